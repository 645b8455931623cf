"""The cache before a server's engine: which requests it answers, what the answers look like, and its own endpoints.

An answer from the cache is made by the same code as one from the engine, from the same text, so that a client sees the
same bytes but for ids and times. Headers say how it came about: `x-cache` (exact, hit, coalesced, explore, miss or
bypass), `x-cache-reason`, `x-cache-entry`, `x-cache-similarity` and `age`.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pydantic

from jaxstack.engine import Engine
from jaxstack.serving.answers import Answer
from jaxstack.serving.clients import Caller, caller_of
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.endpoints import Endpoints
from jaxstack.serving.errors import ApiError, bad_field
from jaxstack.serving.exchange import USAGE_COMMENT, WANT_USAGE, Exchange, encode_json
from jaxstack.serving.generation import Piece, Usage
from jaxstack.serving.json_body import read_json
from jaxstack.serving.protocol import ChatRequest, read_as
from jaxstack.serving.semantic_cache.answers import Answered
from jaxstack.serving.semantic_cache.cache import SemanticCache
from jaxstack.serving.semantic_cache.flight import Chunk
from jaxstack.serving.semantic_cache.lookup import Lookup
from jaxstack.serving.semantic_cache.scope import CacheRequest


class FeedbackRequest(pydantic.BaseModel):
    """`POST /v1/cache/feedback`."""

    model_config = pydantic.ConfigDict(strict=True)
    correct: bool
    response_id: str | None = None
    entry_id: int | None = None


class InvalidateRequest(pydantic.BaseModel):
    """`POST /v1/cache/invalidate`."""

    model_config = pydantic.ConfigDict(strict=True, protected_namespaces=())
    entry_id: int | None = None
    model: str | None = None
    prompt_prefix: str | None = None
    older_than_s: float | None = pydantic.Field(default=None, ge=0)
    everything: bool = False


class CachedAnswers:
    """The way of a request through the cache."""

    def __init__(self, cache: SemanticCache, endpoints: Endpoints, config: ServerConfig):
        self.cache, self._endpoints, self._config = cache, endpoints, config

    async def say(self, exchange: Exchange, reply: Answer, body: bytes, caller: Caller) -> bool:
        """Answers; False if the cache has no part in the request, which is then the caller's to answer.

        Raises:
          UserError: the request's field `cache` is wrong.
        """
        job = reply.job

        def reduced(body: bytes, engine: Engine, config: ServerConfig) -> CacheRequest:
            return self.cache.scope.body(
                read_json(body),
                tenant=caller.tenant,
                model=job.adapter or config.model_name,
                temperature=job.sampling.temperature,
                chat=isinstance(job.request, ChatRequest),
            )

        request = await self._endpoints.on_pool(reduced, body)
        if request.bypass is not None or len(job.prompts) != 1:
            self._announce(exchange, self.cache.pass_over(request, request.bypass or "prompts"))
            return False

        async def generate() -> AsyncIterator[Chunk]:
            async with contextlib.aclosing(self._endpoints.pieces(job)) as groups:
                async for pieces, usage in groups:
                    for piece in pieces:
                        yield _chunk(piece, usage)

        async with contextlib.aclosing(await self.cache.answer(request, generate)) as answered:
            lookup = answered.lookup
            self._announce(exchange, lookup)
            self.cache.remember(reply.id, lookup)
            if job.request.stream:
                await self._stream(exchange, reply, answered)
            else:
                await self._whole(exchange, reply, answered)
        return True

    async def _whole(self, exchange: Exchange, reply: Answer, answered: Answered) -> None:
        piece, usage = Piece(0), Usage()
        async for chunk in answered:
            piece.extend(_piece(chunk))
            usage = _usage(chunk)
        content = reply.whole([piece], usage)
        _mark(content["usage"], answered.lookup)
        await exchange.answer(content)

    async def _stream(self, exchange: Exchange, reply: Answer, answered: Answered) -> None:
        opening, usage = reply.opening(), Usage()
        chunks = aiter(answered)
        coming: asyncio.Future[Chunk] | None = None
        try:
            while True:
                coming = asyncio.ensure_future(anext(chunks))
                while not (await asyncio.wait({coming}, timeout=self._config.comment_interval_s))[0]:
                    if not exchange.started:
                        await exchange.start_events()
                    await exchange.comment()
                try:
                    chunk = coming.result()
                except StopAsyncIteration:
                    break
                usage = _usage(chunk)
                events = [*opening, *reply.chunks(_piece(chunk))]
                opening = []
                if not exchange.started:
                    await exchange.start_events()
                if events:
                    await exchange.event(*events)
        finally:
            if coming is not None and not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        closing = reply.closing(usage)
        for event in closing:
            event["usage"] = {**event["usage"]}
            _mark(event["usage"], answered.lookup)
        if closing:
            await exchange.event(*closing)
        if WANT_USAGE in exchange.headers:
            await exchange.comment(USAGE_COMMENT + encode_json(reply.usage))
        await exchange.end_events()

    @staticmethod
    def _announce(exchange: Exchange, lookup: Lookup) -> None:
        headers = {"x-cache": lookup.kind, "x-cache-reason": lookup.reason}
        if lookup.entry_id is not None:
            headers["x-cache-entry"] = str(lookup.entry_id)
        if lookup.similarity is not None:
            headers["x-cache-similarity"] = f"{lookup.similarity:.4f}"
        if lookup.response is not None:
            headers["age"] = str(int(lookup.age_s))
        exchange.more_headers.update(headers)

    # ------------------------------------------------------------------------------------------------------- endpoints

    async def feedback(self, exchange: Exchange) -> None:
        request = read_as(FeedbackRequest, await exchange.body())
        if (request.response_id is None) == (request.entry_id is None):
            raise ApiError(400, "response_id: expected either response_id or entry_id", param="response_id")
        tenant = caller_of(exchange, self._config).tenant
        taken = await asyncio.to_thread(
            self.cache.feedback,
            tenant,
            request.correct,
            response_id=request.response_id,
            entry_id=request.entry_id,
        )
        if taken is None:
            most = self.cache.config.feedback_per_minute
            message = f"{most} reports a minute is the limit; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "60"})
        if not taken:
            param = "response_id" if request.entry_id is None else "entry_id"
            raise ApiError(404, f"{param}: no answer of yours from the cache by that name", param=param)
        await exchange.answer({"taken": True})

    async def invalidate(self, exchange: Exchange) -> None:
        body = await exchange.body()
        for name, found in read_json(body).items():  # a condition that is not understood would remove too much
            if name not in InvalidateRequest.model_fields:
                raise bad_field(name, found, f"no other fields than {', '.join(InvalidateRequest.model_fields)}")
        request = read_as(InvalidateRequest, body)
        tenant = caller_of(exchange, self._config).tenant
        removed = await asyncio.to_thread(self.cache.invalidate, tenant, **request.model_dump())
        if self.cache.store_failed is not None:
            message = f"removed {removed}, but a restart brings them back: {self.cache.store_failed}"
            raise ApiError(500, message, code="not_on_file")
        await exchange.answer({"removed": removed})

    async def stats(self, exchange: Exchange) -> None:
        tenant = caller_of(exchange, self._config).tenant
        await exchange.answer(self.cache.stats(tenant).as_json(), headers={"cache-control": "no-store"})

    async def entry(self, exchange: Exchange) -> None:
        number = exchange.scope["path_params"]["number"]
        found = self.cache.entry(caller_of(exchange, self._config).tenant, number)
        if found is None:
            raise ApiError(404, f"entry: you have no entry {number}", code="not_found")
        fields = dataclasses.asdict(found)
        shown = {name: value for name, value in fields.items() if name not in ("owner", "scope", "exact")}
        await exchange.answer(shown, headers={"cache-control": "no-store"})


def _chunk(piece: Piece, usage: Usage) -> Chunk:
    return Chunk(
        piece.text,
        piece.finish_reason,
        usage.prompt_tokens,
        usage.completion_tokens,
        piece.stop_reason,
        usage.cached_tokens,
        piece.timed_out,
    )


def _piece(chunk: Chunk) -> Piece:
    return Piece(
        0,
        chunk.text,
        finish_reason=chunk.finish_reason,
        stop_reason=chunk.stop_reason,
        timed_out=chunk.timed_out,
    )


def _usage(chunk: Chunk) -> Usage:
    return Usage(chunk.prompt_tokens, chunk.completion_tokens, chunk.cached_tokens)


def _mark(usage: dict[str, Any], lookup: Lookup) -> None:
    if lookup.response is not None:
        usage["cached_response"] = True
