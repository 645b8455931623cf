"""matmul: every form against float64 over ragged shapes, bit-for-bit batch invariance, no copied stack, no deadlock."""

import concurrent.futures
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.matmul as matmul_package
from kernels import build
from kernels.matmul import PackedWeight, available, cpu, matmul, pack, pack_transposed, why_not

needs_kernel = pytest.mark.skipif(not available(), reason=f"the compiled kernel: {why_not()}")
FORMS = [None, "ref", "xla", pytest.param("cpu", marks=needs_kernel)]


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def assert_close(found, x, w):
    """Against float64, within what float32 sums of K terms may lose: K eps of the sum of magnitudes is far above it."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    slack = 1e-6 * (np.abs(x) @ np.abs(w)) + 1e-30
    assert found.dtype == np.float32
    assert found.shape == (x @ w).shape
    assert (np.abs(np.asarray(found, np.float64) - x @ w) <= slack).all()


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
def test_packed_equals_float64(rows, depth, columns, implementation):
    rng = np.random.default_rng(rows)
    x, w = normal(rng, rows, depth), normal(rng, 3, depth, columns)
    packed = pack(w)
    assert packed.shape == (3, depth, columns)
    for layer in range(3):
        assert packed.at_layer(layer).shape == (depth, columns)
        assert_close(matmul(x, packed.at_layer(layer), implementation=implementation), x, w[layer])
    assert_close(matmul(x, pack(w[1]), implementation=implementation), x, w[1])


@needs_kernel
@pytest.mark.parametrize("rows", [40, 120])
def test_rows_beyond_what_the_second_level_cache_holds(rows):
    rng = np.random.default_rng(0)
    x, w = normal(rng, rows, 9001), normal(rng, 9001, 70)
    assert_close(matmul(x, pack(w)), x, w)


@pytest.mark.parametrize("implementation", [None, "ref", "xla"])
def test_plain_weights(implementation):
    rng = np.random.default_rng(0)
    x, w = normal(rng, 3, 4, 33), normal(rng, 33, 12)
    assert_close(matmul(jnp.asarray(x), jnp.asarray(w), implementation=implementation), x, w)
    gradient = jax.grad(lambda w: matmul(jnp.asarray(x), w, implementation=implementation).sum())(jnp.asarray(w))
    np.testing.assert_allclose(gradient, np.repeat(x.sum((0, 1))[:, None], 12, 1), rtol=1e-5, atol=1e-5)


@needs_kernel
def test_a_row_has_the_same_bits_in_every_batch():
    rng = np.random.default_rng(1)
    packed = pack(normal(rng, 3, 300, 130))
    x = jnp.asarray(normal(rng, 70, 300))
    product = jax.jit(matmul)
    for layer in range(3):
        w = packed.at_layer(layer)
        alone = np.concatenate([np.asarray(product(x[row : row + 1], w)) for row in range(70)])
        for rows in range(1, 71):
            # Another number of rows, and with the start moved, other places in the batch.
            start = (rows * 7) % (71 - rows)
            np.testing.assert_array_equal(np.asarray(product(x[start : start + rows], w)), alone[start : start + rows])
        assert_close(alone, np.asarray(x), np.asarray(w.unpack()))


def test_pack_and_unpack():
    rng = np.random.default_rng(2)
    for shape in [(3, 5), (64, 64), (2, 3, 70), (700, 1000)]:
        w = normal(rng, *shape)
        for packed in (pack(w), pack(jnp.asarray(w)), jax.jit(pack)(w), pack_transposed(np.swapaxes(w, -1, -2))):
            assert packed.shape == shape
            assert packed.ndim == len(shape)
            assert packed.dtype == jnp.float32
            np.testing.assert_array_equal(packed.unpack(), w)
            np.testing.assert_array_equal(packed.panels, pack(w).panels)
    np.testing.assert_array_equal(jax.jit(pack_transposed)(w.T).panels, pack(w).panels)
    half = jnp.asarray(w, jnp.bfloat16)
    np.testing.assert_array_equal(pack(half).unpack(), half.astype(jnp.float32))


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
