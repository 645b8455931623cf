"""Before a replica, a proxy that cuts the connection of an answer after so many of its bytes."""

import asyncio
import contextlib
import threading
from typing import Any
from urllib.parse import urlsplit


class CuttingProxy:
    """Use as a context manager.

    Attributes:
      cuts: for the answers to POST requests that come, after how many bytes each is cut; None, and whatever comes when
        the list is empty, is not.
      answers: what has been passed on of each answer, head and all.
      paths: of the POST requests that came.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._there = parts.hostname, parts.port
        self.cuts: list[int | None] = []
        self.answers: list[bytearray] = []
        self.paths: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "CuttingProxy":
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.name = self.url.removeprefix("http://")
        return self

    def __exit__(self, *_: Any) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection(*self._there)
        answer: bytearray | None = None
        cut: int | None = None

        async def forth() -> None:
            nonlocal answer, cut
            while data := await reader.read(65536):
                if data.startswith(b"POST "):
                    answer, cut = bytearray(), self.cuts.pop(0) if self.cuts else None
                    self.answers.append(answer)
                    self.paths.append(data.split(b" ", 2)[1].decode())
                elif data.startswith(b"GET "):
                    answer = cut = None
                there.write(data)
                await there.drain()

        async def back() -> None:
            while data := await there_reader.read(65536):
                if cut is not None and answer is not None and len(answer) + len(data) >= cut:
                    data = data[: cut - len(answer)]
                    answer.extend(data)
                    writer.write(data)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1):
                            await writer.drain()
                    return
                if answer is not None:
                    answer.extend(data)
                writer.write(data)
                await writer.drain()

        tasks = [asyncio.create_task(forth()), asyncio.create_task(back())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            writer.close()  # what was passed on arrives; then the connection ends in the middle
            there.transport.abort()
