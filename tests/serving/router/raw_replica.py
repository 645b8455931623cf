"""A replica that does on its socket whatever a test says."""

import asyncio
import contextlib
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def whole(body: bytes, status: int = 200) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class RawReplica:
    """`script` answers each POST; other requests are healthy, or not found. Use as a context manager.

    Attributes:
      heads: of the requests that came by POST.
      gone: set when a client has closed its connection under a script.
    """

    def __init__(self, script: Script):
        self.script = script
        self.heads: list[str] = []
        self.gone = threading.Event()
        self.health = 200
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "RawReplica":
        self._thread.start()
        self.server = self.call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.name = self.url.removeprefix("http://")
        return self

    def __exit__(self, *_: Any) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def die(self) -> None:
        """As a killed process: nobody listens, and every connection is gone."""

        async def die() -> None:
            self.server.close()
            for _ in range(3):  # the last connection may just be coming in
                tasks = asyncio.all_tasks() - {asyncio.current_task()}
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.sleep(0.002)

        if self.server.is_serving():
            self.call(die())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                length = re.search(r"content-length: *(\d+)", head.lower())
                await reader.readexactly(int(length.group(1)) if length else 0)
                if head.startswith("POST"):
                    self.heads.append(head.lower())
                    await self.script(writer)
                elif " /health " in head:
                    writer.write(whole(b"{}", self.health))
                else:
                    writer.write(whole(b'{"error": {"message": "no"}}', 404))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            self.gone.set()
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
