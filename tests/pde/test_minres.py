"""MINRES against SciPy's, iteration by iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse import linalg

from jaxstack.pde.minres import StopReason, minres


def symmetric(eigenvalues: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix with these eigenvalues, and its eigenvectors."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2, q


def scipy_solve(a: np.ndarray, b: np.ndarray, rtol: float, maxiter: int | None = None) -> tuple[np.ndarray, int, int]:
    products = 0

    def multiply(v):
        nonlocal products
        products += 1
        return a @ v

    operator = linalg.LinearOperator(a.shape, matvec=multiply, dtype=a.dtype)
    x, info = linalg.minres(operator, b, rtol=rtol, maxiter=maxiter)
    return x, products, info


@jax.jit
def solve(a, b, rtol):
    return minres(lambda v: a @ v, b, rtol=rtol)


SPECTRA = {
    "1e2": (np.geomspace(1, 1e2, 60), 1e-4),
    "1e6": (np.geomspace(1, 1e6, 60), 1e-3),
    "1e10": (np.geomspace(1, 1e10, 60), 1e-3),
    "indefinite": (np.concatenate([-np.geomspace(1, 50, 30), np.geomspace(0.5, 1e3, 30)]), 1e-2),
    "inconsistent": (np.concatenate([np.zeros(20), np.geomspace(1, 1e3, 40)]), 1e-3),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_the_same_iterates_as_scipy(float64, name):
    # Tolerances at which a solve ends before rounding has been amplified: then the two agree to many digits.
    eigenvalues, rtol = SPECTRA[name]
    a, _ = symmetric(eigenvalues)
    b = np.random.default_rng(1).normal(size=60)
    expected, iterations, _ = scipy_solve(a, b, rtol)
    found = solve(jnp.asarray(a), jnp.asarray(b), rtol)
    assert int(found.iterations) == iterations > 5
    assert np.linalg.norm(found.x - expected) < 1e-5 * np.linalg.norm(expected)
    assert float(found.residual_norm) == pytest.approx(np.linalg.norm(b - a @ expected), rel=1e-6)


@pytest.mark.parametrize("name", ["1e2", "indefinite"])
def test_a_tight_tolerance_gives_the_solution(float64, name):
    a, _ = symmetric(SPECTRA[name][0])
    b = np.random.default_rng(1).normal(size=60)
    found = solve(jnp.asarray(a), jnp.asarray(b), 1e-14)
    exact = np.linalg.solve(a, b)
    assert np.linalg.norm(found.x - exact) < 1e-6 * np.linalg.norm(exact)


def test_a_singular_consistent_system_has_its_minimum_norm_solution(float64):
    eigenvalues = np.concatenate([np.zeros(10), np.linspace(1, 30, 30)])
    a, _ = symmetric(eigenvalues)
    b = a @ np.random.default_rng(2).normal(size=40)
    found = solve(jnp.asarray(a), jnp.asarray(b), 1e-12)
    np.testing.assert_allclose(found.x, np.linalg.pinv(a, rcond=1e-10) @ b, atol=1e-8)
    assert float(found.residual_norm) < 1e-8


def test_an_inconsistent_system_ends_with_least_squares(float64):
    a, q = symmetric(np.concatenate([np.zeros(10), np.linspace(1, 30, 30)]))
    b = np.random.default_rng(1).normal(size=40)
    found = solve(jnp.asarray(a), jnp.asarray(b), 1e-4)
    assert int(found.stop_reason) == StopReason.LEAST_SQUARES
    # What no x can explain is b's part in the null space.
    assert float(found.residual_norm) == pytest.approx(np.linalg.norm(q[:, :10].T @ b), rel=1e-6)


def test_the_iteration_limit_is_obeyed_and_told(float64):
    a, _ = symmetric(np.geomspace(1, 1e6, 60))
    b = np.random.default_rng(1).normal(size=60)
    expected, _, info = scipy_solve(a, b, 1e-12, maxiter=7)
    assert info == 7
    found = minres(lambda v: jnp.asarray(a) @ v, jnp.asarray(b), rtol=1e-12, max_iterations=7)
    assert int(found.iterations) == 7 and int(found.stop_reason) == StopReason.ITERATION_LIMIT
    np.testing.assert_allclose(found.x, expected, rtol=1e-8)


def test_min_iterations_put_off_the_tests_against_rtol(float64):
    a, _ = symmetric(np.geomspace(1, 1e2, 60))
    b = np.random.default_rng(1).normal(size=60)
    matvec = lambda v: jnp.asarray(a) @ v  # noqa: E731
    assert int(minres(matvec, jnp.asarray(b), rtol=0.5).iterations) < 9
    assert int(minres(matvec, jnp.asarray(b), rtol=0.5, min_iterations=9).iterations) == 9


def test_damping_is_added_to_the_diagonal(float64):
    a, _ = symmetric(np.linspace(0, 30, 40))
    b = np.random.default_rng(3).normal(size=40)
    found = minres(lambda v: jnp.asarray(a) @ v, jnp.asarray(b), rtol=1e-13, damping=0.5)
    np.testing.assert_allclose(found.x, np.linalg.solve(a + 0.5 * np.eye(40), b), rtol=1e-8)


def test_the_ends_that_are_no_solve(float64):
    identity = lambda v: 3.0 * v  # noqa: E731
    zero = minres(identity, jnp.zeros(5))
    assert int(zero.iterations) == 0 and int(zero.stop_reason) == StopReason.ZERO_RIGHT_SIDE and not zero.x.any()
    one = minres(identity, jnp.arange(5.0))
    assert int(one.iterations) == 1 and int(one.stop_reason) == StopReason.EIGENVECTOR
    np.testing.assert_allclose(one.x, np.arange(5.0) / 3)
    broken = minres(lambda v: v * jnp.nan, jnp.arange(5.0))
    assert int(broken.stop_reason) == StopReason.NOT_FINITE and not broken.x.any()
    assert int(minres(identity, jnp.full(5, jnp.inf)).stop_reason) == StopReason.NOT_FINITE


def test_float32_stops_where_scipy_in_float32_stops():
    a, _ = symmetric(np.geomspace(1e-4, 1, 50))
    a32, b32 = a.astype(np.float32), np.random.default_rng(4).normal(size=50).astype(np.float32)
    _, iterations, _ = scipy_solve(a32, b32, 1e-4)
    assert abs(int(solve(jnp.asarray(a32), jnp.asarray(b32), 1e-4).iterations) - iterations) <= 1
