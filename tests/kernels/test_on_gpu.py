"""The GPU forms on a GPU, with the sizes they are served with, against the oracles. Elsewhere nothing here runs, and
the interpreter's tests beside this file stand for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_paged_attention_pallas import CASES, CONFIGS, example

from kernels import platforms
from kernels.grouped_matmul import grouped_matmul
from kernels.kv_write import kv_write
from kernels.lora_matmul import lora_matmul
from kernels.matmul import StackedWeight, matmul
from kernels.paged_attention import paged_attention
from kernels.rms_norm_rope import rms_norm_rope
from kernels.sample_threshold import kept, sample_threshold

pytestmark = [
    pytest.mark.skipif(bool(platforms.why_not("pallas_gpu")), reason=platforms.why_not("pallas_gpu")),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

DTYPES = [jnp.float32, jnp.bfloat16]
TOLERANCE = {jnp.dtype(jnp.float32): 2e-5, jnp.dtype(jnp.bfloat16): 2e-2}


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_near(found, wanted, dtype):
    """Relative to the largest number, within what a rounding of the result and of products' inputs may do."""
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    assert np.isfinite(found).all()
    np.testing.assert_array_less(
        np.abs(found - wanted), TOLERANCE[jnp.dtype(dtype)] * max(1.0, np.abs(wanted).max(initial=0))
    )


def both(operation, *arrays, **options):
    """What the GPU's form gives, and what the oracle gives of the same numbers in float32."""
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, arrays)
    run = lambda form: jax.jit(functools.partial(operation, implementation=form, **options))  # noqa: E731
    with jax.default_matmul_precision("highest"):
        wanted = run("ref")(*exact)
    return run("pallas_gpu")(*arrays), wanted


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_paged_attention(config):
    softcap = config[5]
    for decodes, chunks, window in CASES:
        (q, kv, layer, described), sinks, n, clean = example(np.random.default_rng(0), config, decodes, chunks)
        call = functools.partial(paged_attention, scale=0.1, window=window, softcap=softcap, sinks=sinks)
        found = jax.jit(functools.partial(call, implementation="pallas_gpu"))(q, kv, layer, described)
        exact = (x.astype(jnp.float32) for x in (q, clean))
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(functools.partial(call, implementation="ref"))(*exact, layer, described)
        assert_near(found[:n], wanted[:n], q.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 4096, 6144), (1, 4096, 4096), (24, 14336, 512), (128, 300, 200), (5, 37, 130)])
def test_matmul(shape, dtype):
    rows, depth, columns = shape
    x, w = normal(0, rows, depth, dtype=dtype), normal(1, 3, depth, columns, dtype=dtype) / depth**0.5
    for layer in (0, 2):
        product = lambda x, w, layer=layer, **o: matmul(x, StackedWeight(w).at_layer(layer), **o)  # noqa: E731
        assert_near(*both(product, x, w), dtype)


def test_matmul_beyond_four_gigabytes():
    """Offsets of the last layer need 64 bits."""
    depth, columns, layers = 4096, 28672, 20
    w = jnp.zeros((layers, depth, columns), jnp.bfloat16).at[-1].set(normal(1, depth, columns, dtype=jnp.bfloat16))
    x = normal(0, 16, depth, dtype=jnp.bfloat16)
    product = jax.jit(
        lambda x, w, form: matmul(x, StackedWeight(w).at_layer(layers - 1), implementation=form), static_argnums=2
    )
    wanted = product(x, w, "xla")
    assert_near(product(x, w, "pallas_gpu"), wanted, jnp.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kv_write(dtype):
    cache, k, v = normal(0, 3, 9, 16, 16, 128, dtype=dtype), normal(1, 40, 8, 128), normal(2, 40, 8, 128)
    slots = jax.random.permutation(jax.random.key(3), 9 * 16)[:40].astype(jnp.int32)
    found, wanted = (
        jax.jit(functools.partial(kv_write, implementation=form))(cache, k, v, jnp.int32(1), slots)
        for form in ("pallas_gpu", "ref")
    )
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [9, 100, 700])
def test_grouped_matmul(rows, dtype):
    groups, depth, columns = 6, 200, 328
    x, w = normal(0, rows, depth, dtype=dtype), normal(1, 2, groups, depth, columns, dtype=dtype) / depth**0.5
    rng = np.random.default_rng(rows)
    for used in (0, rows - 3, rows):
        sizes = jnp.asarray(rng.multinomial(used, np.ones(groups) / groups), jnp.int32)
        call = functools.partial(grouped_matmul, layer=1)
        assert_near(*both(call, x, w, sizes), dtype)

    def slope(form, x, w):
        total = lambda x, w: jnp.sin(grouped_matmul(x, w, sizes, implementation=form).astype(jnp.float32)).sum()  # noqa: E731
        with jax.default_matmul_precision("highest"):  # XLA's own products are part of both
            return jax.jit(jax.grad(total, (0, 1)))(x, w)

    wanted = slope("xla", x.astype(jnp.float32), w[0].astype(jnp.float32))
    for a, b in zip(slope("pallas_gpu", x, w[0]), wanted):
        assert_near(a, b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [6, 16, 64])
def test_lora_matmul(rank, dtype):
    rows, adapters, depth, columns = 70, 5, 300, 650
    x = normal(0, rows, depth, dtype=dtype)
    a = normal(1, 2, adapters, depth, rank, dtype=dtype).at[:, 0].set(0) / depth**0.5
    b = normal(2, 2, adapters, rank, columns, dtype=dtype).at[:, 0].set(0)
    scale = jnp.ones((2, adapters), dtype)
    of_row = jnp.asarray(np.random.default_rng(0).integers(0, adapters, rows), jnp.int32)
    for ids in (of_row, jnp.sort(of_row), of_row * 0):
        assert_near(*both(functools.partial(lora_matmul, layer=1), x, a, b, scale, ids), dtype)


@pytest.mark.parametrize("vocab", [200, 32_000, 151_936])
def test_sample_threshold(vocab):
    rows = 12
    scaled = normal(0, rows, vocab) * 3
    scaled = scaled.at[:, 5].set(-jnp.inf).at[0].set(0.0).at[1, :50].set(4.0)  # no token; all alike; many alike
    rng = np.random.default_rng(0)
    filters = (
        jnp.asarray(rng.choice([0, 1, 20, 100, vocab], rows), jnp.int32),
        jnp.asarray(rng.choice([0.1, 0.7731, 0.951, 1.0], rows), jnp.float32),
        jnp.asarray(rng.choice([0.0, 0.013], rows), jnp.float32),
    )
    found, wanted = both(sample_threshold, scaled, *filters)
    # A sum of float32 may put a token at the very edge on the other side: what differs is next to nothing.
    differ = kept(scaled, found) != kept(scaled, wanted)
    assert float(jnp.where(differ, jax.nn.softmax(scaled), 0).sum(-1).max()) < 1e-4
    assert int(differ.sum(-1)[2:].max()) <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 32, 8, 128, 128), (7, 14, 2, 64, 64), (700, 4, 1, 80, 32)], ids=str)
def test_rms_norm_rope(shape, dtype):
    rows, heads, kv_heads, head_dim, rotated = shape
    q, k = normal(0, rows, heads, head_dim, dtype=dtype), normal(1, rows, kv_heads, head_dim, dtype=dtype)
    angles = jax.random.uniform(jax.random.key(2), (rows, rotated // 2), maxval=7.0)
    weights = [1 + 0.1 * normal(s, head_dim, dtype=dtype) for s in (3, 4)]
    for some in (weights, [None, None]):
        found, wanted = both(rms_norm_rope, q, k, jnp.cos(angles), jnp.sin(angles), *some)
        for a, b in zip(found, wanted):
            assert_near(a, b, dtype)
