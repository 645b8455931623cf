"""One replica as the router knows it: whether it answers, what it is doing, what its cache has lost."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from jaxstack.serving.router.config import RouterConfig
from jaxstack.serving.router.upstream import Upstream, UpstreamError

log = logging.getLogger(__name__)

_POLL_S = 10.0
# For a server that does not report what it evicts: it may be replaced by one that does.
_ASK_AGAIN_S = 30.0

STATES = ("unknown", "ready", "busy", "down")


class ReplicaLost(Exception):
    """The replica does not answer any more."""


class Replica:
    """Made on the event loop that uses it.

    Args:
      url: `http://HOST:PORT`.
      on_evicted: called with keys that its cache has lost.
      on_restart: called when the cache has lost everything.
      on_ready: called when it takes requests (again).

    Attributes:
      name: HOST:PORT.
      upstream: for requests to it.
      active: requests sent to it that are not over.
      state: "ready"; "busy", it says so itself (warming up, shutting down); "down"; "unknown" before the first look.
      why: for a state other than "ready", in one line.
      draining: no new requests go there.
      reports: whether it says what it evicts.
    """

    def __init__(
        self,
        url: str,
        config: RouterConfig,
        on_evicted: Callable[["Replica", Sequence[int]], None],
        on_restart: Callable[["Replica"], None],
        on_ready: Callable[[], None] = lambda: None,
    ):
        self.url, self.name = url, urlsplit(url).netloc
        self._config, self._on_evicted, self._on_restart = config, on_evicted, on_restart
        self._on_ready = on_ready
        key = config.replica_api_key
        own = {"authorization": f"Bearer {key}"} if key else {}
        self.upstream = Upstream(url, config.connect_timeout_s, own)
        self.active = 0
        self.state, self.why = "unknown", "not asked yet"
        self.draining = False
        self.reports = False
        self.epoch: str | None = None
        self._failures = 0
        self._looking: asyncio.Task[None] | None = None
        self._waits: set[asyncio.Timeout] = set()

    @property
    def usable(self) -> bool:
        return self.state == "ready" and not self.draining

    async def run(self) -> None:
        """Looks after it until cancelled."""
        try:
            await asyncio.gather(self._watch_health(), self._read_reports())
        finally:
            if self._looking is not None:
                self._looking.cancel()
            self.upstream.close()

    @contextlib.asynccontextmanager
    async def while_alive(self) -> AsyncIterator[None]:
        """Whatever waits inside is interrupted when the replica is found lost. Raises ReplicaLost."""
        scope = asyncio.timeout(None)
        self._waits.add(scope)
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise ReplicaLost(self.why) from error
        except UpstreamError as error:
            raise ReplicaLost(str(error)) from error
        finally:
            self._waits.discard(scope)

    async def look(self) -> None:
        """Asks how it is, now; `state` is the answer. Who comes meanwhile waits for the same."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)

    def lost(self, why: str) -> None:
        """It cannot be reached. Everything that waits for it ends."""
        if self.state != "down":
            log.warning("replica %s is down: %s", self.name, why)
            if not self.reports:
                self._on_restart(self)
        self.state, self.why = "down", why
        self.interrupt()

    def interrupt(self) -> None:
        """Ends everything that waits for it."""
        now = asyncio.get_running_loop().time()
        for scope in list(self._waits):
            if not scope.expired():
                scope.reschedule(now)
        self._waits.clear()

    def as_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "state": "draining" if self.draining and self.state == "ready" else self.state,
            "why": self.why,
            "active": self.active,
            "reports_evictions": self.reports,
        }

    # Inside.

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled() and task.exception() is not None:
            log.error("looking at replica %s", self.name, exc_info=task.exception())

    async def _watch_health(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(self._config.health_interval_s)

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(self._config.health_timeout_s):
                status, _, body = await self.upstream.fetch("GET", "/health")
                if status == 404:  # not every server has it
                    status, _, body = await self.upstream.fetch("GET", "/v1/models")
        except TimeoutError:
            self._failures += 1
            if self._failures > self._config.failures_allowed:
                self.lost(f"did not answer {self._failures} times in a row")
            return
        except UpstreamError as error:
            self.lost(str(error))
            return
        self._failures = 0
        if status < 500:
            before, self.state, self.why = self.state, "ready", ""
            if before != "ready":
                log.info("replica %s is ready", self.name)
                self._on_ready()
        else:
            self.state, self.why = "busy", _message(body) or f"its health is {status}"

    async def _read_reports(self) -> None:
        after = 0
        while True:
            pause_s = self._config.health_interval_s
            if self.state in ("ready", "busy"):
                query: dict[str, Any] = {"after": after, "wait_s": int(_POLL_S), "epoch": self.epoch or ""}
                try:
                    async with asyncio.timeout(3 * _POLL_S):
                        target = f"/prefix_cache/evictions?{urlencode(query)}"
                        status, _, body = await self.upstream.fetch("GET", target)
                    if status == 200:
                        after, pause_s = self._take_report(json.loads(body)), 0.02
                    else:
                        self.reports, pause_s = False, _ASK_AGAIN_S
                except (UpstreamError, TimeoutError):
                    pass
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    log.warning("replica %s: its report of evictions cannot be read (%s)", self.name, error)
                    self.reports, pause_s = False, _ASK_AGAIN_S
            await asyncio.sleep(pause_s)

    def _take_report(self, report: dict[str, Any]) -> int:
        """Returns the number to ask for next."""
        epoch, after = str(report["epoch"]), int(report["next"])
        keys = [int(key, 16) for key in report["evicted"]]
        self.reports = True
        if report["lost"] or epoch != self.epoch:
            # Also the first report of all: nothing that was sent before can have been listened for.
            self._on_restart(self)
        elif keys:
            self._on_evicted(self, keys)
        self.epoch = epoch
        return after


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""
