"""Conversations to token ids, and which of those tokens are trained.

The template decides what the text looks like; which characters of it an assistant would have generated is found by
rendering the conversation turn by turn. The whole text is tokenised once, so the ids are those that the field's tools
produce, and a token is trained when its first character lies in a trained span.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError

MaskPolicy = Literal["assistant", "last_assistant", "all"]
"""Which tokens of a conversation are trained: every assistant turn, the last one, or all tokens."""

_SHAREGPT_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    mask: MaskPolicy = "assistant",
    **variables: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [n] of a conversation and their loss mask bool [n].

    Of a trained assistant turn the content and the end-of-turn token are trained; the header is not, nor is white space
    that the template writes behind the end of the turn. A message with `"train": false` is not trained.

    Args:
      tokenizer: must have a chat template.
      messages: `{"role": ..., "content": ...}` each.
      mask: what is trained.
      variables: for the template, for instance `enable_thinking=False`.

    Raises:
      UserError: no template, the template refuses the messages, or it does not show where an assistant's turn begins
        and ends.
    """
    text, spans = trained_spans(tokenizer, messages, mask=mask, **variables)
    encoding = tokenizer.pipeline.encode(text, add_special_tokens=False)
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    trained = np.zeros(len(starts), bool)
    for begin, end in spans:
        trained |= (starts >= begin) & (starts < end)
    return np.array(encoding.ids, np.int32), trained


def trained_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    mask: MaskPolicy = "assistant",
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans `[begin, end)` of it that are trained; else as `render`."""
    if not any(message.get("role") == "assistant" for message in messages):
        return tokenizer.render_chat(messages, add_generation_prompt=False, **variables), []
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    if mask == "all":
        return text, [(0, len(text))]
    turns = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
    if mask == "last_assistant":
        turns = turns[-1:]
    wanted = [k for k in turns if messages[k].get("train", True)]
    spans = [_turn_span(tokenizer, messages, k, text, variables) for k in wanted]
    if None not in spans:
        return text, [span for span in spans if span is not None]
    return _generation_spans(tokenizer, messages, wanted, text, variables)


def _turn_span(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], k: int, text: str, variables: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Where message k lies in `text`, or None if the conversation up to there is not how `text` begins."""
    if k == 0:
        return None  # most templates refuse an empty conversation, which its header would be
    header = tokenizer.render_chat(messages[:k], add_generation_prompt=True, **variables)
    upto = tokenizer.render_chat(messages[: k + 1], add_generation_prompt=False, **variables)
    if not (upto.startswith(header) and text.startswith(upto)):
        return None
    return len(header), max(len(header), len(upto.rstrip()))


def _generation_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    wanted: Sequence[int],
    text: str,
    variables: Mapping[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """Spans from the template's `{% generation %}` blocks, the one other way to know."""
    template = tokenizer.chat_template(tools=bool(variables.get("tools")))
    names = {"tools": None, "documents": None, **tokenizer.special_tokens, **variables}
    marked, blocks = template.render_with_spans(messages, add_generation_prompt=False, **names)
    assistants = [k for k, message in enumerate(messages) if message.get("role") == "assistant"]
    if marked != text or len(blocks) not in (len(assistants), len(messages)):
        raise UserError(
            f"{template.name}: rendering this conversation turn by turn does not give the beginning of the whole "
            "(templates that drop earlier thinking do this), and it has no {% generation %} block for each assistant "
            "turn; expected one of them, or mask=last_assistant"
        )
    of_message = dict(zip(assistants if len(blocks) == len(assistants) else range(len(messages)), blocks))
    return text, [of_message[k] for k in wanted]


def messages_of_sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"system": ..., "conversations": [{"from": "user", "value": ...}, ...]}` as messages.

    Raises:
      UserError: a turn without `from` and `value`, or from an unknown role.
    """
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(row["conversations"]):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise UserError(f"conversations[{number}]: expected an object with 'from' and 'value'")
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise UserError(
                f"conversations[{number}]: from is {turn.get('from')!r}, expected one of {', '.join(_SHAREGPT_ROLES)}"
            )
        messages.append({"role": role, "content": turn["value"]})
        if turn.get("train") is False:
            messages[-1]["train"] = False
    return messages
