"""Plans that are replayed: attainment, tighter plans, routing rules, and rates that are off."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from jaxstack.fleet.allocation import AllocationProblem, solve
from jaxstack.fleet.allocation.problem import Allocation
from jaxstack.fleet.simulator import replay, requests_of, solve_and_check
from jaxstack.fleet.simulator.arrivals import Request
from jaxstack.serving.router.mixed_fleet import RULES
from launch.melange_study.workloads import StudyConfig, lengths_of, problem_of, step_times

TTFT_S = 2.0
"""What a tight plan must keep, too: P99."""

TIGHT = (("short", 8.0), ("short", 32.0), ("mixed", 4.0))
"""Workload and rate of the plans that are made tighter."""

ROUTED = (("mixed", 4.0), ("short", 32.0))
"""And of those whose routing is compared."""


def _requests(study: StudyConfig, workload: str, rate: float, seed: int, burstiness: float = 1.0) -> list[Request]:
    return requests_of(lengths_of(workload), rate, study.replay_s, seed=seed, burstiness=burstiness)


def _replayed(
    study: StudyConfig, plan: Allocation, problem: AllocationProblem, requests: list[Request], **options: Any
) -> dict[str, Any]:
    report = replay(plan, problem, step_times(), requests, warmup_s=study.warmup_s, **options)
    return {"cost": plan.cost_usd_per_hour, "counts": dict(plan.counts), **report.as_json()}


def attainment(study: StudyConfig, workload: str, rate: float) -> dict[str, Any]:
    """A plan at upper corners, as the paper makes it, replayed with prompts in chunks and whole."""
    problem = problem_of(workload, rate, 0.12, headroom=study.headroom)
    plan = solve(problem)
    run: Callable[..., dict[str, Any]] = lambda **options: _replayed(  # noqa: E731
        study, plan, problem, _requests(study, workload, rate, 0), **options
    )
    return {"chunked": run(), "whole_prompts": run(chunk_tokens=None)}


def tighter(study: StudyConfig, workload: str, rate: float) -> dict[str, Any]:
    """The same workload planned for at upper corners, at mean lengths, and at mean lengths with the replay's word."""
    found: dict[str, Any] = {}
    for point in ("upper", "mean"):
        problem = problem_of(workload, rate, 0.12, point=point, headroom=study.headroom, ttft_s=TTFT_S)
        plan = solve(problem)
        found[point] = _replayed(study, plan, problem, _requests(study, workload, rate, 0))
    checked = solve_and_check(
        problem_of(workload, rate, 0.12, point="mean", headroom=study.headroom, ttft_s=TTFT_S),
        step_times(),
        lambda: _requests(study, workload, rate, 0),
        warmup_s=study.warmup_s,
    )
    assert checked.report is not None
    found["checked"] = {
        "cost": checked.allocation.cost_usd_per_hour,
        "counts": dict(checked.allocation.counts),
        "path": [dict(step) for step in checked.path],
        **checked.report.as_json(),
    }
    return found


def routing(study: StudyConfig, workload: str, rate: float) -> dict[str, Any]:
    """P99 of the time to the first token by rule and seed, on the plan at mean lengths."""
    problem = problem_of(workload, rate, 0.12, point="mean", headroom=study.headroom)
    plan = solve(problem)
    rules: dict[str, Any] = {}
    for rule in RULES:
        runs = [
            _replayed(study, plan, problem, _requests(study, workload, rate, seed), rule=rule, seed=seed)
            for seed in range(study.seeds)
        ]
        rules[rule] = {
            "ttft_p99_s": [run["ttft_s"][2] for run in runs],
            "median_ttft_p99_s": statistics.median(run["ttft_s"][2] for run in runs),
            "tpot_attainment": min(run["tpot_attainment"] for run in runs),
        }
    return {"counts": dict(plan.counts), "cost": plan.cost_usd_per_hour, "rules": rules}


def robustness(study: StudyConfig, workload: str, rate: float) -> dict[str, Any]:
    """A checked plan when there are more requests than was planned for, or burstier ones; and what each would cost if
    it were planned for.
    """
    problem = problem_of(workload, rate, 0.12, point="mean", headroom=study.headroom, ttft_s=TTFT_S)
    plan = solve(problem)
    rows = []
    for factor, burstiness in ((1.0, 1.0), (1.2, 1.0), (1.5, 1.0), (1.0, 2.0), (1.0, 3.0)):
        requests = _requests(study, workload, rate * factor, 0, burstiness)
        run = _replayed(study, plan, problem, requests)
        more = solve(dataclasses.replace(problem, workload=problem.workload.at_rate(rate * factor)))
        rows.append(
            {
                "rate_factor": factor,
                "burstiness": burstiness,
                "tpot_attainment": run["tpot_attainment"],
                "attainment": run["attainment"],
                "ttft_p99_s": run["ttft_s"][2],
                "cost": plan.cost_usd_per_hour,
                "cost_if_planned": more.cost_usd_per_hour,
            }
        )
    return {"counts": dict(plan.counts), "rows": rows}
