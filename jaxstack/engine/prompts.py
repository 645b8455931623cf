"""What a prompt may be, and whether it could be answered as it is asked to be: checked before anything is queued."""

from collections.abc import Sequence

from jaxstack.engine.errors import PromptTooLong
from jaxstack.engine.guided import GrammarCompiler
from jaxstack.engine.prompt_embeddings import EmbeddingPrompt, GivenEmbeddings, check_embeddings
from jaxstack.engine.request import SamplingParams
from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError

Prompt = str | Sequence[int] | EmbeddingPrompt


class PromptChecker:
    """Checks prompts for one model. Callable from any thread.

    Args:
      tokenizer: of prompts that are text; None where there are none.
      vocab_size: token ids from here on are never drawn.
      max_model_len: prompt and answer together, in tokens.
      grammars: compiles the guides asked for.
    """

    def __init__(
        self,
        model: DecoderConfig,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        grammars: GrammarCompiler,
    ):
        self._model, self._tokenizer, self._grammars = model, tokenizer, grammars
        self._vocab_size, self._max_model_len = vocab_size, max_model_len

    def check(self, prompt: Prompt, sampling: SamplingParams, wanted: int) -> tuple[list[int], GivenEmbeddings | None]:
        """The prompt's token ids, -1 for a vector, and its vectors if it has any. Compiles the grammar of a guide.

        Args:
          wanted: tokens to generate that must fit behind the prompt.

        Raises:
          UserError: the prompt is empty or holds unknown tokens, or `sampling` does not suit the model.
          PromptTooLong: it does not fit the window.
        """
        sampling.check_token_ids(self._vocab_size)
        if sampling.guide is not None:
            self._grammars.compile(sampling.guide)
        given = None
        if isinstance(prompt, EmbeddingPrompt):
            tokens, given = check_embeddings(prompt, self._model.hidden_size)
        elif isinstance(prompt, str):
            if self._tokenizer is None:
                raise UserError("prompt: found text, expected token ids (this engine has no tokenizer)")
            tokens = self._tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            raise UserError("prompt: found no tokens, expected at least one")
        low, high = min(tokens), max(tokens)
        if (low < 0 and given is None) or high >= self._model.vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"prompt: found token id {bad}, expected ids from 0 to {self._model.vocab_size - 1}")
        if len(tokens) + wanted > self._max_model_len:
            raise PromptTooLong(
                f"prompt: found {len(tokens)} tokens and {wanted} to generate, "
                f"expected at most {self._max_model_len} together"
            )
        return tokens, given


def check_emitted(
    emitted: Sequence[Sequence[int] | None], sampling: SamplingParams, max_tokens: int, vocab_size: int
) -> tuple[tuple[int, ...] | None, ...]:
    """What has been drawn of each choice elsewhere, None for one that has ended. Raises UserError if no answer can go
    on behind it.
    """
    n = sampling.choices
    if n != sampling.n or sampling.prompt_logprobs is not None:
        raise UserError("emitted: found best_of or prompt_logprobs, whose answers are not gone on with")
    if len(emitted) != n or all(tokens is None for tokens in emitted):
        raise UserError(f"emitted: found {len(emitted)} choices, expected {n}, one of them open")
    for tokens in emitted:
        if tokens is not None and len(tokens) >= max_tokens:
            raise UserError(f"emitted: found {len(tokens)} tokens, expected fewer than max_tokens = {max_tokens}")
        for token in tokens or ():
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise UserError(f"emitted: found token id {token!r}, expected ids from 0 to {vocab_size - 1}")
    return tuple(None if tokens is None else tuple(tokens) for tokens in emitted)


def check_timeout(timeout_s: float | None) -> None:
    """Raises UserError unless None or a positive number of seconds."""
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise UserError(f"timeout_s: found {timeout_s!r}, expected a positive number of seconds")
