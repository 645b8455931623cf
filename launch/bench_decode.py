"""How near a decode step comes to what memory allows: `python -m launch.bench_decode`.

A decode step must read every weight once (of the embedding only the rows of its tokens) and all keys and values of its
sequences. The roofline is those bytes over the bandwidth of a copy, measured in the same run. Two figures:

    program   the compiled step alone, forward pass and sampler, one after the other without waiting
    engine    `Engine.step` with all its work on the host, in the middle of as many answers

Weights are random. `--shape=llama8b` is Llama 3 8B's, for an accelerator, and the default there; `--shape=qwen0.5b` is
Qwen2.5-0.5B's, with fewer `--layers` and a smaller `--vocab_size`. Steps of many rows on a CPU are bound by arithmetic,
and their share says little.
"""

import dataclasses
import gc
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.batch import BatchShape, HostBatch, cut, size
from jaxstack.engine.draws import HostDraws, float_fields, no_draws
from jaxstack.engine.request import Listener
from jaxstack.engine.runner import Runner
from jaxstack.engine.weights import served_dtype, serving_form
from jaxstack.models.decoder import Decoder, DecoderConfig
from launch import job
from launch.kernel_benchmark.measure import copy_bandwidth
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe
from launch.serve_benchmark.shapes import llama8b, model_config, token_bytes, weight_bytes

_SHAPE = flags.DEFINE_enum("shape", None, ["llama8b", "qwen0.5b"], "the model; by default the one for this machine")
_LAYERS = flags.DEFINE_integer("layers", None, "layers; by default 32 of llama8b, 6 of qwen0.5b", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 37_984, "vocabulary of qwen0.5b; Qwen2.5-0.5B has 151936", lower_bound=2
)
_ROWS = flags.DEFINE_integer("rows", None, "answers at once; by default 64, on a CPU 8", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", None, "tokens of each before; by default 2048, on a CPU 512", lower_bound=1)
_PAGE = flags.DEFINE_integer("page_size", 64, "tokens in a page of the KV cache")
_STEPS = flags.DEFINE_integer("steps", 24, "steps measured of each kind", lower_bound=2)
_ENGINE = flags.DEFINE_bool("engine", True, "measure the engine, too")

_ROUNDS = 3
_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
_SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured: `rows` sequences that have `context` tokens each and get `steps` more, a few times over."""

    model: DecoderConfig
    rows: int
    context: int
    page_size: int
    steps: int

    @property
    def window(self) -> int:
        """Tokens of the longest sequence, in whole pages."""
        most = self.context + 2 * (_ROUNDS + 1) * self.steps + 8
        return -(-most // self.page_size) * self.page_size

    @property
    def engine(self) -> EngineConfig:
        on_cpu = jax.default_backend() == "cpu"
        return EngineConfig(
            max_sequences=self.rows,
            max_batch_tokens=max(512 if on_cpu else 2048, self.rows),
            max_model_len=self.window,
            page_size=self.page_size,
            num_pages=(self.rows + 1) * self.window // self.page_size,
            prefix_caching=False,
        )

    def context_bytes(self, context: int) -> int:
        """Keys and values that a step reads."""
        return self.rows * context * token_bytes(self.model, served_dtype(self.engine).itemsize)


def decoder_of(model: DecoderConfig) -> Decoder:
    return Decoder(model, rngs=nnx.Rngs(0), param_dtype=served_dtype(EngineConfig()))


def measure_program(setting: Setting, copy: float) -> tuple[int, dict[str, Any]]:
    """The compiled step on its own; also the bytes of weights that it reads."""
    rows, config = setting.rows, setting.engine
    dtype = served_dtype(config)
    table = setting.window // setting.page_size
    shape = BatchShape(rows, rows, table, rows)
    served = serving_form(decoder_of(setting.model), config, None, dtype)
    weights = weight_bytes(served)
    runner = Runner(
        served,
        [shape],
        num_pages=rows * table,
        page_size=setting.page_size,
        slots=rows,
        max_length=setting.window,
        vocab_size=setting.model.vocab_size,
        dtype=dtype,
    )
    start = time.perf_counter()
    runner.warm_up()
    warm_up_s = time.perf_counter() - start
    batch = _batch(setting, shape)
    result: dict[str, Any] = {"program_compile_s": round(warm_up_s, 1)}
    moved = weights + setting.context_bytes(setting.context)
    for name, sampling in (("greedy", _GREEDY), ("sampled", _SAMPLED)):
        draws = _draws(rows, runner.sampler.scrap_slot, sampling)
        seconds = min(_program_seconds(runner, batch, draws, setting.steps) for _ in range(_ROUNDS))
        result |= {
            f"program_{name}_ms": round(seconds * 1e3, 3),
            f"program_{name}_tokens_per_s": round(rows / seconds, 1),
            f"program_{name}_share_of_roofline": round(moved / copy / seconds, 3),
        }
    return weights, result | {"step_gb": round(moved / 1e9, 3)}


def _batch(setting: Setting, shape: BatchShape) -> HostBatch:
    """A decode step of equal contexts, pages scattered over the cache."""
    rows, page, context = setting.rows, setting.page_size, setting.context
    ints = np.zeros(size(shape.int_fields), np.int32)
    f = cut(ints, shape.int_fields)
    tables = np.random.default_rng(0).permutation(rows * shape.table_pages).reshape(rows, shape.table_pages)
    f["tokens"][:] = np.arange(rows) % setting.model.vocab_size
    f["positions"][:] = context - 1
    f["kv_lens"][:] = context
    f["query_starts"][:] = np.arange(rows + 1)
    f["num_decodes"][...] = rows
    f["block_tables"][:] = tables
    f["write_slots"][:] = tables[:, (context - 1) // page] * page + (context - 1) % page
    return HostBatch(None, shape, ints)  # type: ignore[arg-type]  # no sequences stand behind it


def _draws(rows: int, scrap_slot: int, sampling: SamplingParams) -> HostDraws:
    draws = no_draws(rows, scrap_slot)
    g = cut(draws.floats, float_fields(rows))
    g["temperature"][:], g["top_p"][:] = sampling.temperature, sampling.top_p
    return dataclasses.replace(draws, kind="greedy" if sampling.temperature == 0 else "plain")


def _program_seconds(runner: Runner, batch: HostBatch, draws: HostDraws, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        future = runner.draw(runner.launch(batch), draws)
    future.tokens()
    return (time.perf_counter() - start) / steps


def measure_engine(setting: Setting, copy: float, weights: int) -> dict[str, Any]:
    """The engine, its step taken by hand."""
    engine = Engine(decoder_of(setting.model), None, setting.engine)
    try:
        start = time.perf_counter()
        engine.warm_up()
        result: dict[str, Any] = {"engine_warm_up_s": round(time.perf_counter() - start, 1)}
        for name, sampling in (("greedy", _GREEDY), ("sampled", _SAMPLED)):
            prefill, seconds, context = _engine_seconds(engine, setting, sampling)
            moved = weights + setting.context_bytes(context)
            result |= {
                f"engine_{name}_ms": round(seconds * 1e3, 3),
                f"engine_{name}_tokens_per_s": round(setting.rows / seconds, 1),
                f"engine_{name}_share_of_roofline": round(moved / copy / seconds, 3),
            }
            if name == "greedy":
                tokens = setting.rows * setting.context
                result |= {"prefill_tokens_per_s": round(tokens / prefill)}
        return result | {"recompilations": engine.stats().recompilations}
    finally:
        engine.close()


def _engine_seconds(engine: Engine, setting: Setting, sampling: SamplingParams) -> tuple[float, float, int]:
    """Seconds until every answer has begun, of a step afterwards, and the tokens a sequence has by then."""
    begun: set[int] = set()
    rng = np.random.default_rng(1)
    names: list[str] = []
    start = time.perf_counter()
    for number in range(setting.rows):
        prompt = rng.integers(0, setting.model.vocab_size, setting.context).tolist()
        limit = dataclasses.replace(sampling, max_tokens=setting.window - setting.context)
        listener: Listener = lambda delta, number=number: begun.add(number)  # noqa: E731
        names.append(engine.submit(prompt, limit, listener))
    with tqdm(total=setting.rows, desc="reading prompts", unit="prompt", file=sys.stderr, leave=False) as bar:
        while len(begun) < setting.rows:
            engine.step()
            bar.update(len(begun) - bar.n)
    prefill = time.perf_counter() - start
    least = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(setting.steps):
            engine.step()
        least = min(least, (time.perf_counter() - start) / setting.steps)
    lengths = [len(s.tokens) for s in engine.scheduler.running]
    for name in names:
        engine.abort(name)
    while engine.step():
        pass
    return prefill, least, round(float(np.mean(lengths)) - _ROUNDS * setting.steps / 2)


def run() -> dict[str, Any]:
    on_cpu = jax.default_backend() == "cpu"
    shape = _SHAPE.value or ("qwen0.5b" if on_cpu else "llama8b")
    model = llama8b(_LAYERS.value or 32) if shape == "llama8b" else model_config(_LAYERS.value or 6, _VOCAB_SIZE.value)
    setting = Setting(
        model, _ROWS.value or (8 if on_cpu else 64), _CONTEXT.value or (512 if on_cpu else 2048), _PAGE.value,
        _STEPS.value,
    )  # fmt: skip
    if setting.window > model.max_position_embeddings:
        raise job.BadUsage(
            f"--context: found {setting.context} tokens, {setting.window} with those to come, expected at most "
            f"{model.max_position_embeddings}"
        )
    with LoadMeter() as meter:
        copy = copy_bandwidth()
        print(f"copy bandwidth {copy / 1e9:.1f} GB/s (bytes read + written)", file=sys.stderr)
        weights, result = measure_program(setting, copy)
        if _ENGINE.value:
            gc.collect()  # an accelerator has no room for two of them
            result |= measure_engine(setting, copy, weights)
    return {
        "benchmark": "bench_decode",
        "shape": shape,
        "layers": model.num_layers,
        "rows": setting.rows,
        "context": setting.context,
        "dtype": str(served_dtype(setting.engine)),
        "copy_gb_per_s": round(copy / 1e9, 1),
        **result,
        "conclusive": not on_cpu or meter.foreign_cores <= FOREIGN_LIMIT,
        "foreign_cores": round(meter.foreign_cores, 3),
        "jax": jax.__version__,
        **({**describe()} if on_cpu else {"device": jax.devices()[0].device_kind}),
    }


if __name__ == "__main__":
    job.main(run)
