"""The live page of a server: what the engine is doing now, and a box to try a prompt.

`page.html` is served as it is (no build step, nothing from elsewhere); once a second it asks for `LivePage.snapshot`.
"""

import collections
import dataclasses
import itertools
from importlib import resources
from typing import Any

import numpy as np

from jaxstack.engine import Engine, RequestTiming
from jaxstack.engine.memory.swap import PageSpaces
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.fairness import of_clients
from jaxstack.serving.semantic_cache import SemanticCache

__all__ = ["HEADERS", "LivePage"]

# Squares of the picture at most; each stands for several pages where there are more.
_CELLS = 2048
# Clients shown by name.
_CLIENTS = 12
# Requests that the percentiles look back on.
_RECENT = 256

HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of the page: whatever a model writes into it, nothing is fetched from, or sent, elsewhere."""


class LivePage:
    """See the package's docstring."""

    def __init__(self, engine: Engine, config: ServerConfig, cache: SemanticCache | None = None):
        self.html = resources.files(__package__).joinpath("page.html").read_bytes()
        self._engine, self._config, self._cache = engine, config, cache
        self._recent: collections.deque[RequestTiming] = collections.deque(maxlen=_RECENT)
        engine.on_finish(self._recent.append)

    def snapshot(self) -> dict[str, Any]:
        """What the page shows, for JSON. Token counts are totals; times are seconds; `cells` has a letter a square of
        the picture: "f"ree, "h"eld by a request, "s"hared (the prefix cache's), capital where it is on the host.
        """
        stats = self._engine.stats()
        recent = list(self._recent)
        first = [t.first_token_s - t.arrival_s for t in recent if t.token_times]
        between = [
            (t.token_times[-1] - t.token_times[0]) / (len(t.token_times) - 1) for t in recent if len(t.token_times) > 1
        ]
        owners = self._engine.scheduler.pool.owners()
        stride = -(-len(owners) // _CELLS)
        return {
            "model": self._config.model_name,
            "state": "ready" if stats.warm and stats.alive else "warming up" if stats.alive else "stopped",
            "warm_progress": round(stats.warm_progress, 3),
            "chat": self._engine.tokenizer is not None and self._engine.tokenizer.has_chat_template,
            "max_model_len": self._engine.max_model_len,
            "running": stats.running,
            "waiting": stats.waiting,
            "generation_tokens": stats.generation_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "prefix_hit_rate": round(stats.prefix_hits / stats.prefix_queries, 4) if stats.prefix_queries else None,
            "preemptions": stats.preemptions,
            "recompilations": stats.recompilations,
            "finished": stats.finished,
            "pages": {
                "free": stats.pages_free,
                "held": stats.pages_private,
                "shared": stats.pages_tree,
                "total": stats.pages_total,
                "per_cell": stride,
                "tokens": self._engine.config.page_size,
            },
            "cells": self._cells(owners, stride),
            "swap": None if stats.swap is None else dataclasses.asdict(stats.swap),
            "fairness": self._fairness(),
            "cache": None if self._cache is None else self._cache.stats().as_json(),
            "ttft_s": _percentiles(first),
            "tpot_s": _percentiles(between),
        }

    def _cells(self, owners: bytes, stride: int) -> str:
        letters = "".join("fsh"[owner] for owner in itertools.islice(owners, 0, None, stride))
        pool = self._engine.scheduler.pool
        if not isinstance(pool, PageSpaces):
            return letters
        spaces = pool.spaces()[::stride]
        return "".join(cell.upper() if space == ord("h") else cell for cell, space in zip(letters, spaces))

    def _fairness(self) -> dict[str, Any]:
        """The policy, the certificate, and the clients with the most service."""
        reading = self._engine.fairness()
        return {
            "policy": reading.policy,
            "max_gap": round(reading.max_gap),
            "bound": reading.bound,
            "pair": reading.pair,
            "errors": reading.errors,
            "clients": [dataclasses.asdict(row) for row in of_clients(reading, limit=_CLIENTS)],
        }


def _percentiles(values: list[float]) -> dict[str, float] | None:
    """The median and the 95th percentile; None of nothing."""
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 5), "p95": round(float(p95), 5)}
