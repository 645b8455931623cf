"""From the text of one answer to the parts of a chat message: reasoning, content and calls of tools."""

import dataclasses

from jaxstack.serving.reasoning import ReasoningReader
from jaxstack.serving.tool_choice import Tools
from jaxstack.serving.tools import CallPiece, ToolFormat, ToolReader


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the answers to one request are read.

    Attributes:
      thinking: whether the prompt has begun the model's thinking; None where thinking is not told apart.
      show_thinking: whether it is part of the answer.
      tools: those on offer, and how the model writes calls; None for plain text.
    """

    thinking: bool | None = None
    show_thinking: bool = True
    tools: tuple[Tools, ToolFormat] | None = None


PLAIN_TEXT = Reading()


@dataclasses.dataclass
class MessagePart:
    """What a piece of text came to."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = dataclasses.field(default_factory=list)


class MessageReader:
    """Reads one answer; pieces of any size in, parts out."""

    def __init__(self, reading: Reading):
        self._show_thinking = reading.show_thinking
        self._reasoning = None if reading.thinking is None else ReasoningReader(begun=reading.thinking)
        self._tools: ToolReader | None = None
        if reading.tools is not None:
            tools, notation = reading.tools
            self._tools = ToolReader(notation, tools.names, parallel=tools.parallel)

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        return 0 if self._tools is None else self._tools.calls

    def push(self, text: str, *, last: bool = False) -> MessagePart:
        """Takes the next piece; with the last one also what was held back."""
        part = MessagePart(content=text)
        if self._reasoning is not None:
            part.reasoning, part.content = self._reasoning.push(text)
            if last:
                reasoning, content = self._reasoning.finish()
                part.reasoning, part.content = part.reasoning + reasoning, part.content + content
        if not self._show_thinking:
            part.reasoning = ""
        if self._tools is not None:
            events = self._tools.push(part.content)
            if last:
                events += self._tools.finish()
            part.content = "".join(event for event in events if isinstance(event, str))
            part.calls = [event for event in events if isinstance(event, CallPiece)]
        return part
