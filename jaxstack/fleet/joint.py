"""What to rent and where, at once: accelerator types, spot or on-demand, zones, extra replicas, in one program.

A mix of types planned at on-demand prices and then moved to spot is not the cheapest that there is: types differ in how
scarce and how cheap they are as spot. So each way to have n replicas of a type ready (on-demand alone, or spot in the
zones up to some price with so many extra and on-demand to fill in) is an `Option` with an expected cost and an expected
share of time with fewer ready, both found by running the policy itself on what the zones have had to give. Then

    minimise    sum_o cost_o y_o
    subject to  sum_g x_bg = 1                              for every bucket b of requests
                sum_b r_b L_bg x_bg <= sum_{o of g} n_o y_o  for every type g
                sum_{o of g} y_o <= 1                       for every type g
                sum_o unready_o y_o <= 1 - availability

is a small mixed-integer program, with the loads r L of `AllocationProblem`, solved to a proven bound. The last row adds
up the times in which some type is short, so that the plan as a whole is whole at least so much of the time.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.program import even_shares
from jaxstack.fleet.spot.placement import ZonePlacer
from jaxstack.fleet.spot.policy import FixedTarget, OnDemandOnly, ServingPolicy, spothedge
from jaxstack.fleet.spot.simulator import COLD_START_S, SimulationResult, simulate
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.runtime.errors import UserError

TICK_S = 60.0
_TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to have `replicas` of a type ready.

    Args:
      zones: that spot replicas may be in; none: on-demand alone.
      extra: spot replicas beyond.
      cost_usd_per_hour: expected.
      unready: expected share of time with fewer ready.
    """

    kind: str
    replicas: int
    zones: tuple[str, ...]
    extra: int
    cost_usd_per_hour: float
    unready: float

    def policy(self) -> ServingPolicy:
        """That carries it out, on a market of these zones."""
        if not self.zones:
            return ServingPolicy(FixedTarget(self.replicas), OnDemandOnly(), ZonePlacer())
        return spothedge(FixedTarget(self.replicas), overprovision=self.extra)

    def run(self, market: SpotTrace, *, tick_s: float = TICK_S, cold_start_s: float = COLD_START_S) -> SimulationResult:
        """What its policy makes of a market."""
        trace = market.only(self.zones) if self.zones else market
        return simulate(trace, self.policy(), tick_s=tick_s, cold_start_s=cold_start_s)


def options_for(
    problem: AllocationProblem,
    history: Mapping[str, SpotTrace],
    *,
    extras: Sequence[int] = (0, 1, 2),
    max_replicas: int = 16,
    tick_s: float = TICK_S,
    cold_start_s: float = COLD_START_S,
    on_done: Callable[[str], None] = lambda kind: None,
) -> list[Option]:
    """Every option of every type that no other of the same number undercuts in both cost and time short.

    Args:
      history: type -> what its zones had to give, with prices in dollars an hour. A type without is had on-demand only.
      max_replicas: of a type.
      tick_s: of the simulation; coarser is faster.
      on_done: told each type when its options are there.

    Raises:
      UserError: a market for an unknown type, or one whose on-demand price is not the type's.
    """
    prices = {each.name: each.price_usd_per_hour for each in problem.types}
    for kind, trace in history.items():
        if kind not in prices:
            raise UserError(f"history: found a market for {kind!r}, expected some of {', '.join(prices)}")
        theirs = min(price.on_demand_usd_per_hour for price in trace.zone_prices.values())
        if not math.isclose(theirs, prices[kind], rel_tol=1e-9):
            raise UserError(
                f"history: {kind}: found on-demand at {theirs} $/h in {trace.name}, expected the type's {prices[kind]}"
            )
    demand = problem.demand()
    whole = np.where(np.isfinite(demand), demand, 0.0).sum(0)
    found = []
    for each, most in zip(problem.types, whole):
        cap = max_replicas if each.max_count is None else min(max_replicas, each.max_count)
        for replicas in range(1, min(cap, math.ceil(most)) + 1):
            options = [Option(each.name, replicas, (), 0, replicas * each.price_usd_per_hour, 0.0)]
            if each.name in history:
                options += _spot_options(each.name, replicas, history[each.name], extras, tick_s, cold_start_s)
            found += _undominated(options)
        on_done(each.name)
    return found


def _spot_options(
    kind: str, replicas: int, market: SpotTrace, extras: Sequence[int], tick_s: float, cold_start_s: float
) -> list[Option]:
    found = []
    for zones in zone_sets(market):
        for extra in extras:
            plain = Option(kind, replicas, zones, extra, 0.0, 0.0)
            result = plain.run(market, tick_s=tick_s, cold_start_s=cold_start_s)
            cost = float(result.bill_usd_per_hour[result.warm_ticks :].mean())
            found.append(dataclasses.replace(plain, cost_usd_per_hour=cost, unready=1 - result.availability))
    return found


def zone_sets(market: SpotTrace) -> list[tuple[str, ...]]:
    """The zones up to each price that a zone has: nobody would leave out a cheaper one for being cheap."""
    price = {zone: each.spot_usd_per_hour for zone, each in market.zone_prices.items()}
    return [tuple(z for z in market.zones if price[z] <= limit) for limit in sorted(set(price.values()))]


def _undominated(options: Sequence[Option]) -> list[Option]:
    """Those that are cheaper than every one that is short for no longer."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.unready, o.cost_usd_per_hour, o.extra)):
        if not kept or option.cost_usd_per_hour < kept[-1].cost_usd_per_hour - _TOLERANCE:
            kept.append(option)
    return kept


@dataclasses.dataclass(frozen=True, eq=False)
class JointPlan:
    """A plan.

    Args:
      status: "optimal": proven; "feasible": the time limit came first; "infeasible": no options carry the load and are
        whole enough of the time.
      options: the one of each type that is used.
      cost_usd_per_hour: expected; infinite without a plan.
      lower_bound_usd_per_hour: no choice of the options is cheaper.
      unready: at most so much of the time some type is short, as expected.
      shares: of each bucket that each type takes.
    """

    status: Literal["optimal", "feasible", "infeasible", "time_limit"]
    options: tuple[Option, ...]
    cost_usd_per_hour: float
    lower_bound_usd_per_hour: float
    unready: float
    shares: Float[np.ndarray, "inputs outputs types"]
    solve_time_s: float

    @property
    def found(self) -> bool:
        return bool(self.options)

    @property
    def gap(self) -> float:
        return 1 - self.lower_bound_usd_per_hour / self.cost_usd_per_hour if self.found else 1.0

    @property
    def counts(self) -> dict[str, int]:
        """Replicas that should be ready, by type."""
        return {option.kind: option.replicas for option in self.options}

    def allocation(self, problem: AllocationProblem) -> Allocation:
        """The ready replicas as a plan for a router; its cost is on-demand's."""
        counts = {name: self.counts.get(name, 0) for name in problem.names}
        cost = float(problem.prices @ np.array(list(counts.values())))
        return Allocation(
            "feasible", counts, cost, self.shares, {}, 0.0, 0.0, 1.0, self.solve_time_s, dict.fromkeys(problem.names)
        )


def solve_jointly(
    problem: AllocationProblem,
    options: Sequence[Option],
    *,
    availability: float = 0.98,
    time_limit_s: float = 30.0,
) -> JointPlan:
    """The cheapest choice of options that carries the load.

    Args:
      availability: share of time in which all types should be whole.

    Raises:
      UserError: an availability that is no share, or a workload without requests.
    """
    if not 0 <= availability <= 1:
        raise UserError(f"availability: found {availability}, expected a share from 0 to 1")
    demand = problem.demand()
    if not len(demand):
        raise UserError("workload: found no requests, expected a rate > 0")
    began = time.perf_counter()
    chosen: list[Option] = []
    split = None
    slack = 0.0
    while split is None:
        found = _solve(demand * (1 + slack), problem.names, options, availability, time_limit_s)
        if found.x is None:
            break
        y = np.round(found.x[-len(options) :])
        chosen = [option for option, taken in zip(options, y) if taken]
        counts = [sum(o.replicas for o in chosen if o.kind == name) for name in problem.names]
        split = even_shares(demand, counts)
        if split is None or split[1] > 1 + _TOLERANCE:
            # The search took its own tolerance for room: ask for a little more than there is.
            split, slack = None, max(1e-6, 4 * slack)
            if slack > 1e-3:
                break
    took_s = time.perf_counter() - began
    shares = np.zeros((math.prod(problem.workload.grid.shape), len(problem.types)))
    if split is None:
        status: Literal["infeasible", "time_limit"] = "time_limit" if found.status == 1 else "infeasible"
        return JointPlan(status, (), math.inf, math.inf, 1.0, _table(shares, problem), took_s)
    shares[problem.asked()] = split[0]
    cost = sum(option.cost_usd_per_hour for option in chosen)
    return JointPlan(
        "optimal" if found.status == 0 else "feasible",
        tuple(chosen),
        cost,
        min(cost, float(found.mip_dual_bound)),
        sum(option.unready for option in chosen),
        _table(shares, problem),
        took_s,
    )


def _table(
    shares: Float[np.ndarray, "buckets types"], problem: AllocationProblem
) -> Float[np.ndarray, "inputs outputs types"]:
    return shares.reshape(*problem.workload.grid.shape, len(problem.types))


def _solve(
    demand: Float[np.ndarray, "buckets types"],
    names: Sequence[str],
    options: Sequence[Option],
    availability: float,
    time_limit_s: float,
) -> scipy.optimize.OptimizeResult:
    """Columns: the share of each bucket on each type that can serve it, then whether each option is taken."""
    buckets, types = demand.shape
    bucket, kind = np.nonzero(np.isfinite(demand))
    pairs, count = len(bucket), len(options)
    of = np.array([names.index(option.kind) for option in options], np.int64)
    replicas = np.array([option.replicas for option in options], float)
    unready = np.array([option.unready for option in options])
    column = pairs + np.arange(count)
    # Rows: buckets, then types twice (load, one option), then time short.
    row = np.concatenate(
        [bucket, buckets + kind, buckets + of, buckets + types + of, np.full(count, buckets + 2 * types)]
    )
    columns = np.concatenate([np.arange(pairs), np.arange(pairs), column, column, column])
    value = np.concatenate([np.ones(pairs), demand[bucket, kind], -replicas, np.ones(count), unready])
    rows = scipy.sparse.csr_array((value, (row, columns)), shape=(buckets + 2 * types + 1, pairs + count))
    low = np.concatenate([np.ones(buckets), np.full(2 * types + 1, -np.inf)])
    high = np.concatenate([np.ones(buckets), np.zeros(types), np.ones(types), [1 - availability + _TOLERANCE]])
    return scipy.optimize.milp(
        np.concatenate([np.zeros(pairs), [option.cost_usd_per_hour for option in options]]),
        integrality=np.concatenate([np.zeros(pairs), np.ones(count)]),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=scipy.optimize.LinearConstraint(rows, low, high),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
