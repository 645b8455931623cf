"""What streaming weights costs, and what it costs others: `python -m launch.bench_offload --peer=accelerate`.

A mixture of experts of Mixtral's shape is decoded whose experts lie in the host's memory. Ours is CGOPipe: attention on
the host, the next layer's weights in pages between the activations on the link. The peers, on the same machine in turn:

    accelerate   each module's weights copied from ordinary memory just before it runs, all waiting for all
                 (accelerate's cpu_offload: the real one where torch, transformers and accelerate are installed, else
                 its way of working with our compiled pieces); keys and values on the device, so that the batch is
                 what the cap leaves
    self_s4      FlexGen's order: attention on the device, keys and values loaded a micro-batch ahead, a layer's weights
                 in one piece; page-locked memory, the same batch and the same kernels

Figures are generated tokens/s of a whole decode step under a cap on device memory, and the share of the link's measured
bandwidth that weights alone keep busy. `--check` first compares the tokens of all with those of a model that is there
as a whole. On a CPU the same code runs at a toy size, which says that it works and nothing about speed.
"""

import dataclasses
import gc
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxstack.engine.batch import BatchShape
from jaxstack.engine.page_store import DEVICE
from jaxstack.engine.pipelined_runner import PipelinedRunner
from jaxstack.runtime.memory_spaces import host_processor
from kernels.kv_write import kv_write
from kernels.paged_attention import paged_attention, ragged
from launch import job
from launch.offload_benchmark import peers
from launch.offload_benchmark.contestants import Pages, greedy, link_bandwidth, make_pages, make_runner, step_seconds
from launch.offload_benchmark.model import Setting, mixtral

_PEER = flags.DEFINE_enum("peer", "accelerate", ["accelerate", "self_s4", "all"], "whom to compare with")
_CHECK = flags.DEFINE_bool("check", False, "compare tokens first, at a small size")
_CHECK_ONLY = flags.DEFINE_bool("check_only", False, "compare tokens, and nothing else")
_LAYERS = flags.DEFINE_integer("layers", None, "of the model; by default 6, on a CPU 3", lower_bound=2)
_SEQUENCES = flags.DEFINE_integer("sequences", None, "decoded at once; by default 1024, on a CPU 8", lower_bound=1)
_PARTS = flags.DEFINE_integer("micro_batches", None, "by default 8, on a CPU 2", lower_bound=1)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "tokens before; by default what the host's processor can attend to while a layer's weights move",
    lower_bound=1,
)  # fmt: skip
_CAP = flags.DEFINE_float("cap_gb", None, "device memory; by default 10 GB, on a CPU what is needed")
_STEPS = flags.DEFINE_integer("steps", 6, "measured of each", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 140.0, "no step is begun after so long", lower_bound=1.0)

_MOST_CONTEXT = 1024
# Of the time in which a layer's weights move, what attention on the host may take.
_HOST_SHARE = 0.8


def say(text: str) -> None:
    print(f"bench_offload: {text}", file=sys.stderr, flush=True)


def attention_bytes_per_s(setting: Setting) -> float:
    """At which the host's processor reads keys and values, measured on one micro-batch."""
    model, cpu = setting.model, host_processor()
    rows = -(-setting.sequences // setting.micro_batches)
    context = 512 if setting.sequences > 64 else setting.context or 16  # more than caches hold
    pages = -(-context // setting.page_size)
    part = BatchShape(rows, rows, pages, rows)
    dtype = jnp.dtype(setting.dtype)
    with jax.default_device(cpu):
        cache = jnp.zeros((1, rows * pages + 1, setting.page_size, 2 * model.num_kv_heads, model.head_dim), dtype)
        q = jnp.ones((rows, model.num_heads, model.head_dim), dtype)
        k = jnp.ones((rows, model.num_kv_heads, model.head_dim), dtype)
        tables = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)

        def attend(cache, q, k):
            batch = ragged(
                tables, jnp.full((rows,), context, jnp.int32), jnp.arange(rows + 1), jnp.int32(rows), rows=part.rows
            )
            cache = kv_write(cache, k, k, jnp.int32(0), tables[:, -1] * setting.page_size)
            return paged_attention(q, cache, jnp.int32(0), batch, scale=model.attention_scale), cache

        run = jax.jit(attend, donate_argnums=0)
        least = float("inf")
        for _ in range(6):
            start = time.perf_counter()
            _, cache = jax.block_until_ready(run(cache, q, k))
            least = min(least, time.perf_counter() - start)
    return rows * context * setting.kv_token_bytes / least


def compare_tokens(on_cpu: bool) -> dict[str, Any]:
    """Every contestant against a model that is on the device as a whole, at a small size.

    Raises:
      UserError: tokens differ where the logits are not near a tie.
    """
    dtype = "float32" if on_cpu else "bfloat16"
    size = {"hidden": 64, "inner": 128, "heads": 4} if on_cpu else {"hidden": 512, "inner": 1024, "heads": 8}
    model = mixtral(3, vocab=512, **size)
    setting = Setting(model, 6, 2, 0, 12, 16, dtype)
    pages = make_pages(setting, lambda _: None, alike=False)
    prompt = np.random.default_rng(2).integers(0, 512, (5, setting.sequences)).astype(np.int32)
    found = {}
    for kind in ("resident", "cgopipe", "s4", "hooked"):
        runner = make_runner(kind, setting, pages, 2**40, blocks=False)
        found[kind] = greedy(runner, setting, prompt, 8)
        runner.close()
        say(f"check: {kind} done")
    tokens, logits = found["resident"]
    top = np.sort(logits, axis=-1)
    # Attention on the host adds up in another order: in bfloat16 that moves logits, and near ties go either way. A
    # sequence that has parted from the others is no longer compared.
    tolerance = 1e-3 if on_cpu else 0.05 * float(np.abs(logits).max())
    compared = 0
    for kind, (mine, _) in found.items():
        same = np.ones(setting.sequences, bool)
        for step in range(len(tokens)):
            clear = (top[step, :, -1] - top[step, :, -2] > tolerance) & same
            if (wrong := clear & (mine[step] != tokens[step])).any():
                raise job.UserError(
                    f"check: {kind} drew {mine[step][wrong].tolist()} in step {step}, expected "
                    f"{tokens[step][wrong].tolist()}"
                )
            compared += int(clear.sum())
            same &= mine[step] == tokens[step]
    return {"check": "passed", "check_tokens": compared}


def contest(setting: Setting, pages: Pages, kind: str, cap: int, deadline: float) -> dict[str, float]:
    """Tokens/s and what they took."""
    began = time.perf_counter()
    # A module at a time would need less than the layer that `hooked` holds: its batch is chosen for that, and it may.
    runner = make_runner(kind, setting, pages, 2**62 if kind == "hooked" else cap, blocks=True)
    say(f"{kind}: ready after {time.perf_counter() - began:.1f} s, {setting.sequences} sequences")
    try:
        runner.ledger.reset_peak()
        seconds = step_seconds(runner, setting, deadline)
        step = float(np.median(seconds))
        say(f"{kind}: {step * 1e3:.0f} ms a step, {setting.sequences / step:.1f} tokens/s, {len(seconds)} steps")
        return {
            "tokens_per_s": setting.sequences / step,
            "step_s": step,
            "sequences": setting.sequences,
            "peak_gb": runner.ledger.peak(DEVICE) / 1e9,
        }
    finally:
        _forget(runner)


def _forget(runner: PipelinedRunner) -> None:
    runner.close()
    runner.work.fail()
    runner.work.cache = runner.work.staging = None
    gc.collect()


def batch_under(setting: Setting, cap: int) -> int:
    """How many sequences have room on the device beside one expert and the weights that stay."""
    model = setting.model
    kept = setting.itemsize * (
        2 * model.vocab_size * model.hidden_size
        + model.num_layers * 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
    )
    row = setting.table_pages * setting.page_size * setting.kv_token_bytes * model.num_layers
    row += 16 * (model.hidden_size + 2 * model.vocab_size)  # activations and logits
    assert model.moe is not None
    row += 12 * model.moe.intermediate_size
    return max(1, int((0.9 * cap - kept - setting.layer_bytes // model.moe.num_experts) // row))


def default_setting(on_cpu: bool) -> Setting:
    size: dict[str, int] = {"hidden": 64, "inner": 256, "vocab": 512, "heads": 4} if on_cpu else {}
    return Setting(
        mixtral(_LAYERS.value or (3 if on_cpu else 6), **size),
        _SEQUENCES.value or (8 if on_cpu else 1024),
        _PARTS.value or (2 if on_cpu else 8),
        _CONTEXT.value or 0,
        _STEPS.value,
        16,
        "float32" if on_cpu else "bfloat16",
    )


def run() -> dict[str, Any]:
    on_cpu = jax.default_backend() == "cpu"
    began = time.perf_counter()
    deadline = began + _SECONDS.value
    result: dict[str, Any] = {"benchmark": "bench_offload", "peer": _PEER.value}
    if _CHECK.value or _CHECK_ONLY.value:
        result |= compare_tokens(on_cpu)
        if _CHECK_ONLY.value:
            return result
    setting = default_setting(on_cpu)
    rate = attention_bytes_per_s(setting)
    say(f"attention on the host reads {rate / 1e9:.1f} GB/s")
    pages = make_pages(setting, say, alike=not on_cpu)
    link = link_bandwidth(pages, setting.model.num_layers)
    moved = setting.layer_bytes / link
    say(f"link {link / 1e9:.1f} GB/s: a layer's weights take {moved * 1e3:.1f} ms")
    if _CONTEXT.value is None:
        tokens = _HOST_SHARE * moved * rate / (setting.sequences * setting.kv_token_bytes)
        context = int(min(_MOST_CONTEXT, max(16, tokens // 16 * 16)))
        setting = dataclasses.replace(setting, context=context)
    cap = round(_CAP.value * 1e9) if _CAP.value else 2**40 if on_cpu else 10 * 10**9
    say(f"{setting.sequences} sequences of {setting.context} tokens in {setting.micro_batches} micro-batches")
    ours = contest(setting, pages, "cgopipe", cap, deadline)
    streamed = setting.model.num_layers * setting.layer_bytes
    result |= {
        "layers": setting.model.num_layers,
        "context": setting.context,
        "micro_batches": setting.micro_batches,
        "dtype": setting.dtype,
        "cap_gb": None if cap == 2**40 else cap / 1e9,
        "link_gb_per_s": link / 1e9,
        "host_attention_gb_per_s": rate / 1e9,
        "link_busy": streamed / ours["step_s"] / link,
        "ours": ours,
    }
    if _PEER.value in ("self_s4", "all"):
        result["self_s4"] = contest(setting, pages, "s4", cap, deadline)
        result["over_self_s4"] = ours["tokens_per_s"] / result["self_s4"]["tokens_per_s"]
    if _PEER.value in ("accelerate", "all"):
        batch = min(setting.sequences, batch_under(setting, cap))
        alone = dataclasses.replace(setting, sequences=batch, micro_batches=1, steps=min(2, setting.steps))
        theirs = None if on_cpu else peers.accelerate(alone, say)
        result["accelerate_is"] = "its way of working, in JAX" if theirs is None else "accelerate itself"
        result["accelerate"] = contest(alone, pages, "hooked", cap, deadline) if theirs is None else theirs
        result["over_accelerate"] = ours["tokens_per_s"] / result["accelerate"]["tokens_per_s"]
    if (stats := None if on_cpu else jax.local_devices()[0].memory_stats()) is not None:
        result["allocator_peak_gb"] = stats["peak_bytes_in_use"] / 1e9
    result |= {"seconds": time.perf_counter() - began, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return _rounded(result)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    job.main(run)
