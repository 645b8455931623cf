"""A plan from end to end: lengths and profile in; the cheapest mix, tried in a replay, and what would change it out."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxstack.fleet.allocation.baselines import Baseline, best_single_type, cheapest_per_size, whole_slices
from jaxstack.fleet.allocation.problem import AllocationProblem
from jaxstack.fleet.allocation.routing import routing_table
from jaxstack.fleet.allocation.sensitivity import PriceFlip, costs_by_rate, price_flips
from jaxstack.fleet.allocation.solving import solve
from jaxstack.fleet.allocation.workload import Workload, read_lengths
from jaxstack.fleet.profile.files import load_profile
from jaxstack.fleet.profile.lengths import PAPER_SIZED_GRID, LengthGrid
from jaxstack.fleet.profile.roofline import DATASHEETS, MODELS, Roofline, throughput_from_datasheet
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective
from jaxstack.fleet.simulator import CheckedPlan, StepTimes, requests_of, solve_and_check
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically
from jaxstack.serving.router.mixed_fleet import Rule


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What is to be planned.

    Args:
      rate_rps: requests a second.
      lengths: a CSV of input and output tokens; None: lognormal lengths of the medians and sigmas given.
      profile: files of measured profiles; none: data sheets of `types` serving `model`.
      caps, prices: "TYPE=NUMBER": replicas that can be had, dollars an hour; for the others as the profile says.
      tpot_s, ttft_s, quantile: the objective.
      bucket_point: with data sheets, buckets are looked at their "upper" corners or at the "mean" of their requests.
      headroom, slice_factor, redundancy: see `AllocationProblem`.
      replay_s: of virtual time that the plan is tried; 0: not at all.
      burstiness: of the arrivals: 1 is Poisson.
      rule: of routing in the replay.
      sensitivity: also look for what would change the answer.
      time_limit_s: for each search.
    """

    rate_rps: float = 8.0
    lengths: str | None = None
    input_median: float = 45.0
    input_sigma: float = 1.25
    output_median: float = 150.0
    output_sigma: float = 0.95
    profile: tuple[str, ...] = ()
    types: tuple[str, ...] = tuple(DATASHEETS)
    model: str = "llama-2-7b"
    caps: tuple[str, ...] = ()
    prices: tuple[str, ...] = ()
    tpot_s: float = 0.12
    ttft_s: float | None = 2.0
    quantile: float = 0.99
    bucket_point: Literal["mean", "upper"] = "mean"
    headroom: float = 0.15
    slice_factor: int | None = None
    redundancy: int = 0
    replay_s: float = 300.0
    burstiness: float = 1.0
    rule: Rule = "occupancy"
    sensitivity: bool = True
    time_limit_s: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input_median", "output_median", "burstiness", "time_limit_s"):
            _at_least(name, getattr(self, name), 0, open_=True)
        for name in ("input_sigma", "output_sigma", "replay_s"):
            _at_least(name, getattr(self, name), 0)
        if self.profile:
            return
        for name in self.types:
            if name not in DATASHEETS:
                raise UserError(f"types: found {name!r}, expected some of {', '.join(DATASHEETS)}")
        if self.model not in MODELS:
            raise UserError(f"model: found {self.model!r}, expected one of {', '.join(MODELS)}")


@dataclasses.dataclass(frozen=True, eq=False)
class PlanOutcome:
    """What was found.

    Args:
      baselines: other ways to choose.
      by_rate: multiple of the rate -> dollars an hour and counts; None where there is no plan.
      flips: prices at which other types are rented.
    """

    checked: CheckedPlan
    baselines: tuple[Baseline, ...]
    by_rate: Mapping[float, tuple[float, Mapping[str, int]] | None]
    flips: tuple[PriceFlip, ...]


def lengths_of(config: PlanConfig, grid: LengthGrid) -> tuple[list[int], list[int]]:
    """Of the requests that are planned for. Raises UserError beyond the grid's last edges."""
    if config.lengths is not None:
        return read_lengths(config.lengths)
    draw = np.random.default_rng(config.seed)
    columns = []
    for which, edges in (("input", grid.input_edges_tokens), ("output", grid.output_edges_tokens)):
        median, sigma = getattr(config, f"{which}_median"), getattr(config, f"{which}_sigma")
        made = np.round(draw.lognormal(math.log(median), sigma, 20_000))
        columns.append(np.clip(made, 1, edges[-1]).astype(int).tolist())
    return columns[0], columns[1]


def problem_of(config: PlanConfig) -> tuple[AllocationProblem, Mapping[str, StepTimes], tuple[list[int], list[int]]]:
    """The problem, the step times of its types, and the lengths that it is made of."""
    objective = LatencyObjective(config.tpot_s, config.ttft_s, config.quantile)
    if config.profile:
        profile, types = load_profile(*config.profile)
        lengths = lengths_of(config, profile.grid)
        workload = Workload.from_lengths(profile.grid, *lengths, config.rate_rps)
        times = {}
        if profile.concurrency is not None:
            able = [name for name in profile.names if profile.max_rate_rps[name].max() > 0]
            times = {name: StepTimes.fit(profile, name) for name in able}
    else:
        sheets = [DATASHEETS[name] for name in config.types]
        model, grid = MODELS[config.model], PAPER_SIZED_GRID
        lengths = lengths_of(config, grid)
        workload = Workload.from_lengths(grid, *lengths, config.rate_rps)
        # The prompt's own time is in the profile; what queueing adds to it, the replay sees.
        profile = throughput_from_datasheet(sheets, model, grid, objective, workload.points(config.bucket_point))
        types = tuple(sheet.accelerator() for sheet in sheets)
        times = {sheet.name: StepTimes.of_roofline(Roofline(sheet.device, model)) for sheet in sheets}
    caps, prices = _numbers("caps", config.caps, types), _numbers("prices", config.prices, types)
    types = tuple(
        dataclasses.replace(
            kind,
            max_count=int(caps[kind.name]) if kind.name in caps else kind.max_count,
            price_usd_per_hour=prices.get(kind.name, kind.price_usd_per_hour),
        )
        for kind in types
    )
    problem = AllocationProblem(
        workload,
        types,
        profile,
        headroom=config.headroom,
        slice_factor=config.slice_factor,
        redundancy=config.redundancy,
    )
    return problem, times, lengths


def run_plan(config: PlanConfig, say: Callable[[str], None] = lambda line: None) -> PlanOutcome:
    """Plans, tries, and looks around.

    Args:
      say: told how far it is.
    """
    problem, times, lengths = problem_of(config)
    if config.replay_s > 0 and times and config.rate_rps > 0:
        checked = solve_and_check(
            problem,
            times,
            lambda: requests_of(
                lengths, config.rate_rps, config.replay_s, seed=config.seed, burstiness=config.burstiness
            ),
            warmup_s=config.replay_s / 6,
            rule=config.rule,
            time_limit_s=config.time_limit_s,
            say=say,
            seed=config.seed,
        )
    else:
        plan = solve(problem, time_limit_s=config.time_limit_s)
        cost = plan.cost_usd_per_hour if plan.found else None
        path = {"headroom": problem.headroom, "cost_usd_per_hour": cost, "attainment": None}
        checked = CheckedPlan(plan, problem, None, (path,))
    problem = checked.problem
    if not checked.allocation.found:
        return PlanOutcome(checked, (), {}, ())
    say("comparing with single types and other ways to choose")
    baselines = (best_single_type(problem), cheapest_per_size(problem), whole_slices(problem))
    by_rate: dict[float, tuple[float, Mapping[str, int]] | None] = {}
    flips: tuple[PriceFlip, ...] = ()
    if config.sensitivity and problem.workload.rate_rps > 0:
        say("looking for what would change the answer")
        for factor, plan in costs_by_rate(problem, time_limit_s=config.time_limit_s).items():
            by_rate[factor] = (plan.cost_usd_per_hour, plan.counts) if plan.found else None
        flips = tuple(price_flips(problem, time_limit_s=config.time_limit_s))
    return PlanOutcome(checked, baselines, by_rate, flips)


def as_json(outcome: PlanOutcome) -> dict[str, Any]:
    """All of it, JSON-ready."""
    report = outcome.checked.report
    return {
        "allocation": outcome.checked.allocation.as_json(),
        "types": list(outcome.checked.problem.names),
        "headroom": outcome.checked.problem.headroom,
        "path": [dict(step) for step in outcome.checked.path],
        "replay": report and report.as_json(),
        "baselines": [dataclasses.asdict(baseline) for baseline in outcome.baselines],
        "by_rate": {f"{factor:g}": found for factor, found in outcome.by_rate.items()},
        "price_flips": [dataclasses.asdict(flip) for flip in outcome.flips],
    }


def write_routing(path: Path, outcome: PlanOutcome) -> None:
    """The router's tables, for `launch.route --routing_table`."""
    table = routing_table(outcome.checked.allocation, outcome.checked.problem)
    write_atomically(path, json.dumps(table.as_json()) + "\n")


def _numbers(field: str, given: tuple[str, ...], types: tuple[AcceleratorType, ...]) -> dict[str, float]:
    names = [kind.name for kind in types]
    found: dict[str, float] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if name not in names or not equals:
            raise UserError(f"{field}: found {text!r}, expected TYPE=NUMBER with one of {', '.join(names)}")
        try:
            found[name] = float(number)
            whole = field != "caps" or found[name].is_integer()
        except (ValueError, OverflowError):
            whole = False
        if not whole or not found[name] >= 0 or not math.isfinite(found[name]):
            what = "a whole number" if field == "caps" else "a number"
            raise UserError(f"{field}: found {text!r}, expected {what} >= 0 after the '='")
    return found


def _at_least(name: str, value: float, least: float, *, open_: bool = False) -> None:
    if not (math.isfinite(value) and (value > least if open_ else value >= least)):
        raise UserError(f"{name}: found {value}, expected a number {'>' if open_ else '>='} {least:g}")
