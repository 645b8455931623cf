"""An answer that can go on elsewhere, as a server sees it: what it says beside it (`journal_format.py`), and what it is
told of one that another server has broken off.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import pydantic

from jaxstack.engine import SamplingParams, TokenLogprob
from jaxstack.serving.errors import ApiError, bad_field
from jaxstack.serving.exchange import encode_json
from jaxstack.serving.generation import Piece
from jaxstack.serving.journal_format import HEAD, TOKENS, WANT_JOURNAL

# Of the body of a resumption, beside that of the request itself: bytes for each byte of that.
RESUME_BODY_FACTOR = 8


class BrokenOff(Exception):
    """This server cannot go on with an answer; another may."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What has been drawn of one choice elsewhere. `logprobs` are those of an answer that is no stream."""

    token_ids: tuple[int, ...] = ()
    ended: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Resumed:
    """An answer of another server, as far as its client has it.

    Attributes:
      id, created: as that server had called it.
      prompts: token ids.
      choices: those of prompt i are numbered from i * n.
      elapsed_s: time that the client has waited already.
    """

    id: str
    created: int
    prompts: tuple[tuple[int, ...], ...]
    choices: tuple[Drawn, ...]
    elapsed_s: float

    def emitted(self, prompt: int, n: int) -> list[tuple[int, ...] | None]:
        """For the engine: what there is of the choices of one prompt, None for those that have ended."""
        return [None if drawn.ended else drawn.token_ids for drawn in self.choices[prompt * n : (prompt + 1) * n]]


@dataclasses.dataclass(frozen=True)
class Journal:
    """That an answer is journaled.

    Attributes:
      seed: draws the answer to a request that brings none.
      resumed: what there is of it already.
    """

    seed: int
    resumed: Resumed | None = None


class _Content(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    id: str = pydantic.Field(min_length=1, max_length=200)
    created: int
    prompts: list[list[int]] = pydantic.Field(min_length=1)
    choices: list[tuple[list[int], bool, list[Any]]] = pydantic.Field(min_length=1)
    elapsed_s: float = pydantic.Field(ge=0)


def read_resumed(content: Any) -> Resumed:
    """The `resumed` of a body. Raises ApiError."""
    try:
        found = _Content.model_validate(_tuples(content))
        choices = tuple(Drawn(tuple(ids), ended, tuple(map(_entry, entries))) for ids, ended, entries in found.choices)
    except (pydantic.ValidationError, TypeError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, pydantic.ValidationError) else error
        raise bad_field("resumed", content, f"an answer that has broken off ({reason})") from None
    return Resumed(found.id, found.created, tuple(map(tuple, found.prompts)), choices, found.elapsed_s)


def read_seed(header: str) -> int:
    """The value of `WANT_JOURNAL`. Raises ApiError."""
    if not header.isascii() or not header.isdigit() or not int(header[:20]) < 2**63:
        raise bad_field(WANT_JOURNAL, header, "a seed, an integer from 0 to 2**63 - 1")
    return int(header)


def check_resumed(resumed: Resumed, sampling: SamplingParams) -> None:
    """Raises ApiError unless `resumed` is an answer to a request with these parameters."""
    expected = len(resumed.prompts) * sampling.n
    if not journaled(sampling) or len(resumed.choices) != expected:
        raise bad_field("resumed", f"{len(resumed.choices)} choices", f"{expected}, of a request that can be resumed")


def journaled(sampling: SamplingParams) -> bool:
    """Whether an answer can be gone on with. Where the best of several are picked, or the prompt is scored, it begins
    anew instead: nothing of it has been shown.
    """
    return sampling.choices == sampling.n and sampling.prompt_logprobs is None


# What the server writes.


def head_comment(answer_id: str, created: int, prompts: Sequence[Sequence[int]], choices: int) -> bytes:
    head = {"id": answer_id, "created": created, "prompts": [list(prompt) for prompt in prompts], "choices": choices}
    return HEAD + encode_json(head) + b"\n\n"


def tokens_comment(pieces: Iterable[Piece], *, whole: bool) -> bytes:
    """Commits. Of a whole answer nothing is said about the end of a choice: it comes about once more."""
    entries: list[list[Any]] = []
    for piece in pieces:
        if not whole:
            entries.append([piece.choice, piece.token_ids, piece.finish_reason is not None, []])
        elif piece.finish_reason is None:
            entries.append([piece.choice, piece.token_ids, False, [_as_list(entry) for entry in piece.logprobs]])
    return TOKENS + encode_json(entries) + b"\n\n"


def _as_list(entry: TokenLogprob) -> list[Any]:
    # No minus infinity in JSON; it comes out as OpenAI's -9999 in any case.
    return [entry.token_id, max(entry.logprob, -9999.0), [[token, max(p, -9999.0)] for token, p in entry.top]]


def _entry(found: Any) -> TokenLogprob:
    token, logprob, top = found
    return TokenLogprob(int(token), float(logprob), tuple((int(t), float(p)) for t, p in top))


def _tuples(content: Any) -> Any:
    """JSON has no tuples, and a strict model takes nothing else for one."""
    if not isinstance(content, dict) or not isinstance(content.get("choices"), list):
        raise ApiError(400, "resumed: expected an object with choices", param="resumed")
    return {**content, "choices": [tuple(c) if isinstance(c, list) else c for c in content["choices"]]}
