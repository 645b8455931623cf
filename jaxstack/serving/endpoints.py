"""What the generating endpoints do, without HTTP: request bodies in, OpenAI's objects out.

The server answers sockets with it; the batch runner and the terminal chat use it in their own process. So a body means
the same thing wherever it is answered.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from jaxstack.engine import Engine
from jaxstack.serving.answers import Answer, ChatAnswer, CompletionAnswer
from jaxstack.serving.clients import Caller
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.embeddings import embeddings
from jaxstack.serving.generation import Generation, Piece, Usage
from jaxstack.serving.journal import BrokenOff, Journal, Resumed, check_resumed
from jaxstack.serving.prompts import Job, chat_job, completion_job

log = logging.getLogger(__name__)

_Prepare = Callable[[bytes, Engine, ServerConfig], Job]

# Requests for embeddings that the engine works on together.
_EMBEDDING_THREADS = 8

_GENERATING: dict[str, tuple[_Prepare, type[Answer]]] = {
    "/v1/completions": (completion_job, CompletionAnswer),
    "/v1/chat/completions": (chat_job, ChatAnswer),
}
GENERATING = tuple(_GENERATING)
EMBEDDINGS = "/v1/embeddings"
WHOLE_ANSWERS = (*_GENERATING, EMBEDDINGS)


class Commit(NamedTuple):
    """Chunks, and the pieces that they were made of: whoever has the ones need not be sent the others again. The last
    have no pieces: they count with the end of the answer.
    """

    chunks: list[dict[str, Any]]
    pieces: list[Piece] | None


def _resumed_job(prepare: _Prepare, resumed: Resumed, body: bytes, engine: Engine, config: ServerConfig) -> Job:
    """The job of a request that another server has begun to answer: with the prompts that it had, whatever a template
    makes of the conversation today.
    """
    job = prepare(body, engine, config)
    check_resumed(resumed, job.sampling)
    prompts = [engine.check_prompt(list(prompt), job.sampling) for prompt in resumed.prompts]
    left = None if job.timeout_s is None else max(1e-3, job.timeout_s - resumed.elapsed_s)
    return dataclasses.replace(job, prompts=prompts, timeout_s=left)


class Endpoints:
    """Answers request bodies with one engine, which must have been started.

    Args:
      config: its limits and names hold here too.
    """

    def __init__(self, engine: Engine, config: ServerConfig):
        self.engine, self.config = engine, config
        self._pool = ThreadPoolExecutor(config.tokenizer_threads, thread_name_prefix="prompts")
        self._waiting = ThreadPoolExecutor(_EMBEDDING_THREADS, thread_name_prefix="embeddings")
        self._running: set[Generation] = set()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._waiting.shutdown(wait=False, cancel_futures=True)

    async def on_pool(self, prepare: Callable[[bytes, Engine, ServerConfig], Any], body: bytes) -> Any:
        """`prepare(body, engine, config)` on a pool thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, prepare, body, self.engine, self.config)

    def in_background(self, work: Callable[..., None], *arguments: Any) -> None:
        """Calls `work` on a pool thread; what it raises is logged."""

        def logged() -> None:
            try:
                work(*arguments)
            except Exception:
                log.exception("%s", work)

        with contextlib.suppress(RuntimeError):  # closing
            self._pool.submit(logged)

    async def prepare(
        self, path: str, body: bytes, caller: Caller | None = None, journal: Journal | None = None
    ) -> Answer:
        """Reads and checks a request, which is `caller`'s; None for one made in this process. One that goes on with an
        answer from elsewhere has that one's prompts.

        Raises:
          ApiError, UserError: what is wrong with it.
        """
        prepare, answer = _GENERATING[path]
        if journal is not None and journal.resumed is not None:
            prepare = functools.partial(_resumed_job, prepare, journal.resumed)
        job = await self.on_pool(prepare, body)
        if caller is not None:
            job = dataclasses.replace(job, client=caller.client(job.request.user))
        return answer(job, self.engine.tokenizer, job.adapter or self.config.model_name, journal)

    async def answer(self, path: str, body: bytes) -> dict[str, Any]:
        """The whole response object; `path` is one of `WHOLE_ANSWERS`. Raises as `prepare` and `Generation.take`."""
        if path == EMBEDDINGS:
            return await self.embeddings(body)
        return await self.whole(await self.prepare(path, body))

    async def embeddings(self, body: bytes, caller: Caller | None = None) -> dict[str, Any]:
        """The response object of `embeddings`. Raises as it does."""
        # On threads of its own: it waits for the engine, and prompts must not wait for it.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._waiting, embeddings, body, self.engine, self.config, caller)

    async def whole(self, reply: Answer) -> dict[str, Any]:
        """The response object of a request that has been prepared."""
        async with self._generation(reply.job, whole=True) as generation:
            return reply.whole(await generation.take(), generation.usage)

    async def chunks(
        self, reply: Answer, patience_s: float | None = None
    ) -> AsyncGenerator[list[dict[str, Any]] | None]:
        """The response in chunks, as many at a time as have come; None each time nothing came for `patience_s`.

        Use `contextlib.aclosing`: leaving early ends the request.
        """
        async with self._generation(reply.job) as generation:
            opening = reply.opening()
            while not generation.finished:
                # What fails before the first of this has its own HTTP status.
                pieces = await generation.take(patience_s=patience_s)
                yield [*opening, *(c for piece in pieces for c in reply.chunks(piece))] if pieces or opening else None
                opening = []
            yield reply.closing(generation.usage)

    async def pieces(self, job: Job) -> AsyncGenerator[tuple[list[Piece], Usage]]:
        """What comes of a job as it comes, with the tokens so far; for whoever makes an answer of it elsewhere."""
        async with self._generation(job) as generation:
            while not generation.finished:
                yield await generation.take(), generation.usage

    async def journaled(self, reply: Answer, patience_s: float | None = None) -> AsyncGenerator[Commit | None]:
        """As `chunks`, with the pieces that they come from. An answer that is no stream comes as one chunk, at the end.

        Raises:
          BrokenOff: the engine ends the answer before its end.
        """
        stream, replayed = bool(reply.job.request.stream), reply.replay()
        opening = reply.opening()
        if reply.journal is not None and reply.journal.resumed is not None:
            opening = []
        if stream:
            for piece in replayed.values():  # so that what follows is read as its continuation
                reply.chunks(piece)
        async with self._generation(reply.job, journal=reply.journal) as generation:
            while not generation.finished:
                pieces = await generation.take(patience_s=patience_s)
                if any(piece.finish_reason == "abort" for piece in pieces):
                    raise BrokenOff
                if stream and (pieces or opening):
                    yield Commit([*opening, *(c for piece in pieces for c in reply.chunks(piece))], pieces)
                    opening = []
                elif pieces:
                    for piece in pieces:
                        replayed.setdefault(piece.choice, Piece(piece.choice)).extend(piece)
                    yield Commit([], pieces)
                else:
                    yield None
            if stream:
                yield Commit(reply.closing(generation.usage), None)
            else:
                yield Commit([reply.whole(replayed.values(), generation.usage)], None)

    async def abort_all(self) -> None:
        """Ends everything that is being answered; clients get what there is."""
        await asyncio.gather(*(generation.abort() for generation in self._running))

    @contextlib.asynccontextmanager
    async def _generation(
        self, job: Job, *, whole: bool = False, journal: Journal | None = None
    ) -> AsyncIterator[Generation]:
        resumed = None if journal is None else journal.resumed
        n = job.sampling.n
        async with Generation(
            self.engine,
            job.prompts,
            job.sampling,
            whole=whole,
            timeout_s=job.timeout_s,
            adapter=job.adapter,
            priority=job.request.priority,
            client=job.client,
            seed=None if journal is None else journal.seed,
            emitted=None if resumed is None else [resumed.emitted(i, n) for i in range(len(job.prompts))],
        ) as generation:
            if resumed is not None:
                generation.usage.completion_tokens += sum(len(drawn.token_ids) for drawn in resumed.choices)
            self._running.add(generation)
            try:
                yield generation
            finally:
                self._running.discard(generation)
