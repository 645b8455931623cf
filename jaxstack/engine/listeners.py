"""Who hears of the tokens: `Collector` puts a request together, `Feed` carries its pieces to an event loop."""

import asyncio
import collections
import threading
import time
from collections.abc import Callable

from jaxstack.engine.request import Completion, Delta, Request, RequestOutput, TokenLogprob

Touched = dict[asyncio.AbstractEventLoop, "list[Feed]"]


class Collector:
    """Listener of `generate`: puts the pieces of a request together."""

    def __init__(self, prompt: list[int], n: int, on_done: Callable[[], object]):
        self.request: Request | None = None
        self.done = threading.Event()
        self._completions = [Completion(i) for i in range(n)]
        self._open, self._prompt, self._cached, self._on_done = n, prompt, 0, on_done
        self._finished_s: float | None = None
        self._discarded = 0
        self._prompt_logprobs: list[TokenLogprob | None] | None = None

    def __call__(self, delta: Delta) -> None:
        self._completions[delta.index].add(delta)
        self._cached = delta.cached_tokens
        self._discarded += delta.discarded_tokens
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = list(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            self._open -= 1
            if self._open == 0:
                self._finished_s = time.perf_counter()
                self._on_done()
                self.done.set()

    def output(self) -> RequestOutput:
        request = self.request
        assert request is not None
        return RequestOutput(
            request.request_id,
            self._prompt,
            self._completions,
            self._cached,
            request.arrival_s,
            request.first_token_s,
            self._finished_s,
            self._discarded,
            self._prompt_logprobs,
        )


class Feed:
    """Listener of `stream`: carries pieces to an event loop. The engine never waits for a slow reader.

    Args:
      whole: hold pieces back until a choice has ended: one awakening for each choice, and not for each token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, touched: "Touched", *, whole: bool = False):
        self._loop, self._touched, self._whole = loop, touched, whole
        self._held: list[Delta] = []
        self._pieces: collections.deque[Delta] = collections.deque()
        self.ready = asyncio.Event()

    def __call__(self, delta: Delta) -> None:
        self._held.append(delta)
        if self._whole and delta.finish_reason is None:
            return
        self._pieces.extend(self._held)
        self._held.clear()
        self._touched.setdefault(self._loop, []).append(self)

    async def take(self) -> list[Delta]:
        """All pieces that have come since the last call; waits for the first."""
        while not self._pieces:
            self.ready.clear()
            if not self._pieces:
                await self.ready.wait()
        pieces = []
        while self._pieces:
            pieces.append(self._pieces.popleft())
        return pieces


def wake_all(feeds: list[Feed]) -> None:
    for feed in feeds:
        feed.ready.set()
