"""Types, spot or on-demand, and zones planned at once, beside planning one after the other; on days not planned from.

The four types of Melange's study, each with a market of its own: the zones of one of the made-up sets, at spot prices
that are made up too, from the cheapest zone to the dearest within what clouds ask (17 to 55 % of on-demand).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxstack.fleet.allocation import Allocation, AllocationProblem, solve
from jaxstack.fleet.joint import JointPlan, Option, options_for, solve_jointly
from jaxstack.fleet.joint_replay import replay_markets, replay_requests
from jaxstack.fleet.simulator import requests_of
from jaxstack.fleet.spot.evaluation import random_window
from jaxstack.fleet.spot.simulator import ReadySpan
from jaxstack.fleet.spot.synthetic import PROFILES, generate
from jaxstack.fleet.spot.traces import SpotTrace, region_of
from jaxstack.fleet.spot.view import ZonePrice
from launch.melange_study.workloads import lengths_of, problem_of, step_times

MARKETS: Mapping[str, tuple[str, float, float]] = {
    "L4": ("gcp1", 0.30, 0.45),
    "A10G": ("aws1", 0.17, 0.42),
    "A100-80GB": ("aws2", 0.35, 0.50),
    "H100": ("aws3", 0.40, 0.55),
}
"""Type -> the set its zones are from, and the cheapest and the dearest spot price over on-demand."""
HISTORY_SEED = 1000
PLANS = ("on_demand", "one_type", "after", "joint")


@dataclasses.dataclass(frozen=True)
class JointSettings:
    """What is planned for.

    Args:
      workload, rate_rps, tpot_s: of Melange's study.
      availability: share of time in which the whole plan should be ready.
      others: further ones, for how cost rises with them.
      history: windows that are planned from.
      max_replicas: of a type.
      windows, hours: that it is tried on.
      request_s: of one window, whose requests are sent through step by step.
    """

    workload: str = "mixed"
    rate_rps: float = 8.0
    tpot_s: float = 0.12
    availability: float = 0.98
    others: tuple[float, ...] = (0.95, 0.99, 0.995, 1.0)
    history: int = 30
    max_replicas: int = 6
    windows: int = 60
    hours: float = 24.0
    request_s: float = 1800.0


def market(kind: str, price_usd_per_hour: float, seed: int, hours: float) -> SpotTrace:
    """A window of a type's market. Windows of different types with the same seed are taken as of the same time."""
    name, low, high = MARKETS[kind]
    trace = random_window(generate(PROFILES[name], seed), hours * 3600, seed)
    shares = np.linspace(low, high, len(trace.zones)).tolist()
    prices = {
        zone: ZonePrice(price_usd_per_hour * share, price_usd_per_hour, region_of(zone))
        for zone, share in zip(trace.zones, shares)
    }
    return dataclasses.replace(trace, prices=prices, name=kind)


def markets(problem: AllocationProblem, seed: int, hours: float) -> dict[str, SpotTrace]:
    return {each.name: market(each.name, each.price_usd_per_hour, seed, hours) for each in problem.types}


def history_of(problem: AllocationProblem, settings: JointSettings) -> dict[str, SpotTrace]:
    """Days of many made-up traces one after the other: durations are heavy-tailed, and a month of one trace may be far
    from what its statistics are.
    """
    windows = [markets(problem, seed, settings.hours) for seed in range(HISTORY_SEED, HISTORY_SEED + settings.history)]
    return {
        kind: dataclasses.replace(
            first, capacity=np.concatenate([window[kind].capacity for window in windows], axis=1)
        )
        for kind, first in windows[0].items()
    }  # fmt: skip


def compare(settings: JointSettings) -> dict[str, Any]:
    """Plan -> what it promises and what came of it. JSON-ready."""
    problem = problem_of(settings.workload, settings.rate_rps, settings.tpot_s, point="mean")
    options = options_for(
        problem, history_of(problem, settings), extras=(0, 1), max_replicas=settings.max_replicas, tick_s=120.0
    )
    mixed = solve(problem)
    plans = plans_of(problem, options, mixed, settings.availability)
    days = [markets(problem, seed, settings.hours) for seed in range(settings.windows)]
    rows = {name: _row(plan, problem, days) for name, plan in plans.items()}
    for name in ("on_demand", "joint"):
        if plans[name].found:
            rows[name]["requests"] = _requests(plans[name], problem, days, settings)
    curve = {f"{a:g}": _row(solve_jointly(problem, options, availability=a), problem, days) for a in settings.others}
    curve[f"{settings.availability:g}"] = rows["joint"]
    return {"settings": dataclasses.asdict(settings), "options": len(options), "plans": rows, "curve": curve}


def plans_of(
    problem: AllocationProblem, options: Sequence[Option], mixed: Allocation, availability: float
) -> dict[str, JointPlan]:
    """On-demand alone; the best of one type alone; that mix moved to spot; and all at once."""
    plans = {
        "on_demand": solve_jointly(problem, [o for o in options if not o.zones], availability=availability),
        "after": solve_jointly(
            problem, [o for o in options if mixed.counts.get(o.kind) == o.replicas], availability=availability
        ),
        "joint": solve_jointly(problem, options, availability=availability),
    }
    alone = [
        solve_jointly(problem, [o for o in options if o.kind == name], availability=availability)
        for name in problem.names
    ]
    plans["one_type"] = min(alone, key=lambda plan: plan.cost_usd_per_hour)
    return {name: plans[name] for name in PLANS}


def _row(plan: JointPlan, problem: AllocationProblem, days: Sequence[Mapping[str, SpotTrace]]) -> dict[str, Any]:
    if not plan.found:
        return {"status": plan.status}
    tried = [replay_markets(plan, problem, day) for day in days]
    return {
        "status": plan.status,
        "options": [dataclasses.asdict(option) for option in plan.options],
        "planned_usd_per_hour": plan.cost_usd_per_hour,
        "lower_bound_usd_per_hour": plan.lower_bound_usd_per_hour,
        "planned_whole": 1 - plan.unready,
        "solve_time_s": plan.solve_time_s,
        "usd_per_hour": float(np.mean([each.cost_usd_per_hour for each in tried])),
        "whole": float(np.mean([each.whole for each in tried])),
        "carried": float(np.mean([each.carried for each in tried])),
    }


def _requests(
    plan: JointPlan, problem: AllocationProblem, days: Sequence[Mapping[str, SpotTrace]], settings: JointSettings
) -> dict[str, Any]:
    """The stretch of the first days in which most replicas were lost, request by request."""
    length_s = min(settings.request_s, settings.hours * 3600 / 2)
    spans, start_s = max(
        (_hardest(replay_markets(plan, problem, day).spans, length_s, settings.hours * 3600) for day in days[:3]),
        key=lambda found: _lost(found[0], found[1], found[1] + length_s),
    )
    cut = {kind: _cut(of_kind, start_s, start_s + length_s) for kind, of_kind in spans.items()}
    requests = requests_of(lengths_of(settings.workload), settings.rate_rps, length_s, seed=0)
    report, interrupted = replay_requests(plan, problem, cut, step_times(), requests)
    return {
        "requests": report.requests,
        "refused": report.refused,
        "interrupted": interrupted,
        "preemptions": _lost(spans, start_s, start_s + length_s),
        "tpot_attainment": report.tpot_attainment,
        "ttft_s": [None if math.isnan(value) else value for value in report.ttft_s],
    }


def _lost(spans: Mapping[str, Sequence[ReadySpan]], start_s: float, end_s: float) -> int:
    every = [span for of_kind in spans.values() for span in of_kind]
    return sum(span.end == "preempted" and start_s < span.end_s <= end_s for span in every)


def _hardest(
    spans: Mapping[str, Sequence[ReadySpan]], length_s: float, whole_s: float
) -> tuple[Mapping[str, Sequence[ReadySpan]], float]:
    """The spans, and where the stretch with most replicas lost begins."""
    starts = np.arange(600.0, whole_s - length_s, length_s / 2).tolist() or [0.0]
    return spans, max(starts, key=lambda start_s: _lost(spans, start_s, start_s + length_s))


def _cut(spans: Sequence[ReadySpan], start_s: float, end_s: float) -> list[ReadySpan]:
    """The spans of a stretch, on its own clock; what goes on beyond it is open."""
    kept = [span for span in spans if span.end_s > start_s and span.start_s < end_s]
    return [
        ReadySpan(
            max(0.0, span.start_s - start_s),
            min(span.end_s, end_s) - start_s,
            span.end if span.end_s <= end_s else "open",
            span.kind,
        )
        for span in kept
    ]
