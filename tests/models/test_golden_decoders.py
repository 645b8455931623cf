"""Logits, frequencies and folders against files made by transformers (tests/golden/generate.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.models import RopeConfig, dense_attention
from jaxstack.models.checkpoint import load_decoder, save_decoder
from jaxstack.models.hf_names import flat_params
from jaxstack.models.rope import inverse_frequencies

GOLDEN = Path(__file__).parent.parent / "golden"
FAMILIES = sorted(path.name for path in (GOLDEN / "decoder").iterdir())


def logits_of(decoder, tokens, attend):
    graphdef, state = nnx.split(decoder)
    return jax.jit(lambda state: nnx.merge(graphdef, state)(tokens, jnp.arange(tokens.shape[-1]), attend)[0])(state)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_before_and_after_a_round_trip(name, tmp_path):
    folder = GOLDEN / "decoder" / name
    decoder = load_decoder(folder)
    golden = np.load(folder / "logits.npz")
    short, long = golden["tokens_a"], golden["tokens_b"]
    if decoder.config.rope.rope_type == "longrope":  # the length of the whole decides on its frequencies
        first, second = (logits_of(decoder, jnp.asarray(tokens), dense_attention()) for tokens in (short, long))
    else:
        padded = np.pad(short, (0, len(long) - len(short)))  # causal: what is appended changes nothing before
        first, second = logits_of(decoder, jnp.asarray(np.stack([padded, long])), dense_attention())
    assert second.dtype == jnp.float32
    assert np.abs(first[: len(short)] - golden["logits_a"]).max() <= 1e-4
    assert np.abs(second - golden["logits_b"]).max() <= 1e-4

    save_decoder(decoder, tmp_path / "saved")
    again = load_decoder(tmp_path / "saved")
    assert again.config == decoder.config
    before, after = flat_params(decoder), flat_params(again)
    assert before.keys() == after.keys()
    assert all((before[path] == after[path]).all() for path in before)


def test_windows_are_read_and_matter():
    decoder = load_decoder(GOLDEN / "decoder" / "qwen2")
    assert decoder.config.layer_windows == (None, 8, 8)
    assert load_decoder(GOLDEN / "decoder" / "mistral").config.layer_windows == (8, 8)
    tokens = jnp.asarray(np.load(GOLDEN / "decoder" / "qwen2" / "logits.npz")["tokens_b"])
    windowed = logits_of(decoder, tokens, dense_attention())
    # The first 8 tokens see everything within the window of 8; the last ones do not.
    full = logits_of(decoder, tokens, _without_windows)
    assert np.abs(windowed - full)[:8].max() < 1e-5 < 0.1 < np.abs(windowed - full)[20:].max()


def _without_windows(q, k, v, layer, cache):
    return dense_attention()(q, k, v, type(layer)(layer.index, jnp.int32(2**30)), cache)


ROPES = {
    "qwen3": (128, {"theta": 1e6}),
    "llama31": (128, {"theta": 5e5, "rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}),
    "llama32": (64, {"theta": 5e5, "rope_type": "llama3", "factor": 32, "original_max_position_embeddings": 8192}),
    "qwen25_yarn": (128, {"theta": 1e6, "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}),
    "yarn_untruncated": (
        64,
        {
            "theta": 150000.0,
            "rope_type": "yarn",
            "factor": 8,
            "original_max_position_embeddings": 4096,
            "truncate": False,
            "beta_fast": 24,
            "beta_slow": 2,
            "attention_factor": 1.25,
        },
    ),
    "linear": (64, {"rope_type": "linear", "factor": 4}),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name):
    head_dim, settings = ROPES[name]
    golden = np.load(GOLDEN / "rope.npz")
    frequencies, scale = inverse_frequencies(RopeConfig(**settings), head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, golden[name], rtol=5e-7)
    assert scale == pytest.approx(float(golden[f"{name}_scale"]), rel=1e-12)
