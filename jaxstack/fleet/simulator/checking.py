"""A plan that has been tried before it is shown."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.solving import solve
from jaxstack.fleet.simulator.arrivals import Request
from jaxstack.fleet.simulator.replaying import ReplayReport, replay
from jaxstack.fleet.simulator.step_times import StepTimes


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedPlan:
    """A plan, its replay, and the way there.

    Args:
      problem: with the headroom that it took.
      report: None where there was nothing to replay.
      path: of each try: headroom, cost, attainment.
    """

    allocation: Allocation
    problem: AllocationProblem
    report: ReplayReport | None
    path: tuple[Mapping[str, float | None], ...]

    @property
    def met(self) -> bool:
        return self.report is not None and self.report.met


def solve_and_check(
    problem: AllocationProblem,
    times: Mapping[str, StepTimes],
    make_requests: Callable[[], Sequence[Request]],
    *,
    raise_headroom: float = 0.05,
    tries: int = 8,
    time_limit_s: float = 10.0,
    say: Callable[[str], None] = lambda line: None,
    **of_replay: Any,
) -> CheckedPlan:
    """Solves and replays; where the objective is missed, plans for more and does it again.

    Args:
      make_requests: the arrivals, the same ones each time.
      raise_headroom: what is added after a miss.
      tries: after the first. The last one is returned, met or not.
      say: told what came of each try.
    """
    path: list[Mapping[str, float | None]] = []
    for number in range(tries + 1):
        allocation = solve(problem, time_limit_s=time_limit_s)
        if not allocation.found or not allocation.instances:
            path.append({"headroom": problem.headroom, "cost_usd_per_hour": None, "attainment": None})
            return CheckedPlan(allocation, problem, None, tuple(path))
        report = replay(allocation, problem, times, make_requests(), **of_replay)
        path.append(
            {
                "headroom": round(problem.headroom, 4),
                "cost_usd_per_hour": allocation.cost_usd_per_hour,
                "attainment": report.attainment,
            }
        )
        say(
            f"headroom {problem.headroom:.0%}: {allocation.cost_usd_per_hour:.2f} $/h, "
            f"{report.attainment:.2%} of {report.requests} requests keep the objective"
        )
        if report.met or number == tries:
            break
        problem = dataclasses.replace(problem, headroom=problem.headroom + raise_headroom)
    return CheckedPlan(allocation, problem, report, tuple(path))
