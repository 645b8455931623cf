"""Thinking kept apart from the answer: `<think>...</think>` becomes `reasoning_content`.

A reader sees the text as it comes, in pieces of any size, and gives the same result however it was cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxstack.models.tokenizer import Tokenizer

ReasoningFormat = Literal["think"]
BEGIN, END = "<think>", "</think>"


class ReasoningReader:
    """Splits one answer into what was thought and what is said.

    Blanks around the thinking and before the answer belong to neither. Thinking is looked for at the beginning of the
    answer alone; a marker later on is text.

    Args:
      begun: the prompt has opened the thinking already.
    """

    def __init__(self, *, begun: bool):
        self._state = "thinking" if begun else "start"
        self._said_something = False
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Takes the next piece; returns the reasoning and the content that are certain now."""
        if self._state == "said":
            return "", text
        self._held += text
        reasoning = ""
        if self._state == "start":
            start = self._held.lstrip()
            if start.startswith(BEGIN):
                self._state, self._held = "thinking", start[len(BEGIN) :]
            elif not BEGIN.startswith(start):
                self._state = "said"
        if self._state == "thinking":
            thought, marker, rest = self._held.partition(END)
            if marker:
                self._state, self._held = "gap", rest
            else:
                certain = len(thought) - longest_overlap(thought, END)
                thought = thought[:certain]
                self._held = self._held[len(thought.rstrip()) :]
            reasoning = self._trimmed(thought)
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "said"
        if self._state != "said":
            return reasoning, ""
        content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """What was held back, now that no more comes."""
        rest, self._held = self._held, ""
        if self._state == "thinking":
            return self._trimmed(rest), ""
        return "", "" if self._state == "gap" else rest

    def _trimmed(self, thought: str) -> str:
        thought = thought.rstrip()
        if not self._said_something:
            thought = thought.lstrip()
            self._said_something = bool(thought)
        return thought


def longest_overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `marker`."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def reasoning_format(tokenizer: Tokenizer) -> ReasoningFormat | None:
    """How this model marks its thinking: told by its chat template, else by its tokens."""
    in_template = tokenizer.has_chat_template and END in tokenizer.chat_template().source
    has_tokens = all(tokenizer.token_to_id(marker) is not None for marker in (BEGIN, END))
    return "think" if in_template or has_tokens else None


def thinking_begun(prompt: str, messages: Sequence[Mapping[str, Any]], continued: bool) -> bool:
    """Whether the rendered `prompt` ends inside the model's thinking.

    Only what the template or the model itself wrote counts: a user may well talk of `<think>`.
    """
    if not continued:
        return prompt.rstrip().endswith(BEGIN)
    said = str(messages[-1].get("content"))
    return BEGIN in said and said.rfind(BEGIN) > said.rfind(END)
