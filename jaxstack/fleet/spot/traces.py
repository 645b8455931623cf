"""What zones had to give over time: how many spot instances could be had at each moment.

On disk a trace is a folder with one JSON file a zone, `ZONE_GPU_COUNT.json`:

    {"metadata": {"gap_seconds": 300}, "data": [4, 4, 3, 0]}
"""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxstack.fleet.spot.view import ZonePrice
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically

UNLIMITED = 10**6
"""The capacity of a zone that is only known to have some."""


@dataclass(frozen=True)
class SpotTrace:
    """Capacity of zones over time.

    Args:
      zones: their names.
      gap_s: seconds between samples; a sample holds until the next.
      capacity: spot instances that can be had.
      prices: zone -> price; by default a spot instance costs 1 and an on-demand one 3.
      name: for tables and messages.
    """

    zones: tuple[str, ...]
    gap_s: float
    capacity: Int[np.ndarray, "zones samples"]
    prices: Mapping[str, ZonePrice] | None = None
    name: str = "trace"

    def __post_init__(self) -> None:
        shape = self.capacity.shape
        if len(shape) != 2 or shape[0] != len(self.zones) or 0 in shape:
            raise UserError(f"{self.name}: found capacities of shape {shape} for {len(self.zones)} zones")
        if not self.gap_s > 0:
            raise UserError(f"{self.name}: found a gap of {self.gap_s} s between samples, expected a number > 0")
        if self.capacity.min() < 0:
            raise UserError(f"{self.name}: found a capacity of {self.capacity.min()}, expected integers >= 0")
        prices = flat_prices(self.zones) if self.prices is None else self.prices
        for zone in self.zones:
            if zone not in prices:
                raise UserError(f"{self.name}: found no price for zone {zone!r}, expected one for each zone")
        object.__setattr__(self, "prices", {zone: prices[zone] for zone in self.zones})

    @property
    def duration_s(self) -> float:
        return self.capacity.shape[1] * self.gap_s

    @property
    def zone_prices(self) -> Mapping[str, ZonePrice]:
        assert self.prices is not None
        return self.prices

    def window(self, start_s: float, duration_s: float) -> "SpotTrace":
        """The samples of a while.

        Raises:
          UserError: it is not all inside the trace.
        """
        first, count = round(start_s / self.gap_s), round(duration_s / self.gap_s)
        if first < 0 or count < 1 or first + count > self.capacity.shape[1]:
            raise UserError(
                f"{self.name}: a window of {duration_s / 3600:.2f} h from hour {start_s / 3600:.2f} on; expected one "
                f"inside the {self.duration_s / 3600:.2f} h that the trace has"
            )
        return replace(self, capacity=self.capacity[:, first : first + count])

    def ticks(self, tick_s: float) -> Int[np.ndarray, "zones ticks"]:
        """Capacity at multiples of `tick_s`, each the sample that holds then."""
        count = int(self.duration_s / tick_s + 1e-9)
        places = np.floor(np.arange(count) * tick_s / self.gap_s + 1e-9).astype(np.int64)
        return self.capacity[:, places]

    def only(self, zones: Sequence[str]) -> "SpotTrace":
        """The trace of some of its zones."""
        rows = [self.zones.index(zone) for zone in zones]
        prices = {zone: self.zone_prices[zone] for zone in zones}
        return replace(self, zones=tuple(zones), capacity=self.capacity[rows], prices=prices)


def flat_prices(zones: Sequence[str], price_ratio: float = 3.0) -> dict[str, ZonePrice]:
    """Spot at 1 in every zone and on-demand at `price_ratio`, the unit of the paper's simulation."""
    return {zone: ZonePrice(1.0, price_ratio, region_of(zone)) for zone in zones}


def region_of(zone: str) -> str:
    """The region of a zone, by the names of the two large clouds: us-east-1f and us-central1-a."""
    return re.sub(r"(?<=\d)-?[a-z]$", "", zone)


def load_trace_dir(folder: str | Path, *, say: Callable[[str], None] = lambda line: None) -> SpotTrace:
    """Reads the files of a folder. Zones sampled at unlike intervals are brought to the greatest common divisor, and
    all are cut to the shortest; `say` is told so. A zone that has only ever 0 or 1 in a folder where all zones do is
    read as unlimited where it has 1.

    Raises:
      UserError: no files, or one that is not a trace; the message names the file.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{folder}: found no *.json, expected a folder with one trace file a zone")
    gaps, rows = zip(*[_read(file) for file in files])
    gap_s = functools.reduce(math.gcd, gaps)
    if len(set(gaps)) > 1:
        say(f"{folder}: zones are sampled every {', '.join(map(str, sorted(set(gaps))))} s; read every {gap_s} s")
    rows = tuple(np.repeat(row, gap // gap_s) for gap, row in zip(gaps, rows))
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        hours = [length * gap_s / 3600 for length in (lengths[0], lengths[-1])]
        say(f"{folder}: zones have {hours[0]:.1f} to {hours[1]:.1f} h; cut to the shortest")
    capacity = np.stack([row[: lengths[0]] for row in rows])
    if capacity.max() <= 1:
        capacity = capacity * UNLIMITED
    stems = [file.stem for file in files]
    short = [stem.split("_")[0] for stem in stems]
    zones = short if len(set(short)) == len(short) else stems
    return SpotTrace(tuple(zones), float(gap_s), capacity, name=folder.name)


def _read(file: Path) -> tuple[int, Int[np.ndarray, " samples"]]:
    try:
        content: Any = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{file}: found no JSON ({error}), expected a trace file") from error
    metadata = content.get("metadata") if isinstance(content, dict) else None
    gap: Any = metadata.get("gap_seconds") if isinstance(metadata, dict) else None
    if not _whole(gap) or gap < 1:
        raise UserError(f"{file}: found metadata.gap_seconds {gap!r}, expected a whole number of seconds >= 1")
    data = content.get("data")
    if not isinstance(data, list) or not data:
        raise UserError(f"{file}: found no samples in 'data', expected a list of integers")
    for place, value in enumerate(data):
        if not _whole(value) or value < 0:
            raise UserError(f"{file}: found {value!r} as sample {place}, expected an integer >= 0")
    return int(gap), np.array(data, np.int64)


def _whole(value: Any) -> bool:
    """Whether it is a number of JSON without a fraction; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value % 1 == 0


def save_trace_dir(trace: SpotTrace, folder: str | Path, *, suffix: str = "gpu_1") -> None:
    """Writes a trace as `load_trace_dir` reads it. The gap must be whole seconds."""
    if trace.gap_s % 1:
        raise UserError(f"{trace.name}: found a gap of {trace.gap_s} s, expected whole seconds to save it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for zone, row in zip(trace.zones, trace.capacity):
        content = {"metadata": {"gap_seconds": int(trace.gap_s)}, "data": row.tolist()}
        write_atomically(folder / f"{zone}_{suffix}.json", json.dumps(content) + "\n")
