"""A joint plan on markets that it was not made from: its cost, who was ready, and requests through those who were."""

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from jaxstack.fleet.allocation.problem import AllocationProblem
from jaxstack.fleet.allocation.program import even_shares
from jaxstack.fleet.allocation.routing import routing_table
from jaxstack.fleet.joint import TICK_S, JointPlan
from jaxstack.fleet.simulator.arrivals import Request
from jaxstack.fleet.simulator.replaying import ReplayReport, report_of
from jaxstack.fleet.simulator.replica import StepReplica
from jaxstack.fleet.simulator.step_times import StepTimes
from jaxstack.fleet.spot.simulator import COLD_START_S, ReadySpan
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.mixed_fleet import MixedFleet, Rule
from jaxstack.serving.router.policies import RoutedRequest


@dataclasses.dataclass(frozen=True, eq=False)
class MarketReplay:
    """What a plan came to.

    Args:
      cost_usd_per_hour: mean.
      whole: share of time with all types as many as planned.
      carried: share of time in which those that were ready could carry the load, headroom left out, shared as well as
        they could.
      ready: replicas of each type of the plan, at each tick.
      spans: type -> when its replicas were ready.
    """

    cost_usd_per_hour: float
    whole: float
    carried: float
    ready: Mapping[str, Int[np.ndarray, " ticks"]]
    spans: Mapping[str, tuple[ReadySpan, ...]]


def replay_markets(
    plan: JointPlan,
    problem: AllocationProblem,
    markets: Mapping[str, SpotTrace],
    *,
    tick_s: float = TICK_S,
    cold_start_s: float = COLD_START_S,
) -> MarketReplay:
    """Runs the plan's policies, one for each type, on markets of the same time.

    Raises:
      UserError: there is no plan, a type of it has no market, or the markets are not equally long.
    """
    if not plan.found:
        raise UserError(f"plan: found one that is {plan.status}, expected one that can be run")
    missing = sorted(plan.counts.keys() - markets.keys())
    lengths = {round(markets[kind].duration_s) for kind in plan.counts if kind in markets}
    if missing or len(lengths) > 1:
        raise UserError(f"markets: found {missing or sorted(lengths)}, expected one for each type, equally long")
    results = {o.kind: o.run(markets[o.kind], tick_s=tick_s, cold_start_s=cold_start_s) for o in plan.options}
    warm = max(result.warm_ticks for result in results.values())
    ready = {kind: result.ready for kind, result in results.items()}
    rows = np.stack([ready.get(name, np.zeros_like(next(iter(ready.values())))) for name in problem.names], 1)[warm:]
    planned = np.array([plan.counts.get(name, 0) for name in problem.names])
    # Few different fleets are ever ready, and each is asked about once.
    fleets, places = np.unique(np.minimum(rows, planned), axis=0, return_inverse=True)
    demand = problem.demand() / (1 + problem.headroom)
    able = np.array([(split := even_shares(demand, fleet)) is not None and split[1] <= 1.0 for fleet in fleets])
    cost = sum(float(result.bill_usd_per_hour[warm:].mean()) for result in results.values())
    return MarketReplay(
        cost,
        float(np.mean((rows >= planned).all(1))),
        float(np.mean(able[places.ravel()])),
        ready,
        {kind: result.spans for kind, result in results.items()},
    )


def replay_requests(
    plan: JointPlan,
    problem: AllocationProblem,
    spans: Mapping[str, Sequence[ReadySpan]],
    times: Mapping[str, StepTimes],
    requests: Sequence[Request],
    *,
    rule: Rule = "occupancy",
    chunk_tokens: int | None = 512,
    warmup_s: float = 60.0,
    seed: int = 0,
) -> tuple[ReplayReport, int]:
    """Serves `requests`, in order of their times, with replicas that come and go, step by step.

    A replica that is taken away loses what it was doing: those requests start again elsewhere, and keep the time at
    which they arrived. One that is stopped finishes what it has. Where nobody is ready, requests wait.

    Returns:
      What became of them (but not how busy replicas were, which come and go), and how often one was interrupted.
    """
    lives = [
        (f"{kind}-{number}", kind, span)
        for kind, of_kind in spans.items()
        for number, span in enumerate(of_kind)
        if span.end_s > span.start_s
    ]
    kinds = {name: kind for name, kind, _ in lives}
    longest = problem.workload.grid.output_edges_tokens[-1]
    policy = MixedFleet(routing_table(plan.allocation(problem), problem), kinds, rule, seed=seed)
    run = _Requests(policy, longest)
    events: list[tuple[float, int, int]] = [(span.start_s, 0, place) for place, (_, _, span) in enumerate(lives)]
    events += [(span.end_s, 1, place) for place, (_, _, span) in enumerate(lives) if span.end != "open"]
    events += [(request.at_s, 2, place) for place, request in enumerate(requests)]
    heapq.heapify(events)
    while events:
        now_s, what, place = heapq.heappop(events)
        run.advance(now_s)
        if what == 2:
            run.submit(requests[place], now_s)
            continue
        name, kind, span = lives[place]
        if what == 0:
            run.up(StepReplica(name, kind, times[kind], chunk_tokens=chunk_tokens), now_s)
        else:
            run.down(name, now_s, preempted=span.end == "preempted")
    run.advance(math.inf)
    report = report_of(requests, run.replicas, problem.profile.objective, warmup_s=warmup_s)
    return dataclasses.replace(report, busy={}), run.interrupted


class _Requests:
    """Requests between replicas that are ready, draining, or gone."""

    def __init__(self, policy: MixedFleet, max_tokens: int):
        self._policy, self._max_tokens = policy, max_tokens
        self._ready: dict[str, StepReplica] = {}
        self._draining: dict[str, StepReplica] = {}
        self._routed: dict[str, dict[Request, RoutedRequest]] = {}
        self._waiting: list[Request] = []
        self.replicas: list[StepReplica] = []
        self.interrupted = 0

    def advance(self, until_s: float) -> None:
        for replicas in (self._ready, self._draining):
            for name, replica in list(replicas.items()):
                for request in replica.advance(until_s):
                    asked = self._routed[name].pop(request)
                    self._policy.on_finish(asked, replica, 0, request.output_tokens, request.input_tokens)
                if replicas is self._draining and not replica.active:
                    del replicas[name]

    def up(self, replica: StepReplica, now_s: float) -> None:
        self.replicas.append(replica)
        self._ready[replica.name] = replica
        self._routed[replica.name] = {}
        waiting, self._waiting = self._waiting, []
        for request in waiting:
            self.submit(request, now_s)

    def down(self, name: str, now_s: float, *, preempted: bool) -> None:
        replica = self._ready.pop(name)
        if not preempted:
            self._draining[name] = replica
            return
        for request, asked in list(self._routed[name].items()):
            self._policy.on_failed(asked, replica)
            request.first_s, request.replica = math.nan, ""
            self.interrupted += 1
            self.submit(request, now_s)
        self._routed[name].clear()

    def submit(self, request: Request, now_s: float) -> None:
        able = [replica for replica in self._ready.values() if replica.holds(request)]
        if not able:
            self._waiting.append(request)
            return
        asked = RoutedRequest("", (), (), request.input_tokens, self._max_tokens)
        chosen = self._policy.choose(asked, able)
        self._policy.on_dispatch(asked, chosen)
        self._routed[chosen.name][request] = asked
        chosen.submit(request, now_s)
