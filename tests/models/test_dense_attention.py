"""`dense_attention` against a loop over queries in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.models import FULL_WINDOW, LayerContext, dense_attention


def arrays(length, heads=6, kv_heads=2, head_dim=8, batch=(), seed=0):
    generator = np.random.default_rng(seed)
    shapes = [(*batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(generator.standard_normal(shape, np.float32)) for shape in shapes)


def layer(window=FULL_WINDOW, **options):
    return LayerContext(jnp.int32(0), jnp.int32(window), **options)


def by_loop(q, k, v, segments, window, scale=None, softcap=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros_like(q)
    for i in range(length):
        seen = [j for j in range(i + 1) if segments[i] == segments[j] and i - j < window]
        for h in range(heads):
            scores = k[seen, h // group] @ q[i, h] * (scale or 1 / np.sqrt(head_dim))
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[seen, h // group]
    return out


@pytest.mark.parametrize("block_size", [512, 7])
def test_equals_the_loop(block_size):
    q, k, v = arrays(20)
    segments = np.array([1] * 8 + [2] * 9 + [0] * 3)
    positions = jnp.array([*range(8), *range(9), 0, 1, 2])
    attend = dense_attention(jnp.array(segments), positions, block_size=block_size)
    compiled = jax.jit(attend)
    for window in (FULL_WINDOW, 5, 1):
        out, cache = compiled(q, k, v, layer(window), (3,))
        assert cache == (3,)
        np.testing.assert_allclose(out, by_loop(q, k, v, segments, window), atol=1e-5)


@pytest.mark.parametrize("block_size", [512, 7])
def test_scale_and_softcap_come_from_the_layer_or_the_caller(block_size):
    q, k, v = arrays(20)
    expected = by_loop(q, k, v, np.ones(20), 9, scale=0.7, softcap=1.5)
    own = dense_attention(block_size=block_size)(q, k, v, layer(9, scale=0.7, softcap=1.5), None)[0]
    np.testing.assert_allclose(own, expected, atol=1e-5)
    given = dense_attention(scale=0.7, softcap=1.5, block_size=block_size)(q, k, v, layer(9, scale=3.0), None)[0]
    np.testing.assert_allclose(given, expected, atol=1e-5)
    assert np.abs(expected - by_loop(q, k, v, np.ones(20), 9)).max() > 0.1


def test_leading_dimensions_are_free():
    q, k, v = arrays(9, batch=(2, 3))
    out, _ = jax.jit(dense_attention(block_size=4))(q, k, v, layer(4), None)
    out, q, k, v = map(np.asarray, (out, q, k, v))
    for a in range(2):
        for b in range(3):
            expected = by_loop(q[a, b], k[a, b], v[a, b], np.ones(9), 4)
            np.testing.assert_allclose(out[a, b], expected, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_blocks_equal_one_piece_and_so_do_gradients(softcap):
    q, k, v = arrays(50, batch=(2,))
    segments = jnp.array([[1] * 30 + [2] * 20, [1] * 10 + [0] * 40])

    def loss(qkv, block_size):
        out, _ = dense_attention(segments, block_size=block_size)(*qkv, layer(12, softcap=softcap), None)
        return jnp.sum(jnp.sin(out) * (segments > 0)[..., None, None]), out

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (_, whole), whole_grads = step((q, k, v), 64)
    (_, blocked), blocked_grads = step((q, k, v), 16)
    np.testing.assert_allclose(whole, blocked, atol=1e-5)
    for a, b in zip(whole_grads, blocked_grads):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.isfinite(a).all()
    assert not np.asarray(whole_grads[0])[1, 10:].any()  # padding queries carry no gradient


@pytest.mark.parametrize("block_size", [8, 4])
def test_padding_is_finite_even_in_bfloat16(block_size):
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(6))
    attend = dense_attention(jnp.zeros(6, int), block_size=block_size)
    grads = jax.jit(jax.grad(lambda q: attend(q * 100, k, v, layer(1), None)[0].sum()))(q)
    assert grads.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(grads, np.float32)).all()


def test_long_sequences_never_hold_the_square():
    length, heads = 2048, 2
    q, k, v = arrays(length, heads=heads, kv_heads=1)

    def step(q, k, v):
        return jax.grad(lambda q: dense_attention()(q, k, v, layer(), None)[0].sum())(q)

    compiled = jax.jit(step).lower(q, k, v).compile()
    square_bytes = heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < square_bytes / 2
