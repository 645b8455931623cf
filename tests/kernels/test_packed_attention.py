"""Attention within packed documents and its gradients: every form against the oracle, that against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.packed_attention import cpu, packed_attention

COMPILED = pytest.mark.skipif(bool(cpu.refuses(jnp.zeros((1, 1, 1, 16)))), reason="no C++ compiler")
FORMS = ["xla", pytest.param("cpu", marks=COMPILED)]


def first_keys(documents: list[list[int]], length: int, window: int = 1 << 30) -> np.ndarray:
    """For rows of documents of given lengths, the rest padding that sees itself."""
    positions = np.zeros((len(documents), length), np.int64)
    for row, lengths in enumerate(documents):
        for start, count in zip(np.cumsum([0, *lengths]), lengths):
            positions[row, start : start + count] = np.arange(count)
    return (np.arange(length) - np.minimum(positions, window - 1)).astype(np.int32)


CASES = {
    # documents of each row, length, heads, kv heads, head_dim, window, softcap
    "one document": ([[70]], 70, 2, 1, 16, 1 << 30, None),
    "short ones": ([[3, 1, 40, 5], [1, 1, 1, 60], []], 64, 4, 2, 32, 1 << 30, None),
    "longer than blocks": ([[5, 170], [140, 33]], 175, 7, 1, 64, 1 << 30, None),
    "window and cap": ([[150, 40], [8, 100]], 200, 4, 2, 80, 37, 1.5),
    "alone": ([[2] * 24], 50, 2, 2, 16, 1, None),
}


def arrays(case):
    documents, length, heads, kv_heads, head_dim, window, softcap = case
    rng = np.random.default_rng(0)
    shapes = [(len(documents), length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_out = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return (q / head_dim**0.25, k / head_dim**0.25, v, d_out), first_keys(documents, length, window), softcap


def with_gradients(form, qkv, first, softcap, d_out):
    product = functools.partial(packed_attention, first=jnp.asarray(first), softcap=softcap, implementation=form)

    def run(q, k, v, d_out):
        out, pull_back = jax.vjp(product, q, k, v)
        return out, *pull_back(d_out)

    return jax.jit(run)(*qkv, d_out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_oracles(form, name):
    (q, k, v, d_out), first, softcap = arrays(CASES[name])
    expected = with_gradients("ref", (q, k, v), first, softcap, d_out)
    found = with_gradients(form, (q, k, v), first, softcap, d_out)
    for what, a, b in zip(("out", "d_q", "d_k", "d_v"), found, expected):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=3e-6 * max(scale, 1), err_msg=what)


def test_the_oracle_equals_float64():
    (q, k, v, _), first, softcap = arrays(CASES["window and cap"])
    assert softcap is not None
    out = packed_attention(q, k, v, jnp.asarray(first), softcap=softcap, implementation="ref")
    for row, token, head in [(0, 0, 0), (0, 149, 3), (0, 189, 1), (1, 60, 2), (1, 150, 0)]:
        seen = slice(first[row, token], token + 1)
        keys, values = (x[row, seen, head // 2].astype(np.float64) for x in (k, v))
        scores = softcap * np.tanh(keys @ q[row, token, head].astype(np.float64) / softcap)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(out[row, token, head], weights @ values / weights.sum(), atol=2e-6)


@COMPILED
def test_what_lies_beside_a_document_does_not_change_a_bit_of_it():
    (q, k, v, d_out), first, _ = arrays(CASES["longer than blocks"])
    whole = with_gradients("cpu", (q, k, v), first, None, d_out)
    alone = with_gradients(
        "cpu", [x[1:, 140:173] for x in (q, k, v)], first[1:, 140:173] - 140, None, d_out[1:, 140:173]
    )
    for a, b in zip(whole, alone):
        np.testing.assert_allclose(a[1:, 140:173], b, atol=1e-6)
    again = with_gradients("cpu", (q, k, v), first, None, d_out)
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[1, 5:140] *= 3  # of the second row's first document
    for a, b in zip(whole, with_gradients("cpu", changed, first, None, d_out)):
        np.testing.assert_array_equal(a[1, 140:], b[1, 140:])
        assert not np.array_equal(a[1, 5:140], b[1, 5:140])


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    (q, k, v, d_out), first, _ = arrays(CASES["short ones"])
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, d_out)]
    exact = with_gradients("ref", [x.astype(jnp.float32) for x in half[:3]], first, None, half[3].astype(jnp.float32))
    found = with_gradients(form, half[:3], first, None, half[3])
    for a, b in zip(found, exact):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * float(np.abs(b).max()))


@COMPILED
def test_first_keys_that_would_be_read_outside_a_row_are_refused():
    (q, k, v, _), first, _ = arrays(CASES["one document"])
    for wrong in (first - 1, np.where(np.arange(70) == 9, 5, first), np.arange(1, 71)[None]):
        with pytest.raises(Exception, match="first visible keys"):
            jax.block_until_ready(packed_attention(q, k, v, jnp.asarray(wrong, jnp.int32), implementation="cpu"))


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match="do not fit each other"):
        packed_attention(x, x[:, :4], x[:, :4], jnp.zeros((1, 8), jnp.int32))
    with pytest.raises(ValueError, match="first of shape"):
        packed_attention(x, x, x, jnp.zeros((8,), jnp.int32))
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        packed_attention(x[..., :8], x[..., :8], x[..., :8], jnp.zeros((1, 8), jnp.int32), implementation="cpu")
