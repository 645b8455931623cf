"""low_rank_add: every form against float64; in place, and yet never seen by who still reads the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.low_rank_add import cpu, low_rank_add

COMPILED = pytest.mark.skipif(
    bool(cpu.refuses(jnp.zeros((1, 16)), jnp.zeros((1, 1)), jnp.zeros((1, 16)))), reason="no C++ compiler"
)
FORMS = ["ref", "xla", pytest.param("cpu", marks=COMPILED)]


def draw(rows: int, width: int, rank: int):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s, dtype=np.float32) for s in ((rows, width), (rows, rank), (rank, width))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows, width, rank", [(1, 16, 1), (5, 80, 3), (6, 64, 16), (61, 912, 17), (40, 4864, 8)])
def test_against_float64(form, rows, width, rank):
    base, low, b = draw(rows, width, rank)
    found = jax.jit(lambda *a: low_rank_add(*a, implementation=form))(base, low, b)
    np.testing.assert_allclose(found, base + low.astype(np.float64) @ b, rtol=2e-6, atol=5e-6)


@COMPILED
def test_the_base_is_left_alone_where_it_is_read_again():
    base, low, b = map(jnp.asarray, draw(7, 32, 4))

    @jax.jit
    def both(base, low, b):
        doubled = 2 * base
        return low_rank_add(doubled, low, b, implementation="cpu"), doubled

    found, doubled = both(base, low, b)
    np.testing.assert_array_equal(doubled, 2 * base)
    np.testing.assert_allclose(found, 2 * base + low @ b, atol=1e-5)


def test_what_does_not_fit_is_refused_in_a_line():
    base, low, b = map(jnp.asarray, draw(4, 16, 2))
    with pytest.raises(ValueError, match=r"base \(4, 16\), low \(4, 2\) and b \(2, 8\) do not fit"):
        low_rank_add(base, low, b[:, :8])
    with pytest.raises(ValueError, match="expected float32, a multiple of 16"):
        low_rank_add(base[:, :8], low, b[:, :8], implementation="cpu")
