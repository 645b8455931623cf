"""The running answers of one HTTP request, between the engine and a client that may be slow or gone.

A pump task per prompt takes pieces from the engine as they come (of a whole answer: at its end) and merges what the
client has not taken yet, choice by choice. So the engine never waits for a reader, and what a slow one leaves lying is
no more than the text itself.
"""

import asyncio
import dataclasses
import uuid
from collections.abc import Sequence
from types import TracebackType

from jaxstack.engine import Delta, Engine, SamplingParams, TokenLogprob
from jaxstack.serving.errors import ApiError

# An answer that the engine should have ended by now is ended without it.
_GRACE_S = 1.0


@dataclasses.dataclass
class Piece:
    """What came for one choice since it was last taken. Choices of prompt i are numbered from i * n.

    The first piece of every choice has its prompt's log probabilities, if these were asked for.
    """

    choice: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    timed_out: bool = False
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    def extend(self, piece: "Piece") -> None:
        """Puts the next piece of the same choice behind this one."""
        self.text += piece.text
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason, self.stop_reason, self.timed_out = piece.finish_reason, piece.stop_reason, piece.timed_out
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.stop_reason = delta.stop_reason


@dataclasses.dataclass
class Usage:
    """Tokens of all prompts and choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """Use as `async with`; leaving it aborts what still runs.

    Args:
      prompts: token ids, one request to the engine each.
      whole: hand out nothing before everything has come.
      timeout_s: ends all choices with finish_reason "length" after so long.
      adapter, priority, client: as the engine's `submit`.
      seed: draws an answer to a request that brings none.
      emitted: for each prompt, of each of its choices what has been drawn elsewhere; None for one that has ended.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        whole: bool = False,
        timeout_s: float | None = None,
        adapter: str | None = None,
        priority: int = 0,
        client: str = "",
        seed: int | None = None,
        emitted: Sequence[Sequence[Sequence[int] | None]] | None = None,
    ):
        self._whole = whole
        self._engine, self._prompts, self._sampling = engine, prompts, sampling
        self._timeout_s, self._adapter, self._priority = timeout_s, adapter, priority
        self._client = client
        self._timed_out = self._late = False
        self._names = [f"http-{uuid.uuid4().hex}" for _ in prompts]
        self._seed, self._emitted = seed, emitted
        choices = [()] * (len(prompts) * sampling.n) if emitted is None else [c for of in emitted for c in of]
        self._open = {choice for choice, begun in enumerate(choices) if begun is not None}
        self._untaken: dict[int, Piece] = {}
        self._cached = [0] * len(prompts)
        self._begun: set[int] = set()
        self._prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}
        self._something = asyncio.Event()
        self._error: BaseException | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self.usage = Usage(prompt_tokens=sum(map(len, prompts)))

    async def __aenter__(self) -> "Generation":
        loop = asyncio.get_running_loop()
        # The engine keeps the time; this is for one that is stuck.
        self._deadline = None if self._timeout_s is None else loop.time() + self._timeout_s + _GRACE_S
        running = sorted({choice // self._sampling.n for choice in self._open})
        self._pumps = [loop.create_task(self._pump(which)) for which in running]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop_pumps()

    @property
    def finished(self) -> bool:
        """Whether every choice has ended and all of it has been taken."""
        return not self._open and not self._untaken

    async def take(self, patience_s: float | None = None) -> list[Piece]:
        """What has come since the last call, at most one piece a choice; waits for something, but `patience_s` at most.

        Raises:
          ApiError: 408, the time was over before the first token; 500, the engine failed on one of the choices.
          UserError, QueueFull, EngineDead: as the engine's `stream`.
        """
        now = asyncio.get_running_loop().time()
        left = None if self._deadline is None else self._deadline - now
        waits = [seconds for seconds in (patience_s, left) if seconds is not None]
        if not self._something.is_set():
            try:
                async with asyncio.timeout(min(waits) if waits else None):
                    await self._something.wait()
            except TimeoutError:
                pass
        if self._error is not None:
            raise self._error
        if self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
            self._late = True
            await self.abort()
        if self._timed_out and self.usage.completion_tokens == 0:
            raise ApiError(408, f"the time of {self._timeout_s} s was over before the first token", code="timeout")
        self._something.clear()
        pieces, self._untaken = list(self._untaken.values()), {}
        for piece in pieces:
            if piece.choice not in self._begun:
                self._begun.add(piece.choice)
                piece.prompt_logprobs = self._prompt_logprobs.get(piece.choice // self._sampling.n)
        return pieces

    async def abort(self) -> None:
        """Ends every open choice with finish_reason "abort"; what came before stays."""
        for name in self._names:
            self._engine.abort(name)
        if self._pumps:
            await asyncio.wait(self._pumps, timeout=_GRACE_S)  # the engine hands out what it has; or it is stuck
        await self._stop_pumps()
        for choice in sorted(self._open):
            piece = self._untaken.setdefault(choice, Piece(choice))
            self._finish(piece, "abort")
        self._open.clear()
        self._something.set()

    async def _stop_pumps(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def _finish(self, piece: Piece, reason: str | None) -> None:
        """Says how a choice ended; if by the clock, as if its length had been reached."""
        piece.timed_out = reason == "timeout" or (self._late and reason == "abort")
        piece.finish_reason = "length" if piece.timed_out else reason
        self._timed_out = self._timed_out or piece.timed_out

    async def _pump(self, which: int) -> None:
        first, sampling = which * self._sampling.n, self._sampling
        if self._seed is not None and sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=(self._seed + which) % 2**63)
        try:
            # The engine aborts the request when the iterator is closed, and a cancelled wait closes it.
            async for delta in self._engine.stream(
                self._prompts[which],
                sampling,
                self._names[which],
                whole=self._whole,
                adapter=self._adapter,
                priority=self._priority,
                client=self._client,
                timeout_s=self._timeout_s,
                emitted=None if self._emitted is None else self._emitted[which],
            ):
                self._add(which, first + delta.index, delta)
        except Exception as error:
            self._error = self._error or error
            self._something.set()

    def _add(self, which: int, choice: int, delta: Delta) -> None:
        piece = self._untaken.get(choice)
        if piece is None:
            piece = self._untaken[choice] = Piece(choice)
        piece.add(delta)
        self._finish(piece, delta.finish_reason)
        self.usage.completion_tokens += len(delta.token_ids) + delta.discarded_tokens
        self.usage.cached_tokens += delta.cached_tokens - self._cached[which]
        self._cached[which] = delta.cached_tokens
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[which] = delta.prompt_logprobs
        if delta.finish_reason == "error":
            self._error = self._error or ApiError(500, "the engine failed on this request", code="engine_error")
        if delta.finish_reason is not None:
            self._open.discard(choice)
        if not self._whole or not self._open or self._error is not None:
            self._something.set()
