"""matmul: every form against float64 over ragged shapes, bit-for-bit batch invariance, no copied stack, no deadlock."""

import concurrent.futures
import os
import platform
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import GPUS, TRITON, lowered_text

import kernels.matmul as matmul_package
from kernels import build
from kernels.matmul import (
    PackedWeight,
    StackedWeight,
    available,
    cpu,
    matmul,
    pack,
    pack_transposed,
    pallas_gpu,
    why_not,
)
from kernels.native import NativeKernel

needs_kernel = pytest.mark.skipif(not available(), reason=f"the compiled kernel: {why_not()}")
FORMS = [None, "ref", "xla", pytest.param("cpu", marks=needs_kernel)]


DTYPES = [jnp.float32, jnp.bfloat16]


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def assert_close(found, x, w, bias=0.0, dtype=np.float32):
    """Against float64, within what float32 sums of K terms may lose: K eps of the sum of magnitudes is far above it.

    A result in `dtype` may be rounded to it once.
    """
    x, w, bias = (np.asarray(a, np.float64) for a in (x, w, bias))
    expected = x @ w + bias
    slack = 1e-6 * (np.abs(x) @ np.abs(w) + np.abs(bias)) + 1e-30
    if dtype == jnp.bfloat16:
        slack += 2.0**-8 * np.abs(expected)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (np.abs(np.asarray(found, np.float64) - expected) <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [
        (1, 1, 1),
        (1, 7, 5),
        (1, 300, 65),
        (2, 128, 64),
        (5, 129, 63),
        (6, 127, 200),
        (7, 256, 128),
        (13, 131, 97),
        (70, 513, 197),
    ],
)
def test_packed_equals_float64(rows, depth, columns, implementation, dtype):
    rng = np.random.default_rng(rows)
    x, w = normal(rng, rows, depth, dtype=dtype), normal(rng, 3, depth, columns, dtype=dtype)
    packed = pack(w, dtype)
    assert packed.shape == (3, depth, columns)
    for layer in range(3):
        assert packed.at_layer(layer).shape == (depth, columns)
        assert_close(matmul(x, packed.at_layer(layer), implementation=implementation), x, w[layer])
    bias = normal(rng, columns)
    for out_dtype in DTYPES:
        found = matmul(x, pack(w[1], dtype), jnp.asarray(bias), out_dtype=out_dtype, implementation=implementation)
        assert_close(found, x, w[1], bias, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", FORMS)
def test_padding_rows_are_zeros_and_change_nothing(implementation, dtype):
    rng = np.random.default_rng(10)
    x, w = jnp.asarray(normal(rng, 9, 301, dtype=dtype)), pack(normal(rng, 2, 301, 70), dtype).at_layer(1)
    bias = jnp.asarray(normal(rng, 70))
    product = jax.jit(matmul, static_argnames=("implementation", "out_dtype"))
    for out_dtype in DTYPES:
        whole = product(x, w, bias, implementation=implementation, out_dtype=out_dtype)
        for count in (0, 1, 4, 9, 12):
            poisoned = x.at[count:].set(jnp.nan)
            found = product(poisoned, w.for_rows(count), bias, implementation=implementation, out_dtype=out_dtype)
            np.testing.assert_array_equal(found[:count], whole[:count])
            assert (np.asarray(found[count:], np.float32) == 0).all()


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 120])
def test_rows_beyond_what_the_second_level_cache_holds(rows, dtype):
    rng = np.random.default_rng(0)
    x, w = normal(rng, rows, 9001, dtype=dtype), normal(rng, 9001, 70, dtype=dtype)
    assert_close(matmul(x, pack(w, dtype)), x, w)


@pytest.mark.skipif(platform.machine() != "x86_64" or not available(), reason="flags of this processor family")
@pytest.mark.parametrize("without", ["-mno-avx512bf16", "-mno-avx512f", "-mno-avx"])
def test_processors_that_can_do_less(without, monkeypatch):
    """Every path of the source, on the machine at hand: without the bfloat16 unit, AVX-512, AVX."""
    flags = ("-O1" if flag == "-O3" else flag for flag in build.FLAGS)  # compiles in a third of the time
    monkeypatch.setattr(build, "FLAGS", (*flags, without))
    lesser = NativeKernel(cpu.kernel.source, symbol=cpu.kernel.symbol, target=cpu.kernel.target + without)
    assert lesser.why_not() == ""
    monkeypatch.setattr(cpu, "kernel", lesser)
    rng = np.random.default_rng(9)
    for dtype in DTYPES:
        x, w = normal(rng, 9, 517, dtype=dtype), normal(rng, 517, 70, dtype=dtype)
        found = cpu.matmul(jnp.asarray(x), pack(w, dtype), None, jnp.dtype(jnp.float32))
        assert_close(found, x, w)
        alone = [cpu.matmul(jnp.asarray(x[i : i + 1]), pack(w, dtype), None, jnp.dtype(jnp.float32)) for i in range(9)]
        np.testing.assert_array_equal(np.concatenate(alone), found)


@needs_kernel
def test_rounding_to_bfloat16_is_to_the_nearest_even_and_keeps_what_is_not_finite():
    one = pack(np.eye(1, dtype=np.float32))
    bits = np.r_[np.arange(0x3F80_0000, 0x3F84_0000, 0x101), 0x7F7F_FFFF, 0x7F80_0000, 0xFF80_0000, 0x7FC0_0001]
    x = bits.astype(np.uint32).view(np.float32)[:, None]
    found = np.asarray(matmul(x, one, out_dtype=jnp.bfloat16))
    np.testing.assert_array_equal(found.astype(np.float32), x.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("implementation", [None, "ref", "xla"])
def test_plain_weights(implementation):
    rng = np.random.default_rng(0)
    x, w = normal(rng, 3, 4, 33), normal(rng, 33, 12)
    assert_close(matmul(jnp.asarray(x), jnp.asarray(w), implementation=implementation), x, w)
    gradient = jax.grad(lambda w: matmul(jnp.asarray(x), w, implementation=implementation).sum())(jnp.asarray(w))
    np.testing.assert_allclose(gradient, np.repeat(x.sum((0, 1))[:, None], 12, 1), rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype):
    rng = np.random.default_rng(1)
    packed = pack(normal(rng, 3, 300, 130), dtype)
    x = jnp.asarray(normal(rng, 70, 300, dtype=dtype))
    product = jax.jit(matmul)
    for layer in range(3):
        w = packed.at_layer(layer)
        alone = np.concatenate([np.asarray(product(x[row : row + 1], w)) for row in range(70)])
        for rows in (*range(1, 15), 23, 24, 25, 31, 32, 33, 48, 64, 69, 70):
            # Another number of rows, and with the start moved, other places in the batch.
            start = (rows * 7) % (71 - rows)
            np.testing.assert_array_equal(np.asarray(product(x[start : start + rows], w)), alone[start : start + rows])
        assert_close(alone, np.asarray(x), np.asarray(w.unpack()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_unpack(dtype):
    rng = np.random.default_rng(2)
    for shape in [(3, 5), (64, 64), (2, 3, 70), (700, 1000)]:
        w = normal(rng, *shape)
        rounded = w.astype(dtype)
        packed = pack(w, dtype)
        others = (
            pack(jnp.asarray(w), dtype),
            pack(rounded, dtype),
            jax.jit(pack, static_argnums=1)(w, dtype),
            pack_transposed(np.swapaxes(w, -1, -2), dtype),
            jax.jit(pack_transposed, static_argnums=1)(np.swapaxes(w, -1, -2), dtype),
        )
        for other in (packed, *others):
            assert other.shape == shape
            assert other.ndim == len(shape)
            assert other.dtype == dtype
            np.testing.assert_array_equal(other.unpack(), rounded)
            np.testing.assert_array_equal(other.panels, packed.panels)
    np.testing.assert_array_equal(pack(rounded).unpack(), rounded.astype(np.float32))


def test_pack_survives_its_source():
    w = normal(np.random.default_rng(3), 64, 64)  # exactly one panel: the layouts coincide, the memory must not
    packed, before = pack(w), w.copy()
    w[:] = 0
    np.testing.assert_array_equal(packed.unpack(), before)


def test_leading_axes_dtypes_and_empty():
    rng = np.random.default_rng(4)
    w = normal(rng, 20, 70)
    x = normal(rng, 2, 3, 20)
    assert_close(matmul(x, pack(w)).reshape(6, 70), x.reshape(6, 20), w)
    assert matmul(x[0, 0], pack(w)).shape == (70,)
    assert matmul(jnp.asarray(x, jnp.bfloat16), pack(w)).dtype == jnp.float32
    assert matmul(x[:, :0], pack(w)).shape == (2, 0, 70)
    assert (np.asarray(matmul(np.zeros((2, 0), np.float32), pack(w[:0]))) == np.zeros((2, 70))).all()


def test_layer_outside_the_stack_means_the_nearest_inside():
    rng = np.random.default_rng(5)
    x, w = normal(rng, 2, 9), normal(rng, 3, 9, 7)
    for implementation in (None, "xla"):
        assert_close(matmul(x, pack(w).at_layer(3), implementation=implementation), x, w[2])


def test_errors_say_what_to_do():
    x, packed = jnp.ones((2, 8)), pack(np.ones((2, 8, 8), np.float32))
    one = packed.at_layer(0)
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda x: matmul(x, one).sum())(x)
    with pytest.raises(TypeError, match="vmap"):
        jax.vmap(lambda x: matmul(x, one))(x[None])
    with pytest.raises(ValueError, match="at_layer"):
        matmul(x, packed)
    with pytest.raises(ValueError, match="expected a stack"):
        one.at_layer(1)
    with pytest.raises(ValueError, match="does not fit"):
        matmul(jnp.ones((2, 9)), one)
    with pytest.raises(TypeError, match="floating point"):
        matmul(jnp.ones((2, 8), jnp.int32), one)
    with pytest.raises(ValueError, match="pack"):
        matmul(x, jnp.ones((8, 8)), implementation="cpu")
    with pytest.raises(ValueError, match="unknown implementation"):
        matmul(x, one, implementation="fast")
    with pytest.raises(ValueError, match="bias"):
        matmul(x, one, jnp.ones(7))
    with pytest.raises(ValueError, match="expected float32 or bfloat16"):
        pack(np.ones((3, 3), np.float32), jnp.float16)
    with pytest.raises(ValueError, match="matrix"):
        pack(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="floating point"):
        pack(np.ones((3, 3), np.int32))


@needs_kernel
def test_a_scan_over_layers_does_not_copy_the_stack():
    layers, width = 12, 256
    rng = np.random.default_rng(6)
    packed = pack(normal(rng, layers, width, width) / 16)
    x = jnp.asarray(normal(rng, 8, width))

    def network(x, packed, steps):
        def layer(carry, index):
            x, total = carry
            x = jnp.tanh(matmul(x, packed.at_layer(index)))
            return (x, total + x), None

        def again(state):
            count, x = state
            return count + 1, jax.lax.scan(layer, (x, jnp.zeros_like(x)), jnp.arange(layers))[0][1]

        return jax.lax.while_loop(lambda state: state[0] < steps, again, (0, x))[1]

    compiled = jax.jit(network, donate_argnums=0).lower(x, packed, 2).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < packed.panels.nbytes / layers
    expected = np.asarray(x, np.float64)
    for _ in range(2):
        total = 0.0
        for w in np.asarray(packed.unpack(), np.float64):
            expected = np.tanh(expected @ w)
            total = total + expected
        expected = total
    np.testing.assert_allclose(compiled(x, packed, 2), expected, rtol=1e-3, atol=1e-4)


@needs_kernel
def test_independent_products_side_by_side():
    rng = np.random.default_rng(7)
    x = jnp.asarray(normal(rng, 9, 200))
    weights = [pack(normal(rng, 200, 300)) for _ in range(12)]
    together = jax.jit(lambda x, weights: [matmul(x, w) for w in weights])
    expected = [np.asarray(matmul(x, w, implementation="cpu")) for w in weights]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for results in threads.map(lambda _: together(x, weights), range(20)):
            for found, wanted in zip(results, expected):
                np.testing.assert_array_equal(found, wanted)


@needs_kernel
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
def test_one_thread_is_enough():
    program = """
        import os
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
        import jax, numpy as np
        from kernels.matmul import matmul, pack
        rng = np.random.default_rng(0)
        x, ws = np.ones((9, 200), np.float32), [pack(np.full((200, 600), i, np.float32)) for i in range(8)]
        for y, i in zip(jax.jit(lambda x, ws: [matmul(x, w, implementation="cpu") for w in ws])(x, ws), range(8)):
            assert (np.asarray(y) == 200 * i).all()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_without_a_compiler(monkeypatch, tmp_path, caplog):
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.shared_library(cpu.kernel.source, compiler="no-such-compiler", cache=tmp_path)
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(cpu.kernel, "_why_not", None)  # as in a new process; put back afterwards
    assert not available()
    assert "no-such-compiler" in why_not()
    rng = np.random.default_rng(8)
    x, w = normal(rng, 3, 40), normal(rng, 40, 70)
    assert_close(matmul(x, pack(w)), x, w)
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        matmul(x, pack(w), implementation="cpu")
    assert len(caplog.records) == 1


def test_a_compiler_that_fails_is_named(tmp_path):
    source = tmp_path / "broken.cc"
    source.write_text("this is not C++;")
    if not available():
        pytest.skip(why_not())
    with pytest.raises(build.BuildError, match=r"failed: .*error"):
        build.shared_library(source, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_others_can_write_is_not_trusted(tmp_path):
    if not available():
        pytest.skip(why_not())
    source = tmp_path / "tiny.cc"
    source.write_text('extern "C" int answer() { return 42; }')
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert shared not in build.shared_library(source, cache=shared).parents


@needs_kernel
def test_two_processes_build_at_once(tmp_path):
    source = tmp_path / "tiny.cc"
    source.write_text('extern "C" int answer() { return 42; }')
    program = textwrap.dedent(f"""
        import ctypes, pathlib
        from kernels import build
        library = build.shared_library(pathlib.Path({str(source)!r}), cache=pathlib.Path({str(tmp_path / "cache")!r}))
        assert ctypes.CDLL(str(library)).answer() == 42
        print(library)
    """)
    both = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_program_lowers_for_platforms_without_the_kernel():
    w = pack(np.ones((40, 70), np.float32))
    exported = jax.export.export(jax.jit(matmul), platforms=["cuda", "tpu"])(jnp.ones((3, 40)), w)
    assert "jaxstack_packed_matmul" not in exported.mlir_module()


def test_a_packed_weight_is_a_pytree():
    packed = pack(np.ones((2, 3, 4), np.float32))
    assert len(jax.tree.leaves(packed)) == 1
    assert len(jax.tree.leaves(packed.at_layer(0))) == 2
    assert isinstance(jax.tree.map(lambda leaf: leaf, packed), PackedWeight)
    assert packed.panels.shape[-1] == matmul_package.PANEL_COLUMNS


# Tiles that reach over every edge, and K in pieces of which the last are empty.
SMALL_TILES = [pallas_gpu.Tile(16, 32, 16, 1, 4, 2), pallas_gpu.Tile(16, 64, 32, 4, 4, 2)]
STACKED_FORMS = [(None, None), ("ref", None), ("xla", None), ("interpret", None)]
STACKED_FORMS += [("interpret", tile) for tile in SMALL_TILES]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "tile"), STACKED_FORMS, ids=str)
def test_one_of_a_stack(form, tile, dtype, monkeypatch):
    if tile is not None:
        monkeypatch.setattr(pallas_gpu, "tile_for", lambda *_: tile)

    @jax.jit
    def product(x, w, bias, layer):
        weight = StackedWeight(w).at_layer(layer)
        return matmul(x, weight, bias, out_dtype=jnp.float32, implementation=form)

    rng = np.random.default_rng(6)
    for rows, depth, columns in [(1, 7, 5), (21, 70, 130)]:
        w = normal(rng, 3, depth, columns, dtype=dtype)
        x, bias = normal(rng, rows, depth, dtype=dtype), normal(rng, columns)
        for layer in (0, 2):
            assert_close(product(x, w, bias, layer), x, w[layer], bias)
    assert product(x.reshape(3, 7, 70), w, bias, 1).shape == (3, 7, 130)


def test_a_stack_that_does_not_fit_is_named():
    x, stack = jnp.zeros((2, 7)), StackedWeight(jnp.zeros((3, 7, 5)))
    with pytest.raises(ValueError, match=r"stack of shape \(3, 7, 5\); choose a matrix"):
        matmul(x, stack)
    with pytest.raises(ValueError, match=r"x of shape \(2, 6\) does not fit a weight of shape \(7, 5\)"):
        matmul(x[:, 1:], stack.at_layer(0))
    for plain in (jnp.zeros((7, 5)), pack(np.zeros((7, 5), np.float32))):
        with pytest.raises(ValueError, match="implementation='interpret' takes a StackedWeight"):
            matmul(x, plain, implementation="interpret")
    with pytest.raises(ValueError, match="expected numbers in both"):
        matmul(x[:0], stack.at_layer(0), implementation="interpret")
    assert matmul(x[:0], stack.at_layer(0)).shape == (0, 5)


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lowers_for_accelerators(device, dtype):
    for rows, depth, columns in [(64, 4096, 28672), (1, 14336, 4096), (300, 37, 130)]:
        x, w = jax.ShapeDtypeStruct((rows, depth), dtype), jax.ShapeDtypeStruct((9, depth, columns), dtype)
        text = lowered_text(lambda x, w: matmul(x, StackedWeight(w).at_layer(2)), x, w, device=device)
        assert text.count(TRITON) == 1


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_a_multiprocessor(itemsize):
    for rows in (1, 16, 17, 64, 65, 128, 129, 8192):
        for depth, columns in [(4096, 28672), (14336, 4096), (4096, 6144), (8, 8), (896, 151936)]:
            tile = pallas_gpu.tile_for(rows, depth, columns, itemsize)
            assert tile.shared_bytes(itemsize) <= 227 << 10
            assert tile.rows * tile.columns <= 128 * 256  # float32 sums, in the registers of two warpgroups
            assert tile.splits == 1 or tile.splits * tile.depth <= depth
