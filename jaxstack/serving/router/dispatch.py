"""The way of one request through the router: choose, send, pass the answer on, and try again where that is honest.

A request may be sent again as long as its client has had nothing of an answer: the replica was lost, or has no room.
From the first event on the answer is passed on event by event as it comes, no faster than the client takes it. If the
replica is lost then, another goes on with the answer where that is possible (`migration.py`): the client sees one
stream. Where it is not, the stream ends with an error event.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jaxstack.serving.errors import ApiError, unavailable
from jaxstack.serving.exchange import Exchange
from jaxstack.serving.prefix_keys import PrefixKeys
from jaxstack.serving.router.config import RouterConfig
from jaxstack.serving.router.migration import StreamJournal
from jaxstack.serving.router.policies import RoutedRequest, RoutingPolicy
from jaxstack.serving.router.replica import Replica, ReplicaLost
from jaxstack.serving.router.tally import Tally
from jaxstack.serving.router.upstream import UpstreamAnswer, UpstreamError

log = logging.getLogger(__name__)

# Answers that say "not here, not now": another replica may have room.
_ELSEWHERE = frozenset({429, 502, 503, 504})
_KEPT_HEADERS = ("retry-after", "www-authenticate")
_JOURNALED = frozenset({"/v1/completions", "/v1/chat/completions"})
# Between two looks for a replica, where nobody will say that there is one; and between two signs of life to a client.
_LOOK_S, _FULL_S, _COMMENT_S = 1.0, 0.25, 5.0


@dataclasses.dataclass(frozen=True)
class Incoming:
    """A request that has been read.

    Attributes:
      prefix: what `routed` was made of.
      headers: for the replica.
      stream: whether its client wants events.
    """

    path: str
    body: bytes
    headers: dict[str, str]
    prefix: PrefixKeys
    routed: RoutedRequest
    stream: bool = False


class _Refused(Exception):
    def __init__(self, status: int, headers: dict[str, str], body: bytes):
        super().__init__(status)
        self.status, self.headers, self.body = status, headers, body


@dataclasses.dataclass
class Counts:
    """Totals since the start. `outcomes` are by (replica, word); `lost_answers` had begun and could not be ended."""

    outcomes: "collections.Counter[tuple[str, str]]" = dataclasses.field(default_factory=collections.Counter)
    arrivals: int = 0
    resent: int = 0
    resumed: int = 0
    resumed_tokens: int = 0
    lost_answers: int = 0
    held: int = 0
    decisions: int = 0
    decision_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    expected_cached_tokens: int = 0
    output_tokens: int = 0
    policy_errors: int = 0


class Dispatcher:
    """Sends requests to replicas as a policy says, and keeps its books.

    Args:
      replicas: all there are now.

    Attributes:
      bytes_per_token: of prompts, as the replicas' counts have it of late.
      waiting: requests that wait for a replica.
    """

    def __init__(self, replicas: Sequence[Replica], policy: RoutingPolicy, config: RouterConfig):
        self.replicas, self.policy, self.config = replicas, policy, config
        self.counts = Counts()
        self.bytes_per_token = 4.0
        self._ending = False
        self._changed = asyncio.Event()
        self.waiting = 0

    def changed(self) -> None:
        """A replica takes requests that did not: whoever waits for one looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def route(self, exchange: Exchange, incoming: Incoming) -> None:
        """Answers a request. Raises ApiError where no replica does."""
        self.counts.arrivals += 1
        journal = StreamJournal() if self.config.migration_limit and incoming.path in _JOURNALED else None
        refusals: dict[str, _Refused] = {}
        lost_with: list[Replica] = []
        deadline = _now() + self.config.hold_timeout_s
        while not self._ending:
            resuming = journal is not None and journal.resumable
            replica = await self._find(exchange, incoming.routed, refusals, lost_with, deadline, patient=resuming)
            if replica is None:
                break
            try:
                await self._attempt(exchange, incoming, replica, journal)
                return
            except _Refused as refused:
                refusals[replica.name] = refused
            except ReplicaLost as lost:
                lost_with.append(replica)
                log.warning(
                    "request %s: replica %s was lost (%s)", incoming.headers["x-request-id"], replica.name, lost
                )
                if replica.state == "ready":
                    await replica.look()
                if journal is not None and journal.resumable:
                    if journal.resumptions == self.config.migration_limit:
                        break
                    journal.resumptions += 1
                    refusals.clear()
                    deadline = _now() + self.config.resume_timeout_s
                    continue
                if len(lost_with) > self.config.retries:
                    break
            self.counts.resent += 1
        if journal is not None and journal.resumable:
            self.counts.lost_answers += 1
            tries = f"after {journal.tokens} tokens and {journal.resumptions} resumptions"
            raise ApiError(502, f"the replica was lost in the middle of this answer, {tries}", code="replica_lost")
        if self._ending:
            raise unavailable("the router is shutting down", "shutting_down", 10)
        if refusals:
            await self._pass_refusal(exchange, list(refusals.values())[-1])
            return
        if lost_with:
            message = f"this request was sent {len(lost_with)} times, and each time the replica was lost"
            raise ApiError(502, message, code="replica_lost", headers={"retry-after": "1"})
        raise self.nobody()

    def nobody(self) -> ApiError:
        """Why no replica can be asked."""
        states = ", ".join(f"{r.name} is {r.as_json()['state']}" for r in self.replicas)
        return unavailable(f"no replica takes requests: {states}", "no_replica")

    def end_all(self) -> None:
        """Ends everything under way."""
        self._ending = True
        self.changed()
        for replica in self.replicas:
            replica.interrupt()

    # Inside.

    def _choose(self, routed: RoutedRequest, usable: Sequence[Replica]) -> Replica:
        start = time.perf_counter()
        replica = self._tell("choose", routed, usable)
        if replica is None:  # the policy failed; no request shall suffer for it
            replica = min(usable, key=lambda r: r.active)
        self.counts.decisions += 1
        self.counts.decision_seconds += time.perf_counter() - start
        return replica

    async def _find(
        self,
        exchange: Exchange,
        routed: RoutedRequest,
        refusals: dict[str, _Refused],
        lost_with: list[Replica],
        deadline: float,
        *,
        patient: bool,
    ) -> Replica | None:
        """A replica that may be asked; waits for one until `deadline`. Whoever has refused is asked once more only if
        `patient`.
        """
        held, told = False, _now()
        try:
            while not self._ending:
                usable = [r for r in self.replicas if r.usable and r.name not in refusals]
                if usable:
                    # One that lost it and is well again comes last.
                    return self._choose(routed, [r for r in usable if r not in lost_with] or usable)
                left = deadline - _now()
                if left <= 0 or (refusals and not patient):
                    return None
                if not held:
                    held = True
                    self.counts.held += 1
                    self.waiting += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(left, _FULL_S if refusals else _LOOK_S))
                refusals.clear()
                if exchange.started and _now() - told > _COMMENT_S:
                    told = _now()
                    await exchange.comment()
            return None
        finally:
            self.waiting -= held

    async def _attempt(
        self, exchange: Exchange, incoming: Incoming, replica: Replica, journal: StreamJournal | None
    ) -> None:
        """Sends a request, or what is left of it, to one replica. Raises ReplicaLost or _Refused where another may be
        tried.
        """
        routed, tally = incoming.routed, Tally()
        path, body, headers = incoming.path, incoming.body, incoming.headers
        resuming = journal is not None and journal.resumable
        if journal is not None:
            headers = headers | journal.headers
            journal.attempt()
            if resuming:
                path, body = journal.resumption(path, body)
                self.counts.resumed += 1
                self.counts.resumed_tokens += journal.tokens
                if exchange.started:
                    await exchange.comment(b"resumed at " + replica.name.encode())
        self.counts.expected_cached_tokens += self._tell("cached", routed, replica) or 0
        self._tell("on_dispatch", routed, replica)
        replica.active += 1
        exchange.more_headers["x-replica"] = replica.name
        outcome = "abandoned"  # unless it comes to something else: the client has left
        try:
            async with replica.while_alive():
                answer = await replica.upstream.send("POST", path, headers, body)
                with contextlib.closing(answer):
                    if resuming and answer.status != 200:  # it cannot; whoever has begun this answer could
                        raise _Refused(answer.status, {}, b"")
                    await self._pass_on(exchange, answer, tally, journal, incoming.stream)
            outcome = "answered" if answer.status < 400 else "rejected"
        except _Refused:
            outcome = "refused"
            raise
        except ReplicaLost as lost:
            outcome = "lost"
            if tally.events and not (journal is not None and journal.resumable):
                self.counts.lost_answers += 1
                message = f"the replica was lost in the middle of this answer, after {tally.events} events"
                raise ApiError(502, message, code="replica_lost") from lost
            if self._ending:
                raise unavailable("the router is shutting down", "shutting_down", 10) from lost
            raise
        except ApiError:
            outcome = "lost"
            raise
        finally:
            replica.active -= 1
            self.counts.outcomes[replica.name, outcome] += 1
            self._settle(incoming, replica, tally, kept=outcome in ("answered", "abandoned"))

    async def _pass_on(
        self, exchange: Exchange, answer: UpstreamAnswer, tally: Tally, journal: StreamJournal | None, stream: bool
    ) -> None:
        kind = answer.headers.get("content-type", "application/json")
        if answer.status == 200 and kind.startswith("text/event-stream"):
            whole: list[bytes] = []
            async for piece in self._in_time(answer, journal):
                committed = piece if journal is None else journal.take(piece)
                if journal is not None and journal.kept and not stream:
                    whole.append(committed)
                    continue
                events = tally.events_of(committed)
                if events:
                    if not exchange.started:
                        await exchange.start_events()
                    await exchange.pass_on(events)
            if journal is not None and journal.kept:
                if not journal.complete:
                    raise ReplicaLost("it broke off")
                if not stream:
                    body = b"".join(whole).rpartition(b"data: ")[2].rstrip()
                    tally.whole(body)
                    await exchange.answer_bytes(body, "application/json", journal.status)
                    return
            last = tally.end_of_events()
            if not exchange.started:
                await exchange.start_events()
            await exchange.end_events(last)
            return
        pieces, size = [], 0
        async for piece in answer.pieces():
            pieces.append(piece)
            size += len(piece)
            if size > self.config.max_answer_bytes:
                message = f"the replica's answer has more than {self.config.max_answer_bytes} bytes; ask for a stream"
                raise ApiError(502, message, code="answer_too_large")
        body = b"".join(pieces)
        headers = {name: answer.headers[name] for name in _KEPT_HEADERS if name in answer.headers}
        if answer.status in _ELSEWHERE:
            raise _Refused(answer.status, {"content-type": kind, **headers}, body)
        tally.whole(body)
        if exchange.started:  # comments have been sent: this must be an event
            await self._pass_refusal(exchange, _Refused(answer.status, headers, body))
        else:
            await exchange.answer_bytes(body, kind, answer.status, headers)

    async def _in_time(self, answer: UpstreamAnswer, journal: StreamJournal | None) -> AsyncIterator[bytes]:
        """What comes of an answer. Raises UpstreamError where one that could go on elsewhere has stopped coming."""
        async with contextlib.aclosing(answer.pieces()) as pieces:
            while True:
                kept = journal is not None and journal.kept
                try:
                    async with asyncio.timeout(self.config.silence_timeout_s if kept else None) as limit:
                        piece = await anext(pieces, None)
                except TimeoutError:
                    if not limit.expired():
                        raise
                    raise UpstreamError(f"it said nothing for {self.config.silence_timeout_s} s") from None
                except UpstreamError:
                    if journal is None or not journal.complete:
                        raise
                    return  # lost behind the last word
                if piece is None:
                    return
                yield piece

    async def _pass_refusal(self, exchange: Exchange, refused: _Refused) -> None:
        if exchange.started:
            await exchange.pass_on(b"data: " + b" ".join(refused.body.split(b"\n")) + b"\n\n")
            await exchange.end_events(b"")
        else:
            kind = refused.headers.pop("content-type", "application/json")
            await exchange.answer_bytes(refused.body, kind, refused.status, refused.headers)

    def _settle(self, incoming: Incoming, replica: Replica, tally: Tally, *, kept: bool) -> None:
        if not kept:
            self._tell("on_failed", incoming.routed, replica)
            return
        counts, prompt = self.counts, tally.prompt_tokens
        self._tell("on_finish", incoming.routed, replica, tally.cached_tokens, tally.output_tokens, prompt)
        counts.output_tokens += tally.output_tokens
        if prompt is not None:
            counts.prompt_tokens += prompt
            counts.cached_tokens += tally.cached_tokens or 0
            if prompt > 16:
                ratio = min(16.0, max(0.25, incoming.prefix.length / prompt))
                self.bytes_per_token += 0.05 * (ratio - self.bytes_per_token)

    def _tell(self, what: str, *arguments: Any) -> Any:
        """Calls a method of the policy; its failure is logged, the first time with a trace, and counted."""
        call: Callable[..., Any] = getattr(self.policy, what)
        try:
            return call(*arguments)
        except Exception as error:
            self.counts.policy_errors += 1
            log.error("policy, %s: %r", what, error, exc_info=self.counts.policy_errors == 1)
            return None

    def evicted(self, replica: Replica, keys: Sequence[int]) -> None:
        self._tell("on_evicted", replica, keys)

    def restarted(self, replica: Replica) -> None:
        self._tell("on_restart", replica)


def _now() -> float:
    return time.monotonic()


async def forward(exchange: Exchange, replicas: Sequence[Replica], body: bytes | None, headers: dict[str, str]) -> bool:
    """Passes a small request on as it is, to the least busy of `replicas` that answers; whether one did."""
    scope = exchange.scope
    for replica in sorted(replicas, key=lambda r: r.active):
        try:
            async with replica.while_alive(), asyncio.timeout(60):
                status, given, content = await replica.upstream.fetch(
                    scope["method"], scope["raw_path"].decode("latin-1"), headers, body or b""
                )
        except (ReplicaLost, TimeoutError):
            if replica.state == "ready":
                await replica.look()
            continue
        await exchange.answer_bytes(content, given.get("content-type", "application/json"), status)
        return True
    return False
