"""bench_decode as a user runs it, and what it counts."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from programs import run

from jaxstack.models.decoder import Decoder
from jaxstack.models.serving_layout import fuse_for_serving
from launch.serve_benchmark.shapes import llama8b, model_config, token_bytes, weight_bytes


def test_a_run_gives_both_figures():
    flags = ["--layers=1", "--vocab_size=640", "--rows=2", "--context=40", "--page_size=16", "--steps=2"]
    done = run("launch.bench_decode", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["recompilations"] == 0 and found["layers"] == 1
    for part in ("program", "engine"):
        for kind in ("greedy", "sampled"):
            ms, rate = found[f"{part}_{kind}_ms"], found[f"{part}_{kind}_tokens_per_s"]
            assert ms > 0 and rate == pytest.approx(2e3 / ms, rel=0.01)
    expected = found["step_gb"] / found["copy_gb_per_s"] / found["program_greedy_ms"] * 1e3
    assert found["program_greedy_share_of_roofline"] == pytest.approx(expected, rel=0.02)


def test_a_context_beyond_the_model_is_refused():
    done = run("launch.bench_decode", "--shape=llama8b", "--context=8000")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--context: found 8000 tokens" in done.stderr and "expected at most 8192" in done.stderr


def test_bytes_of_a_step():
    """Of Llama 3 8B: all weights but the embedding; 128 KiB a token in bfloat16."""
    config = llama8b()
    sizes = {str(p): x.size for p, x in jax.tree.leaves_with_path(nnx.state(Decoder.abstract(config)))}
    assert sum(sizes.values()) == 8_030_261_248  # as the model's card says
    assert token_bytes(config, 2) == 128 << 10

    small = model_config(1, 640)
    decoder = Decoder(small, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    table = 640 * 896 * 4
    whole = sum(x.nbytes for x in jax.tree.leaves(nnx.state(decoder)))
    assert weight_bytes(fuse_for_serving(decoder, pack=False)) == whole  # the table is the output matrix
    assert whole <= weight_bytes(fuse_for_serving(decoder, pack=True)) < whole + table // 8  # panels may be padded
