"""An application on a socket: what uvicorn leaves open is closed here.

That is a time limit for the head of a request, a cap on connections, an error object for bytes that are not HTTP, an
end for clients that never read, and a shutdown that lets answers finish.
"""

import asyncio
import contextlib
import functools
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxstack.runtime.errors import UserError
from jaxstack.serving.application import Service
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.errors import ApiError, unavailable

# Time for the last chunks of aborted answers to reach their clients.
_LAST_WORDS_S = 2.0


class _Protocol(H11Protocol):
    """uvicorn's h11 protocol with limits. `settings` is set by `_protocol_class`."""

    settings: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.app = functools.partial(self._call, self.app)
        self._head_timer: asyncio.TimerHandle | None = None

    async def _call(self, app: Any, scope: Scope, receive: Receive, send: Send) -> None:
        scope["jaxstack.abort"] = self.transport.abort
        await app(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(unavailable("too many connections", "too_many_connections"))
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_arrived()
        elif self._head_timer is None and self.timeout_keep_alive_task is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # A client that does not read its answer would keep a closing connection for ever.
        self.loop.call_later(self.settings.stall_timeout_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not valid HTTP/1.1", code="invalid_http"))

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.settings.header_timeout_s, self._head_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            message = f"the head of the request did not arrive within {self.settings.header_timeout_s} s"
            self._refuse(ApiError(408, message, code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answers without an exchange and closes; only where no answer is under way."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error.body).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers,
            }
            head = (
                f"HTTP/1.1 {error.status} Refused\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class HttpServer(uvicorn.Server):
    """uvicorn with our shutdown: stop taking requests, let answers finish for `drain_timeout_s`, abort the rest.

    Attributes:
      service: what is behind the application.
      on_ready: called once, on the event loop, when the service is.
      failure: why the server gave up; None after a wanted shutdown.
    """

    def __init__(self, app: Starlette, config: ServerConfig, listener: socket.socket):
        self.service: Service = app.state.service
        self.settings = config
        self.on_ready: Callable[[], None] | None = None
        self.failure: BaseException | None = None
        self._listener = listener
        self._dead_since: float | None = None
        protocol = type("Protocol", (_Protocol,), {"settings": config})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]
                timeout_graceful_shutdown=int(_LAST_WORDS_S),
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal, `stop`, or the death of the service."""
        asyncio.run(self.serve(sockets=sockets or [self._listener]))

    def stop(self) -> None:
        """Begins the shutdown; callable from any thread. A second call does not wait for answers any more."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self.on_ready is not None and self.service.ready:
            tell, self.on_ready = self.on_ready, None
            tell()
        if self.service.dead:
            self._dead_since = self._dead_since or time.monotonic()
            if time.monotonic() - self._dead_since >= self.settings.dead_grace_s:
                self.failure = self.service.failure or RuntimeError("the engine has died")
                return True
        return await super().on_tick(counter)

    async def main_loop(self) -> None:
        await super().main_loop()
        self.service.draining = True
        await self._until_idle(0 if self.failure else self.settings.drain_timeout_s)
        await self.service.end_all()
        await self._until_idle(_LAST_WORDS_S)

    async def _until_idle(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while self.service.active and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised again afterwards: we have ended cleanly."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Background:
    """An `HttpServer` on a thread of its own, for tests, demos and benchmarks.

    Entering returns when it is ready. Leaving lets answers under way finish (within the config's `drain_timeout_s`) and
    stops it.

    Attributes:
      url: "http://127.0.0.1:PORT".
      base_url: the same with "/v1", as the openai client wants it.
    """

    server: HttpServer

    def __init__(self, config: ServerConfig, build: Callable[[ServerConfig], Starlette]):
        self.config = config
        self._listener = listen(self.config)
        self.url = url_of(self._listener)
        self.base_url = f"{self.url}/v1"
        self.server = HttpServer(build(config), self.config, self._listener)
        self._ready = threading.Event()
        self.server.on_ready = self._ready.set
        self._thread = threading.Thread(target=self._run, name="http-server", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> Any:
        self._thread.start()
        while not self._ready.wait(0.05):
            if not self._thread.is_alive():
                raise self._error or self.server.failure or RuntimeError("the server ended before it was ready")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.stop()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self._error = error


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be had."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"host: found {config.host!r}, expected an address of this machine ({error.strerror})"
        ) from None
    listener = socket.socket(family, kind, number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise UserError(f"port: cannot listen on {config.host}:{config.port} ({error.strerror})") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
