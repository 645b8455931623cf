"""From a lookup to an answer: replayed, joined, or generated. The order exact, in flight, near is a contract: a repeat
never counts as an answer from near requests, and never becomes a label.
"""

import asyncio
import contextlib
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from jaxstack.serving.semantic_cache.entry import CachedResponse
from jaxstack.serving.semantic_cache.flight import Chunk, Flight, Generate
from jaxstack.serving.semantic_cache.lookup import Lookup
from jaxstack.serving.semantic_cache.scope import CacheRequest

if TYPE_CHECKING:
    from jaxstack.serving.semantic_cache.cache import SemanticCache

# Words in one chunk of a replayed answer, so that it has about as many tokens as OpenAI's chunks at most have.
_WORDS = 8
_LONGEST = 48
# Requests looked up together.
_BATCH = 64


class Answered:
    """An answer as it comes, and how it came about.

    Attributes:
      lookup: what the cache said.
    """

    def __init__(self, lookup: Lookup, chunks: AsyncGenerator[Chunk], leave: Callable[[], None] | None = None):
        self.lookup, self._chunks, self._leave = lookup, chunks, leave

    def __aiter__(self) -> "Answered":
        return self

    async def __anext__(self) -> Chunk:
        return await self._chunks.__anext__()

    async def aclose(self) -> None:
        await self._chunks.aclose()
        if self._leave is not None:
            self._leave()


class Answers:
    """The asynchronous face of a cache. Belongs to one event loop."""

    def __init__(self, cache: "SemanticCache"):
        self._cache = cache
        self._flights: dict[Hashable, Flight] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-lookup")
        self._waiting: list[tuple[CacheRequest, asyncio.Future[Lookup]]] = []
        self._looking: asyncio.Task[None] | None = None

    async def answer(self, request: CacheRequest, generate: Generate) -> Answered:
        """See `SemanticCache.answer`."""
        if request.mode == "refresh" or request.bypass is not None:
            lookup = await self._look(request)
            return Answered(lookup, self._alone(lookup, generate))
        while True:
            # What was begun before an invalidation is joined by nobody who comes after it.
            key = (request.partition, request.exact, self._cache.epoch(request.owner))
            found = self._cache.repeat(request)
            if found is not None and found.response is not None:
                return Answered(found, self._replay(found.response))
            if found is not None:  # shadowed
                return Answered(found, self._alone(found, generate))
            flight = self._flights.get(key)
            if flight is None:
                break
            chunks, leave = flight.listen(generate)
            try:
                joined = await asyncio.shield(flight.decided)
            except asyncio.CancelledError:
                leave()
                raise
            if joined:
                return Answered(self._cache.count_coalesced(request), chunks, leave)
            if flight.passed_over is not None:
                # To try it again one after the other would keep the last of many waiting for very long.
                lookup = self._cache.pass_over(request, flight.passed_over)
                return Answered(lookup, generate_closing(generate))
            # It was answered from a near request: with a coin of its own, so is this one.
        flight = self._flights[key] = Flight()
        try:
            lookup = await self._look(request)
        except BaseException:
            flight.give_up()
            self._end(key, flight)
            raise
        if lookup.response is not None or lookup.kind == "bypass":
            flight.give_up(lookup.reason if lookup.kind == "bypass" else None)
            self._end(key, flight)
            if lookup.response is not None:
                return Answered(lookup, self._replay(lookup.response))
            return Answered(lookup, generate_closing(generate))
        began = time.monotonic()

        def ended(chunks: list[Chunk] | None) -> None:
            self._end(key, flight)
            self._settle(lookup, chunks, time.monotonic() - began)

        return Answered(lookup, *flight.start(generate, ended))

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _end(self, key: Hashable, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _settle(self, lookup: Lookup, chunks: list[Chunk] | None, seconds: float) -> None:
        if chunks and chunks[-1].finish_reason is not None:
            last = chunks[-1]
            text = "".join(chunk.text for chunk in chunks)
            took = (last.prompt_tokens, last.completion_tokens, seconds, last.stop_reason)
            self._cache.complete(lookup, CachedResponse(text, last.finish_reason or "", *took))
        else:
            self._cache.abandon(lookup)

    async def _alone(self, lookup: Lookup, generate: Generate) -> AsyncGenerator[Chunk]:
        """An answer that nobody joins."""
        began, chunks = time.monotonic(), list[Chunk]()
        try:
            async with contextlib.aclosing(generate()) as source:  # type: ignore[type-var]
                async for chunk in source:
                    chunks.append(chunk)
                    yield chunk
        finally:
            self._settle(lookup, chunks, time.monotonic() - began)

    async def _replay(self, response: CachedResponse) -> AsyncGenerator[Chunk]:
        texts = list(pieces(response.text)) or [""]
        pace = self._cache.config.replay_tokens_per_s
        pause = 0.0 if pace is None else response.completion_tokens / len(texts) / pace
        for text in texts[:-1]:
            yield Chunk(text)
            if pause:
                await asyncio.sleep(pause)
        yield Chunk(
            texts[-1],
            response.finish_reason,
            response.prompt_tokens,
            response.completion_tokens,
            response.stop_reason,
        )

    async def _look(self, request: CacheRequest) -> Lookup:
        """Looks up what has come while the lookup before was under way, all at once."""
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[Lookup] = loop.create_future()
        self._waiting.append((request, waiting))
        if self._looking is None or self._looking.done():
            self._looking = loop.create_task(self._look_all())
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled() and waiting.exception() is None:
                self._cache.abandon(waiting.result())
            raise

    async def _look_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            try:
                found = await loop.run_in_executor(self._thread, self._cache.lookup, [r for r, _ in batch])
            except Exception as error:
                for _, waiting in batch:
                    if not waiting.done():
                        waiting.set_exception(error)
                continue
            for (_, waiting), lookup in zip(batch, found):
                if waiting.done():  # whoever asked has gone
                    self._cache.abandon(lookup)
                else:
                    waiting.set_result(lookup)


async def generate_closing(generate: Generate) -> AsyncGenerator[Chunk]:
    """An answer that the cache has no part in."""
    async with contextlib.aclosing(generate()) as source:  # type: ignore[type-var]
        async for chunk in source:
            yield chunk


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of a few words; together they are the text."""
    for found in re.finditer(rf"\s*(?:\S+\s*){{1,{_WORDS}}}|\s+", text):
        piece = found.group()
        for first in range(0, len(piece), _LONGEST):
            yield piece[first : first + _LONGEST]


class OneAtATime:
    """A lock for each key, for as long as somebody wants it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[Hashable, tuple[threading.Lock, int]] = {}

    @contextlib.contextmanager
    def of(self, key: Hashable) -> Iterator[None]:
        with self._lock:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users = self._locks[key][1] - 1
                if users:
                    self._locks[key] = (lock, users)
                else:
                    del self._locks[key]
