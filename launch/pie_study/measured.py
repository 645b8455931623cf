"""Swapping measured by the wall clock, on an emulated machine: a small model of 32 layers, whose real pages are copied
at the speed of a link, and whose layers take the time that those of Llama-3-8B take on a GH200, all slowed down alike.

Decode steps only, with a full cache. Tokens are compared with those of the ordinary engine.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.memory.swap import SwapConfig, capacity_tokens, step_seconds
from jaxstack.engine.swap_movers import EmulatedMachine
from jaxstack.engine.swapping_runner import SwappingRunner
from jaxstack.models.decoder import Decoder, DecoderConfig
from launch.pie_study.simulated import GH200, KV_BYTES, MODELS

PAGE, SEQUENCE_PAGES, PROMPT = 16, 7, 4 * 16 + 1
"""A sequence ends with its pages full; all of its prompt but the last token is cached before."""
OUTPUT = SEQUENCE_PAGES * PAGE - PROMPT
WARM_STEPS = 2


@dataclasses.dataclass(frozen=True)
class MeasuredConfig:
    """How long it takes.

    Args:
      layer_s: of the emulated machine, with nothing swapped; waking threads costs up to 0.9 ms of each.
      steps: that are timed, for each share.
      shares: phi.
    """

    layer_s: float = 16e-3
    steps: int = 30
    shares: tuple[float, ...] = (0.0, 8 / 32, 16 / 32)


def tiny_model(layers: int = 32, *, seed: int = 0) -> Decoder:
    """A decoder of random weights whose keys and values take 128 bytes a token and layer."""
    config = DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128,
        hidden_size=32,
        num_layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=1024,
    )
    return Decoder(config, rngs=nnx.Rngs(seed))


@dataclasses.dataclass
class _Clock:
    """The emulated times, which only count once the prompts are there."""

    scale: float
    running: bool = False

    def __call__(self, kv_tokens: int, new_tokens: int) -> float:
        return GH200.layer_s(MODELS["llama3_8b"], kv_tokens, new_tokens) * self.scale if self.running else 0.0


def measure(config: MeasuredConfig, say: Callable[[str], None], advance: Callable[[int], None]) -> dict[str, Any]:
    """Runs every share, and each with pages that arrive at once; the rows, JSON-ready.

    Args:
      advance: told of each timed step.
    """
    rows: dict[str, Any] = {}
    for share in config.shares:
        k = round(share * 32)
        rows[f"k{k}"] = row = _run(config, share, advance)
        say(f"k = {k}: {row['step_s'] * 1e3:.1f} ms a step of {row['sequences']}, law {row['law_s'] * 1e3:.1f} ms")
    return rows


def timed_steps(config: MeasuredConfig) -> int:
    """Steps of all runs together."""
    return sum(config.steps + WARM_STEPS for share in config.shares for _ in range(2 if share else 1))


def _run(config: MeasuredConfig, share: float, advance: Callable[[int], None]) -> dict[str, Any]:
    shape, model = MODELS["llama3_8b"], tiny_model()
    small = 2 * model.config.num_kv_heads * model.config.head_dim * 4  # bytes a token and layer
    budget = KV_BYTES * small / shape.kv_bytes
    scale = config.layer_s / GH200.layer_s(shape, capacity_tokens(shape, KV_BYTES, 0.0))
    link = GH200.link_bytes_per_s * small / shape.kv_bytes / scale
    clock = _Clock(scale)
    settings = EngineConfig(
        max_sequences=int(capacity_tokens(shape, KV_BYTES, share) / PAGE) // SEQUENCE_PAGES,
        max_batch_tokens=256,
        max_model_len=SEQUENCE_PAGES * PAGE + 1,
        page_size=PAGE,
        num_pages=int(budget / (PAGE * small * 32)),
        dtype="float32",
        overlap=False,
        kv_swap=SwapConfig(host_bytes=1 << 30, adaptive=False, host_share=share),
    )
    engine = Engine(model, None, settings, emulate=EmulatedMachine(clock, link, link))
    runner = engine.runner
    assert isinstance(runner, SwappingRunner)
    # As many sequences as both spaces hold, at their full length.
    count = min(settings.max_sequences, runner.plan.pages // SEQUENCE_PAGES)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, PROMPT).tolist() for _ in range(count)]
    wanted = _resident(prompts)
    try:
        engine.warm_up(progress=False)
        engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        walls, tokens, contexts = _decode(engine, prompts, clock, config.steps, advance)
        stall_s = runner.swap_reading().stall_s
        row: dict[str, Any] = {
            "share": share,
            "sequences": count,
            "step_s": statistics.median(walls),
            "mean_step_s": statistics.fmean(walls),
            "steps": len(walls),
            "law_s": statistics.median(_law(share, context, count, clock, link, runner) for context in contexts),
            "throughput": count / statistics.median(walls),
            "tokens_equal": tokens == wanted,
            "stall_s": stall_s,
        }
        if share:
            runner.change_link(None)
            walls, tokens, _ = _decode(engine, prompts, clock, config.steps, advance)
            row |= {"unlinked_step_s": statistics.median(walls), "unlinked_tokens_equal": tokens == wanted}
        reading = runner.swap_reading()
        return row | {
            "late_s": runner.late_s,
            "peak_bytes": reading.device_peak_bytes,
            "budget_bytes": reading.device_budget_bytes,
            "recompilations": runner.recompilations,
        }
    finally:
        engine.close()
        runner.close()


def _law(share: float, context: int, sequences: int, clock: _Clock, link: float, runner: SwappingRunner) -> float:
    """Seconds of a step of so many cached tokens, of which those lie on the host that the device has no room for."""
    layer_s = clock(context, sequences)
    on_host = max(0.0, 1 - runner.plan.device_slots * PAGE / context) if share else 0.0
    return step_seconds(32, 32 * on_host, layer_s, context * 128 / link)


def _decode(engine: Engine, prompts: list[list[int]], clock: _Clock, steps: int, advance: Callable[[int], None]):
    """Answers all prompts, in the same steps; the last of them take the emulated machine's times, and are timed."""
    params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
    clock.running = False
    names = [engine.submit(prompt, params) for prompt in prompts]
    engine.step()
    sequences = {s.request_id: s for s in engine.scheduler.running}
    assert len(sequences) == len(prompts), f"{len(sequences)} of {len(prompts)} run"
    walls, contexts = [], []
    while any(s.finish_reason is None for s in sequences.values()):
        done = min(s.generated for s in sequences.values())
        clock.running = done >= OUTPUT - steps - WARM_STEPS
        contexts.append(sum(s.length for s in sequences.values()))
        begin = time.perf_counter()
        engine.step()
        walls.append(time.perf_counter() - begin)
        advance(int(clock.running))
    clock.running = True
    answers = [sequences[name].tokens[len(prompt) :] for name, prompt in zip(names, prompts)]
    return walls[-steps:], answers, contexts[-steps:]


def _resident(prompts: list[list[int]]) -> list[list[int]]:
    """The answers of an ordinary engine."""
    settings = EngineConfig(
        max_sequences=32, max_batch_tokens=512, max_model_len=SEQUENCE_PAGES * PAGE + 1, page_size=PAGE,
        num_pages=64 * SEQUENCE_PAGES, dtype="float32",
    )  # fmt: skip
    engine = Engine(tiny_model(), None, settings)
    try:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True))
        return [list(output.completions[0].token_ids) for output in outputs]
    finally:
        engine.close()
