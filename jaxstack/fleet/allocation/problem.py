"""What is asked, and what is answered."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxstack.fleet.allocation.workload import Workload
from jaxstack.fleet.profile.throughput import AcceleratorType, ThroughputProfile
from jaxstack.runtime.errors import UserError

MAX_REDUNDANCY = 3


@dataclasses.dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Which types to rent, and how many of each.

    Args:
      types: with their prices and caps; every one has a profile, and every profile a type.
      headroom: rates are multiplied by 1 + headroom. 0 plans for a replica that is busy all of the time, behind which
        a queue grows without limit.
      slice_factor: each bucket is cut into so many equal slices, each of which goes to one type as a whole (the paper);
        None: any share of a bucket may go to any type (what a router can do anyway).
      redundancy: replicas, of whatever types, that may be lost while the rest still serves everything.
      current: what is running now; changing it costs `start_cost_usd` for each replica started and `stop_cost_usd`
        for each one stopped, which is spread over `horizon_h` hours of rent.

    Raises:
      UserError: grids or names that do not match, a value out of range.
    """

    workload: Workload
    types: tuple[AcceleratorType, ...]
    profile: ThroughputProfile
    headroom: float = 0.15
    slice_factor: int | None = None
    redundancy: int = 0
    current: Mapping[str, int] | None = None
    start_cost_usd: float = 0.0
    stop_cost_usd: float = 0.0
    horizon_h: float = 1.0

    def __post_init__(self) -> None:
        names = [t.name for t in self.types]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            found = f"{twice[0]!r} twice" if twice else "none"
            raise UserError(f"types: found {found}, expected at least one, each once")
        if self.workload.grid != self.profile.grid:
            raise UserError(
                f"profile: found a grid of {self.profile.grid.shape} buckets that is not the workload's of "
                f"{self.workload.grid.shape}, expected the same edges"
            )
        for name in names:
            if name not in self.profile.max_rate_rps:
                raise UserError(f"types: {name!r} has no profile; expected one of {', '.join(self.profile.names)}")
        for name in self.profile.names:
            if name not in names:
                raise UserError(f"profile: {name!r} has no type with a price; expected one of {', '.join(names)}")
        _at_least("headroom", self.headroom, 0)
        if self.slice_factor is not None and self.slice_factor < 1:
            raise UserError(f"slice_factor: found {self.slice_factor}, expected an integer >= 1 or None")
        if not 0 <= self.redundancy <= MAX_REDUNDANCY:
            raise UserError(f"redundancy: found {self.redundancy}, expected 0 to {MAX_REDUNDANCY} replicas")
        if self.redundancy and self.slice_factor is not None:
            raise UserError("redundancy: found together with slice_factor, expected slice_factor None (shares)")
        for name in ("start_cost_usd", "stop_cost_usd"):
            _at_least(name, getattr(self, name), 0)
        if not self.horizon_h > 0:
            raise UserError(f"horizon_h: found {self.horizon_h}, expected a positive number of hours")
        for name, count in (self.current or {}).items():
            if name not in names:
                raise UserError(f"current: {name!r} is none of the types {', '.join(names)}")
            _at_least(f"current: {name}", count, 0)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.types)

    @property
    def prices(self) -> Float[np.ndarray, "types"]:
        """Dollars an hour."""
        return np.array([t.price_usd_per_hour for t in self.types])

    @property
    def planned_rates_rps(self) -> Float[np.ndarray, "inputs outputs"]:
        """Of each bucket, headroom included."""
        return self.workload.rates_rps * (1 + self.headroom)

    def demand(self) -> Float[np.ndarray, "buckets types"]:
        """Replicas of each type that each bucket of requests would take alone, row by row of the grid; infinite where
        the type cannot serve. Buckets without requests are left out (see `asked`).
        """
        loads = self.profile.loads(self.names).reshape(-1, len(self.types))
        rates = self.planned_rates_rps.reshape(-1)
        asked = self.asked()
        return loads[asked] * rates[asked, None]

    def asked(self) -> np.ndarray:
        """Which buckets have requests, as flat indices."""
        return np.flatnonzero(self.planned_rates_rps.reshape(-1) > 0)


@dataclasses.dataclass(frozen=True)
class Infeasibility:
    """Why nothing can do, by name.

    Args:
      reasons: in sentences, the whole of it.
      unserved: buckets that no type can serve: (bucket, requests a second).
      served_multiple: the greatest multiple of the planned rates that the caps allow; None where they are not why.
      saturated: types whose caps bind there.
      relaxation: the one cap whose raising is cheapest: (type, replicas it would take, dollars an hour then).
    """

    reasons: tuple[str, ...]
    unserved: tuple[tuple[str, float], ...] = ()
    served_multiple: float | None = None
    saturated: tuple[str, ...] = ()
    relaxation: tuple[str, int, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """A plan.

    Args:
      status: "optimal": proven; "feasible": the time limit came first, `gap` says how far from proven; "infeasible":
        see `infeasibility`; "time_limit": nothing was found in time.
      counts: replicas by type; empty without a plan, as `shares` is all zeros then.
      cost_usd_per_hour: rent; infinite without a plan.
      shares: of each bucket that each type takes; rows of buckets with requests sum to 1, others to 0.
      utilisation: of each type that is rented: its planned load over its count.
      lower_bound_usd_per_hour: no plan is cheaper (rent, and costs of switching over the horizon, where there are any).
      fractional_bound_usd_per_hour: what a fraction of a replica could be rented for; in closed form.
      gap: (cost - lower bound) / cost.
      switch_cost_usd: of starting and stopping.
      single_type_cost_usd_per_hour: of each type alone; None where it cannot serve everything.
      nodes: of the search tree.
    """

    status: Literal["optimal", "feasible", "infeasible", "time_limit"]
    counts: Mapping[str, int]
    cost_usd_per_hour: float
    shares: Float[np.ndarray, "inputs outputs types"]
    utilisation: Mapping[str, float]
    lower_bound_usd_per_hour: float
    fractional_bound_usd_per_hour: float
    gap: float
    solve_time_s: float
    single_type_cost_usd_per_hour: Mapping[str, float | None]
    infeasibility: Infeasibility | None = None
    switch_cost_usd: float = 0.0
    nodes: int = 0

    @property
    def found(self) -> bool:
        """Whether there is a plan."""
        return self.status in ("optimal", "feasible")

    @property
    def instances(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        """All of it, JSON-ready; what is infinite is None."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found["shares"] = np.round(self.shares, 9).tolist()
        found["infeasibility"] = self.infeasibility and dataclasses.asdict(self.infeasibility)
        for name, value in found.items():
            if isinstance(value, float) and not math.isfinite(value):
                found[name] = None
        return found


def _at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"{name}: found {value}, expected a number >= {least:g}")
