"""Single flight: equal requests that are being answered at once are answered by one generation.

Everyone reads the answer from its beginning, so those who come later stream too. The generation goes on while anybody
listens, whoever began it. Belongs to one event loop.
"""

import asyncio
import contextlib
import dataclasses
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


class Flight:
    """One generation and those who listen to it.

    Attributes:
      decided: True once it is certain that there will be an answer to listen to, False if there will be none.
    """

    def __init__(self) -> None:
        self.decided: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._chunks: list[Chunk] = []
        self._more = asyncio.Event()
        self._over = False
        self._error: BaseException | None = None
        self._listeners: list[Generate] = []
        self._task: asyncio.Task[None] | None = None

    def start(self, generate: Generate, on_end: Callable[[list[Chunk] | None], None]) -> None:
        """Begins. `on_end` is called once: with the whole answer, or with None if there is none."""
        self.decided.set_result(True)
        self._task = asyncio.get_running_loop().create_task(self._run(generate, on_end))

    def give_up(self) -> None:
        """There will be nothing to listen to: those who waited ask for themselves."""
        if not self.decided.done():
            self.decided.set_result(False)

    def listen(self, generate: Generate) -> AsyncGenerator[Chunk]:
        """The answer from its beginning; what ends it in failure is raised. Counts from now on, until `leave`.

        Args:
          generate: the listener's own way to an answer, should the one under way fail.
        """
        self._listeners.append(generate)
        return self._read(generate)

    def leave(self, generate: Generate) -> None:
        """Without listeners the generation ends. May be called again."""
        if generate in self._listeners:
            self._listeners.remove(generate)
            if not self._listeners and self._task is not None:
                self._task.cancel()

    async def _read(self, generate: Generate) -> AsyncGenerator[Chunk]:
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
            self.leave(generate)

    async def _run(self, generate: Generate, on_end: Callable[[list[Chunk] | None], None]) -> None:
        whole: list[Chunk] | None = None
        try:
            try:
                await self._take(generate)
            except Exception:
                # Somebody else tries, once, if nobody has seen anything yet.
                others = [other for other in self._listeners if other is not generate]
                if not others or self._chunks:
                    raise
                await self._take(others[0])
            whole = self._chunks
        except Exception as error:
            self._error = error
        except asyncio.CancelledError as error:
            self._error = error
            raise
        finally:
            self._over = True
            self._more.set()
            on_end(whole)

    async def _take(self, generate: Generate) -> None:
        chunks = generate()
        async with contextlib.aclosing(chunks) as source:  # type: ignore[type-var]
            async for chunk in source:
                self._chunks.append(chunk)
                self._more.set()
