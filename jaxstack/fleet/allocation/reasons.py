"""Why no plan exists, by name: sizes that nobody can serve, caps that are too low, losses that cannot be borne."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.optimize

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem, Infeasibility


def explain(problem: AllocationProblem, solve: Callable[[AllocationProblem], Allocation]) -> Infeasibility:
    """The reasons for which `solve` finds nothing."""
    demand = problem.demand()
    asked = problem.asked()
    columns = problem.workload.grid.shape[1]
    rates = problem.planned_rates_rps.reshape(-1)
    unable = asked[~np.isfinite(demand).any(axis=1)]
    if len(unable):
        unserved = tuple((problem.workload.grid.name(*divmod(int(b), columns)), float(rates[b])) for b in unable)
        names = ", ".join(problem.names)
        reasons = [
            f"no type can serve requests with {bucket} within the objective ({rate:.3g}/s of them); types: {names}"
            for bucket, rate in unserved
        ]
        return Infeasibility(tuple(reasons), unserved)
    if problem.redundancy:
        bare = dataclasses.replace(problem, redundancy=0)
        without = solve(bare)
        if without.found:
            reason = (
                f"with {problem.redundancy} replicas lost, what can be had does not serve everything; without any loss "
                f"it does, for {without.cost_usd_per_hour:.2f} $/h"
            )
            return Infeasibility((reason,), relaxation=_cheapest_cap(problem, solve))
    multiple, saturated = served_multiple(problem)
    if multiple >= 1 and problem.slice_factor is not None:
        reason = (
            f"the caps are enough for shares but not for {problem.slice_factor} whole slices of each bucket: take "
            "slice_factor None, or more slices"
        )
        return Infeasibility((reason,), served_multiple=multiple, saturated=saturated)
    relaxation = _cheapest_cap(problem, solve)
    caps = {t.name: t.max_count for t in problem.types}
    most = ", ".join(f"{name} (at most {caps[name]})" for name in saturated)
    reasons = [f"what can be had serves {multiple:.3g} times the planned rates; it is {most} that runs out"]
    if relaxation is not None:
        name, count, cost = relaxation
        reasons.append(f"with {count} {name} in the place of {caps[name]} it can be done, for {cost:.2f} $/h")
    else:
        reasons.append("no single cap that is raised would do")
    return Infeasibility(tuple(reasons), served_multiple=multiple, saturated=saturated, relaxation=relaxation)


def served_multiple(problem: AllocationProblem) -> tuple[float, tuple[str, ...]]:
    """The greatest multiple of the planned rates that all replicas that can be had serve, and the types that run out
    there; infinite where no cap is in the way.
    """
    demand = problem.demand()
    buckets = len(demand)
    caps = np.array([math.inf if t.max_count is None else t.max_count for t in problem.types])
    bucket, kind = np.nonzero(np.isfinite(demand))
    pairs = len(bucket)
    serve = np.zeros((buckets, pairs + 1))
    serve[bucket, np.arange(pairs)] = 1.0
    serve[:, pairs] = -1.0
    capped = np.flatnonzero(np.isfinite(caps))
    able = np.zeros((len(capped), pairs + 1))
    for row, g in enumerate(capped):
        mine = np.flatnonzero(kind == g)
        able[row, mine] = demand[bucket[mine], g]
    found = scipy.optimize.linprog(
        np.append(np.zeros(pairs), -1.0), A_ub=able, b_ub=caps[capped], A_eq=serve, b_eq=np.zeros(buckets),
        bounds=(0, None), method="highs",
    )  # fmt: skip
    if found.x is None:  # unbounded
        return math.inf, ()
    priced = found.ineqlin.marginals < -1e-12
    return float(found.x[pairs]), tuple(problem.names[g] for g in capped[priced])


def _cheapest_cap(
    problem: AllocationProblem, solve: Callable[[AllocationProblem], Allocation]
) -> tuple[str, int, float] | None:
    """The one cap whose raising makes a plan possible for least."""
    best = None
    for number, kind in enumerate(problem.types):
        if kind.max_count is None:
            continue
        free = dataclasses.replace(kind, max_count=None)
        types = (*problem.types[:number], free, *problem.types[number + 1 :])
        raised = dataclasses.replace(problem, types=types)
        if served_multiple(raised)[0] < 1:
            continue
        plan = solve(raised)
        if plan.found and (best is None or plan.cost_usd_per_hour < best[2]):
            best = (kind.name, plan.counts[kind.name], plan.cost_usd_per_hour)
    return best
