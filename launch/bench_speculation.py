"""What n-gram speculation gains a lone stream: `python -m launch.bench_speculation`.

Drafts come from the text itself: where the last tokens have occurred before, what followed them then is tried now. So
the gain depends on the text, and both ends are measured, each with and without speculation, in turns:

    copying   the answer repeats a passage of the prompt over and over, as when code is edited or a document quoted
    fresh     sampled tokens that nothing predicts: what speculation costs where it cannot help

The model has the widths of Qwen2.5-0.5B and random weights, except that the output matrix is the embedding moved by one
token along a cycle: greedy decoding then walks the cycle, which is copying by a real model at its real cost. Answers
with and without speculation must be equal token for token.
"""

import contextlib
import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models.decoder import Decoder
from jaxstack.runtime.errors import UserError
from launch import job
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe
from launch.serve_benchmark.shapes import model_config, scale_of

_LAYERS = flags.DEFINE_integer("layers", 6, "layers of the model; Qwen2.5-0.5B has 24", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 37_984, "vocabulary; Qwen2.5-0.5B has 151936", lower_bound=128)
_DRAFT = flags.DEFINE_integer("draft", 3, "tokens drafted at most for a step", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 128, "tokens of each answer", lower_bound=8)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "answers of each kind, with and without, in turns", lower_bound=1)

_CYCLE = 64  # tokens of the passage that is copied
_EMBEDDING_SCALE = 50.0  # the embedding outweighs what the random layers add, so the cycle is followed


def copying_decoder(layers: int, vocab_size: int, seed: int = 0) -> Decoder:
    """A decoder that, decoding greedily, follows each token of a passage of 64 with the next, the last with the first.

    Args:
      vocab_size: the passages are the whole cycles of 64 tokens below it.
    """
    config = model_config(layers, vocab_size)
    config = dataclasses.replace(config, tie_word_embeddings=False)
    decoder = Decoder(config, rngs=nnx.Rngs(seed))
    table = decoder.embed.embedding.get_value() * _EMBEDDING_SCALE
    token = np.arange(vocab_size)
    before = np.where(token % _CYCLE == 0, token + _CYCLE - 1, token - 1)
    before = np.minimum(before, vocab_size - 1)
    decoder.embed.embedding = nnx.Param(table)
    assert decoder.lm_head is not None
    decoder.lm_head.kernel = nnx.Param(jnp.asarray(table)[before].T)
    return decoder


def prompt_of(kind: str, number: int, vocab_size: int) -> list[int]:
    """A prompt of its own for every answer, so that none finds another's pages in the prefix cache."""
    passages = vocab_size // _CYCLE
    start = (number % passages) * _CYCLE
    passage = list(range(start, start + _CYCLE))
    return passage * 2 if kind != "fresh" else passage


def run() -> dict[str, Any]:
    config = EngineConfig(max_sequences=8, max_batch_tokens=128, max_model_len=512, dtype="float32", num_pages=256)
    engines: dict[str, Engine] = {}
    with contextlib.ExitStack() as stack:
        for name, draft in (("plain", 0), ("speculative", _DRAFT.value)):
            decoder = copying_decoder(_LAYERS.value, _VOCAB_SIZE.value)
            engine = engines[name] = Engine(decoder, None, dataclasses.replace(config, speculation=draft))
            stack.callback(engine.close)
            print(f"{name}: compiling", file=sys.stderr)
            engine.warm_up()
        return _measure(engines)


def _measure(engines: dict[str, Engine]) -> dict[str, Any]:
    kinds = {
        "copying": SamplingParams(max_tokens=_TOKENS.value, temperature=0.0, ignore_eos=True),
        "fresh": SamplingParams(max_tokens=_TOKENS.value, temperature=1e4, ignore_eos=True, seed=1),
    }
    seconds: dict[tuple[str, str], list[float]] = {(k, name): [] for k in kinds for name in engines}
    steps: dict[tuple[str, str], int] = dict.fromkeys(seconds, 0)
    with LoadMeter() as meter, tqdm(total=len(seconds) * _ROUNDS.value, unit="answer", file=sys.stderr) as bar:
        for number in range(_ROUNDS.value):
            for kind, sampling in kinds.items():
                prompt = prompt_of(kind, number, _VOCAB_SIZE.value)
                answers = {}
                for name in list(engines) if number % 2 == 0 else list(engines)[::-1]:
                    engine, before = engines[name], engines[name].stats().steps
                    begin = time.perf_counter()
                    (output,) = engine.generate([prompt], sampling)
                    seconds[kind, name].append(time.perf_counter() - begin)
                    steps[kind, name] += engine.stats().steps - before
                    answers[name] = output.completions[0].token_ids
                    bar.update()
                if answers["plain"] != answers["speculative"]:
                    raise UserError(f"{kind}, answer {number}: speculation changed the tokens")
    summary: dict[str, Any] = {"benchmark": "bench_speculation", "draft": _DRAFT.value}
    for kind in kinds:
        ratios = [a / b for a, b in zip(seconds[kind, "plain"], seconds[kind, "speculative"])]
        summary[f"speedup_{kind}"] = round(statistics.median(ratios), 3)
        summary[f"tokens_per_step_{kind}"] = round(_ROUNDS.value * _TOKENS.value / steps[kind, "speculative"], 2)
    summary |= {
        "tokens_per_s_plain": round(_TOKENS.value / statistics.median(seconds["copying", "plain"]), 1),
        "tokens_per_s_copying": round(_TOKENS.value / statistics.median(seconds["copying", "speculative"]), 1),
        "tokens_equal": True,
        "recompilations": max(engine.stats().recompilations for engine in engines.values()),
        "conclusive": meter.foreign_cores <= FOREIGN_LIMIT,
        "foreign_cores": round(meter.foreign_cores, 3),
        "scale": scale_of(model_config(_LAYERS.value, _VOCAB_SIZE.value)),
        "jax": jax.__version__,
        **describe(),
    }
    return summary


if __name__ == "__main__":
    job.main(run)
