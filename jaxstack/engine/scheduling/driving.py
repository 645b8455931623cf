"""Load for a replica, real or simulated: what arrives, what comes of it, and the loop that brings the two together.

A `Workload` says what arrives, at the start and in answer to what has been answered, so closed loops and programs whose
steps depend on each other are workloads like any trace. A `Server` takes arrivals and steps: `SimulatedReplica`, a
fleet of them, or `EngineServer` around a live engine. `drive` runs one against the other. Plain Python, no jax.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Protocol

TokenIds = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Arrival:
    """One request to come.

    Args:
      client: who asks.
      prompt: token ids.
      output_tokens: length of the answer.
      at_s: when it arrives, on the server's clock; at once if that is past.
      max_tokens: what the scheduler believes that the answer may take; `output_tokens` by default.
      answer: the answer's tokens in a simulation; made up by default. A live engine gives its own.
      enters_at: of a recorded request: the steps launched plus steps settled before it is let in (see `Observer`).
      leaves_after_s: the client gives up so long after the arrival.
      tag: the workload's own.
    """

    client: str
    prompt: TokenIds
    output_tokens: int
    at_s: float = 0.0
    max_tokens: int | None = None
    answer: TokenIds | None = None
    enters_at: int | None = None
    leaves_after_s: float | None = None
    namespace: Hashable = None
    priority: int = 0
    tag: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """A request that is over. Times are the server's; `first_token_s` and `scheduled_s` are None if it never got there.

    `cached_tokens` of the prompt were not computed. `replica` numbers where it ran.
    """

    arrival: Arrival
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    finished_s: float
    cached_tokens: int
    answer: TokenIds
    finish_reason: str
    replica: int = 0

    @property
    def client(self) -> str:
        return self.arrival.client

    @property
    def prompt_tokens(self) -> int:
        return len(self.arrival.prompt)

    @property
    def output_tokens(self) -> int:
        return len(self.answer)

    @property
    def time_to_first_token_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrival_s


class Workload(Protocol):
    """What arrives. Deterministic: the same outcomes in the same order give the same arrivals."""

    def start(self) -> Iterable[Arrival]:
        """What arrives whatever happens, in order where the times are equal."""
        ...

    def on_done(self, outcome: Outcome) -> Iterable[Arrival]:
        """What arrives because a request is over; `at_s` may be in the past for at once."""
        ...


class Server(Protocol):
    """What takes arrivals and works on them, step by step."""

    @property
    def now_s(self) -> float:
        """Seconds since it began."""
        ...

    def submit(self, arrival: Arrival) -> None:
        """Lets a request wait, from the next step on."""
        ...

    def turn(self) -> list[Outcome] | None:
        """Takes a step, or a part of one, and returns what is over with it; None when there is nothing to do."""
        ...

    def wait_until(self, when_s: float) -> None:
        """Lets time pass, with nothing to do."""
        ...


class OpenLoop:
    """Arrivals that wait for nobody."""

    def __init__(self, arrivals: Iterable[Arrival]):
        self._arrivals = sorted(arrivals, key=lambda arrival: arrival.at_s)

    def start(self) -> list[Arrival]:
        return self._arrivals

    def on_done(self, outcome: Outcome) -> tuple[Arrival, ...]:
        return ()


class Together:
    """Several workloads at once. Their clients must differ: whose answer it is decides who is told.

    Args:
      workloads: of each the clients it has, and itself.
    """

    def __init__(self, *workloads: Workload):
        self._workloads = workloads
        self._owner: dict[str, Workload] = {}

    def start(self) -> Iterator[Arrival]:
        rounds = [self._owned(workload, workload.start()) for workload in self._workloads]
        for several in itertools.zip_longest(*rounds):  # in turns, so that none is first throughout
            yield from (arrival for arrival in several if arrival is not None)

    def on_done(self, outcome: Outcome) -> Iterable[Arrival]:
        workload = self._owner[outcome.client]
        return self._owned(workload, workload.on_done(outcome))

    def _owned(self, workload: Workload, arrivals: Iterable[Arrival]) -> list[Arrival]:
        arrivals = list(arrivals)
        for arrival in arrivals:
            if self._owner.setdefault(arrival.client, workload) is not workload:
                raise ValueError(f"client {arrival.client!r} belongs to two workloads")
        return arrivals


def drive(
    server: Server,
    workload: Workload,
    *,
    until_s: float = float("inf"),
    on_outcome: Callable[[Outcome], object] = lambda outcome: None,
    on_turn: Callable[[], object] = lambda: None,
) -> None:
    """Runs `workload` on `server` until its clock shows `until_s`, or until nothing is left to do.

    Requests that are still open then stay where they are.
    """
    ticket = itertools.count()
    timed: list[tuple[float, int, Arrival]] = []

    def take(arrivals: Iterable[Arrival]) -> None:
        for arrival in arrivals:
            if arrival.at_s <= server.now_s:
                server.submit(arrival)
            else:
                heapq.heappush(timed, (arrival.at_s, next(ticket), arrival))

    take(workload.start())
    while server.now_s < until_s:
        while timed and timed[0][0] <= server.now_s:
            server.submit(heapq.heappop(timed)[2])
        outcomes = server.turn()
        if outcomes is None:
            if not timed:
                return
            server.wait_until(min(timed[0][0], until_s))
            continue
        for outcome in outcomes:
            on_outcome(outcome)
            take(workload.on_done(outcome))
        on_turn()
