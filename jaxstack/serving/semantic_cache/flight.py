"""Single flight: equal requests that are being answered at once are answered by one generation.

Everyone reads the answer from its beginning, so those who come later stream too. The generation goes on while anybody
listens, whoever began it. Belongs to one event loop.
"""

import asyncio
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of an answer; the last one says how it ended and what it took."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    stop_reason: int | str | None = None
    cached_tokens: int = 0
    timed_out: bool = False


Generate = Callable[[], AsyncIterator[Chunk]]
Listening = tuple[AsyncGenerator[Chunk], Callable[[], None]]
"""The answer from its beginning (what ends it in failure is raised), and what to call on leaving, more than once if
need be: a generator that has not begun does not notice that it is closed.
"""


class Flight:
    """One generation and those who listen to it.

    Attributes:
      decided: True once it is certain that there will be an answer to listen to, False if there will be none.
      passed_over: why the cache could not be asked, if that is why there will be none.
    """

    def __init__(self) -> None:
        self.decided: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.passed_over: str | None = None
        self._chunks: list[Chunk] = []
        self._more = asyncio.Event()
        self._over = False
        self._error: BaseException | None = None
        self._numbers = itertools.count()
        self._listeners: dict[int, Generate] = {}
        self._task: asyncio.Task[None] | None = None
        self._on_end: Callable[[list[Chunk] | None], None] | None = None

    def start(self, generate: Generate, on_end: Callable[[list[Chunk] | None], None]) -> Listening:
        """Begins, for a first listener. `on_end` is called once, with the answer or with None if it failed; it is not
        whole if everybody has left.
        """
        leader = next(self._numbers)
        self._listeners[leader] = generate
        self._on_end = on_end
        self.decided.set_result(True)
        self._task = asyncio.get_running_loop().create_task(self._run(leader, generate))
        return self._listening(leader)

    def give_up(self, passed_over: str | None = None) -> None:
        """There will be nothing to listen to: those who waited ask for themselves."""
        if not self.decided.done():
            self.passed_over = passed_over
            self.decided.set_result(False)

    def listen(self, generate: Generate) -> Listening:
        """Counts from now on.

        Args:
          generate: the listener's own way to an answer, should the one under way fail.
        """
        number = next(self._numbers)
        self._listeners[number] = generate
        return self._listening(number)

    def _listening(self, number: int) -> Listening:
        return self._read(number), functools.partial(self._leave, number)

    def _leave(self, number: int) -> None:
        """Without listeners the generation ends: at once, so that nobody joins what is being taken down."""
        if self._listeners.pop(number, None) is not None and not self._listeners and self._task is not None:
            self._end(self._chunks)
            self._task.cancel()

    async def _read(self, number: int) -> AsyncGenerator[Chunk]:
        try:
            taken = 0
            while True:
                while taken < len(self._chunks):
                    taken += 1
                    yield self._chunks[taken - 1]
                if self._over:
                    if self._error is not None:
                        raise self._error
                    return
                self._more.clear()
                await self._more.wait()
        finally:
            self._leave(number)

    async def _run(self, leader: int, generate: Generate) -> None:
        try:
            try:
                await self._take(generate)
            except Exception:
                # Somebody else tries, once, if nobody has seen anything yet.
                others = [other for number, other in self._listeners.items() if number != leader]
                if not others or self._chunks:
                    raise
                await self._take(others[0])
        except Exception as error:
            self._error = error
        except asyncio.CancelledError as error:
            self._error = error
            raise
        finally:
            self._over = True
            self._more.set()
            self._end(None if self._error is not None else self._chunks)

    def _end(self, answer: list[Chunk] | None) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(answer)

    async def _take(self, generate: Generate) -> None:
        chunks = generate()
        async with contextlib.aclosing(chunks) as source:  # type: ignore[type-var]
            async for chunk in source:
                self._chunks.append(chunk)
                self._more.set()
