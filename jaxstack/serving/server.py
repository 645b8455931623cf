"""The OpenAI-compatible HTTP application: one engine behind plain ASGI endpoints.

A generating request goes one way: body within limits -> `endpoints` -> JSON or server-sent events, all of it raced
against the client going away. Every other outcome is an `ApiError`.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from jaxstack.engine import Engine
from jaxstack.engine.errors import EngineDead
from jaxstack.serving.answers import Answer
from jaxstack.serving.application import Endpoint, Handler, application
from jaxstack.serving.cache_reports import CacheReports, read_query
from jaxstack.serving.clients import caller_of
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.endpoints import GENERATING, Endpoints
from jaxstack.serving.errors import ApiError, as_api_error, bad_field, unavailable
from jaxstack.serving.exchange import USAGE_COMMENT, WANT_USAGE, Exchange, encode_json
from jaxstack.serving.journal import (
    RESUME_BODY_FACTOR,
    BrokenOff,
    Journal,
    Resumed,
    head_comment,
    journaled,
    read_resumed,
    read_seed,
    tokens_comment,
)
from jaxstack.serving.journal_format import COMPLETE, RESUME_PATH, STATUS, WANT_JOURNAL
from jaxstack.serving.json_body import read_json
from jaxstack.serving.metrics import Metrics
from jaxstack.serving.page import HEADERS, LivePage
from jaxstack.serving.prompts import adapter_of, detokenize, tokenize
from jaxstack.serving.protocol import LoadAdapterRequest, UnloadAdapterRequest, read_as
from jaxstack.serving.semantic_cache import SemanticCache
from jaxstack.serving.semantic_cache.middleware import CachedAnswers

log = logging.getLogger(__name__)


class Service:
    """The state behind the endpoints: the engine, whether it is ready, and what is being answered.

    Attributes:
      failure: why the engine could not be started; None otherwise.
      started: the engine is warm and its thread runs.
      draining: no new requests are taken.
      active: generating requests being answered.
    """

    def __init__(self, engine: Engine, config: ServerConfig, cache: SemanticCache | None = None):
        self.engine, self.config = engine, config
        self.metrics = Metrics(engine, config.model_name, cache)
        self.page = LivePage(engine, config, cache)
        self.failure: BaseException | None = None
        self.draining = False
        self.active = 0
        self.started = False
        self._created = int(time.time())
        # When adapters were loaded over HTTP, and from where.
        self._loaded: dict[str, tuple[int, str]] = {}
        self.endpoints = Endpoints(engine, config)
        self.reports = CacheReports(engine)
        self.cached = None if cache is None else CachedAnswers(cache, self.endpoints, config)

    # ------------------------------------------------------------------------------------------------------ life cycle

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Starts the engine beside the server, so that `/health` can tell how far its warm-up is."""
        # A thread of its own: the loop's executor would keep a shutdown waiting for the end of the warm-up.
        threading.Thread(target=self._start, name="engine-start", daemon=True).start()
        try:
            yield
        finally:
            self.endpoints.close()

    def _start(self) -> None:
        try:
            self.engine.start()
            self.started = True
        except Exception as error:
            self.failure = error
            log.exception("the engine did not start")

    async def end_all(self) -> None:
        await self.endpoints.abort_all()

    @property
    def ready(self) -> bool:
        return self.started and self.engine.stats().alive and not self.draining

    @property
    def dead(self) -> bool:
        """Whether the engine will never answer again."""
        return self.failure is not None or (self.started and not self.engine.stats().alive)

    # ------------------------------------------------------------------------------------------------------- endpoints

    async def health(self, exchange: Exchange) -> None:
        self._check_ready()
        await exchange.answer({})

    async def show_metrics(self, exchange: Exchange) -> None:
        await exchange.answer_bytes(self.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")

    async def show_page(self, exchange: Exchange) -> None:
        await exchange.answer_bytes(self.page.html, "text/html; charset=utf-8", headers=HEADERS)

    async def show_snapshot(self, exchange: Exchange) -> None:
        await exchange.answer(self.page.snapshot(), headers={"cache-control": "no-store"})

    async def list_models(self, exchange: Exchange) -> None:
        cards = [self._card(None), *(self._card(name) for name in self.engine.adapters)]
        await exchange.answer({"object": "list", "data": cards})

    async def show_model(self, exchange: Exchange) -> None:
        adapter = adapter_of(exchange.scope["path_params"]["name"], self.engine, self.config)
        await exchange.answer(self._card(adapter))

    async def load_adapter(self, exchange: Exchange) -> None:
        request = read_as(LoadAdapterRequest, await exchange.body())
        self._check_ready()
        if request.lora_name == self.config.model_name:
            raise ApiError(400, f"lora_name: {request.lora_name!r} is the model's own name", param="lora_name")
        # On no thread of the pool: it would keep prompts waiting.
        await asyncio.to_thread(self.engine.load_adapter, request.lora_name, request.lora_path)
        self._loaded[request.lora_name] = (int(time.time()), request.lora_path)
        if self.cached is not None:  # of an adapter that went by this name before
            await asyncio.to_thread(self.cached.cache.invalidate_model, request.lora_name)
        await exchange.answer_bytes(
            f"Success: LoRA adapter '{request.lora_name}' added successfully.".encode(), "text/plain; charset=utf-8"
        )

    async def unload_adapter(self, exchange: Exchange) -> None:
        request = read_as(UnloadAdapterRequest, await exchange.body())
        self._check_ready()
        await asyncio.to_thread(self.engine.unload_adapter, request.lora_name)
        self._loaded.pop(request.lora_name, None)
        await exchange.answer_bytes(
            f"Success: LoRA adapter '{request.lora_name}' removed successfully.".encode(), "text/plain; charset=utf-8"
        )

    async def tokenize(self, exchange: Exchange) -> None:
        await exchange.answer(await self.endpoints.on_pool(tokenize, await exchange.body()))

    async def detokenize(self, exchange: Exchange) -> None:
        await exchange.answer(await self.endpoints.on_pool(detokenize, await exchange.body()))

    async def completions(self, exchange: Exchange) -> None:
        await self._generate(exchange, "/v1/completions")

    async def chat(self, exchange: Exchange) -> None:
        await self._generate(exchange, "/v1/chat/completions")

    async def report_evictions(self, exchange: Exchange) -> None:
        query = read_query(exchange.scope["query_string"])
        await exchange.answer(await exchange.while_client_waits(self.reports.poll(query, lambda: self.draining)))

    # ------------------------------------------------------------------------------------------------------ generating

    async def embed(self, exchange: Exchange) -> None:
        async with self._place(exchange) as body:
            caller = caller_of(exchange, self.config)
            await exchange.answer(await exchange.while_client_waits(self.endpoints.embeddings(body, caller)))

    async def _generate(self, exchange: Exchange, path: str) -> None:
        async with self._place(exchange) as body:
            wanted = exchange.headers.get(WANT_JOURNAL)
            journal = None if wanted is None else Journal(read_seed(wanted))
            await exchange.while_client_waits(self._answer(exchange, path, body, journal))

    async def resume(self, exchange: Exchange) -> None:
        """Goes on with an answer that another server has broken off; for routers."""
        async with self._place(exchange, RESUME_BODY_FACTOR) as body:
            seed = read_seed(exchange.headers.get(WANT_JOURNAL, ""))
            path, request, resumed = await self.endpoints.on_pool(_read_resumption, body)
            work = self._answer(exchange, path, request, Journal(seed, resumed))
            await exchange.while_client_waits(work)

    @contextlib.asynccontextmanager
    async def _place(self, exchange: Exchange, factor: int = 1) -> AsyncIterator[bytes]:
        """One of `max_streams` places, and the body of the request that takes it."""
        self._check_ready()
        if self.active >= self.config.max_streams:
            message = f"{self.config.max_streams} requests are being answered, which is the limit; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self.active += 1
        try:
            yield await exchange.body(factor)
        finally:
            self.active -= 1

    async def _answer(self, exchange: Exchange, path: str, body: bytes, journal: Journal | None) -> None:
        caller = caller_of(exchange, self.config)
        reply = await self.endpoints.prepare(path, body, caller, journal)
        try:
            if self.cached is not None and journal is None and await self.cached.say(exchange, reply, body, caller):
                return
            if journal is not None and journaled(reply.job.sampling):
                await self._say_journaled(exchange, reply)
            else:
                await self._say(exchange, reply)
        finally:
            self.endpoints.in_background(self.reports.note, body, reply.job)

    async def _say(self, exchange: Exchange, reply: Answer) -> None:
        if not reply.job.request.stream:
            await exchange.answer(await self.endpoints.whole(reply))
            return
        async with contextlib.aclosing(self.endpoints.chunks(reply, self.config.comment_interval_s)) as groups:
            async for chunks in groups:
                if not exchange.started:
                    await exchange.start_events()
                if chunks:
                    await exchange.event(*chunks)
                elif chunks is None:
                    await exchange.comment()
        if WANT_USAGE in exchange.headers:
            await exchange.comment(USAGE_COMMENT + encode_json(reply.usage))
        await exchange.end_events()

    async def _say_journaled(self, exchange: Exchange, reply: Answer) -> None:
        whole, exchange.farewell = not reply.job.request.stream, COMPLETE + b"\n\n"
        first = head_comment(reply.id, reply.created, reply.job.prompts, len(reply.job.prompts) * reply.job.sampling.n)
        try:
            async with contextlib.aclosing(self.endpoints.journaled(reply, self.config.comment_interval_s)) as commits:
                async for commit in commits:
                    if not exchange.started:
                        await exchange.start_events()
                        await exchange.pass_on(first)
                    if commit is None:
                        await exchange.comment()
                    else:
                        then = b"" if commit.pieces is None else tokens_comment(commit.pieces, whole=whole)
                        await exchange.event(*commit.chunks, then=then)
        except (BrokenOff, EngineDead):
            if not exchange.started:
                raise unavailable("the server is shutting down", "shutting_down", 10) from None
            await exchange.break_off()
            return
        except Exception as error:
            # What has no status of its own any more brings it along.
            known = as_api_error(error)
            if known is None or not exchange.started or not whole:
                raise
            await exchange.pass_on(STATUS + str(known.status).encode() + b"\n\n")
            await exchange.fail(known)
            return
        if whole:
            await exchange.end_events(b"")
            return
        if WANT_USAGE in exchange.headers:
            await exchange.comment(USAGE_COMMENT + encode_json(reply.usage))
        await exchange.end_events()

    def _check_ready(self) -> None:
        stats = self.engine.stats()
        if self.failure is not None or not stats.alive:
            raise unavailable("the engine has stopped", "engine_dead", 10)
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down", 10)
        if not self.started:
            progress = round(stats.warm_progress, 4)
            message = f"the engine is warming up, {progress:.0%} done"
            raise unavailable(message, "warming_up", 1, progress=progress)

    def _card(self, adapter: str | None) -> dict[str, Any]:
        base = self.config.model_name
        created, root = self._loaded.get(adapter or "", (self._created, adapter or base))
        return {
            "id": adapter or base,
            "object": "model",
            "created": created,
            "owned_by": "jaxstack",
            "root": root,
            "parent": None if adapter is None else base,
            "max_model_len": self.engine.max_model_len,
        }


def _read_resumption(body: bytes, engine: Engine, config: ServerConfig) -> tuple[str, bytes, Resumed]:
    """The path and the body of a request, and what there is of its answer."""
    content = read_json(body)
    path, request = content.get("path"), content.get("request")
    if path not in GENERATING:
        raise bad_field("path", path, f"one of {', '.join(GENERATING)}")
    if not isinstance(request, dict):
        raise bad_field("request", request, "the body of a request")
    return path, encode_json(request), read_resumed(content.get("resumed"))


def build_app(engine: Engine, config: ServerConfig | None = None, cache: SemanticCache | None = None) -> Starlette:
    """The ASGI application; `app.state.service` is its `Service`.

    Its lifespan starts the engine, but does not close it, nor the cache.
    """
    config = config or ServerConfig()
    service = Service(engine, config, cache)

    def route(path: str, method: str, handler: Handler, needs_key: bool = True) -> Route:
        return Route(path, Endpoint(handler, config, needs_key=needs_key), methods=[method])

    routes = [
        route("/", "GET", service.show_page, needs_key=False),
        route("/page/snapshot", "GET", service.show_snapshot, needs_key=False),
        route("/health", "GET", service.health, needs_key=False),
        route("/metrics", "GET", service.show_metrics, needs_key=False),
        route("/v1/models", "GET", service.list_models),
        route("/v1/models/{name:path}", "GET", service.show_model),
        route("/v1/completions", "POST", service.completions),
        route("/v1/chat/completions", "POST", service.chat),
        route(RESUME_PATH, "POST", service.resume),
        route("/v1/embeddings", "POST", service.embed),
        route("/prefix_cache/evictions", "GET", service.report_evictions),
        route("/v1/load_lora_adapter", "POST", service.load_adapter),
        route("/v1/unload_lora_adapter", "POST", service.unload_adapter),
        route("/tokenize", "POST", service.tokenize),
        route("/detokenize", "POST", service.detokenize),
    ]
    if service.cached is not None:
        routes += [
            route("/v1/cache/feedback", "POST", service.cached.feedback),
            route("/v1/cache/invalidate", "POST", service.cached.invalidate),
            route("/v1/cache/stats", "GET", service.cached.stats),
            route("/v1/cache/entries/{number:int}", "GET", service.cached.entry),
        ]
    return application(routes, config, service)
