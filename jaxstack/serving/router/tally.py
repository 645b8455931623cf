"""What an answer on its way to the client says of itself: whole events, how many, and the usage."""

import dataclasses
import json
import re
from typing import Any

from jaxstack.serving.exchange import USAGE_COMMENT

_USAGE = re.compile(rb'"usage"\s*:\s*(?=\{)')
_COMMENT = re.compile(rb"^: " + USAGE_COMMENT + rb"(\{.*\})\r?\n\r?\n", re.MULTILINE)
_DATA = re.compile(rb"^data:", re.MULTILINE)
_TAIL = 8192
# An event longer than this is passed on in pieces.
_LONGEST_EVENT = 16 * 2**20

_decoder = json.JSONDecoder()


@dataclasses.dataclass
class Tally:
    """Takes an answer piece by piece.

    Attributes:
      events: data events seen whole.
      prompt_tokens, cached_tokens, said_output: as the replica says; None where it does not.
    """

    events: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    said_output: int | None = None
    _held: bytes = b""
    _tail: bytes = b""

    @property
    def output_tokens(self) -> int:
        """Where the replica does not say, one an event."""
        return self.events if self.said_output is None else self.said_output

    def events_of(self, piece: bytes) -> bytes:
        """Takes a piece of a stream of events; returns the events that are complete with it. A part of one is held
        back, so that an event of our own can follow whatever was passed on.
        """
        data = self._held + piece
        end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\r\n\r\n") + 4)
        if end < 4:
            end = 0 if len(data) < _LONGEST_EVENT else len(data)
        whole, self._held = data[:end], data[end:]
        if b": " + USAGE_COMMENT in whole:  # meant for us
            for comment in _COMMENT.finditer(whole):
                self._read(comment.group(1))
            whole = _COMMENT.sub(b"", whole)
        if whole:
            self.events += len(_DATA.findall(whole))
            self._tail = (self._tail + whole)[-_TAIL:]
        return whole

    def end_of_events(self) -> bytes:
        """The stream is over; returns what was held back."""
        if self.said_output is None:
            self._find(self._tail)
        return self._held

    def whole(self, body: bytes) -> None:
        """Takes an answer that is not a stream."""
        self._find(body)

    def _find(self, data: bytes) -> None:
        found = None
        for found in _USAGE.finditer(data):  # noqa: B007 (the last)
            pass
        if found is not None:
            self._read(data[found.end() :])

    def _read(self, data: bytes) -> None:
        try:
            usage: dict[str, Any] = _decoder.raw_decode(data.decode("utf-8", "replace"))[0]
        except ValueError:
            return
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.said_output = _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached_tokens = _count(details.get("cached_tokens"))


def _count(found: Any) -> int | None:
    return found if isinstance(found, int) and found >= 0 else None
