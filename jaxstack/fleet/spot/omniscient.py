"""The least that anyone could have paid who knew the trace from the start (section 5.2 of the paper).

    minimise    sum_t sum_z c_z s_zt + c_o o_t
    subject to  s_zt <= capacity_zt
                a_zt <= s_zt',  b_t <= o_t'       for t' in [t - d, t]     (ready = there for a cold start)
                sum_z a_zt + b_t >= N_tar         for t >= d

As a linear program it is a bound from below in any case, and on such traces its solution is integral nearly always;
where it is not, the integer program is solved.
"""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int

from jaxstack.fleet.spot.simulator import COLD_START_S, TICK_S
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.runtime.errors import UserError


@dataclass(frozen=True)
class OmniscientResult:
    """A bound.

    Args:
      status: of the solver; only `optimal` has costs.
      cost: of the best schedule, as a share of on-demand replicas alone; the scores' first cold start is not counted,
        as in `SimulationResult.cost`.
      lower_bound: no policy that always meets the target costs less than this.
      integral: whether the schedule has whole replicas.
      relaxed: whether the linear program was enough.
      spot: the schedule.
      on_demand: the schedule.
      time_s: what solving took.
    """

    status: Literal["optimal", "time_limit", "failed"]
    cost: float
    lower_bound: float
    integral: bool
    relaxed: bool
    spot: Float[np.ndarray, "zones ticks"]
    on_demand: Float[np.ndarray, " ticks"]
    time_s: float


def solve_omniscient(
    trace: SpotTrace,
    target: int,
    *,
    overprovision: int = 1,
    tick_s: float = TICK_S,
    cold_start_s: float = COLD_START_S,
    time_limit_s: float = 900.0,
) -> OmniscientResult:
    """The cheapest schedule that has `target` replicas ready at every tick after the first cold start.

    Args:
      overprovision: a zone holds at most this many replicas beyond the target. It changes no optimum; it keeps the
        program small.

    Raises:
      UserError: no target, or a trace no longer than a cold start.
    """
    began = time.perf_counter()
    cold = int(np.ceil(cold_start_s / tick_s - 1e-9))
    capacity = np.minimum(trace.ticks(tick_s), target + overprovision)
    if target < 1 or capacity.shape[1] <= cold:
        raise UserError(
            f"{trace.name}: found a target of {target} and {capacity.shape[1]} ticks, expected >= 1 and more than the "
            f"{cold} of a cold start"
        )
    program = _program(trace, capacity, target, cold)
    # What is held before the bill begins costs nothing, and may as well be whole.
    matters = program["c"] > 0
    matters[capacity.size + capacity.shape[1] :] = True
    found = scipy.optimize.milp(**program, options={"time_limit": time_limit_s})
    relaxed, bound = True, np.nan if found.fun is None else found.fun
    if found.x is not None and not _whole(found.x[matters]):
        program["integrality"][:] = 1
        left_s = max(1.0, time_limit_s - (time.perf_counter() - began))
        found = scipy.optimize.milp(**program, options={"time_limit": left_s, "mip_rel_gap": 0.0})
        relaxed = False
    took_s = time.perf_counter() - began
    if found.x is None:
        empty = np.zeros(capacity.shape)
        status: Literal["time_limit", "failed"] = "time_limit" if found.status == 1 else "failed"
        return OmniscientResult(status, np.nan, np.nan, False, relaxed, empty, empty[0], took_s)
    zones, ticks = capacity.shape
    if not relaxed:
        bound = max(bound, found.mip_dual_bound)
    held = found.x[: (zones + 1) * ticks].reshape(zones + 1, ticks)
    cheapest = min(price.on_demand_usd_per_hour for price in trace.zone_prices.values())
    whole = cheapest * target * (ticks - cold)
    return OmniscientResult(
        "optimal" if found.status == 0 else "time_limit",
        float(found.fun / whole),
        float(bound / whole),
        _whole(found.x[matters]),
        relaxed,
        held[:zones],
        held[zones],
        took_s,
    )


def _whole(x: Float[np.ndarray, " n"]) -> bool:
    return bool(np.all(np.abs(x - np.rint(x)) < 1e-6))


def _program(trace: SpotTrace, capacity: Int[np.ndarray, "zones ticks"], target: int, cold: int) -> dict:
    """Columns: held[kind, tick] for each zone and then on-demand, then ready[kind, tick] from `cold` on."""
    zones, ticks = capacity.shape
    kinds, scored = zones + 1, ticks - cold
    prices = trace.zone_prices
    each = [prices[zone].spot_usd_per_hour for zone in trace.zones]
    each.append(min(price.on_demand_usd_per_hour for price in prices.values()))
    # What is held during the first cold start is not on the bill, as in the simulator's.
    held_cost = np.repeat(np.array(each)[:, None], ticks, 1)
    held_cost[:, :cold] = 0.0
    columns = kinds * ticks
    # ready[kind, t] - held[kind, t - lag] <= 0
    kind, tick, lag = (
        a.ravel() for a in np.meshgrid(np.arange(kinds), np.arange(scored), np.arange(cold + 1), indexing="ij")
    )
    count = len(kind)
    ready = columns + kind * scored + tick
    held = kind * ticks + tick + cold - lag
    rows = np.arange(count)
    below = scipy.sparse.csr_array(
        (np.repeat([1.0, -1.0], count), (np.tile(rows, 2), np.concatenate([ready, held]))),
        shape=(count, columns + kinds * scored),
    )
    # sum over kinds of ready[kind, t] >= target
    kind, tick = (a.ravel() for a in np.meshgrid(np.arange(kinds), np.arange(scored), indexing="ij"))
    enough = scipy.sparse.csr_array(
        (np.ones(len(kind)), (tick, columns + kind * scored + tick)), shape=(scored, columns + kinds * scored)
    )
    limit = np.concatenate([capacity.ravel(), np.full(ticks, target)])
    upper = np.concatenate([limit, np.full(kinds * scored, target)])
    return {
        "c": np.concatenate([held_cost.ravel(), np.zeros(kinds * scored)]),
        "constraints": [
            scipy.optimize.LinearConstraint(below, -np.inf, 0.0),
            scipy.optimize.LinearConstraint(enough, target, np.inf),
        ],
        "bounds": scipy.optimize.Bounds(0.0, upper),
        "integrality": np.zeros(columns + kinds * scored),
    }
