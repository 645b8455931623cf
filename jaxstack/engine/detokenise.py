"""From token ids to text that is safe to show, piece by piece.

A streamed piece must never be taken back. So a piece ends where the text is certain: not inside a UTF-8 character whose
other bytes are still to come, and not inside what may become a stop string. The pieces put together are the text of
all tokens, cut at the first stop string. Each push costs time in proportion to its tokens, however long the text is.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol


class _Tokenizer(Protocol):
    """What is asked of a tokenizer; `jaxstack.models.tokenizer.Tokenizer` has it."""

    special_ids: frozenset[int]

    @property
    def joins_bytes(self) -> bool: ...
    def is_raw_byte(self, token_id: int) -> bool: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class IncrementalDetokenizer:
    """Turns the tokens of one completion into text as they come.

    With a byte-level tokenizer the pieces put together equal `tokenizer.decode(ids)` (cut at the stop string). With
    sentencepiece's byte fallback they do so unless a run of byte tokens is not valid UTF-8: there `decode` gives up the
    whole run, while a stream has already shown, and keeps, its valid part.

    Args:
      tokenizer: gives the bytes of a token.
      stop: strings that end the text.
      include_stop: whether the stop string that ended the text is part of it.
      skip_special_tokens: leave out tokens such as `<|im_end|>`.

    Attributes:
      stopped: the stop string that was found; no text comes after it. Of several that become complete at the same
        character the longest counts.
    """

    def __init__(
        self,
        tokenizer: _Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = tokenizer.joins_bytes  # whether the next token is not the first, which may look different
        self._scanner = _StopScanner(stop, include_stop) if stop else None

    @property
    def stopped(self) -> str | None:
        return self._scanner.found if self._scanner else None

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is certain now and has not been returned before."""
        text = "".join([self._text_of(token) for token in token_ids])
        return self._scanner.push(text) if self._scanner else text

    def finish(self) -> str:
        """The text still held back, now that no more tokens come; an unfinished character becomes U+FFFD."""
        rest = self._utf8.decode(b"", True)
        return self._scanner.finish(rest) if self._scanner else rest

    def _text_of(self, token: int) -> str:
        tokenizer = self._tokenizer
        if token in self._skipped:
            return ""
        if tokenizer.joins_bytes or tokenizer.is_raw_byte(token):
            self._begun = True
            return self._utf8.decode(tokenizer.token_bytes(token))
        if self._begun:
            piece = tokenizer.token_bytes(token).decode()
        else:
            piece = tokenizer.decode([token], skip_special_tokens=False)
            self._begun = bool(piece) or bool(tokenizer.token_bytes(token))
        # Whole characters follow: what bytes came before them will not be completed any more.
        return self._utf8.decode(b"", True) + piece


class _StopScanner:
    """Finds the first stop string in a growing text and holds back what may still become one.

    One Knuth-Morris-Pratt automaton per stop string: its state is the length of the longest prefix of the stop string
    that the text ends in, which is also what has to be held back.
    """

    def __init__(self, stop: Sequence[str], include_stop: bool):
        # Longest first, so that it wins among those complete at the same character.
        self._stop = sorted((s for s in stop if s), key=len, reverse=True)
        self._fallbacks = [_borders(s) for s in self._stop]
        self._states = [0] * len(self._stop)
        self._include_stop = include_stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        for end, character in enumerate(text, start=len(self._held) + 1):
            for which, stop in enumerate(self._stop):
                state, fallback = self._states[which], self._fallbacks[which]
                while state and stop[state] != character:
                    state = fallback[state - 1]
                self._states[which] = state = state + (stop[state] == character)
                if state == len(stop) and self.found is None:
                    self.found = stop
            if self.found is not None:
                shown = (self._held + text)[: end if self._include_stop else end - len(self.found)]
                self._held = ""
                return shown
        text = self._held + text
        certain = len(text) - max(self._states, default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self, rest: str) -> str:
        shown = self.push(rest)
        held, self._held = self._held, ""
        return shown + held


def _borders(text: str) -> list[int]:
    """For each prefix of `text` the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = borders[length - 1]
        length += text[i] == text[length]
        borders[i] = length
    return borders
