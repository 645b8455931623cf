"""Letting a model write while it is trained, and scoring what it writes.

An engine of its own holds the model: built before the first step, it takes over the parameters of the moment at each
evaluation (`Engine.update_weights`) and compiles nothing any more. What the engine does not rearrange, it has by
reference: nothing is written to disk, and on one device only the rearranged matrices exist twice.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, RequestOutput, SamplingParams
from jaxstack.engine.weights import served_dtype
from jaxstack.models import Decoder, DecoderConfig
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.signals import StopFlag
from jaxstack.training.loop import SCORE

Score = Callable[[Sequence[RequestOutput]], Mapping[str, float]]
"""The answers to all prompts, in order -> figures by name. An answer's text is `output.completions[0].text`."""


@dataclasses.dataclass(frozen=True)
class GenerationEval:
    """What the model writes at every evaluation, and how that is scored.

    Attributes:
      prompts: texts or token ids, as an engine takes them.
      score: figure "accuracy" becomes "score_accuracy" in the metrics.
      sampling: of every answer; greedy by default. Draws are the same at every evaluation: prompt i has seed i unless
        this names one.
      engine: settings; by default up to 32 answers at once, and a cache just large enough for them.
    """

    prompts: Sequence[str | Sequence[int]]
    score: Score
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=256)
    )
    engine: EngineConfig | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not len(self.prompts):
            raise UserError(f"generation.prompts={self.prompts!r}: expected at least one prompt in a sequence")


class Generator:
    """Answers the prompts with given parameters.

    Args:
      wanted: what to ask.
      tokenizer: None for prompts of token ids and answers without text.
      model: of `decoder_of`'s decoders.
      decoder_of: parameters to a decoder on one device, without adapters.
      params: any parameters of the right shapes; the engine is built on them.
      progress: show a bar over the prompts.

    Raises:
      UserError: a prompt that cannot be answered as asked.
    """

    def __init__(
        self,
        wanted: GenerationEval,
        tokenizer: Tokenizer | None,
        model: DecoderConfig,
        decoder_of: Callable[[Any], Decoder],
        params: Any,
        *,
        progress: bool = False,
    ):
        self._wanted, self._decoder_of, self._progress = wanted, decoder_of, progress
        sampling = wanted.sampling
        self._samplings = [
            sampling if sampling.seed is not None else dataclasses.replace(sampling, seed=number)
            for number in range(len(wanted.prompts))
        ]
        config = wanted.engine or _settings(wanted, tokenizer, model)
        self._dtype = served_dtype(config)
        self.engine = Engine(self._decoder(params), tokenizer, config)
        for prompt in wanted.prompts:
            self.engine.check_prompt(prompt, sampling)
        self.engine.warm_up(progress)
        self.engine.update_weights(self._decoder(params))  # rearranging has programs too: no later one is the first

    def __call__(self, params: Any, stop: StopFlag) -> dict[str, float] | None:
        """The scores of these parameters' answers; None if stopped between two portions of prompts."""
        self.engine.update_weights(self._decoder(params))
        outputs: list[RequestOutput] = []
        portion = 4 * self.engine.config.max_sequences
        for start in range(0, len(self._wanted.prompts), portion):
            if stop:
                return None
            part = slice(start, start + portion)
            outputs += self.engine.generate(self._wanted.prompts[part], self._samplings[part], progress=self._progress)
        return {f"{SCORE}{name}": float(value) for name, value in self._wanted.score(outputs).items()}

    def _decoder(self, params: Any) -> Decoder:
        decoder = self._decoder_of(params)
        state = nnx.state(decoder)
        nnx.update(decoder, jax.tree.map(lambda x: x.astype(self._dtype) if _is_float(x) else x, state))
        return decoder

    def close(self) -> None:
        self.engine.close()


def _settings(wanted: GenerationEval, tokenizer: Tokenizer | None, model: DecoderConfig) -> EngineConfig:
    """As many answers at once as there are prompts, up to 32; a cache that holds them all, as training needs the rest
    of the memory.
    """
    lengths = [
        len(prompt) if not isinstance(prompt, str) else len(tokenizer.encode(prompt)) if tokenizer is not None else 0
        for prompt in wanted.prompts
    ]
    window = model.max_position_embeddings
    if wanted.sampling.max_tokens is not None:
        window = max(2, min(window, max(lengths) + wanted.sampling.max_tokens))
    at_once = min(32, len(wanted.prompts) * wanted.sampling.choices)
    page_size = EngineConfig.page_size
    pages = max(2, -(-window // page_size) + 1)
    return EngineConfig(max_sequences=at_once, max_model_len=window, num_pages=at_once * pages)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def together(
    *parts: Callable[[Any, StopFlag], dict[str, float] | None],
) -> Callable[[Any, StopFlag], dict[str, float] | None]:
    """One evaluation of several, one after the other; None as soon as one of them was stopped."""

    def evaluate(params: Any, stop: StopFlag) -> dict[str, float] | None:
        values: dict[str, float] = {}
        for part in parts:
            found = part(params, stop)
            if found is None:
                return None
            values |= found
        return values

    return evaluate
