"""Serving an engine until a signal, or in the background."""

import contextlib
import functools
import socket
from collections.abc import Callable

from jaxstack.engine import Engine
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.http_server import Background, HttpServer, listen, url_of
from jaxstack.serving.semantic_cache import SemanticCache
from jaxstack.serving.server import build_app


def serve(
    engine: Engine,
    config: ServerConfig | None = None,
    *,
    cache: SemanticCache | None = None,
    listener: socket.socket | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, then lets answers finish and closes the engine.

    Args:
      cache: answers what it can; the caller closes it.
      listener: from `listen(config)`, if the address was taken earlier; closed at the end.
      on_ready: called with the URL once the engine is warm.

    Raises:
      UserError: the address cannot be had, or the engine cannot be started.
      RuntimeError: the engine died.
    """
    config = config or ServerConfig()
    with contextlib.closing(listener or listen(config)) as address:
        server = HttpServer(build_app(engine, config, cache), config, address)
        if on_ready is not None:
            url = url_of(address)
            server.on_ready = lambda: on_ready(url)
        try:
            server.run()
        finally:
            engine.close()  # during a warm-up: after the program being compiled
    if server.failure is not None:
        raise server.failure


class BackgroundServer(Background):
    """A server on a thread of its own: `with BackgroundServer(engine) as server: OpenAI(base_url=server.base_url)`.

    Entering starts the engine and returns when `/health` is 200. Leaving lets answers under way finish (within the
    config's `drain_timeout_s`), stops the server, and leaves the engine running for the caller to close.

    Args:
      config: the port is taken as it is; the default config takes a free one.
      cache: answers what it can; the caller closes it.
    """

    def __init__(self, engine: Engine, config: ServerConfig | None = None, cache: SemanticCache | None = None):
        super().__init__(config or ServerConfig(port=0), functools.partial(build_app, engine, cache=cache))

    def __enter__(self) -> "BackgroundServer":
        super().__enter__()
        return self
