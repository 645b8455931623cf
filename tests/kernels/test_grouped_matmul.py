"""Grouped products: every implementation against float64, with gradients."""

import functools

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest

from kernels.grouped_matmul import grouped_matmul, pallas_gpu, pallas_tpu

FORMS = ["ref", "xla"]
SIZES = [[0, 3, 0, 1, 17], [16, 16, 0, 0, 8], [40, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 5, 0], [1, 1, 1, 1, 1]]
LAYERS, GROUPS, DEPTH, COLUMNS, ROWS = 3, 5, 24, 40, 40


def expected(x, w, sizes):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out, row = np.zeros((len(x), w.shape[-1])), 0
    for matrix, size in zip(w, sizes):
        out[row : row + size] = x[row : row + size] @ matrix
        row += size
    return out


@functools.cache
def compiled(form, stacked):
    def run(x, w, sizes, layer):
        return grouped_matmul(x, w, sizes, layer=layer if stacked else None, implementation=form)

    return jax.jit(run)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, DEPTH)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(LAYERS, GROUPS, DEPTH, COLUMNS)), jnp.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_float64(form, sizes, arrays):
    x, w = arrays
    counts = jnp.asarray(sizes, jnp.int32)
    for layer in (0, 2):
        wanted = expected(x, w[layer], sizes)
        for found in (compiled(form, True)(x, w, counts, layer), compiled(form, False)(x, w[layer], counts, 0)):
            np.testing.assert_allclose(found, wanted, atol=2e-5)
            assert not np.asarray(found[sum(sizes) :]).any()


@pytest.mark.parametrize("form", [None, "xla"])
def test_many_rows_in_few_groups_and_few_in_many(form):
    rng = np.random.default_rng(1)
    for rows, groups in [(700, 2), (3, 64)]:
        sizes = rng.multinomial(rows - 1, np.ones(groups) / groups)
        x, w = rng.normal(size=(rows, 8)), rng.normal(size=(groups, 8, 5))
        found = grouped_matmul(*(jnp.asarray(a, jnp.float32) for a in (x, w)), jnp.asarray(sizes), implementation=form)
        np.testing.assert_allclose(found, expected(x, w, sizes), atol=2e-5)


@pytest.mark.parametrize("sizes", [SIZES[0], SIZES[1], SIZES[3]], ids=str)
def test_gradients_equal_those_of_the_oracle(sizes, arrays):
    x, w = arrays
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, COLUMNS)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(form, x, w, sizes):
        return jax.grad(
            lambda x, w: (jnp.sin(grouped_matmul(x, w, sizes, layer=1, implementation=form)) * weights).sum(), (0, 1)
        )(x, w)

    counts = jnp.asarray(sizes, jnp.int32)
    for found, wanted in zip(gradients("xla", x, w, counts), gradients("ref", x, w, counts)):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form, arrays):
    x, w = (a.astype(jnp.bfloat16) for a in arrays)
    found = compiled(form, True)(x, w, jnp.asarray(SIZES[0]), 1)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected(x, w[1], SIZES[0]), rtol=1e-2, atol=1e-2)


def test_no_layer_of_the_stack_is_copied():
    layers, groups, width = 6, 8, 128
    w = jnp.ones((layers, groups, width, width))

    def network(x, w, sizes):
        return jax.lax.scan(
            lambda x, layer: (jnp.tanh(grouped_matmul(x, w, sizes, layer=layer, implementation="xla")), None),
            x,
            jnp.arange(layers),
        )[0]

    program = jax.jit(network).lower(jnp.ones((32, width)), w, jnp.full((groups,), 4)).compile()
    assert program.memory_analysis().temp_size_in_bytes < w.nbytes / layers / 2


def test_a_row_has_the_same_bits_wherever_it_stands():
    rng = np.random.default_rng(3)
    x, w = jnp.asarray(rng.normal(size=(32, 96)), jnp.float32), jnp.asarray(rng.normal(size=(4, 96, 80)), jnp.float32)
    run = jax.jit(functools.partial(grouped_matmul, implementation="xla"))
    together = run(x, w, jnp.asarray([0, 20, 3, 9]))
    np.testing.assert_array_equal(run(x[20:], w, jnp.asarray([0, 0, 3, 9])), together[20:])
    np.testing.assert_array_equal(run(x[:5], w, jnp.asarray([0, 5, 0, 0])), together[:5])


def test_what_does_not_fit_is_named(arrays):
    x, w = arrays
    sizes = jnp.asarray(SIZES[0])
    with pytest.raises(ValueError, match=r"with layer=; found shape \(3, 5, 24, 40\), no layer"):
        grouped_matmul(x, w, sizes)
    with pytest.raises(ValueError, match="a layer"):
        grouped_matmul(x, w[0], sizes, layer=0)
    with pytest.raises(ValueError, match="does not fit"):
        grouped_matmul(x[:, 1:], w[0], sizes)
    with pytest.raises(ValueError, match="group_sizes of shape"):
        grouped_matmul(x, w[0], sizes[1:])
    with pytest.raises(ValueError, match="found implementation='fast'"):
        grouped_matmul(x, w[0], sizes, implementation="fast")
    assert grouped_matmul(x[:0], w[0], sizes * 0).shape == (0, COLUMNS)


PALLAS = {"gpu": pallas_gpu.grouped_matmul, "tpu": pallas_tpu.grouped_matmul}


@pytest.mark.parametrize("kernel", PALLAS)
@pytest.mark.parametrize("transposed", [False, True])
def test_pallas_kernels_equal_float64_in_the_interpreter(kernel, transposed, monkeypatch):
    """With tiles so small that groups share them and every edge is ragged."""
    monkeypatch.setattr(pallas_gpu, "tile_for", lambda *_: pallas_gpu.Tile(4, 16, 8, 4, 2))
    monkeypatch.setattr(pallas_tpu, "tile_for", lambda *_: pallas_tpu.Tile(8, 16, 16))
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(ROWS, 24)), rng.normal(size=(2, GROUPS, 24, COLUMNS))
    stack = jnp.asarray(w.swapaxes(2, 3) if transposed else w, jnp.float32)
    run = jax.jit(functools.partial(PALLAS[kernel], transposed=transposed, interpret=True))
    for sizes in SIZES:
        found = run(jnp.asarray(x, jnp.float32), stack, jnp.asarray(sizes, jnp.int32), jnp.int32(1))
        np.testing.assert_allclose(found, expected(x, w[1], sizes), atol=2e-5, err_msg=str(sizes))


def test_interpret_through_the_operation_with_gradients(arrays):
    x, w = (a.astype(jnp.bfloat16) for a in arrays)
    sizes = jnp.asarray(SIZES[0], jnp.int32)

    def gradients(form):
        total = lambda x, w: grouped_matmul(x, w, sizes, implementation=form).astype(jnp.float32).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(total, (0, 1)))(x, w[0])

    (found, of_found), (wanted, of_wanted) = gradients("interpret"), gradients("xla")
    np.testing.assert_allclose(found, wanted, rtol=2e-2)
    for a, b in zip(of_found, of_wanted):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=5e-2)


# Decode and prompt rows of a mixture like Qwen3-30B-A3B's, and shapes that no tile divides.
SHAPES = [(64, 128, 2048, 768), (4096, 128, 768, 2048), (5, 3, 200, 100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("device", [*lowering.GPUS, *lowering.TPUS])
def test_lowers_for_accelerators(device, shape):
    rows, groups, depth, columns = shape
    x = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((2, groups, depth, columns), jnp.bfloat16)
    sizes, layer = jax.ShapeDtypeStruct((groups,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def loss(x, w, sizes, layer):  # by itself chosen for the device, forwards and backwards
        return grouped_matmul(x, w, sizes, layer=layer).astype(jnp.float32).sum()

    text = lowering.lowered_text(jax.grad(loss), x, w, sizes, layer, device=device)
    assert (lowering.TRITON if device in lowering.GPUS else lowering.TPU) in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tiles_fit_on_chip(dtype):
    for rows, _, depth, columns in [*SHAPES, (4096, 8, 14336, 4096)]:
        tile = pallas_tpu.tile_for(rows, columns, depth)
        assert pallas_tpu.vmem_bytes(tile, dtype, dtype) < 12 << 20
        tile = pallas_gpu.tile_for(rows, 8)
        one_stage = (tile.rows + tile.columns) * tile.depth * jnp.dtype(dtype).itemsize
        assert one_stage * tile.stages <= 160 << 10  # shared memory of an A100
