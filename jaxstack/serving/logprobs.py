"""Log probabilities as OpenAI's two formats, and vLLM's for prompts, write them."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxstack.engine import TokenLogprob
from jaxstack.engine.detokenise import IncrementalDetokenizer
from jaxstack.models.tokenizer import Tokenizer

Entries = Sequence[TokenLogprob | None]


def finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999 for "practically never"."""
    return max(logprob, -9999.0)


class TokenTexts:
    """Tokens by themselves."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def bytes_of(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def text_of(self, token_id: int) -> str:
        """A token as text; one that is not whole characters as `bytes:\\xe2\\x82`, as OpenAI writes them."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """The parallel lists of the older format, for one choice, piece by piece.

    `text_offset` is where in the choice's text a token begins: how many characters its predecessors have made certain.

    Args:
      count: alternatives to show.
      skip_special_tokens: as for the text.
    """

    def __init__(self, tokenizer: Tokenizer | None, count: int, skip_special_tokens: bool):
        self._tokenizer, self._count, self._skip = tokenizer, count, skip_special_tokens
        self._texts = TokenTexts(tokenizer)
        self._offset = 0
        self._reader = self._new_reader()

    def _new_reader(self) -> IncrementalDetokenizer | None:
        if self._tokenizer is None:
            return None
        return IncrementalDetokenizer(self._tokenizer, skip_special_tokens=self._skip)

    def lists(self, tokens: Sequence[int], entries: Entries) -> dict[str, Any]:
        """The lists for the next tokens; an entry is None where there is nothing to condition on."""
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += 0 if self._reader is None else len(self._reader.push((token,)))
        return {
            "tokens": [self._texts.text_of(token) for token in tokens],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._alternatives(entry) for entry in entries],
            "text_offset": offsets,
        }

    def echo(self, text: str, prompt: Sequence[int], entries: Entries | None) -> dict[str, Any]:
        """The lists for the prompt, put before the answer as `text`."""
        found = self.lists(prompt, [None] * len(prompt) if entries is None else entries)
        self._offset, self._reader = len(text), self._new_reader()
        return found

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        # Of two tokens with one spelling the likelier stays; the chosen one is always there.
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._count], (entry.token_id, entry.logprob)):
            found.setdefault(self._texts.text_of(token_id), finite(logprob))
        return found


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Lists put end to end."""
    return {name: first[name] + second[name] for name in first}


def chat_logprobs(tokenizer: Tokenizer | None, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The newer format."""
    texts = TokenTexts(tokenizer)

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = texts.bytes_of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(raw)}

    content = [
        {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*alternative) for alternative in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(tokenizer: Tokenizer | None, entries: Entries, count: int) -> list[dict[str, Any] | None]:
    """vLLM's: for each token of a prompt an object by token id; `rank` is None beyond the `count` likeliest."""
    texts = TokenTexts(tokenizer)

    def one(entry: TokenLogprob) -> dict[str, Any]:
        ranked = {token: (rank, logprob) for rank, (token, logprob) in enumerate(entry.top[:count], 1)}
        chosen = {entry.token_id: ranked.get(entry.token_id, (None, entry.logprob))}
        return {
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": texts.text_of(token)}
            for token, (rank, logprob) in {**chosen, **ranked}.items()
        }

    return [None if entry is None else one(entry) for entry in entries]
