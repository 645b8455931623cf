"""Low-rank additions of several adapters in one batch: every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest

from kernels.lora_matmul import lora_matmul, pallas_gpu, pallas_tpu
from kernels.lora_matmul.blocks import adapters_of_blocks

FORMS = ["ref", "xla"]
LAYERS, ADAPTERS, IN, RANK, OUT = 2, 5, 40, 6, 56
ROWS = {
    "sorted": [0] * 7 + [1] * 16 + [3] * 10 + [4],
    "shuffled": [3, 0, 1, 1, 4, 0, 0, 3, 2, 2, 4, 1] * 3,
    "none": [0] * 20,
    "one row": [2],
    "all the same": [4] * 33,
}


@pytest.fixture(scope="module")
def factors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(LAYERS, ADAPTERS, IN, RANK)), rng.normal(size=(LAYERS, ADAPTERS, RANK, OUT))
    # Adapter 0 must give zeros even if its factors hold something.
    return tuple(jnp.asarray(v, jnp.float32) for v in (a, b, rng.uniform(0.5, 2, size=(LAYERS, ADAPTERS))))


def rows_of(name):
    adapters = np.asarray(ROWS[name], np.int32)
    x = np.random.default_rng(len(adapters)).normal(size=(len(adapters), IN))
    return jnp.asarray(x, jnp.float32), adapters


def expected(x, a, b, scale, adapters):
    x, a, b, scale = (np.asarray(v, np.float64) for v in (x, a, b, scale))
    return np.stack([scale[i] * (row @ a[i] @ b[i]) * (i > 0) for row, i in zip(x, adapters)])


@functools.cache
def compiled(form):
    return jax.jit(functools.partial(lora_matmul, implementation=form))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_equals_float64(form, name, factors):
    x, adapters = rows_of(name)
    wanted = expected(x, *(v[1] for v in factors), adapters)
    stacked = compiled(form)(x, *factors, adapters, layer=1)
    np.testing.assert_allclose(stacked, wanted, atol=1e-4)
    np.testing.assert_allclose(compiled(form)(x, *(v[1] for v in factors), adapters), wanted, atol=1e-4)
    assert not np.asarray(stacked)[adapters == 0].any()


def test_a_row_has_the_same_bits_in_every_batch(factors):
    x, adapters = rows_of("shuffled")
    together = np.asarray(compiled("xla")(x, *factors, adapters, layer=0))
    for row in (0, 2, 10, 35):
        alone = compiled("xla")(x[row : row + 1], *factors, adapters[row : row + 1], layer=0)
        np.testing.assert_array_equal(alone[0], together[row])


def test_gradients_equal_those_of_the_oracle(factors):
    x, adapters = rows_of("shuffled")

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form, x, *factors):
        total = lambda *args: jnp.sin(lora_matmul(*args, adapters, layer=1, implementation=form)).sum()  # noqa: E731
        return jax.grad(total, (0, 1, 2, 3))(x, *factors)

    for found, wanted in zip(gradients("xla", x, *factors), gradients("ref", x, *factors)):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_bfloat16(factors):
    x, adapters = rows_of("sorted")
    half = [v.astype(jnp.bfloat16) for v in (x, *factors)]
    found, wanted = (compiled(form)(*half, adapters, layer=0) for form in ("xla", "ref"))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(v, np.float32) for v in (found, wanted)), rtol=0.03, atol=0.5)


def test_no_layer_of_the_stack_is_copied():
    layers, adapters, width, rank = 6, 8, 256, 16
    a, b = jnp.ones((layers, adapters, width, rank)), jnp.ones((layers, adapters, rank, width))

    def network(x, a, b, scale, ids):
        step = lambda x, layer: (jnp.tanh(lora_matmul(x, a, b, scale, ids, layer=layer)), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(layers))[0]

    arguments = jnp.ones((4, width)), a, b, jnp.ones((layers, adapters)), jnp.asarray([0, 1, 2, 3])
    program = jax.jit(network).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < a.nbytes / layers


def test_what_does_not_fit_is_named(factors):
    x, adapters = rows_of("one row")
    a, b, scale = (v[0] for v in factors)
    with pytest.raises(ValueError, match=r"expected \[n, in, r\] and \[n, r, out\]"):
        lora_matmul(x, *factors, adapters)
    with pytest.raises(ValueError, match=r"expected \[L, n, in, r\]"):
        lora_matmul(x, a, b, scale, adapters, layer=0)
    with pytest.raises(ValueError, match="scale of shape"):
        lora_matmul(x, a, b, scale[1:], adapters)
    with pytest.raises(ValueError, match="does not fit"):
        lora_matmul(x[:, 1:], a, b, scale, adapters)
    with pytest.raises(ValueError, match="adapter_of_row"):
        lora_matmul(x, a, b, scale, adapters[:0])
    assert lora_matmul(x[:0], a, b, scale, adapters[:0]).shape == (0, OUT)


@pytest.mark.parametrize("kernel", ["gpu", "tpu"])
def test_pallas_kernels_equal_float64_in_the_interpreter(kernel, factors, monkeypatch):
    """With tiles that divide nothing."""
    monkeypatch.setattr(pallas_gpu, "_DEPTH", 32)
    monkeypatch.setattr(pallas_gpu, "_COLUMNS", 32)
    monkeypatch.setattr(pallas_tpu, "tile_for", lambda *_: (16, 16, 24))
    pallas = {"gpu": pallas_gpu, "tpu": pallas_tpu}[kernel]
    run = jax.jit(functools.partial(pallas.lora_matmul, interpret=True))
    for name in ("shuffled", "sorted"):
        x, adapters = (v[:34] for v in rows_of(name))
        found = run(x, *factors, jnp.asarray(adapters), jnp.int32(1))
        np.testing.assert_allclose(found, expected(x, *(v[1] for v in factors), adapters), atol=1e-4)


def test_interpret_through_the_operation(factors):
    x, adapters = rows_of("shuffled")
    found, wanted = (compiled(form)(x, *factors, adapters, layer=0) for form in ("interpret", "ref"))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("device", [*lowering.GPUS, *lowering.TPUS])
@pytest.mark.parametrize("shape", [(64, 9, 4096, 16, 6144), (2048, 3, 4096, 64, 4096), (5, 2, 100, 3, 200)], ids=str)
def test_lowers_for_accelerators(device, shape):
    rows, adapters, depth, rank, columns = shape
    shaped = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    stacks = shaped(2, adapters, depth, rank), shaped(2, adapters, rank, columns), shaped(2, adapters)
    integers = shaped(rows, dtype=jnp.int32), shaped(dtype=jnp.int32)
    run = lambda x, a, b, scale, ids, layer: lora_matmul(x, a, b, scale, ids, layer=layer)  # noqa: E731
    text = lowering.lowered_text(run, shaped(rows, depth), *stacks, *integers, device=device)
    assert (lowering.TRITON if device in lowering.GPUS else lowering.TPU) in text


def test_adapters_of_blocks():
    met = adapters_of_blocks(jnp.asarray([4, 0, 2, 2, 0, 0, 0, 0, 1, 1]), block=4, adapters=5)
    np.testing.assert_array_equal(met.filled, [2, 0, 1])
    np.testing.assert_array_equal(met.adapter, [[2, 4, 4, 4], [0, 0, 0, 0], [1, 1, 1, 1]])
