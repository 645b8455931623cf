"""What mixes cost: the printed example, the best type by request size, and cost against rate beside single types."""

from typing import Any

import numpy as np

from jaxstack.fleet.allocation import AllocationProblem, Workload, solve
from jaxstack.fleet.profile import (
    AcceleratorType,
    LatencyObjective,
    LengthGrid,
    ThroughputProfile,
    throughput_from_datasheet,
)
from jaxstack.fleet.profile.lengths import PAPER_SIZED_GRID
from launch.melange_study.workloads import MODEL, SHEETS, StudyConfig, problem_of


def example_problem(slice_factor: int | None) -> AllocationProblem:
    """The example of the authors' repository: two types, four sizes, 30 requests a second."""
    grid = LengthGrid((1, 2), (1, 2))
    tables = {"A10G": [[2, 1], [5, 2]], "A100-80GB": [[20, 20], [40, 20]]}
    types = (AcceleratorType("A10G", 1.01), AcceleratorType("A100-80GB", 3.67))
    profile = ThroughputProfile(grid, tables, LatencyObjective(0.12))  # type: ignore[arg-type]
    workload = Workload(grid, 30.0, np.array([[0.2, 0.1], [0.5, 0.2]]))
    return AllocationProblem(workload, types, profile, headroom=0.0, slice_factor=slice_factor)


def example() -> dict[str, Any]:
    """Costs by slice factor."""
    found = {}
    for slices in (1, 2, 3, 4, 8, 16, None):
        plan = solve(example_problem(slices))
        found[str(slices)] = {
            "cost": round(plan.cost_usd_per_hour, 2),
            "counts": dict(plan.counts),
            "status": plan.status,
            "fractional_bound": plan.fractional_bound_usd_per_hour,
        }
    return found


def best_types(tpot_s: float) -> dict[str, Any]:
    """Of every size: tokens for a dollar of each type (figure 1 of the report)."""
    profile = throughput_from_datasheet(SHEETS, MODEL, PAPER_SIZED_GRID, LatencyObjective(tpot_s))
    inputs, outputs = PAPER_SIZED_GRID.upper_corners()
    value = {
        sheet.name: (3600 * profile.max_rate_rps[sheet.name] * (inputs + outputs) / sheet.price_usd_per_hour).tolist()
        for sheet in SHEETS
    }
    return {"tokens_per_usd": value, "max_rate_rps": {n: t.tolist() for n, t in profile.max_rate_rps.items()}}


def cost_curve(study: StudyConfig, workload: str, tpot_s: float) -> dict[str, Any]:
    """The mix and each type alone, at every rate; costs in dollars an hour, None where a type cannot serve."""
    rows = []
    for rate in study.rates_rps:
        plan = solve(problem_of(workload, rate, tpot_s, headroom=study.headroom))
        alone = {n: c for n, c in plan.single_type_cost_usd_per_hour.items() if c is not None}
        savings = {name: 1 - plan.cost_usd_per_hour / cost for name, cost in alone.items()}
        rows.append(
            {
                "rate_rps": rate,
                "status": plan.status,
                "cost": plan.cost_usd_per_hour,
                "counts": dict(plan.counts),
                "alone": dict(plan.single_type_cost_usd_per_hour),
                "saving_over_worst": max(savings.values(), default=None),
                "saving_over_best": min(savings.values(), default=None),
                "bound": plan.lower_bound_usd_per_hour,
                "fractional_bound": plan.fractional_bound_usd_per_hour,
                "solve_s": plan.solve_time_s,
            }
        )
    return {"rows": rows}
