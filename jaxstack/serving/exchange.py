"""One HTTP exchange: reading a body within limits, answering, streaming events, noticing that the client has gone.

Starlette's request and response classes are not used here: its StreamingResponse watches for a disconnect only with
some servers, its other responses never do.
"""

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from jaxstack.serving.config import ServerConfig
from jaxstack.serving.errors import ApiError, ClientGone

_Result = TypeVar("_Result")

WANT_USAGE = "x-want-usage"
"""A header of a request for a stream: its last comment shall be `USAGE_COMMENT` and the usage, whatever the body says.
A router asks for it, which keeps accounts but must not change what the client sees.
"""
USAGE_COMMENT = b"usage "

# How long, and how much, a client may go on sending after its request was refused, before the connection is closed.
# Closing at once would make its operating system throw away the answer it has not read yet.
_LINGER_S, _LINGER_BYTES = 2.0, 64 * 2**20


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def encode_json(content: Any) -> bytes:
    """UTF-8 JSON. Half a surrogate pair, which may come from a client's own text, is written as its escape."""
    return _encode(content).encode("utf-8", "backslashreplace")


class Exchange:
    """What a handler gets: `receive` and `send` with limits."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, config: ServerConfig):
        self.scope, self.config = scope, config
        self._receive, self._send = receive, send
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.started = False
        self.owner: str | None = None  # of the API key, once that has been checked
        self.more_headers: dict[str, str] = {}  # for whatever the answer will be
        self.farewell = b""  # behind a stream that comes to its end, be it an error
        self._body_read = not {"content-length", "transfer-encoding"} & self.headers.keys()
        self._streaming = False

    # -------------------------------------------------------------------------------------------------------- reading

    async def body(self, factor: int = 1) -> bytes:
        """The request's body, which may be `factor` times as large as others.

        Raises:
          ApiError: 413 too large (as soon as that is known), 415 not JSON, 408 too slow.
          ClientGone: the connection closed.
        """
        limit = factor * self.config.max_body_bytes
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            found = repr(kind) if kind else "none"
            raise ApiError(
                415, f"content-type: found {found}, expected application/json", code="unsupported_media_type"
            )
        announced = self.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            raise self._too_large(f"{announced} bytes", limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                while not self._body_read:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    self._body_read = not message.get("more_body", False)
                    if len(body) > limit:
                        raise self._too_large(f"more than {limit} bytes", limit)
        except TimeoutError:
            message_text = f"the body did not arrive within {self.config.body_timeout_s} s"
            raise ApiError(408, message_text, code="timeout") from None
        return bytes(body)

    def _too_large(self, found: str, limit: int) -> ApiError:
        message = f"body: found {found}, expected at most {limit}"
        return ApiError(413, message, code="request_too_large")

    # ------------------------------------------------------------------------------------------------------ answering

    async def answer(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Sends a JSON body."""
        await self.answer_bytes(encode_json(content), "application/json", status, headers)

    async def answer_bytes(
        self, body: bytes, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Sends a whole body; if the request's was not read to its end, lingers a little and closes the connection."""
        all_headers = {"content-type": content_type, "content-length": str(len(body)), **(headers or {})}
        if not self._body_read:
            all_headers["connection"] = "close"
        await self._start(status, all_headers)
        await self._send_within_limit({"type": "http.response.body", "body": body, "more_body": not self._body_read})
        if not self._body_read:
            await self._discard_rest()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Answers with an error; in a stream that has begun, as its last event."""
        if self._streaming:
            await self.event(error.body)
            await self.end_events(b"")
        elif not self.started:
            await self.answer(error.body, error.status, error.headers)

    async def start_events(self) -> None:
        """Begins a stream of server-sent events."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        await self._start(200, headers)
        self._streaming = True

    async def event(self, *contents: Any, then: bytes = b"") -> None:
        """Sends events, together in one write, and `then` behind them."""
        data = b"".join(b"data: " + encode_json(content) + b"\n\n" for content in contents) + then
        await self._send_within_limit({"type": "http.response.body", "body": data, "more_body": True})

    async def comment(self, text: bytes = b"waiting") -> None:
        """Sends a line that clients skip, so that nobody on the way takes the connection for dead."""
        await self.pass_on(b": " + text + b"\n\n")

    async def pass_on(self, events: bytes) -> None:
        """Sends events that somebody else has written."""
        await self._send_within_limit({"type": "http.response.body", "body": events, "more_body": True})

    async def end_events(self, last: bytes = b"data: [DONE]\n\n") -> None:
        """Sends `[DONE]` and ends the stream."""
        await self.break_off(last + self.farewell)

    async def break_off(self, last: bytes = b"") -> None:
        """Ends the stream without a word more."""
        await self._send_within_limit({"type": "http.response.body", "body": last, "more_body": False})

    async def while_client_waits(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of `work`, which is cancelled as soon as the client closes the connection.

        Call it once the body has been read: what it receives is thrown away.

        Raises:
          ClientGone: the client closed first.
        """
        working = asyncio.create_task(work)
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ClientGone
        finally:
            working.cancel()
            watching.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _start(self, status: int, headers: Mapping[str, str]) -> None:
        every = {**headers, **self.more_headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in every.items()]
        self.started = True
        await self._send_within_limit({"type": "http.response.start", "status": status, "headers": raw})

    async def _send_within_limit(self, message: Any) -> None:
        """Sends, or cuts off a client that has taken nothing for too long."""
        try:
            async with asyncio.timeout(self.config.stall_timeout_s):
                await self._send(message)
        except TimeoutError:
            abort = self.scope.get("jaxstack.abort")
            if abort is not None:
                abort()
                await asyncio.sleep(0)  # lets the server notice that the connection is lost
            raise ClientGone(f"took nothing for {self.config.stall_timeout_s} s") from None

    async def _discard_rest(self) -> None:
        left = _LINGER_BYTES
        try:
            async with asyncio.timeout(_LINGER_S):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            pass
