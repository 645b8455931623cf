"""What one would do without a search: one type alone, or each size where it is cheapest, rounded up."""

import dataclasses
import math

import numpy as np

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.solving import TOLERANCE, single_type_cost, solve


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another way to choose, and its cost; None where it finds no plan."""

    name: str
    counts: dict[str, int] | None
    cost_usd_per_hour: float | None


def best_single_type(problem: AllocationProblem) -> Baseline:
    """The cheapest type that serves everything alone."""
    costs = {name: cost for name in problem.names if (cost := single_type_cost(problem, name)) is not None}
    if not costs:
        return Baseline("best single type", None, None)
    name = min(costs, key=lambda n: (costs[n], n))
    price = next(t.price_usd_per_hour for t in problem.types if t.name == name)
    count = round(costs[name] / price) if price else math.ceil(problem.demand()[:, problem.names.index(name)].sum())
    return Baseline("best single type", {n: count * (n == name) for n in problem.names}, costs[name])


def cheapest_per_size(problem: AllocationProblem) -> Baseline:
    """Every bucket goes as a whole to the type where it costs least; what each type needs for its own is rounded up.
    Caps are ignored but checked.
    """
    demand = problem.demand()
    if not np.isfinite(demand).any(axis=1).all():
        return Baseline("cheapest per size", None, None)
    chosen = (demand * problem.prices).argmin(axis=1)
    loads = np.bincount(chosen, weights=demand[np.arange(len(demand)), chosen], minlength=len(problem.types))
    counts = np.ceil(loads - TOLERANCE).astype(int) + np.where(loads > 0, problem.redundancy, 0)
    caps = [math.inf if t.max_count is None else t.max_count for t in problem.types]
    if (counts > caps).any():
        return Baseline("cheapest per size", None, None)
    return Baseline("cheapest per size", dict(zip(problem.names, counts.tolist())), float(problem.prices @ counts))


def whole_slices(problem: AllocationProblem, slices: int = 8, *, time_limit_s: float = 10.0) -> Baseline:
    """The paper's plan."""
    sliced = dataclasses.replace(problem, slice_factor=slices, redundancy=0)
    found: Allocation = solve(sliced, time_limit_s=time_limit_s)
    if not found.found:
        return Baseline(f"{slices} slices", None, None)
    return Baseline(f"{slices} slices", dict(found.counts), found.cost_usd_per_hour)
