"""What the prefix cache has lost, for whoever routes requests by it.

A router believes that a prefix is where it sent it last. Pages are evicted, though, and this says so: when an answer is
over, the keys of its prompt (`prefix_keys.py`, made from the body as the router made them) are put down beside the
pages that hold it; when the tree loses a page, its keys go into a log, which routers read by long poll. Nothing is kept
before the first of them asks.

Keys are of text and pages of tokens, so where a key ends among the pages is estimated: in proportion.
"""

import asyncio
import collections
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qs

from jaxstack.engine import Engine
from jaxstack.engine.memory import PagePool
from jaxstack.serving.errors import bad_field
from jaxstack.serving.json_body import read_json
from jaxstack.serving.prefix_keys import keys_of_body
from jaxstack.serving.prompts import Job

_LOG = 100_000  # keys; a router further behind is told so
_KEYS_OF_A_PAGE = 64
_LONGEST_POLL_S = 30.0
_LOOK_EVERY_S = 0.05


class CacheReports:
    """See the module's docstring. `note` may be called from any thread."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._pool: PagePool | None = None  # none before anybody asked
        self._epoch = ""
        self._lock = threading.Lock()
        self._keys: dict[int, dict[int, None]] = {}  # page -> keys
        self._log: collections.deque[int] = collections.deque(maxlen=_LOG)
        self._logged = 0

    def note(self, body: bytes, job: Job) -> None:
        """The prompt in `body` has been computed, as far as it was."""
        if self._pool is None:
            return
        keys, ends, length = keys_of_body(read_json(body))
        tokens = job.prompts[0]
        whole = len(tokens) // self._engine.config.page_size
        if not keys or not whole:
            return
        with self._lock:
            self._attach()
            pages = self._engine.cached_pages(tokens, job.adapter)
            for key, end in zip(keys, ends):
                index = min(whole - 1, len(tokens) * end // length // self._engine.config.page_size)
                if index >= len(pages):
                    self._lost(key)
                    continue
                of_page = self._keys.setdefault(pages[index], {})
                of_page[key] = None
                if len(of_page) > _KEYS_OF_A_PAGE:  # the oldest: others know it too little to keep it in use
                    self._lost(next(iter(of_page)))
                    del of_page[next(iter(of_page))]

    async def poll(self, query: dict[str, str], stop: Callable[[], bool]) -> dict[str, Any]:
        """Keys lost after number `after` of `epoch`; waits up to `wait_s` for one.

        Returns: `epoch`, which changes when everything is lost; `next`, to be asked for; the keys `evicted`, in
        hexadecimal; and `lost`, whether some are not known any more.

        Raises:
          ApiError: a field of the query is wrong.
        """
        after = _number(query, "after", 0)
        wait_s = min(_number(query, "wait_s", 0), _LONGEST_POLL_S)
        deadline = time.monotonic() + wait_s
        while True:
            with self._lock:
                self._attach()
                known = query.get("epoch") == self._epoch
                if not known or self._logged > after or time.monotonic() >= deadline or stop():
                    break
            await asyncio.sleep(_LOOK_EVERY_S)
        with self._lock:
            new = min(self._logged - after, len(self._log)) if known else 0
            evicted = [f"{key:x}" for key in list(self._log)[len(self._log) - new :]] if new > 0 else []
            lost = known and self._logged - after > len(self._log)
            return {"epoch": self._epoch, "next": self._logged, "evicted": evicted, "lost": lost}

    def _attach(self) -> None:
        """Listens to the page pool in use; a failed step replaces it."""
        pool = self._engine.scheduler.pool
        if pool is not self._pool:
            self._pool, self._epoch = pool, uuid.uuid4().hex
            self._keys.clear()
            self._log.clear()
            self._logged = 0
            pool.on_evicted = self._evicted

    def _evicted(self, pages: Sequence[int]) -> None:
        with self._lock:
            for page in pages:
                for key in self._keys.pop(page, ()):
                    self._lost(key)

    def _lost(self, key: int) -> None:
        self._log.append(key)
        self._logged += 1


def read_query(query: bytes) -> dict[str, str]:
    """The fields of a query string, the last of each name."""
    return {name: values[-1] for name, values in parse_qs(query.decode("latin-1")).items()}


def _number(query: dict[str, str], name: str, default: int) -> int:
    found = query.get(name, str(default))
    if not found.isascii() or not found.isdigit() or len(found) > 18:
        raise bad_field(name, found, "an integer >= 0")
    return int(found)
