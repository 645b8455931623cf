"""Requests on a fleet, routed by the router's own policies."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.routing import routing_table
from jaxstack.fleet.profile.throughput import LatencyObjective
from jaxstack.fleet.simulator.arrivals import Request
from jaxstack.fleet.simulator.replica import StepReplica
from jaxstack.fleet.simulator.step_times import StepTimes
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.mixed_fleet import MixedFleet, Rule
from jaxstack.serving.router.policies import RoutedRequest, RoutingPolicy


@dataclasses.dataclass(frozen=True)
class ReplayReport:
    """What a replay came to.

    Args:
      requests: that count.
      refused: of these, that no replica had room for at any time; they miss the objective.
      tpot_attainment: share whose mean time per output token keeps the objective.
      attainment: share that keeps all of it.
      met: `attainment` is at least the objective's quantile.
      ttft_s, tpot_s: P50, P90, P99 of those that were served.
      busy: share of the time in which replicas of each type took steps, warm-up included.
      served: requests by type.
    """

    requests: int
    refused: int
    tpot_attainment: float
    attainment: float
    met: bool
    ttft_s: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    busy: Mapping[str, float]
    served: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_fleet(
    replicas: Sequence[StepReplica],
    policy: RoutingPolicy,
    requests: Sequence[Request],
    *,
    max_tokens: int = 1 << 20,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Serves `requests`, in order of their times, until the last has ended; what became of each is in it.

    Replicas affect each other only through the policy, so that each is advanced to a request's arrival when it comes.

    Args:
      max_tokens: that requests say they may have; the policy does not know what they will.
    """
    routed: dict[Request, RoutedRequest] = {}
    by_name = {replica.name: replica for replica in replicas}

    def over(finished: Sequence[Request]) -> None:
        for request in finished:
            policy.on_finish(
                routed.pop(request), by_name[request.replica], 0, request.output_tokens, request.input_tokens
            )

    for number, request in enumerate(requests):
        for replica in replicas:
            finished = replica.advance(request.at_s)
            if finished:
                over(finished)
        able = [replica for replica in replicas if replica.holds(request)]
        if not able:
            continue
        asked = RoutedRequest("", (), (), request.input_tokens, max_tokens)
        chosen = policy.choose(asked, able)
        policy.on_dispatch(asked, chosen)
        routed[request] = asked
        chosen.submit(request, request.at_s)
        if on_progress is not None and number % 1024 == 0:
            on_progress(number)
    for replica in replicas:
        over(replica.advance(math.inf))


def report_of(
    requests: Sequence[Request],
    replicas: Sequence[StepReplica],
    objective: LatencyObjective,
    *,
    warmup_s: float = 0.0,
) -> ReplayReport:
    """What became of the requests that arrived after the warm-up.

    Raises:
      UserError: there are none.
    """
    counted = [request for request in requests if request.at_s >= warmup_s]
    if not counted:
        raise UserError(f"replay: found no request after the first {warmup_s:g} s, expected some")
    served = [request for request in counted if not math.isnan(request.end_s)]
    ttft = np.array([request.ttft_s for request in served])
    tpot = np.array([request.tpot_s for request in served])
    smooth = tpot <= objective.tpot_s
    kept = smooth if objective.ttft_s is None else smooth & (ttft <= objective.ttft_s)
    kinds = {replica.name: replica.kind for replica in replicas}
    end = max((request.end_s for request in requests if not math.isnan(request.end_s)), default=1.0)
    number = {kind: sum(k == kind for k in kinds.values()) for kind in sorted(set(kinds.values()))}
    busy = {kind: sum(r.busy_s for r in replicas if r.kind == kind) / (end * n) for kind, n in number.items()}
    attainment = float(kept.sum() / len(counted))
    return ReplayReport(
        requests=len(counted),
        refused=len(counted) - len(served),
        tpot_attainment=float(smooth.sum() / len(counted)),
        attainment=attainment,
        met=attainment >= objective.quantile,
        ttft_s=_percentiles(ttft),
        tpot_s=_percentiles(tpot),
        busy=busy,
        served={kind: sum(kinds[request.replica] == kind for request in served) for kind in number},
    )


def _percentiles(values: np.ndarray) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return float(p50), float(p90), float(p99)


def fleet_of(
    counts: Mapping[str, int], times: Mapping[str, StepTimes], *, chunk_tokens: int | None = 512
) -> list[StepReplica]:
    """So many replicas of each type.

    Raises:
      UserError: a type whose step times are not known.
    """
    for name, count in counts.items():
        if count and name not in times:
            raise UserError(f"replay: {name!r} has no step times; expected one of {', '.join(times)}")
    return [
        StepReplica(f"{name}-{number}", name, times[name], chunk_tokens=chunk_tokens)
        for name, count in counts.items()
        for number in range(count)
    ]


def replay(
    allocation: Allocation,
    problem: AllocationProblem,
    times: Mapping[str, StepTimes],
    requests: Sequence[Request],
    *,
    rule: Rule = "occupancy",
    chunk_tokens: int | None = 512,
    warmup_s: float = 60.0,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> ReplayReport:
    """Serves `requests` on what a plan rents, and compares with the objective that it was made for.

    Args:
      times: of a step, by type.
      rule: of routing, see `MixedFleet`.
      chunk_tokens: of prompts in a step; None: whole prompts.
      warmup_s: requests that arrive before do not count.
      seed: of what the rule draws. The requests are the caller's: made anew for each replay, since they are written to.
    """
    replicas = fleet_of(allocation.counts, times, chunk_tokens=chunk_tokens)
    kinds = {replica.name: replica.kind for replica in replicas}
    policy = MixedFleet(routing_table(allocation, problem), kinds, rule, seed=seed)
    longest = problem.workload.grid.output_edges_tokens[-1]
    run_fleet(replicas, policy, requests, max_tokens=longest, on_progress=on_progress)
    return report_of(requests, replicas, problem.profile.objective, warmup_s=warmup_s)
