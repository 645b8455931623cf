"""Serving: the OpenAI-compatible HTTP server over one engine, and the protocol by which applications talk to models.

A request comes in at `server.py` (one ASGI endpoint each), is read and checked by `protocol.py`, becomes token ids
and sampling parameters in `prompts.py` on a pool thread, runs in `generation.py`, which stands between the engine and a
client that may be slow or gone, and leaves through `answers.py` and `exchange.py` as JSON or server-sent events.
`errors.py` are the refusals, `metrics.py` what Prometheus reads, `application.py` puts handlers behind ASGI, and
`http_server.py` puts that on a socket, with signals and shutdown.

`router/` stands before several such servers. `journal.py` is what a server tells it, so that another server can go on
with an answer when the first one is lost.

Applications take a `LanguageModel` (`language_model.py`): an engine in this process or any OpenAI-compatible endpoint.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxstack.serving.config import ServerConfig

if TYPE_CHECKING:
    from jaxstack.serving.language_model import EndpointModel, EngineModel, LanguageModel, RequestResult
    from jaxstack.serving.running import BackgroundServer, serve
    from jaxstack.serving.server import build_app

# What needs an engine comes when it is asked for: a router runs without.
_WITH_ENGINE = {
    "BackgroundServer": "jaxstack.serving.running",
    "EndpointModel": "jaxstack.serving.language_model",
    "EngineModel": "jaxstack.serving.language_model",
    "LanguageModel": "jaxstack.serving.language_model",
    "RequestResult": "jaxstack.serving.language_model",
    "build_app": "jaxstack.serving.server",
    "serve": "jaxstack.serving.running",
}

__all__ = [
    "BackgroundServer",
    "EndpointModel",
    "EngineModel",
    "LanguageModel",
    "RequestResult",
    "ServerConfig",
    "build_app",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_WITH_ENGINE[name]), name)
    return found
