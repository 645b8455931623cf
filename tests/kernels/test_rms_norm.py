"""rms_norm: float64 as the oracle, bits that do not depend on the batch, gradients of the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.rms_norm import cpu, rms_norm

KINDS = [{}, {"offset": True}, {"center": True}]
needs_compiler = pytest.mark.skipif(bool(cpu.kernel.why_not()), reason="no compiler here")


def in_float64(x, weight, eps, offset=False, center=False):
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    x = x - x.mean(-1, keepdims=True) if center else x
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return normed * (1 + weight if offset else weight)


def draw(rows: int, width: int, dtype, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(3 * rng.standard_normal((rows, width)), dtype), jnp.asarray(rng.standard_normal(width), dtype)


@pytest.mark.parametrize("implementation", ["ref", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 1.6e-2)])
def test_against_float64(implementation, kind, dtype, tolerance):
    for rows, width in ((1, 16), (5, 64), (3, 896), (70, 2304)):
        x, weight = draw(rows, width, dtype)
        found = rms_norm(x, weight, eps=1e-6, implementation=implementation, **kind)
        wanted = in_float64(x, weight, 1e-6, **kind)
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=tolerance, atol=tolerance)


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    x, weight = draw(100, 896, dtype)
    norm = jax.jit(lambda x: rms_norm(x, weight, eps=1e-6, implementation="cpu"))
    whole = np.asarray(norm(x))
    for rows in (1, 2, 4, 7, 64):
        np.testing.assert_array_equal(np.asarray(norm(x[:rows])), whole[:rows])
        np.testing.assert_array_equal(np.asarray(norm(x[100 - rows :])), whole[100 - rows :])


@needs_compiler
def test_bfloat16_is_rounded_as_xla_rounds_it():
    """Same statistics up to float32's rounding, so nearly all results are equal, and the others neighbours."""
    x, weight = draw(64, 256, jnp.bfloat16)
    ours, theirs = (np.asarray(rms_norm(x, weight, eps=1e-6, implementation=i)) for i in ("cpu", "ref"))
    assert (ours == theirs).mean() > 0.99
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=2**-7)


@needs_compiler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_stays_in_its_row(dtype):
    x, weight = draw(4, 64, dtype)
    x = x.at[1, 3].set(jnp.nan).at[2, 5].set(jnp.inf)
    found = np.asarray(rms_norm(x, weight, eps=1e-6, implementation="cpu"), np.float32)
    assert np.isfinite(found[[0, 3]]).all() and np.isnan(found[1]).all() and not np.isfinite(found[2]).all()


def test_widths_without_compiled_form_fall_back_or_are_refused_by_name():
    x, weight = draw(2, 10, jnp.float32)
    np.testing.assert_array_equal(rms_norm(x, weight, eps=1e-6), rms_norm(x, weight, eps=1e-6, implementation="ref"))
    with pytest.raises(ValueError, match="a multiple of 16"):
        rms_norm(x, weight, eps=1e-6, implementation="cpu")
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm(x, weight[:5], eps=1e-6)
