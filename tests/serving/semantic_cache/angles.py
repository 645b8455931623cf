"""What tests of the cache share: texts whose nearness is known, and the ways to ask."""

import asyncio
import contextlib

import numpy as np

from jaxstack.serving.semantic_cache import CacheConfig, CachedResponse, SemanticCache
from jaxstack.serving.semantic_cache.flight import Chunk

DIM = 8


class Angles:
    """ "WORD DEGREES": words are orthogonal directions, degrees turn away from them. "nan" has no vector."""

    id, dim = "angles", DIM

    def embed(self, texts):
        rows = np.zeros((len(texts), DIM), np.float32)
        for row, text in zip(rows, texts):
            word, _, degrees = text.partition(" ")
            if word == "nan":
                row[:] = np.nan
                continue
            angle = np.deg2rad(float(degrees.split()[0]) if degrees else 0.0)
            row[sum(map(ord, word)) % (DIM - 1)], row[DIM - 1] = np.cos(angle), np.sin(angle)
        return rows


def cache_of(**settings):
    settings = {"delta": 0.1, "policy": "static", "threshold": 0.95, "lookup_timeout_ms": 30_000, **settings}
    return SemanticCache(Angles(), CacheConfig(**settings))


def ask(into, text, answer="yes", tenant="", now_s=None, **fields):
    """The lookup of one request, which is answered if the cache does not."""
    request = into.scope.prompt(text, tenant=tenant, **fields)
    lookup = into.lookup([request], now_s)[0]
    if lookup.response is None:
        into.complete(lookup, CachedResponse(answer, generation_s=0.5), now_s)
    return lookup


def said(lookup):
    return None if lookup.response is None else lookup.response.text


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


async def collect(answered):
    async with contextlib.aclosing(answered):
        return "".join([chunk.text async for chunk in answered])


def speaker(log, words=("on", "e ", "flight"), fail=0, gate=None):
    async def generate():
        log.append("begun")
        if len(log) <= fail:
            if gate is not None:
                await gate.wait()
            raise RuntimeError("lost")
        for n, word in enumerate(words):
            if gate is not None:
                await gate.wait()
            yield Chunk(word, "stop" if n + 1 == len(words) else None, 3, n + 1)

    return generate
