"""The router's HTTP application: endpoints in front, a `Dispatcher` behind, and whoever looks after the replicas."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
from starlette.applications import Starlette
from starlette.routing import Route

from jaxstack.runtime.errors import UserError
from jaxstack.serving.application import Endpoint, Handler, application
from jaxstack.serving.clients import caller_of
from jaxstack.serving.errors import ApiError, bad_field, unavailable
from jaxstack.serving.exchange import WANT_USAGE, Exchange
from jaxstack.serving.json_body import read_json
from jaxstack.serving.prefix_keys import PrefixKeys, keys_of_body
from jaxstack.serving.router.config import RouterConfig, address
from jaxstack.serving.router.dispatch import Dispatcher, Incoming, forward
from jaxstack.serving.router.metrics import RouterMetrics
from jaxstack.serving.router.policies import D2Lpm, RoutedRequest, RoutingPolicy
from jaxstack.serving.router.replica import Replica

log = logging.getLogger(__name__)

CLIENT_HEADER = "x-client-id"
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}")
_PASSED_HEADERS = ("authorization", "traceparent", "tracestate")
# In a header; everything else, line ends above all, is written as in URLs.
_PLAIN = " !#$&'()*+,/:;<=>?@[]^`{|}~"
# A body larger than this is read on a thread: it would hold up the others.
_SMALL_BODY = 128 * 1024
_DEFAULT_MAX_TOKENS = 16


class RouterService:
    """The state behind the endpoints; see `application.Service`."""

    def __init__(self, config: RouterConfig, policy: RoutingPolicy):
        self.config, self.policy = config, policy
        self.failure: BaseException | None = None
        self.draining = False
        self.active = 0
        self.ready = False
        self.id = uuid.uuid4().hex
        self._since = time.time()
        # The replicas' clients belong to the loop of `lifespan`.
        self.dispatcher = Dispatcher([], policy, config)
        self.metrics = RouterMetrics(self.dispatcher)
        self._caring: dict[Replica, asyncio.Task[None]] = {}
        self._retiring: dict[Replica, asyncio.Task[None]] = {}

    @property
    def dead(self) -> bool:
        return False

    @property
    def replicas(self) -> list[Replica]:
        return list(self.dispatcher.replicas)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        for url in self.config.replicas:
            self._add(address(url, "replicas"))
        tasks = [asyncio.create_task(self._follow(address(url, "peers"))) for url in self.config.peers]
        tasks.append(asyncio.create_task(self._first_look()))
        try:
            yield
        finally:
            tasks += [*self._caring.values(), *self._retiring.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first_look(self) -> None:
        await asyncio.gather(*(replica.look() for replica in self.replicas), return_exceptions=True)
        self.ready = True

    async def end_all(self) -> None:
        self.dispatcher.end_all()

    # Endpoints.

    async def generate(self, exchange: Exchange) -> None:
        if self.draining:
            raise unavailable("the router is shutting down", "shutting_down", 10)
        if self.active >= self.config.http.max_streams:
            message = f"{self.config.http.max_streams} requests are being answered, which is the limit; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self.active += 1
        try:
            incoming = await self._read(exchange)
            await exchange.while_client_waits(self.dispatcher.route(exchange, incoming))
        finally:
            self.active -= 1

    async def pass_on(self, exchange: Exchange) -> None:
        """What costs no replica much: any of them will do."""
        body = await exchange.body() if exchange.scope["method"] == "POST" else None
        headers = self._headers(exchange, client=None)
        usable = [replica for replica in self.replicas if replica.usable]
        work = forward(exchange, usable, body, headers)
        if not await exchange.while_client_waits(work):
            raise self.dispatcher.nobody()

    async def health(self, exchange: Exchange) -> None:
        if self.draining:
            raise unavailable("the router is shutting down", "shutting_down", 10)
        if not any(replica.usable for replica in self.replicas):
            raise self.dispatcher.nobody()
        await exchange.answer({})

    async def show_metrics(self, exchange: Exchange) -> None:
        await exchange.answer_bytes(self.metrics.text(), "text/plain; version=0.0.4; charset=utf-8")

    async def show_status(self, exchange: Exchange) -> None:
        counts = self.dispatcher.counts
        status = {
            "policy": {"name": type(self.policy).__name__, **self.policy.report()},
            "replicas": {replica.name: replica.as_json() for replica in self.replicas},
            "active": self.active,
            "draining": self.draining,
            "up_s": round(time.time() - self._since, 1),
            "arrivals": counts.arrivals,
            "resent": counts.resent,
            "resumed": counts.resumed,
            "resumed_tokens": counts.resumed_tokens,
            "lost_answers": counts.lost_answers,
            "held": counts.held,
            "waiting": self.dispatcher.waiting,
            "outcomes": {f"{name} {outcome}": n for (name, outcome), n in sorted(counts.outcomes.items())},
            "cached_share": round(counts.cached_tokens / counts.prompt_tokens, 4) if counts.prompt_tokens else None,
            "bytes_per_token": round(self.dispatcher.bytes_per_token, 3),
        }
        await exchange.answer(status, headers={"cache-control": "no-store"})

    async def drain(self, exchange: Exchange) -> None:
        """Stops, or starts again, sending a replica new requests; those under way go on."""
        body = read_json(await exchange.body())
        known = {replica.name: replica for replica in self.replicas}
        name, wanted = body.get("replica"), body.get("draining", True)
        if not isinstance(name, str) or name not in known:
            raise bad_field("replica", name, f"one of {', '.join(known)}")
        if not isinstance(wanted, bool):
            raise bad_field("draining", wanted, "true or false")
        known[name].draining = wanted
        await exchange.answer({"replica": name, **known[name].as_json()})

    async def set_replicas(self, exchange: Exchange) -> None:
        """Says which replicas there are. New ones get requests once they answer; those left out get no more, and are
        forgotten when what they are answering is over, or at once if they are `lost`: then it goes on elsewhere.
        """
        body = read_json(await exchange.body())
        urls, lost = (_urls(body.get(field, []), field) for field in ("replicas", "lost"))
        known = {replica.url: replica for replica in self.replicas}
        for url in lost:
            if url in known:
                await self._forget(known.pop(url), lost=True)
        for url in urls:
            if url in known:
                known[url].draining = False
            else:
                self._add(url)
        for url in known.keys() - set(urls):
            replica = known[url]
            replica.draining = True
            if replica not in self._retiring:
                self._retiring[replica] = asyncio.create_task(self._retire(replica))
        await exchange.answer({"replicas": {replica.name: replica.as_json() for replica in self.replicas}})

    async def show_ledger(self, exchange: Exchange) -> None:
        """This router's own part of the deficits, for its peers."""
        if not isinstance(self.policy, D2Lpm):
            raise ApiError(404, "this router's policy keeps no deficits", code="not_found")
        query = exchange.scope["query_string"].decode("latin-1")
        since = re.fullmatch(r"since=(\d{1,18})", query or "since=0")
        if since is None:
            raise bad_field("since", query, "since=VERSION")
        await exchange.answer({"router": self.id, **self.policy.deficits.changes(int(since.group(1)))})

    # Inside.

    def _add(self, url: str) -> None:
        dispatcher = self.dispatcher
        replica = Replica(url, self.config, dispatcher.evicted, dispatcher.restarted, dispatcher.changed)
        dispatcher.replicas = [*dispatcher.replicas, replica]
        self._caring[replica] = asyncio.create_task(replica.run())

    async def _retire(self, replica: Replica) -> None:
        while replica.draining and replica.active and replica.state != "down":
            await asyncio.sleep(0.05)
        del self._retiring[replica]
        if replica.draining:
            await self._forget(replica, lost=False)

    async def _forget(self, replica: Replica, *, lost: bool) -> None:
        dispatcher = self.dispatcher
        dispatcher.replicas = [other for other in dispatcher.replicas if other is not replica]
        if lost:
            replica.lost("it has been taken away")
        dispatcher.restarted(replica)
        if replica in self._retiring:
            self._retiring.pop(replica).cancel()
        caring = self._caring.pop(replica)
        caring.cancel()
        await asyncio.gather(caring, return_exceptions=True)

    async def _read(self, exchange: Exchange) -> Incoming:
        body = await exchange.body()
        if len(body) > _SMALL_BODY:
            content, prefix = await asyncio.to_thread(_look_at, body)
        else:
            content, prefix = _look_at(body)
        user = content.get("user")
        client = caller_of(exchange, self.config.http).client(user if isinstance(user, str) else None)
        asked = content.get("max_completion_tokens", content.get("max_tokens"))
        limit = asked if isinstance(asked, int) and asked > 0 else _DEFAULT_MAX_TOKENS
        routed = RoutedRequest.of_keys(client, prefix, limit, self.dispatcher.bytes_per_token)
        headers = self._headers(exchange, client)
        if content.get("stream"):
            headers[WANT_USAGE] = "1"
        return Incoming(exchange.scope["path"], body, headers, prefix, routed, bool(content.get("stream")))

    def _headers(self, exchange: Exchange, client: str | None) -> dict[str, str]:
        """For the replica. The request's own name is kept, or made, and goes to the client as well."""
        given = exchange.headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange.more_headers["x-request-id"] = name
        headers = {"x-request-id": name}
        if "content-type" in exchange.headers:
            headers["content-type"] = exchange.headers["content-type"]
        if client is not None:
            headers[CLIENT_HEADER] = quote(client, safe=_PLAIN).strip()
        for passed in _PASSED_HEADERS:
            if passed in exchange.headers and not (passed == "authorization" and self.config.replica_api_key):
                headers[passed] = exchange.headers[passed]
        return headers

    async def _follow(self, peer: str) -> None:
        """Reads another router's part of the deficits, again and again."""
        if not isinstance(self.policy, D2Lpm):
            log.warning("peers: this policy keeps no deficits, so there is nothing to share")
            return
        deficits, since = self.policy.deficits, 0
        theirs: str | None = None
        key = self.config.http.api_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(base_url=peer, trust_env=False, timeout=5.0, headers=headers) as client:
            while True:
                try:
                    answer = await client.get("/router/ledger", params={"since": since})
                    if answer.status_code == 200:
                        told = answer.json()
                        name, before = str(told["router"]), theirs
                        if name == self.id:
                            log.warning("peers: %s is this router itself", peer)
                            return
                        theirs = name
                        if before not in (None, name):  # it has restarted; what we asked for was the other's
                            deficits.forget_router(before)
                            since = 0
                            continue
                        deficits.merge(name, told["rows"])
                        since = int(told["version"])
                    else:
                        log.warning("peer %s: its ledger answers %d", peer, answer.status_code)
                except httpx.RequestError:
                    pass
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    log.warning("peer %s: its ledger cannot be read (%r)", peer, error)
                await asyncio.sleep(self.config.peer_interval_s)


def _look_at(body: bytes) -> tuple[dict[str, Any], PrefixKeys]:
    content = read_json(body)
    return content, keys_of_body(content)


def _urls(found: Any, field: str) -> list[str]:
    try:
        if isinstance(found, list) and all(isinstance(url, str) for url in found):
            return list(dict.fromkeys(address(url, field) for url in found))
    except UserError as error:
        raise ApiError(400, str(error), param=field) from None
    raise bad_field(field, found, "a list of URLs")


def build_router(config: RouterConfig, policy: RoutingPolicy) -> Starlette:
    """The ASGI application; `app.state.service` is its `RouterService`."""
    service = RouterService(config, policy)

    def route(path: str, method: str, handler: Handler, needs_key: bool = True) -> Route:
        return Route(path, Endpoint(handler, config.http, needs_key=needs_key), methods=[method])

    routes = [
        route("/", "GET", service.show_status),
        route("/health", "GET", service.health, needs_key=False),
        route("/metrics", "GET", service.show_metrics, needs_key=False),
        route("/router/status", "GET", service.show_status),
        route("/router/drain", "POST", service.drain),
        *([route("/router/replicas", "POST", service.set_replicas)] if config.managed else []),
        route("/router/ledger", "GET", service.show_ledger),
        route("/v1/completions", "POST", service.generate),
        route("/v1/chat/completions", "POST", service.generate),
        route("/v1/embeddings", "POST", service.generate),
        route("/v1/models", "GET", service.pass_on),
        route("/v1/models/{name:path}", "GET", service.pass_on),
        route("/tokenize", "POST", service.pass_on),
        route("/detokenize", "POST", service.pass_on),
    ]
    return application(routes, config.http, service)
