"""gated: values and gradients of every form against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gated import cpu, gated

COMPILED = pytest.mark.skipif(bool(cpu.refuses(jnp.zeros(16), jnp.zeros(16))), reason="no C++ compiler")
FORMS = ["ref", "xla", pytest.param("cpu", marks=COMPILED)]


def in_float64(gate, up, d_out, activation):
    """Value, d_gate and d_up."""
    x, up, d_out = (np.asarray(a, np.float64) for a in (gate, up, d_out))
    with np.errstate(over="ignore"):
        if activation == "silu":
            sigmoid = 1 / (1 + np.exp(-x))
            value, slope = x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
        else:
            inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
            value = x * (1 + np.tanh(inner)) / 2
            slope = (1 + np.tanh(inner)) / 2 + x / 2 / np.cosh(inner) ** 2 * np.sqrt(2 / np.pi) * (1 + 0.134145 * x**2)
    return value * up, d_out * up * slope, d_out * value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(16,), (3, 32), (41, 1, 1712)], ids=str)  # the last is shared by threads
def test_values_and_gradients(form, activation, shape):
    rng = np.random.default_rng(0)
    gate, up, d_out = (4 * rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    gate.flat[:7] = 0.0, -0.0, 1e-30, -88.5, 90.0, -1000.0, 1000.0
    out, pull_back = jax.vjp(lambda g, u: gated(g, u, activation, implementation=form), *map(jnp.asarray, (gate, up)))
    for found, wanted in zip((out, *pull_back(jnp.asarray(d_out))), in_float64(gate, up, d_out, activation)):
        # A slope near its zero is a difference of numbers of order 1.
        np.testing.assert_allclose(found, wanted, rtol=5e-6, atol=2e-6 * np.abs(up * d_out).max())


@COMPILED
def test_what_is_not_a_number_stays_where_it_is():
    gate = jnp.ones(64).at[5].set(jnp.nan)
    out = np.asarray(gated(gate, jnp.ones(64), "silu", implementation="cpu"))
    assert np.isnan(out[5]) and np.isfinite(np.delete(out, 5)).all()


def test_what_does_not_fit_is_refused_in_a_line():
    with pytest.raises(ValueError, match=r"gate \(2,\) and up \(3,\)"):
        gated(jnp.zeros(2), jnp.zeros(3), "silu")
    with pytest.raises(ValueError, match="found activation 'relu', expected one of silu, gelu_tanh"):
        gated(jnp.zeros(2), jnp.zeros(2), "relu")
    with pytest.raises(ValueError, match="expected float32, a multiple of 16"):
        gated(jnp.zeros(5), jnp.zeros(5), "silu", implementation="cpu")
    assert gated(jnp.zeros(5, jnp.bfloat16), jnp.ones(5, jnp.bfloat16), "silu").dtype == jnp.bfloat16
