"""What users wait for: requests through the replicas that were ready, one shared queue, first come first served.

A replica serves one request at a time. What becomes of a request whose replica is taken away is the difference between
systems: it starts again elsewhere, goes on where it was, or is lost.
"""

import collections
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxstack.fleet.spot.simulator import ReadySpan
from jaxstack.runtime.errors import UserError

OnPreempted = Literal["restart", "resume", "lose"]


@dataclass(frozen=True)
class LatencyReport:
    """How long each request took, in the order of arrival.

    Args:
      latency_s: from arrival to the last token; the timeout where it was not met.
      failed: requests that ran into the timeout or were lost.
      interrupted: times a replica was taken away from a request.
    """

    latency_s: Float[np.ndarray, " requests"]
    failed: int
    interrupted: int

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latency_s, q)) if len(self.latency_s) else 0.0

    @property
    def failed_share(self) -> float:
        return self.failed / max(1, len(self.latency_s))


def poisson_arrivals(rate_rps: float, start_s: float, end_s: float, seed: int) -> Float[np.ndarray, " requests"]:
    """Times of a Poisson process."""
    rng = np.random.default_rng([seed, 0])
    count = rng.poisson(rate_rps * max(0.0, end_s - start_s))
    return np.sort(rng.uniform(start_s, end_s, count))


def exponential_services(count: int, mean_s: float, seed: int) -> Float[np.ndarray, " requests"]:
    """Seconds that each request keeps a replica busy."""
    return np.random.default_rng([seed, 1]).exponential(mean_s, count)


def replay(
    spans: Sequence[ReadySpan],
    arrival_s: Float[np.ndarray, " requests"],
    service_s: Float[np.ndarray, " requests"],
    *,
    timeout_s: float = 100.0,
    on_preempted: OnPreempted = "restart",
) -> LatencyReport:
    """Sends requests through replicas that are ready during `spans`.

    A stopped replica finishes what it has; a preempted one does not. A client leaves at its timeout, which frees its
    replica. An interrupted request goes to the head of the queue.
    """
    if len(arrival_s) != len(service_s) or not timeout_s > 0:
        raise UserError(
            f"found {len(arrival_s)} arrivals, {len(service_s)} services and a timeout of {timeout_s} s, expected as "
            "many services as arrivals, and a timeout > 0"
        )
    return _Replay(arrival_s.tolist(), service_s.tolist(), timeout_s, on_preempted).run(spans)


_UP, _DOWN, _FINISH, _ARRIVE = range(4)  # at one time, in this order


class _Replay:
    def __init__(self, arrival_s: list[float], service_s: list[float], timeout_s: float, on_preempted: OnPreempted):
        self._arrival_s, self._left_s = arrival_s, service_s
        self._timeout_s, self._on_preempted = timeout_s, on_preempted
        self._latency_s = [timeout_s] * len(arrival_s)
        self._queue: collections.deque[int] = collections.deque()
        self._idle: set[int] = set()
        self._draining: set[int] = set()
        self._serving: dict[int, tuple[int, float, int]] = {}  # replica -> request, since when, ticket of its end
        self._events: list[tuple[float, int, int, int]] = []  # time, what, ticket, replica or request
        self._tickets = itertools.count()
        self._failed, self._interrupted = 0, 0

    def run(self, spans: Sequence[ReadySpan]) -> LatencyReport:
        for number, span in enumerate(spans):
            self._at(span.start_s, _UP, number)
            if span.end != "open":
                self._at(span.end_s, _DOWN, number)
        for request, when_s in enumerate(self._arrival_s):
            self._at(when_s, _ARRIVE, request)
        while self._events:
            now_s, what, ticket, which = heapq.heappop(self._events)
            if what == _ARRIVE:
                self._queue.append(which)
            elif what == _UP:
                self._idle.add(which)
            elif what == _DOWN:
                self._down(which, now_s, spans[which].end == "preempted")
            elif self._serving.get(which, (0, 0.0, -1))[2] == ticket:
                self._finish(which, now_s)
            self._dispatch(now_s)
        self._failed += len(self._queue)  # nobody came for them
        return LatencyReport(np.array(self._latency_s, np.float64), self._failed, self._interrupted)

    def _at(self, when_s: float, what: int, which: int) -> int:
        ticket = next(self._tickets)
        heapq.heappush(self._events, (when_s, what, ticket, which))
        return ticket

    def _dispatch(self, now_s: float) -> None:
        while self._queue and self._idle:
            request = self._queue.popleft()
            leaves_s = self._arrival_s[request] + self._timeout_s
            if now_s >= leaves_s:
                self._failed += 1
                continue
            replica = min(self._idle)
            self._idle.remove(replica)
            ticket = self._at(min(now_s + self._left_s[request], leaves_s), _FINISH, replica)
            self._serving[replica] = (request, now_s, ticket)

    def _finish(self, replica: int, now_s: float) -> None:
        request, since_s, _ = self._serving.pop(replica)
        if now_s < since_s + self._left_s[request] - 1e-9:  # the client has left
            self._failed += 1
        else:
            self._latency_s[request] = now_s - self._arrival_s[request]
        if replica not in self._draining:
            self._idle.add(replica)

    def _down(self, replica: int, now_s: float, preempted: bool) -> None:
        self._idle.discard(replica)
        if replica not in self._serving:
            return
        if not preempted:
            self._draining.add(replica)
            return
        request, since_s, _ = self._serving.pop(replica)
        self._interrupted += 1
        if self._on_preempted == "lose":
            self._failed += 1
            return
        if self._on_preempted == "resume":
            self._left_s[request] -= now_s - since_s
        self._queue.appendleft(request)
