"""Traces made up from statistics: alternating renewal processes with heavy-tailed durations, and outages of regions.

A zone is up while its own process is up and its region's is; while it is up, full spells take turns with spells of
fewer instances. `PROFILES` have the shares of time up, durations and correlations of four published traces.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from jaxstack.fleet.spot.traces import UNLIMITED, SpotTrace
from jaxstack.runtime.errors import UserError

SIGMA = 1.5
"""Of the logarithms of durations: the mean is about three times the median."""
PARTIAL_MEAN_H = 0.7
BURN_IN_SAMPLES = 2000
LEVEL_SAMPLES = 6


@dataclass(frozen=True)
class ZoneProfile:
    """A zone.

    Args:
      name: of the zone.
      up: share of time with any capacity, the region's outages included.
      down_h: mean hours that the zone's own process is down.
      capacity: instances in a full spell.
      full: share of the time up that is full.
      region: the outages that it shares, a key of `TraceProfile.outages`; "" for none.
    """

    name: str
    up: float
    down_h: float = 1.0
    capacity: int = UNLIMITED
    full: float = 1.0
    region: str = ""


@dataclass(frozen=True)
class TraceProfile:
    """Zones, the outages of regions (share of time down, mean hours down), days and the gap between samples."""

    name: str
    zones: tuple[ZoneProfile, ...]
    outages: Mapping[str, tuple[float, float]]
    days: float
    gap_s: float = 300.0

    def __post_init__(self) -> None:
        for zone in self.zones:
            if not (0 <= zone.up <= 1 and 0 < zone.full <= 1 and zone.down_h > 0 and zone.capacity >= 1):
                raise UserError(f"{self.name}: zone {zone.name}: found {zone}, expected shares and positive numbers")
            if zone.region and zone.region not in self.outages:
                raise UserError(f"{self.name}: zone {zone.name}: found no outages of region {zone.region!r}")

    def correlation(self, first: ZoneProfile, second: ZoneProfile) -> float:
        """Of two zones' being up, as the outages that they share make it."""
        if not first.region or first.region != second.region:
            return 0.0
        f = self.outages[first.region][0]
        odds = first.up * second.up / ((1 - first.up) * (1 - second.up))
        return f / (1 - f) * math.sqrt(odds)


def generate(profile: TraceProfile, seed: int, *, days: float | None = None) -> SpotTrace:
    """A trace of the profile's statistics, the same for the same seed.

    Raises:
      UserError: no time at all.
    """
    samples = round((days or profile.days) * 86400 / profile.gap_s)
    if samples < 1:
        raise UserError(f"{profile.name}: found {days} days, expected at least one sample of {profile.gap_s} s")
    total = samples + BURN_IN_SAMPLES
    regions: dict[str, Bool[np.ndarray, " samples"]] = {}
    for index, (region, (down, down_h)) in enumerate(profile.outages.items()):
        rng = np.random.default_rng([seed, index, 1])
        up_h = down_h * (1 - down) / down
        regions[region] = _alternating(rng, up_h, down_h, total, profile.gap_s)
    rows = []
    for index, zone in enumerate(profile.zones):
        rng = np.random.default_rng([seed, index, 0])
        down = profile.outages[zone.region][0] if zone.region else 0.0
        own = min(1.0, zone.up / (1 - down))
        if own in (0.0, 1.0):
            up = np.full(total, own == 1.0)
        else:
            up = _alternating(rng, zone.down_h * own / (1 - own), zone.down_h, total, profile.gap_s)
        if zone.region:
            up = up & regions[zone.region]
        rows.append(np.where(up, _levels(rng, zone, total, profile.gap_s), 0)[BURN_IN_SAMPLES:])
    names = tuple(zone.name for zone in profile.zones)
    return SpotTrace(names, profile.gap_s, np.stack(rows), name=f"{profile.name}-{seed}")


def _alternating(
    rng: np.random.Generator, up_h: float, down_h: float, samples: int, gap_s: float
) -> Bool[np.ndarray, " samples"]:
    """Up or down at each sample: lognormal durations of the given means, at least a sample each."""
    state = np.empty(samples, bool)
    up = bool(rng.random() < up_h / (up_h + down_h))
    place = 0
    while place < samples:
        mean = (up_h if up else down_h) * 3600 / gap_s
        spell = max(1, round(rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA)))
        state[place : place + spell] = up
        place += spell
        up = not up
    return state


def _levels(rng: np.random.Generator, zone: ZoneProfile, samples: int, gap_s: float) -> Int[np.ndarray, " samples"]:
    """How many instances there are while the zone is up."""
    if zone.full == 1.0 or zone.capacity == 1:
        return np.full(samples, zone.capacity)
    full_h = PARTIAL_MEAN_H * zone.full / (1 - zone.full)
    full = _alternating(rng, full_h, PARTIAL_MEAN_H, samples, gap_s)
    partial = np.repeat(rng.integers(1, zone.capacity, size=samples // LEVEL_SAMPLES + 1), LEVEL_SAMPLES)[:samples]
    return np.where(full, zone.capacity, partial)


def _zones(region: str, *zones: tuple[str, float, float], capacity: int = UNLIMITED) -> tuple[ZoneProfile, ...]:
    return tuple(ZoneProfile(name, up, down_h, capacity, region=region) for name, up, down_h in zones)


PROFILES: Mapping[str, TraceProfile] = {
    "aws1": TraceProfile(
        "aws1",
        (
            ZoneProfile("us-east-1f", 0.40, 2.5, 4, 0.82, "east"),
            ZoneProfile("us-east-2a", 0.625, 2.0, 4, 0.95, "east"),
            ZoneProfile("us-west-2c", 0.79, 0.92, 4, 0.92),
        ),
        {"east": (0.339, 5.0)},
        33,
    ),
    "aws2": TraceProfile(
        "aws2",
        (
            ZoneProfile("us-east-2b", 0.628, 2.0, 16, 0.94),
            ZoneProfile("us-west-2a", 0.59, 1.0, 16, 0.98, "west"),
            ZoneProfile("us-west-2c", 0.59, 1.0, 16, 0.98, "west"),
        ),
        {"west": (0.32, 1.5)},
        34,
    ),
    "aws3": TraceProfile(
        "aws3",
        (
            *_zones("east1", ("us-east-1a", 0.167, 6.0), ("us-east-1c", 0.467, 2.0), ("us-east-1d", 0.447, 2.5)),
            *_zones("east1", ("us-east-1f", 0.591, 1.5)),
            *_zones("east2", ("us-east-2a", 0.759, 2.0), ("us-east-2b", 0.682, 2.5)),
            *_zones("west2", ("us-west-2a", 0.883, 1.2), ("us-west-2b", 0.905, 1.6), ("us-west-2c", 0.891, 1.3)),
        ),
        {"east1": (0.32, 3.0), "east2": (0.185, 3.0), "west2": (0.051, 1.3)},
        70,
    ),
    "gcp1": TraceProfile(
        "gcp1",
        (
            ZoneProfile("asia-northeast1-a", 0.958, 1.3, 1),
            ZoneProfile("europe-west4-a", 1.0, 1.0, 4, 0.955),
            ZoneProfile("us-central1-a", 0.856, 0.92, 4, 0.25),
            ZoneProfile("us-central1-b", 0.956, 0.71, 4, 0.33),
            ZoneProfile("us-east1-b", 0.0),
            ZoneProfile("us-west1-b", 0.479, 2.4, 3, 0.3),
        ),
        {},
        6,
        150.0,
    ),
}
"""The four sets of the paper by name."""
