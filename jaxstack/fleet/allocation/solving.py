"""From a problem to a plan: solve, break ties, spread the load, verify, and explain where nothing can do."""

import dataclasses
import math
import time

import numpy as np

from jaxstack.fleet.allocation.check import violations
from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.program import Program, even_shares
from jaxstack.fleet.allocation.reasons import explain

# Loads may exceed counts by so much: rounding of shares, nothing that a replica would notice.
TOLERANCE = 1e-9


def solve(problem: AllocationProblem, *, time_limit_s: float = 10.0, relative_gap: float = 0.0) -> Allocation:
    """The cheapest counts that serve everything, and how to share the buckets among them.

    With `slice_factor` this is the optimum of the paper's program (section 5); without, of the same program over
    shares, which is never dearer. Of plans that cost the same, one with fewest replicas, then of the first names, is
    taken where shares are continuous. Types are ordered by name inside, so that their order changes nothing.

    Args:
      time_limit_s: for the search; a plan that is not proven best by then is "feasible".
      relative_gap: a plan this close to the bound will do.
    """
    began = time.perf_counter()
    order = sorted(range(len(problem.types)), key=lambda g: problem.names[g])
    demand = problem.demand()[:, order]
    prices = problem.prices[order]
    caps = np.array([math.inf if t.max_count is None else t.max_count for t in problem.types])[order]
    bound = fractional_bound(problem)
    answer = _Answer(problem, order, bound, began)
    if not len(demand) and not problem.redundancy and not problem.current:
        return answer.plan("optimal", np.zeros(len(order), int), np.zeros((0, len(order))), 0.0)
    if not np.isfinite(demand).any(axis=1).all():
        return answer.nothing("infeasible", bound)
    current = None
    if problem.current is not None and (problem.start_cost_usd or problem.stop_cost_usd):
        current = np.array([problem.current.get(problem.names[g], 0) for g in order])
    program = Program(
        demand,
        prices,
        caps,
        problem.slice_factor,
        problem.redundancy if len(demand) else 0,
        current,
        (problem.start_cost_usd / problem.horizon_h, problem.stop_cost_usd / problem.horizon_h),
    )
    floor = 0.0
    if program.slices and current is None:
        # Shares take milliseconds and cost no more than slices: from there on the search knows when it may stop.
        loose = dataclasses.replace(program, slices=None).solve(time_limit_s=time_limit_s / 2)
        if loose.mip_dual_bound is not None and math.isfinite(loose.mip_dual_bound):
            floor = max(0.0, loose.mip_dual_bound - 1e-6)
    found = program.solve(time_limit_s=time_limit_s, relative_gap=relative_gap, rent_usd_per_hour=(floor, math.inf))
    nodes = int(getattr(found, "mip_node_count", None) or 0)
    proven = getattr(found, "mip_dual_bound", None)
    lower = max(bound, proven) if proven is not None and math.isfinite(proven) else bound
    if found.x is None and (found.status == 2 or "infeasible" in found.message.lower()):
        return answer.nothing("infeasible", math.inf)
    status = "optimal" if found.status == 0 else "feasible"
    if found.x is None:
        counts = program.relaxed_counts()
        if counts is None or problem.slice_factor is not None:
            return answer.nothing("time_limit", lower)
        shares = None
    else:
        counts = np.round(found.x[program.places["n"]])
        shares = _slices(program, found.x) if program.slices else None
    if not program.slices and found.x is not None and status == "optimal" and not relative_gap and current is None:
        counts = _fewest(program, counts, time_limit_s)
    if not program.slices:
        shares = _shares(demand, counts)
    if shares is None:
        # The search took its own tolerance of 1e-6 for room: ask for a little more than there is.
        tighter = dataclasses.replace(program, demand=demand * (1 + 1e-6))
        found = tighter.solve(time_limit_s=time_limit_s, relative_gap=relative_gap)
        if found.x is None:
            return answer.nothing("infeasible" if found.status == 2 else "time_limit", lower)
        counts = np.round(found.x[program.places["n"]])
        shares = _slices(program, found.x) if program.slices else _shares(demand, counts)
        assert shares is not None
    return answer.plan(status, counts.astype(int), shares, lower, nodes)


def fractional_bound(problem: AllocationProblem) -> float:
    """What it would cost if a fraction of a replica could be rented: each bucket where it is cheapest, caps aside."""
    cheapest = (problem.demand() * problem.prices).min(axis=1, initial=math.inf)
    return float(cheapest.sum())


def single_type_cost(problem: AllocationProblem, name: str) -> float | None:
    """Dollars an hour for that type alone; None where it cannot serve everything."""
    g = problem.names.index(name)
    load = float(problem.demand()[:, g].sum())
    if not math.isfinite(load):
        return None
    count = math.ceil(load - TOLERANCE) + (problem.redundancy if load > 0 else 0)
    cap = problem.types[g].max_count
    if cap is not None and count > cap:
        return None
    return count * problem.types[g].price_usd_per_hour


@dataclasses.dataclass(frozen=True)
class _Answer:
    """Puts an `Allocation` together, in the problem's own order of types."""

    problem: AllocationProblem
    order: list[int]
    fractional: float
    began: float

    def plan(self, status, counts, shares, lower: float, nodes: int = 0) -> Allocation:
        problem = self.problem
        types = len(self.order)
        back = np.argsort(self.order)
        counts, shares = counts[back], shares[:, back]
        full = np.zeros((problem.planned_rates_rps.size, types))
        full[problem.asked()] = shares
        demand = problem.demand()
        loads = (np.where(np.isfinite(demand), demand, 0.0) * shares).sum(axis=0)
        by_name = {name: int(count) for name, count in zip(problem.names, counts)}
        cost = float(sum(count * t.price_usd_per_hour for count, t in zip(by_name.values(), problem.types)))
        switch = 0.0
        if problem.current is not None:
            changes = [count - problem.current.get(name, 0) for name, count in by_name.items()]
            switch = problem.start_cost_usd * sum(max(0, c) for c in changes)
            switch += problem.stop_cost_usd * sum(max(0, -c) for c in changes)
        total = cost + switch / problem.horizon_h
        lower = min(lower, total)
        found = Allocation(
            status=status,
            counts=by_name,
            cost_usd_per_hour=cost,
            shares=full.reshape(*problem.workload.grid.shape, types),
            utilisation={name: float(load / n) for (name, n), load in zip(by_name.items(), loads) if n},
            lower_bound_usd_per_hour=lower,
            fractional_bound_usd_per_hour=self.fractional,
            gap=(total - lower) / total if total > 0 else 0.0,
            solve_time_s=time.perf_counter() - self.began,
            single_type_cost_usd_per_hour=self._alone(),
            switch_cost_usd=switch,
            nodes=nodes,
        )
        wrong = violations(problem, found)
        if wrong:  # never seen; a wrong plan must not leave here
            raise RuntimeError(f"allocation: the plan that was found does not serve its load: {wrong[0]}")
        return found

    def nothing(self, status, lower: float) -> Allocation:
        problem = self.problem
        return Allocation(
            status=status,
            counts={},
            cost_usd_per_hour=math.inf,
            shares=np.zeros((*problem.workload.grid.shape, len(problem.types))),
            utilisation={},
            lower_bound_usd_per_hour=lower,
            fractional_bound_usd_per_hour=self.fractional,
            gap=1.0,
            solve_time_s=time.perf_counter() - self.began,
            single_type_cost_usd_per_hour=self._alone(),
            infeasibility=explain(problem, solve) if status == "infeasible" else None,
        )

    def _alone(self) -> dict[str, float | None]:
        return {name: single_type_cost(self.problem, name) for name in self.problem.names}


def _slices(program: Program, x: np.ndarray) -> np.ndarray | None:
    """Shares of whole slices; None where, rounded, they do not fit."""
    assert program.slices is not None
    shares = np.zeros(program.demand.shape)
    shares[program.bucket, program.kind] = np.round(x[program.places["k"]]) / program.slices
    counts = np.round(x[program.places["n"]])
    loads = (np.where(np.isfinite(program.demand), program.demand, 0.0) * shares).sum(axis=0)
    whole = np.abs(shares.sum(axis=1) - 1).max(initial=0.0) < TOLERANCE
    return shares if whole and (loads <= counts + TOLERANCE * np.maximum(1, counts)).all() else None


def _shares(demand: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """Even shares, if the counts have room for them."""
    found = even_shares(demand, counts)
    return found[0] if found is not None and found[1] <= 1 + TOLERANCE else None


def _fewest(program: Program, counts: np.ndarray, time_limit_s: float) -> np.ndarray:
    """Of all counts that cost as much, the fewest, then those of the first names."""
    budget = float(program.prices @ counts)
    total = float(counts.sum())
    types = len(counts)
    weight = 1 + np.arange(types) / (types * (total + 1))
    most = budget * (1 + 1e-12) + 1e-9
    found = program.solve(time_limit_s=time_limit_s, objective=weight, rent_usd_per_hour=(0.0, most))
    if found.x is None or found.status != 0:
        return counts
    fewer = np.round(found.x[program.places["n"]])
    same = program.prices @ fewer <= budget + 1e-9 * max(1.0, budget)
    return fewer if same and _shares(program.demand, fewer) is not None else counts
