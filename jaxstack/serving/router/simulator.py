"""Many replicas under one virtual clock, and the router's own policies between them: no sockets, no model.

Each replica is the engine's scheduler (`SimulatedReplica`) and takes its steps at its own pace; what happens, happens
in the order of the clock. The policy is told what the live router would tell it: dispatches, ends with the cached
tokens that the replica counted, and evictions, `report_delay_s` late. Plain Python, no jax.
"""

import collections
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

from jaxstack.engine.observer import Silent
from jaxstack.engine.scheduling.driving import Arrival, Outcome
from jaxstack.engine.scheduling.simulator import SimulatedReplica, VirtualClock
from jaxstack.engine.step_plan import StepPlan
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.policies import RoutedRequest, RoutingPolicy


class SimulatedTarget(Silent):
    """A replica as a routing policy sees it, and what it reports: the keys of the pages that its cache loses."""

    def __init__(self, replica: SimulatedReplica):
        self.replica = replica
        self.name = f"replica-{replica.number}"
        self.active = 0
        self.due_s: float | None = None
        self._keys: dict[int, int] = {}  # page -> key
        self._routed: Mapping[Arrival, RoutedRequest] = {}

    def watch(
        self, routed: Mapping[Arrival, RoutedRequest], report: Callable[["SimulatedTarget", list[int]], None]
    ) -> None:
        """Calls `report` with the keys of evicted pages; `routed` has the keys of the requests under way."""
        self._routed = routed
        self.replica.observers.append(self)

        def evicted(pages: Sequence[int]) -> None:
            lost = [key for page in pages if (key := self._keys.pop(page, None)) is not None]
            if lost:
                report(self, lost)

        self.replica.scheduler.pool.on_evicted = evicted

    def on_step(self, plan: StepPlan, rows: int, launched_s: float, settled_s: float) -> None:
        """Learns which pages hold which prefixes: those of prompts that are computed, and what they found cached."""
        size = self.replica.scheduler.page_size
        for row in plan.rows:
            sequence = row.sequence
            if row.start < len(sequence.request.prompt) and sequence.finish_reason is None:
                keys = self._routed[self.replica.arrival_of(sequence)].keys
                first = 0 if row.start <= (sequence.request.cached_tokens or 0) else row.start // size
                for page, key in zip(sequence.pages[first:], keys[first : (row.start + row.count) // size]):
                    self._keys[page] = key


class SimulatedFleet:
    """A `Server` (see `jaxstack.engine.scheduling.driving`) of many replicas.

    Args:
      make_replica: a replica of the given number on the given clock; all share one.
      replicas: how many.
      make_policy: the routing policy, told the virtual clock where it wants one.
      report_delay_s: how late the router hears of evictions.

    Attributes:
      dispatched: requests sent to each replica so far.
    """

    def __init__(
        self,
        make_replica: Callable[[int, VirtualClock], SimulatedReplica],
        replicas: int,
        make_policy: Callable[[VirtualClock], RoutingPolicy],
        *,
        report_delay_s: float = 0.1,
    ):
        if replicas < 1:
            raise UserError(f"replicas: found {replicas}, expected an integer >= 1")
        self.clock = VirtualClock()
        self.targets = [SimulatedTarget(make_replica(number, self.clock)) for number in range(replicas)]
        self.policy = make_policy(self.clock)
        self.dispatched = [0] * replicas
        self._page_size = self.targets[0].replica.scheduler.page_size
        self._routed: dict[Arrival, RoutedRequest] = {}
        self._ticket = itertools.count()
        self._due: list[tuple[float, int, SimulatedTarget]] = []
        self._delay_s = report_delay_s
        self._reports: collections.deque[tuple[float, SimulatedTarget, list[int]]] = collections.deque()
        for target in self.targets:
            target.watch(self._routed, self._evicted)

    @property
    def now_s(self) -> float:
        return self.clock.now_s

    @property
    def replicas(self) -> list[SimulatedReplica]:
        return [target.replica for target in self.targets]

    def submit(self, arrival: Arrival) -> None:
        """Routes a request."""
        self._hear()
        salt = repr(arrival.namespace).encode() if arrival.namespace is not None else b""
        limit = arrival.max_tokens or arrival.output_tokens
        routed = RoutedRequest.of_tokens(arrival.client, arrival.prompt, limit, self._page_size, salt)
        target = self.policy.choose(routed, self.targets)
        self.policy.on_dispatch(routed, target)
        self._routed[arrival] = routed
        target.active += 1
        self.dispatched[target.replica.number] += 1
        target.replica.submit(arrival)

    def turn(self) -> list[Outcome] | None:
        """Until the next step of some replica has settled."""
        for target in self.targets:
            if target.due_s is None:
                self._begin(target)
        if not self._due:
            return None
        when_s, _, target = heapq.heappop(self._due)
        self.clock.advance(when_s)
        outcomes = target.replica.finish()
        target.due_s = None
        for outcome in outcomes:
            routed = self._routed.pop(outcome.arrival)
            target.active -= 1
            self.policy.on_finish(
                routed, target, outcome.cached_tokens, outcome.output_tokens, prompt_tokens=outcome.prompt_tokens
            )
        return outcomes

    def wait_until(self, when_s: float) -> None:
        self.clock.advance(when_s)

    # Inside.

    def _begin(self, target: SimulatedTarget) -> None:
        target.due_s = target.replica.begin()
        if target.due_s is not None:
            heapq.heappush(self._due, (target.due_s, next(self._ticket), target))

    def _evicted(self, target: "SimulatedTarget", keys: list[int]) -> None:
        self._reports.append((self.now_s + self._delay_s, target, keys))

    def _hear(self) -> None:
        """Lets the policy know of the evictions that it would have heard of by now."""
        while self._reports and self._reports[0][0] <= self.now_s:
            _, target, keys = self._reports.popleft()
            self.policy.on_evicted(target, keys)
