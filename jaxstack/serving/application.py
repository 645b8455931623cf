"""The ASGI application around the handlers of a server: keys, errors as OpenAI writes them, CORS."""

import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxstack.serving.clients import key_fits
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.errors import ApiError, ClientGone, as_api_error
from jaxstack.serving.exchange import Exchange

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]


class Service(Protocol):
    """The state behind the handlers, as whoever runs the server sees it (`http_server.py`)."""

    failure: BaseException | None
    """Why it could not begin; None otherwise."""
    draining: bool
    """No new requests are taken."""
    active: int
    """Requests being answered."""

    @property
    def ready(self) -> bool: ...

    @property
    def dead(self) -> bool:
        """Whether it will never answer again."""
        ...

    def lifespan(self, app: Starlette) -> contextlib.AbstractAsyncContextManager[None]: ...

    async def end_all(self) -> None:
        """Ends what is being answered; clients get what there is."""
        ...


class Endpoint:
    """A handler as an ASGI application that answers every error as OpenAI does."""

    def __init__(self, handler: Handler, config: ServerConfig, *, needs_key: bool = True):
        self._handler, self._config = handler, config
        self._needs_key = needs_key and bool(config.api_key or config.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, self._config)
        try:
            self._check_key(exchange)
            await self._handler(exchange)
        except ClientGone as gone:
            log.info("499 %s %s: client gone %s", scope["method"], scope["path"], gone)
        except Exception as error:
            known = as_api_error(error)
            if known is None:
                number = uuid.uuid4().hex
                log.exception("error %s in %s %s", number, scope["method"], scope["path"])
                known = ApiError(500, f"internal error {number}", code="internal_error")
            with contextlib.suppress(ClientGone):
                await exchange.fail(known)

    def _check_key(self, exchange: Exchange) -> None:
        if not self._needs_key:
            return
        scheme, _, given = exchange.headers.get("authorization", "").partition(" ")
        right, exchange.owner = key_fits(given.strip(), self._config)
        if scheme.lower() != "bearer" or not right:
            message = "missing or wrong API key; expected the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


class _Refusal:
    """What no route takes, as a response."""

    def __init__(self, error: HTTPException, config: ServerConfig):
        self._error, self._config = error, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        words = {404: ("no such path", "not_found"), 405: ("not allowed here", "method_not_allowed")}
        status = self._error.status_code
        message, code = words.get(status, (str(self._error.detail), None))
        known = ApiError(
            status, f"{scope['method']} {scope['path']}: {message}", code=code, headers=self._error.headers
        )
        with contextlib.suppress(ClientGone):
            await Exchange(scope, receive, send, self._config).fail(known)


def application(routes: Sequence[Route], config: ServerConfig, service: Service) -> Starlette:
    """`routes`, most of them to an `Endpoint`, as an application; `app.state.service` is `service`."""
    middleware = []
    if config.allowed_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.append(cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: lambda request, error: _Refusal(error, config)},  # type: ignore[dict-item]
        lifespan=service.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app
