"""Swapping on the device that is there: decode steps of a model of random weights with a capped pool for keys and
values, whose sequences do not fit, against as many as do, and against a pool in which all of them fit.

What a step takes longer than with everything on the device is what transfers did not hide:

    hidden share = 1 - (step - step with all on the device) / (bytes moved in a step / bytes per second of the link)
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.memory.swap import SwapConfig
from jaxstack.engine.swap_start import cache_shape, layers_together, probe_rates, start_swapping
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.runtime.metrics import write_summary

SHAPES: dict[str, dict[str, Any]] = {
    "llama3_8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
    },
    "llama3_1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
    },
}
_PAGE = 16


@dataclasses.dataclass(frozen=True)
class AcceleratorConfig:
    """What is run.

    Args:
      shape: of `SHAPES`.
      kv_bytes: M, of the device, for keys and values.
      share: phi.
      context_pages: of each sequence at its end.
      steps: timed.
      host_bytes: for keys and values.
      budget_s: nothing more is begun after so long.
      layers_per_program: as `SwapConfig` has it.
    """

    shape: str = "llama3_8b"
    kv_bytes: int = 750_000_000
    share: float = 0.5
    context_pages: int = 20
    steps: int = 40
    host_bytes: int = 8 * 10**9
    budget_s: float = 150.0
    layers_per_program: int | None = None


def decoder(shape: str, dtype: Any) -> Decoder:
    """Random weights."""
    config = DecoderConfig(architecture="LlamaForCausalLM", max_position_embeddings=8192, **SHAPES[shape])
    return Decoder(config, rngs=nnx.Rngs(0), param_dtype=dtype)


def served(
    shape: str,
    share: float | None,
    pages: int,
    sequences: int,
    context: int,
    host_bytes: int,
    batch_tokens: int = 256,
    group: int | None = None,
) -> Engine:
    """A warm engine; `share` None is the ordinary runner's."""
    swap = None
    if share is not None:
        swap = SwapConfig(host_bytes=host_bytes, adaptive=False, host_share=share, layers_per_program=group)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = EngineConfig(
        max_sequences=sequences,
        max_batch_tokens=max(batch_tokens, sequences),
        max_model_len=context + 1,
        page_size=_PAGE,
        num_pages=pages,
        dtype=dtype,  # type: ignore[arg-type]
        kv_swap=swap,
    )
    engine = Engine(decoder(shape, jnp.dtype(dtype)), None, config)
    engine.warm_up(progress=False)
    return engine


def decode(engine: Engine, count: int, prompt: int, output: int, steps: int) -> tuple[list[float], list[list[int]]]:
    """Answers `count` prompts that are cached before, side by side; seconds of the last steps, and the tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.vocab_size, prompt).tolist() for _ in range(count)]
    engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    names = [engine.submit(p, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)) for p in prompts]
    sequences: dict[str, Any] = {}
    walls: list[float] = []
    while True:
        begin = time.perf_counter()
        worked = engine.step()
        walls.append(time.perf_counter() - begin)
        sequences |= {s.request_id: s for s in engine.scheduler.running}
        if not worked or all(sequences[n].finish_reason is not None for n in names if n in sequences):
            break
    # The last ones only settle.
    return walls[-steps - 2 : -2], [sequences[name].tokens[prompt:] for name in names]


def check(say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens of a small model with pages on the host, against those of the same programs with none there."""
    count, prompt, output = 6, 33, 40
    tokens: dict[str, list[list[int]]] = {}
    moved = 0
    for name, share, pages, group in (
        ("ordinary", None, 200, None),
        ("resident", 0.0, 200, 1),
        ("swapped", 0.5, 30, 1),
        ("swapped in pairs of layers", 0.5, 40, 2),
    ):
        engine = served("tiny", share, pages, count, 80, 10**9, batch_tokens=32, group=group)
        tokens[name] = decode(engine, count, prompt, output, 8)[1]
        if share:
            reading = engine.stats().swap
            assert reading is not None
            moved += reading.bytes["to_device"]
        engine.close()
    equal = tokens["swapped"] == tokens["swapped in pairs of layers"] == tokens["resident"]
    alike = np.mean([a == b for a, b in zip(tokens["swapped"], tokens["ordinary"])])
    say(f"check: tokens {'equal' if equal else 'DIFFER'} with {moved} bytes moved")
    say(f"check: {alike:.0%} of the answers are those of the ordinary runner, whose programs may round elsewhere")
    return {"tokens_equal": equal, "moved_bytes": moved, "answers_like_ordinary": float(alike)}


def measure(config: AcceleratorConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """The rows, and what they come to. Parts that do not fit into the time are left out."""
    began = time.perf_counter()
    model = SHAPES[config.shape]
    itemsize = 4 if jax.default_backend() == "cpu" else 2
    page_bytes = model["num_layers"] * _PAGE * 2 * model["num_kv_heads"] * model["head_dim"] * itemsize
    pages, context = config.kv_bytes // page_bytes, config.context_pages * _PAGE
    group = layers_together(
        SwapConfig(config.host_bytes, layers_per_program=config.layers_per_program), model["num_layers"]
    )
    rates = probe_rates(64 * group * page_bytes // model["num_layers"])
    say(f"link {rates.link_bytes_per_s / 1e9:.1f} GB/s, device memory {rates.device_bytes_per_s / 1e9:.0f} GB/s")
    output = min(context // 2, config.steps + 12)
    prompt = (context - output - 1) // _PAGE * _PAGE + 1
    rows: dict[str, Any] = {}

    def row(name: str, share: float, budget_pages: int, count: int) -> None:
        if time.perf_counter() - began > config.budget_s:
            say(f"{name}: left out, {config.budget_s:.0f} s are over")
            return
        begin = time.perf_counter()
        engine = served(config.shape, share, budget_pages, count, context, config.host_bytes, group=group)
        warm_s = time.perf_counter() - begin
        walls, tokens = decode(engine, count, prompt, output, config.steps)
        reading = engine.stats().swap
        assert reading is not None
        step_s = statistics.median(walls)
        rows[name] = {
            "sequences": count,
            "step_ms": 1e3 * step_s,
            "tokens_per_s": count / step_s,
            "host_share": reading.host_share,
            "peak_over_budget": reading.device_peak_bytes / reading.device_budget_bytes,
            "sampled_stall_share": reading.stall_s / reading.compute_s if reading.compute_s else 0.0,
            "launch_ms": 1e3 * reading.launch_s,
            "recompilations": engine.stats().recompilations,
            "warm_s": warm_s,
            "tokens": tokens,
        }
        if share:
            plan = engine.runner.plan  # type: ignore[attr-defined]
            chunks = -(-reading.pages["host"] // plan.chunk_pages)
            rows[name]["moved_bytes_a_step"] = chunks * plan.chunk_pages * page_bytes
        say(f"{name}: {count} sequences, {1e3 * step_s:.2f} ms a step, {count / step_s:.0f} tokens/s")
        engine.close()

    few = max(1, pages // config.context_pages - 1)
    law = pages / (1 - config.share + 2 * group * config.share / model["num_layers"])
    many = max(few, int(0.97 * law) // config.context_pages)
    row("k0", 0.0, pages, few)
    row("swapped", config.share, pages, many)
    row("all_on_device", 0.0, (many + 2) * config.context_pages + 64, many)
    found: dict[str, Any] = {
        "layers_per_program": group,
        "link_GBps": rates.link_bytes_per_s / 1e9,
        "device_GBps": rates.device_bytes_per_s / 1e9,
    }
    if {"k0", "swapped"} <= rows.keys():
        found["throughput_gain"] = rows["swapped"]["tokens_per_s"] / rows["k0"]["tokens_per_s"]
    if {"all_on_device", "swapped"} <= rows.keys():
        added = (rows["swapped"]["step_ms"] - rows["all_on_device"]["step_ms"]) / 1e3
        transfer = rows["swapped"]["moved_bytes_a_step"] / rates.link_bytes_per_s
        found["hidden_share"] = 1 - max(0.0, added) / transfer if transfer else 1.0
        found["transfer_ms_a_step"] = 1e3 * transfer
        found["added_latency"] = added / rows["all_on_device"]["step_ms"] * 1e3
        found["law_hides"] = transfer <= rows["all_on_device"]["step_ms"] / 1e3
        found["tokens_equal"] = rows["swapped"]["tokens"] == rows["all_on_device"]["tokens"]
    for each in rows.values():
        del each["tokens"]
    return found | {"rows": rows, "wall_s": time.perf_counter() - began}


def decision(config: AcceleratorConfig) -> str:
    """What the engine would decide by itself for this pool."""
    model = (
        decoder("tiny", jnp.float32)
        if config.shape == "tiny"
        else Decoder.abstract(
            DecoderConfig(architecture="LlamaForCausalLM", max_position_embeddings=8192, **SHAPES[config.shape]),
            param_dtype=jnp.bfloat16,
        )
    )
    shape = cache_shape(model, 4 if jax.default_backend() == "cpu" else 2)
    pages = int(config.kv_bytes // (shape.layers * _PAGE * shape.kv_bytes))
    engine = EngineConfig(max_sequences=8, max_batch_tokens=64, num_pages=pages, page_size=_PAGE)
    swap = SwapConfig(host_bytes=config.host_bytes, layers_per_program=config.layers_per_program)
    chosen = dataclasses.make_dataclass("Chosen", ["num_pages"])(pages)
    return start_swapping(model, engine, swap, chosen, jnp.dtype(jnp.bfloat16)).line


def run(workdir: Path) -> dict[str, Any]:
    """Checks, measures, and writes the summary."""
    say = lambda line: print(line, flush=True)  # noqa: E731
    small = jax.default_backend() == "cpu"
    config = AcceleratorConfig(shape="tiny", kv_bytes=4_000_000, host_bytes=10**9) if small else AcceleratorConfig()
    summary = {"device": jax.devices()[0].device_kind, "check": check(say)} | measure(config, say)
    write_summary(workdir, summary)
    return summary
