"""Plans for traffic that changes: an estimate of it, when to plan anew, and how to get from one plan to the next.

A plan that cannot carry the estimate is replaced at once. One that is too large is replaced only when a smaller one
would do with a margin, pays for the change, and has done so several times in a row: noise changes nothing. What is new
is started before anything old is stopped.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.program import even_shares
from jaxstack.fleet.allocation.reasons import served_multiple
from jaxstack.fleet.allocation.solving import TOLERANCE, solve
from jaxstack.fleet.allocation.workload import Workload
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.runtime.errors import UserError


class WorkloadEstimator:
    """The rate and the lengths of late; what is older counts less.

    Args:
      grid: requests beyond its last edges count as the longest there are.
      rate_half_life_s, lengths_half_life_s: after which a request counts half.
      start_s: when it begins to listen.
    """

    def __init__(
        self,
        grid: LengthGrid,
        *,
        rate_half_life_s: float = 300.0,
        lengths_half_life_s: float = 3600.0,
        start_s: float = 0.0,
    ):
        for name, value in (("rate_half_life_s", rate_half_life_s), ("lengths_half_life_s", lengths_half_life_s)):
            if not value > 0:
                raise UserError(f"{name}: found {value}, expected a positive number of seconds")
        self._grid = grid
        self._rate_decay, self._length_decay = math.log(2) / rate_half_life_s, math.log(2) / lengths_half_life_s
        self._counts = np.zeros(grid.shape)
        self._weight = 0.0
        self._start_s = self._now_s = start_s

    def add(self, now_s: float, input_tokens: int, output_tokens: int, number: float = 1.0) -> None:
        """Requests of one size that came just now."""
        self._age(now_s)
        i = min(int(np.searchsorted(self._grid.input_edges_tokens, input_tokens)), self._grid.shape[0] - 1)
        j = min(int(np.searchsorted(self._grid.output_edges_tokens, output_tokens)), self._grid.shape[1] - 1)
        self._counts[i, j] += number
        self._weight += number

    def workload(self, now_s: float) -> Workload | None:
        """The estimate; None before anything came."""
        self._age(now_s)
        heard = 1 - math.exp(-self._rate_decay * (now_s - self._start_s))
        if heard <= 0 or self._counts.sum() <= 0:
            return None
        return Workload(self._grid, float(self._rate_decay * self._weight / heard), self._counts / self._counts.sum())

    def _age(self, now_s: float) -> None:
        past = max(0.0, now_s - self._now_s)
        self._counts *= math.exp(-self._length_decay * past)
        self._weight *= math.exp(-self._rate_decay * past)
        self._now_s = max(now_s, self._now_s)


@dataclasses.dataclass(frozen=True, eq=False)
class Transition:
    """From one plan to the next without ever having less than the smaller of both: start, wait, move, drain, stop."""

    old: Mapping[str, int]
    new: Mapping[str, int]
    old_shares: Float[np.ndarray, "inputs outputs types"]
    new_shares: Float[np.ndarray, "inputs outputs types"]

    @property
    def starts(self) -> dict[str, int]:
        """Replicas to start, by type."""
        more = {name: count - self.old.get(name, 0) for name, count in self.new.items()}
        return {name: count for name, count in more.items() if count > 0}

    @property
    def stops(self) -> dict[str, int]:
        """Replicas to drain and stop once all that start are ready."""
        fewer = {name: count - self.new.get(name, 0) for name, count in self.old.items()}
        return {name: count for name, count in fewer.items() if count > 0}

    def all_ready(self, ready: Mapping[str, int]) -> bool:
        """Whether everything that the new plan has is ready, so that the old may go."""
        return all(ready.get(name, 0) >= count for name, count in self.new.items())

    def wanted(self, ready: Mapping[str, int]) -> dict[str, int]:
        """Replicas that should run now, given those that are ready."""
        if self.all_ready(ready):
            return dict(self.new)
        names = [*self.new, *(name for name in self.old if name not in self.new)]
        return {name: max(self.old.get(name, 0), self.new.get(name, 0)) for name in names}

    def shares(self, ready: Mapping[str, int]) -> Float[np.ndarray, "inputs outputs types"]:
        """Old and new shares blended by how much of the new is ready; a type of which nothing is ready gets nothing,
        and a bucket that only such types could serve is left with zeros.
        """
        due = sum(self.starts.values())
        there = sum(
            min(count, max(0, ready.get(name, 0) - self.old.get(name, 0))) for name, count in self.starts.items()
        )
        moved = there / due if due else 1.0
        blended = (1 - moved) * self.old_shares + moved * self.new_shares
        alive = np.array([ready.get(name, 0) > 0 for name in self.new])
        blended = blended * alive
        total = blended.sum(axis=-1, keepdims=True)
        return np.divide(blended, total, out=np.zeros_like(blended), where=total > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Replan:
    """What came of a look: the plan that holds now, why, and how to get there if it is another one than before."""

    allocation: Allocation
    reason: str
    transition: Transition | None = None


class Replanner:
    """Looks at estimates, every minute or so, and says when the plan should change.

    Args:
      problem: types, profile, headroom, costs of switching; its workload is replaced by the estimates.
      patience: looks in a row at which a smaller plan must pay.
      margin: a smaller plan must carry so much more than headroom asks for, so that noise cannot go back and forth.
      trigger: share of the headroom that an estimate may use up before the plan is replaced by a larger one.
    """

    def __init__(self, problem: AllocationProblem, *, patience: int = 5, margin: float = 0.05, trigger: float = 0.5):
        if patience < 1:
            raise UserError(f"patience: found {patience}, expected an integer >= 1")
        if not (margin >= 0 and 0 <= trigger <= 1):
            raise UserError(f"margin, trigger: found {margin}, {trigger}, expected >= 0 and from 0 to 1")
        self._problem, self._patience, self._margin, self._trigger = problem, patience, margin, trigger
        self._waited = 0
        self.allocation: Allocation | None = None

    def look(self, workload: Workload) -> Replan:
        """The plan for an estimate: the one that runs, or another one."""
        problem = dataclasses.replace(self._problem, workload=workload)
        current = self.allocation
        if current is None:
            return self._adopt(self._best(problem), "the first plan")
        if not self._carries(problem, current):
            self._waited = 0
            best = self._best(dataclasses.replace(problem, current=current.counts))
            if best.counts == current.counts:
                return Replan(current, "what runs is all that can be had")
            return self._adopt(best, f"{workload.rate_rps:.3g} requests/s are more than the plan carries")
        roomy = dataclasses.replace(problem, headroom=problem.headroom + self._margin, current=current.counts)
        smaller = solve(roomy)
        saved = (current.cost_usd_per_hour - smaller.cost_usd_per_hour) * problem.horizon_h
        if not smaller.found or saved <= smaller.switch_cost_usd + 1e-9:
            self._waited = 0
            return Replan(current, "the plan still fits")
        self._waited += 1
        if self._waited < self._patience:
            return Replan(current, f"a cheaper plan would do, for {self._waited} looks of {self._patience}")
        self._waited = 0
        return self._adopt(smaller, f"{saved / problem.horizon_h:.2f} $/h less will do")

    def _carries(self, problem: AllocationProblem, plan: Allocation) -> bool:
        """Whether a plan still has what the estimate asks for with part of the headroom."""
        bare = dataclasses.replace(problem, headroom=problem.headroom * (1 - self._trigger))
        demand = bare.demand()
        found = even_shares(demand, [plan.counts.get(name, 0) for name in bare.names])
        return found is not None and found[1] <= 1 + TOLERANCE

    def _best(self, problem: AllocationProblem) -> Allocation:
        """The plan, or where the caps do not allow one, a plan for as much of the traffic as they do."""
        found = solve(problem)
        if found.found:
            return found
        multiple, _ = served_multiple(problem)
        if found.status == "infeasible" and 0 < multiple < 1:
            less = problem.workload.at_rate(problem.workload.rate_rps * multiple * (1 - 1e-6))
            found = solve(dataclasses.replace(problem, workload=less))
        if not found.found:
            reasons = found.infeasibility.reasons if found.infeasibility else (found.status,)
            raise UserError(f"replanning: found no plan ({reasons[0]}), expected one")
        return found

    def _adopt(self, plan: Allocation, reason: str) -> Replan:
        old, self.allocation = self.allocation, plan
        if old is None:
            return Replan(plan, reason, Transition({}, plan.counts, np.zeros_like(plan.shares), plan.shares))
        return Replan(plan, reason, Transition(old.counts, plan.counts, old.shares, plan.shares))
