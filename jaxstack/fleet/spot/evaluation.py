"""Policies over many windows of traces: availability, cost, latency, and the distance from the least possible cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxstack.fleet.spot.latency import OnPreempted, exponential_services, poisson_arrivals, replay
from jaxstack.fleet.spot.mixture import DynamicFallback
from jaxstack.fleet.spot.omniscient import solve_omniscient
from jaxstack.fleet.spot.policy import (
    EvenSpread,
    FixedTarget,
    OnDemandOnly,
    PaperPlacer,
    RoundRobin,
    ServingPolicy,
    SingleRegion,
    SpotOnly,
    StaticMixture,
    ZonePlacer,
    spothedge,
)
from jaxstack.fleet.spot.simulator import COLD_START_S, TICK_S, SimulationResult, simulate
from jaxstack.fleet.spot.synthetic import PROFILES, generate
from jaxstack.fleet.spot.traces import SpotTrace, flat_prices, region_of
from jaxstack.runtime.errors import UserError

WINDOW_S = 24 * 3600.0

MakePolicy = Callable[[SpotTrace, int, int], ServingPolicy]
"""(trace, target, overprovision) -> a fresh policy."""


def _ours(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
    return spothedge(FixedTarget(target), overprovision=extra)


def _paper(forgive_below: Callable[[int], int]) -> MakePolicy:
    def make(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
        placer = PaperPlacer(forgive_below(len(trace.zones)))
        return ServingPolicy(FixedTarget(target), DynamicFallback(extra), placer)

    return make


def _even_spread(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
    return ServingPolicy(FixedTarget(target), SpotOnly(extra), EvenSpread(target + extra))


def _round_robin(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
    return ServingPolicy(FixedTarget(target), SpotOnly(extra), RoundRobin())


def _home_region(trace: SpotTrace, target: int) -> SingleRegion:
    """The region that turns out to have had the most room for the target: the best that one region could do."""
    up: dict[str, float] = {}
    for region in sorted({region_of(zone) for zone in trace.zones}):
        rows = [place for place, zone in enumerate(trace.zones) if region_of(zone) == region]
        up[region] = float(np.mean(np.minimum(trace.capacity[rows].sum(0), target)))
    home = max(up, key=lambda region: up[region])
    return SingleRegion(RoundRobin(), lambda zone: region_of(zone) == home)


def _spot_pool(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
    return ServingPolicy(FixedTarget(target), SpotOnly(extra), _home_region(trace, target))


def _scaling_group(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
    return ServingPolicy(FixedTarget(target), StaticMixture(0.1, extra), _home_region(trace, target))


def _on_demand(trace: SpotTrace, target: int, extra: int) -> ServingPolicy:
    return ServingPolicy(FixedTarget(target), OnDemandOnly(), ZonePlacer())


POLICIES: Mapping[str, MakePolicy] = {
    "ours": _ours,
    "paper": _paper(lambda zones: 2),
    "artifact": _paper(lambda zones: min(1, zones - 3) + 1),
    "round_robin": _round_robin,
    "even_spread": _even_spread,
    "spot_pool": _spot_pool,
    "scaling_group": _scaling_group,
    "on_demand": _on_demand,
}
"""By name: SpotHedge with our placer, with the paper's and with the variant of its published simulator, round robin
and even spread over all zones without on-demand, a pool of spot instances in one region (in hindsight the best), the
same with 10 % on-demand, and on-demand alone."""


def risk_window(window_s: float) -> MakePolicy:
    """SpotHedge with our placer and a risk window."""
    return lambda trace, target, extra: spothedge(
        FixedTarget(target), overprovision=extra, risk_window_s=window_s or None
    )


@dataclass(frozen=True)
class Scenario:
    """What a policy is run on.

    Args:
      target: N_tar, replicas that should be ready.
      overprovision: N_extra.
      price_ratio: on-demand over spot.
    """

    target: int = 3
    overprovision: int = 1
    cold_start_s: float = COLD_START_S
    tick_s: float = TICK_S
    price_ratio: float = 3.0

    def __post_init__(self) -> None:
        if not (self.target >= 1 and self.overprovision >= 0 and self.cold_start_s > 0 and self.tick_s > 0):
            raise UserError(f"scenario: found {self}, expected a target >= 1, overprovision >= 0, times > 0")
        if not self.price_ratio > 0:
            raise UserError(f"price_ratio: found {self.price_ratio}, expected a number > 0")


@dataclass(frozen=True)
class Load:
    """Requests: Poisson arrivals, exponential service times, and a client that leaves at the timeout."""

    rate_rps: float = 0.15
    service_s: float = 10.0
    timeout_s: float = 100.0
    on_preempted: OnPreempted = "restart"


def synthetic_windows(
    profile: str, count: int, *, duration_s: float = WINDOW_S, first_seed: int = 0
) -> list[SpotTrace]:
    """One window from each of `count` traces made up by the profile, at a place drawn with the trace's seed."""
    if profile not in PROFILES:
        raise UserError(f"profile: found {profile!r}, expected one of {', '.join(PROFILES)}")
    return [
        random_window(generate(PROFILES[profile], seed), duration_s, seed)
        for seed in range(first_seed, first_seed + count)
    ]


def random_window(trace: SpotTrace, duration_s: float, seed: int) -> SpotTrace:
    """A window at a random place of a trace."""
    last = math.floor((trace.duration_s - duration_s) / trace.gap_s + 1e-9)
    if last < 0:
        return trace.window(0.0, duration_s)  # which says what is wrong
    place = int(np.random.default_rng([seed, 2]).integers(last + 1))
    return replace(trace.window(place * trace.gap_s, duration_s), name=f"{trace.name}@{place}")


def run_policy(trace: SpotTrace, make: MakePolicy, scenario: Scenario) -> SimulationResult:
    """A fresh policy on a trace."""
    priced = replace(trace, prices=flat_prices(trace.zones, scenario.price_ratio))
    policy = make(priced, scenario.target, scenario.overprovision)
    return simulate(priced, policy, tick_s=scenario.tick_s, cold_start_s=scenario.cold_start_s)


@dataclass
class Scores:
    """A policy's scores, a value a window."""

    availability: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    shortfall: list[float] = field(default_factory=list)
    none_ready: list[float] = field(default_factory=list)
    failures: list[float] = field(default_factory=list)
    preemptions: list[float] = field(default_factory=list)

    def add(self, result: SimulationResult) -> None:
        for name, values in vars(self).items():
            values.append(float(getattr(result, name)))

    def means(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in vars(self).items()}


def evaluate(windows: Sequence[SpotTrace], make: MakePolicy, scenario: Scenario) -> dict[str, Any]:
    """Mean scores over windows, and each window's availability and cost."""
    scores = Scores()
    for trace in windows:
        scores.add(run_policy(trace, make, scenario))
    return {**scores.means(), "windows": {"availability": scores.availability, "cost": scores.cost}}


def latencies(windows: Sequence[SpotTrace], make: MakePolicy, scenario: Scenario, load: Load) -> dict[str, float]:
    """Percentiles over the requests of all windows together, and the share that failed."""
    waited: list[Any] = []
    failed = interrupted = 0
    for seed, trace in enumerate(windows):
        result = run_policy(trace, make, scenario)
        arrivals = poisson_arrivals(load.rate_rps, scenario.cold_start_s, trace.duration_s - load.timeout_s, seed)
        services = exponential_services(len(arrivals), load.service_s, seed)
        report = replay(result.spans, arrivals, services, timeout_s=load.timeout_s, on_preempted=load.on_preempted)
        waited.append(report.latency_s)
        failed += report.failed
        interrupted += report.interrupted
    every = np.concatenate(waited)
    quantiles = {f"p{q:g}".replace(".", "_"): float(np.percentile(every, q)) for q in (50, 90, 99, 99.9)}
    return {**quantiles, "failed_share": failed / max(1, len(every)), "interrupted": float(interrupted)}


def omniscient_costs(windows: Sequence[SpotTrace], scenario: Scenario) -> list[dict[str, Any]]:
    """The least possible cost of each window."""
    rows = []
    for trace in windows:
        priced = replace(trace, prices=flat_prices(trace.zones, scenario.price_ratio))
        found = solve_omniscient(
            priced,
            scenario.target,
            overprovision=scenario.overprovision,
            tick_s=scenario.tick_s,
            cold_start_s=scenario.cold_start_s,
        )
        rows.append(
            {
                "status": found.status, "cost": found.cost, "lower_bound": found.lower_bound,
                "integral": found.integral, "relaxed": found.relaxed, "time_s": found.time_s,
            }
        )  # fmt: skip
    return rows


def starved_zone_trace(duration_s: float = WINDOW_S) -> SpotTrace:
    """One zone with room for 99 beside two that never have any: what starves the paper's placer."""
    samples = round(duration_s / 300)
    capacity = np.zeros((3, samples), np.int64)
    capacity[0] = 99
    return SpotTrace(("live", "dead-1", "dead-2"), 300.0, capacity, name="starved zone")
