"""Serving: the OpenAI-compatible HTTP server over one engine, and the protocol by which applications talk to models.

A request comes in at `server.py` (one ASGI endpoint each), is read and checked by `protocol.py`, becomes token ids
and sampling parameters in `prompts.py` on a pool thread, runs in `generation.py`, which stands between the engine and a
client that may be slow or gone, and leaves through `answers.py` and `exchange.py` as JSON or server-sent events.
`errors.py` are the refusals, `metrics.py` what Prometheus reads, `application.py` puts handlers behind ASGI, and
`http_server.py` puts that on a socket, with signals and shutdown.

`router/` stands before several such servers.

Applications take a `LanguageModel` (`language_model.py`): an engine in this process or any OpenAI-compatible endpoint.
"""

from jaxstack.serving.config import ServerConfig
from jaxstack.serving.language_model import EndpointModel, EngineModel, LanguageModel, RequestResult
from jaxstack.serving.running import BackgroundServer, serve
from jaxstack.serving.server import build_app

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
