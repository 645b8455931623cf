"""Routing until a signal, or in the background."""

import contextlib
import socket
from collections.abc import Callable

from jaxstack.serving.http_server import Background, HttpServer, listen, url_of
from jaxstack.serving.router.config import RouterConfig
from jaxstack.serving.router.dispatch import Counts
from jaxstack.serving.router.policies import RoutingPolicy
from jaxstack.serving.router.service import RouterService, build_router


def serve_router(
    config: RouterConfig,
    policy: RoutingPolicy,
    *,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> Counts:
    """Routes until SIGTERM or Ctrl-C, then lets answers finish; returns what it counted.

    Args:
      on_ready: called with the URL once every replica has been asked how it is, whatever it said.

    Raises:
      UserError: the address cannot be had.
    """
    with contextlib.closing(listener or listen(config.http)) as place:
        app = build_router(config, policy)
        server = HttpServer(app, config.http, place)
        if on_ready is not None:
            url = url_of(place)
            server.on_ready = lambda: on_ready(url)
        server.run()
    return app.state.service.dispatcher.counts


class BackgroundRouter(Background):
    """A router on a thread of its own; entering returns when every replica has been asked how it is."""

    def __init__(self, config: RouterConfig, policy: RoutingPolicy):
        super().__init__(config.http, lambda _: build_router(config, policy))

    def __enter__(self) -> "BackgroundRouter":
        super().__enter__()
        return self

    @property
    def service(self) -> RouterService:
        return self.server.service  # type: ignore[return-value]
