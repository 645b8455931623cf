"""HTTP/1.1 to one replica over connections that are kept: as little work for each request as can be.

A request leaves in one write, and an answer is read no faster than it is taken. (A general client does much that a
router has no use for, redirects and cookies and URLs, and took most of the time that the router added to a request.)
"""

import asyncio
import collections
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, Mapping
from urllib.parse import urlsplit

import h11

# Idle connections are given up before any server does so, or a request would meet one that is just being closed.
_IDLE_S = 2.0
_READ_BYTES = 2**16


class UpstreamError(Exception):
    """The server cannot be reached, or breaks off."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.http = h11.Connection(h11.CLIENT)
        self.idle_since = 0.0

    @property
    def open(self) -> bool:
        return not self.writer.is_closing() and not self.reader.at_eof()

    async def event(self) -> "h11.Event | type[h11.PAUSED]":
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(await self.reader.read(_READ_BYTES))
        return event  # type: ignore[return-value]


class Upstream:
    """Connections to `url`, of which there are as many as requests under way.

    Args:
      headers: sent with every request.
    """

    def __init__(self, url: str, connect_timeout_s: float, headers: Mapping[str, str]):
        parts = urlsplit(url)
        self._host, self._secure = parts.hostname or "", parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._connect_timeout_s = connect_timeout_s
        self._headers = {"host": parts.netloc, "accept-encoding": "identity", **headers}
        self._idle: collections.deque[_Connection] = collections.deque()
        self._tls: ssl.SSLContext | None = None
        self._closed = False

    async def send(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> "UpstreamAnswer":
        """Sends a request and waits for the head of its answer, which the caller must close.

        Raises:
          UpstreamError: no connection, or none any more.
        """
        connection = await self._connection()
        every = {**self._headers, **(headers or {}), "content-length": str(len(body))}
        http = connection.http
        try:
            request = h11.Request(method=method, target=target, headers=list(every.items()))
            data = http.send(request) + (http.send(h11.Data(data=body)) if body else b"")  # type: ignore[operator]
            connection.writer.write(data + http.send(h11.EndOfMessage()))  # type: ignore[operator]
            await connection.writer.drain()
            event = await connection.event()
            while isinstance(event, h11.InformationalResponse):
                event = await connection.event()
            if not isinstance(event, h11.Response):
                raise UpstreamError("the connection was closed without an answer")
            return UpstreamAnswer(self, connection, event)
        except BaseException as error:
            connection.writer.transport.abort()
            if isinstance(error, OSError | h11.RemoteProtocolError):
                raise UpstreamError(_words(error)) from error
            raise

    async def fetch(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the whole answer. Raises as `send` does."""
        answer = await self.send(method, target, headers, body)
        with contextlib.closing(answer):
            return answer.status, answer.headers, b"".join([piece async for piece in answer.pieces()])

    def close(self) -> None:
        """Keeps no connection any more."""
        self._closed = True
        while self._idle:
            self._idle.pop().writer.close()

    async def _connection(self) -> _Connection:
        since = time.monotonic() - _IDLE_S
        while self._idle and (self._idle[0].idle_since < since or not self._idle[0].open):
            self._idle.popleft().writer.close()
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
            connection.writer.close()
        if self._secure and self._tls is None:
            self._tls = ssl.create_default_context()
        try:
            async with asyncio.timeout(self._connect_timeout_s) as limit:
                return _Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._tls))
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise UpstreamError(f"no connection within {self._connect_timeout_s} s") from error
        except OSError as error:
            raise UpstreamError(_words(error)) from error

    def _keep(self, connection: _Connection) -> None:
        if self._closed:
            connection.writer.close()
            return
        connection.http.start_next_cycle()
        connection.idle_since = time.monotonic()
        self._idle.append(connection)


class UpstreamAnswer:
    """An answer whose head has come. Header names are in lower case."""

    def __init__(self, upstream: Upstream, connection: _Connection, head: h11.Response):
        self._upstream = upstream
        self._connection: _Connection | None = connection
        self.status = head.status_code
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it comes, at least a read at a time. Raises UpstreamError if it breaks off."""
        connection = self._connection
        assert connection is not None
        http, read = connection.http, bytearray()
        try:
            while True:
                event = http.next_event()
                if isinstance(event, h11.Data):
                    read += event.data
                    continue
                if read:
                    yield bytes(read)
                    read.clear()
                if event is h11.NEED_DATA:
                    http.receive_data(await connection.reader.read(_READ_BYTES))
                    continue
                if http.our_state is h11.DONE and http.their_state is h11.DONE:
                    self._connection = None
                    self._upstream._keep(connection)
                return
        except (OSError, h11.RemoteProtocolError) as error:
            raise UpstreamError(_words(error)) from error

    def close(self) -> None:
        """Breaks off what has not been read."""
        if self._connection is not None:
            self._connection.writer.transport.abort()
            self._connection = None


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
