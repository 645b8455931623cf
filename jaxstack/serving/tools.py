"""Calls of tools: read out of a model's text, as it comes, in the notation that the model was trained on.

Three notations: Hermes and Qwen write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, Llama 3 begins its
answer with `{"name": ..., "parameters": {...}}`, Mistral writes `[TOOL_CALLS]` and a list of such objects, or
`[TOOL_CALLS]name[ARGS]{...}`. A reader takes single characters, so how the text was cut into pieces cannot matter.
Arguments are handed on while they are written. What looks like a call and turns out to be none is content.
"""

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Literal

from jaxstack.models.tokenizer import Tokenizer

ToolFormat = Literal["hermes", "llama3", "mistral"]
FORMATS: tuple[ToolFormat, ...] = ("hermes", "llama3", "mistral")
MARKERS: dict[ToolFormat, str] = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
_HERMES_END = "</tool_call>"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_BLANKS = " \t\r\n"

Routine = Generator[None, str, None]


@dataclasses.dataclass
class CallPiece:
    """Part of a call. The first piece has `id` and `name`; `arguments` of all pieces together are JSON text."""

    index: int
    id: str | None
    name: str | None
    arguments: str = ""


class _NoCall(Exception):
    """What was read cannot be a call."""


class ToolReader:
    """Reads one answer.

    Args:
      notation: which of the three.
      names: the tools on offer. An unmarked call (Llama 3) of any other is content.
      parallel: whether calls after the first are kept.

    Attributes:
      calls: how many have begun.
    """

    def __init__(self, notation: ToolFormat, names: Sequence[str], *, parallel: bool = True):
        self.calls = 0
        self._notation, self._names, self._parallel = notation, frozenset(names), parallel
        self._pieces: list[str | CallPiece] = []
        self._held = ""  # content, unless it becomes a call
        self._holding = False
        self._now = ""
        self._again = False
        self._routine = {"hermes": self._hermes, "llama3": self._llama3, "mistral": self._mistral}[notation]()
        next(self._routine)

    def push(self, text: str) -> list[str | CallPiece]:
        """Takes the next piece; returns content and parts of calls, in order."""
        for character in text:
            self._routine.send(character)
        return self._taken()

    def finish(self) -> list[str | CallPiece]:
        """What was held back, now that no more comes. A call that was cut stays as it is."""
        self._routine.close()
        held, self._held = self._held, ""
        if held.strip() or not self.calls:
            self._say(held)
        return self._taken()

    def _taken(self) -> list[str | CallPiece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # -------------------------------------------------------------------------------------------------- what is shown

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._pieces and isinstance(self._pieces[-1], str):
            self._pieces[-1] += text
        else:
            self._pieces.append(text)

    def _begin_call(self, name: str) -> None:
        self._held, self._holding = "", False
        self.calls += 1
        if self._shown:
            # Mistral's templates insist on nine letters or digits.
            number = uuid.uuid4().hex
            identity = number[:9] if self._notation == "mistral" else f"call_{number[:24]}"
            self._pieces.append(CallPiece(self.calls - 1, identity, name))

    def _add_arguments(self, text: str) -> None:
        if not self._shown:
            return
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, CallPiece) and last.index == self.calls - 1:
            last.arguments += text
        else:
            self._pieces.append(CallPiece(self.calls - 1, None, None, text))

    @property
    def _shown(self) -> bool:
        return self._parallel or self.calls == 1

    # ------------------------------------------------------------------------------------------------- the notations

    def _hermes(self) -> Routine:
        while True:
            marker = yield from self._content((MARKERS["hermes"], *((_HERMES_END,) if self.calls else ())))
            if marker == _HERMES_END:
                self._held = ""
                continue
            try:
                yield from self._after_blanks()
                yield from self._call()
            except _NoCall:
                self._give_up()

    def _mistral(self) -> Routine:
        while True:
            yield from self._content((MARKERS["mistral"],))
            try:
                yield from self._after_blanks()
                if self._now == "[":
                    yield from self._after_blanks()
                    while self._now != "]":
                        yield from self._call()
                        yield from self._after_blanks()
                        if self._now == ",":
                            yield from self._after_blanks()
                        elif self._now != "]":
                            raise _NoCall
                else:
                    yield from self._named_call()
            except _NoCall:
                self._give_up()

    def _named_call(self) -> Routine:
        """`name[ARGS]{...}`, `name[CALL_ID]id[ARGS]{...}` or `name{...}`; `_now` is the first character."""
        head = ""
        while self._now != "{":
            head += self._now
            if len(head) > 200:
                raise _NoCall
            yield from self._next()
        name = head.partition("[")[0].strip()
        if not _NAME.fullmatch(name):
            raise _NoCall
        self._begin_call(name)
        yield from self._value(self._add_arguments)

    def _llama3(self) -> Routine:
        marker = MARKERS["llama3"]
        self._holding = True
        while True:
            # At the beginning, or after a call: another one, perhaps behind the marker, or content from here on.
            yield from self._after_blanks()
            try:
                if self._now == "<" and not self.calls:
                    for expected in marker[1:]:
                        yield from self._next()
                        if self._now != expected:
                            raise _NoCall
                    yield from self._after_blanks()
                elif self._now in ";," and self.calls:
                    yield from self._after_blanks()
                yield from self._call(known_only=True)
                self._holding = True
            except _NoCall:
                self._give_up()
                break
        while True:
            yield from self._next()
            self._say(self._now)

    def _give_up(self) -> None:
        """What was held is content after all."""
        if self._holding:
            held, self._held = self._held, ""
            if self._again:  # the character will be read once more
                held = held[:-1]
            self._say(held)
        self._holding = False

    # --------------------------------------------------------------------------------------------------- characters

    def _next(self) -> Routine:
        """Makes `_now` the next character."""
        if self._again:
            self._again = False
            return
        self._now = yield
        if self._holding:
            self._held += self._now

    def _after_blanks(self) -> Routine:
        yield from self._next()
        while self._now in _BLANKS:
            yield from self._next()

    def _content(self, markers: tuple[str, ...]) -> Generator[None, str, str]:
        """Passes content on until a marker is complete, which is returned. Blanks before it are dropped.

        From the marker on everything is held, for it may be content.
        """
        self._holding = False
        firsts = {marker[0] for marker in markers}
        while True:
            yield from self._next()
            if not self._held and self._now not in firsts and self._now not in _BLANKS:
                self._say(self._now)
                continue
            self._held += self._now
            found = self._held.lstrip(_BLANKS)
            if found in markers:
                self._holding = True
                return found
            certain = 0
            while certain < len(self._held) and not _may_become(self._held[certain:], markers):
                certain += 1
            self._say(self._held[:certain])
            self._held = self._held[certain:]

    # --------------------------------------------------------------------------------------------------------- JSON

    def _call(self, known_only: bool = False) -> Routine:
        """One call as a JSON object; `_now` is its first character, and its last afterwards."""
        if self._now != "{":
            raise _NoCall
        name: str | None = None
        early: str | None = None  # arguments that came before the name
        done = False

        def begin(with_name: str) -> None:
            if not _NAME.fullmatch(with_name) or (known_only and with_name not in self._names):
                raise _NoCall
            self._begin_call(with_name)

        yield from self._after_blanks()
        while self._now != "}":
            key = yield from self._string()
            yield from self._after_blanks()
            if self._now != ":":
                raise _NoCall
            yield from self._after_blanks()
            if key == "name" and name is None:
                name = yield from self._string()
                if early is not None:
                    begin(name)
                    self._add_arguments(early)
            elif key in ("arguments", "parameters") and not done:
                done = True
                if self._now == "{" and name is not None:
                    begin(name)
                    yield from self._value(self._add_arguments)
                else:
                    parts: list[str] = []
                    yield from self._value(parts.append)
                    text = _as_arguments("".join(parts))
                    if name is None:
                        early = text
                    else:
                        begin(name)
                        self._add_arguments(text)
            else:
                yield from self._value(lambda _: None)
            yield from self._after_blanks()
            if self._now == ",":
                yield from self._after_blanks()
            elif self._now != "}":
                raise _NoCall
        if name is None:
            raise _NoCall
        if not done:
            begin(name)
            self._add_arguments("{}")

    def _string(self) -> Generator[None, str, str]:
        """A string; `_now` is its first quote, and its last afterwards."""
        parts: list[str] = []
        if self._now != '"':
            raise _NoCall
        yield from self._value(parts.append)
        try:
            return json.loads("".join(parts), strict=False)
        except ValueError:
            raise _NoCall from None

    def _value(self, keep: Callable[[str], None]) -> Routine:
        """Any value, every character of it to `keep`; `_now` is its first character, and its last afterwards."""
        if self._now not in '{["':
            if self._now in ",}]:":
                raise _NoCall
            while self._now not in ",}]" and self._now not in _BLANKS:
                keep(self._now)
                yield from self._next()
            self._again = True
            return
        depth, quoted, escaped = 0, False, False
        while True:
            keep(self._now)
            if quoted:
                if escaped:
                    escaped = False
                elif self._now == "\\":
                    escaped = True
                elif self._now == '"':
                    quoted = False
            elif self._now == '"':
                quoted = True
            elif self._now in "{[":
                depth += 1
            elif self._now in "}]":
                depth -= 1
            if not depth and not quoted:
                return
            yield from self._next()


def _may_become(text: str, markers: tuple[str, ...]) -> bool:
    start = text.lstrip(_BLANKS)
    return any(marker.startswith(start) for marker in markers)


def _as_arguments(text: str) -> str:
    """Arguments that a model wrote as a JSON string, or as null, made the object they mean."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        try:
            inner = json.loads(text, strict=False)
        except ValueError:
            return text
        return inner if inner.strip() else "{}"
    return text


def tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """The notation that the chat template teaches; None if it knows of no tools."""
    if not tokenizer.has_chat_template:
        return None
    source = tokenizer.chat_template(tools=True).source
    for notation in FORMATS:
        if MARKERS[notation] in source:
            return notation
    if not re.search(r"\btools\b", source):
        return None
    return "llama3" if '"parameters"' in source and "<|start_header_id|>" in source else "hermes"
