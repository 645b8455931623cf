"""Reference solutions: orders of convergence and known maps."""

import numpy as np
import pytest

from jaxstack.pde.references import gaussian_map, implicit_euler_1d, implicit_euler_2d, increasing_map, mixture_cdf


def start_1d(nodes: int) -> np.ndarray:
    wave = np.cos(np.pi * (np.linspace(0, 2, nodes) - 1))
    return (1 - wave) * wave


def solve_1d(nodes: int) -> np.ndarray:
    # A diffusion at which the grid's error shows.
    return implicit_euler_1d(start_1d(nodes), length=2.0, diffusion=1.0, rate=10.0, step=0.02, steps=2)[-1]


def test_halving_the_grid_quarters_the_error():
    fine = solve_1d(641)
    coarse, half = (np.abs(solve_1d(n) - fine[:: 640 // (n - 1)]).max() for n in (41, 81))
    assert coarse / half == pytest.approx(4, abs=0.3)


def test_two_dimensions_agree_with_one_where_nothing_depends_on_the_second():
    flat = np.repeat(start_1d(41)[:, None], 41, axis=1)
    found = implicit_euler_2d(flat, length=2.0, diffusion=1.0, rate=10.0, step=0.02, steps=2)
    np.testing.assert_allclose(found[-1], np.repeat(solve_1d(41)[:, None], 41, axis=1), atol=1e-9)


def test_one_step_satisfies_its_equation():
    n, step, rate, diffusion = 31, 0.1, 10.0, 0.1
    grid = np.linspace(0, 2, n)
    x, y = np.meshgrid(grid, grid, indexing="ij")
    start = np.tanh((0.5 - np.hypot(x - 1, y - 1)) / 0.1)
    u = implicit_euler_2d(start, length=2.0, diffusion=diffusion, rate=rate, step=step, steps=1)[0]
    padded = np.pad(u, 1, mode="reflect")
    laplacian = (
        padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2] - 4 * u
    ) * ((n - 1) / 2) ** 2  # fmt: skip
    residual = u + step * rate * (u**3 - u) - step * diffusion * laplacian - start
    assert np.abs(residual).max() < 1e-9


def test_the_increasing_map_carries_one_distribution_to_the_other():
    target = mixture_cdf([2 / 3, 1 / 3], [-1.0, 1.0], [0.5, 0.5])
    source = mixture_cdf([1.0], [0.0], [1.0])
    x = np.linspace(-3, 3, 50)
    image = increasing_map(source, target, x)
    np.testing.assert_allclose(target(image), source(x), atol=1e-12)
    assert (np.diff(image) > 0).all()


def test_the_gaussian_map_is_symmetric_positive_and_right():
    source, target = np.eye(5), np.eye(5)
    source[0, 0] = 0.25
    target[1, 1] = 0.25
    target[3:, 3:] = [[5 / 8, 3 / 8], [3 / 8, 5 / 8]]
    a = gaussian_map(source, target)
    np.testing.assert_allclose(a @ source @ a.T, target, atol=1e-12)
    expected = np.diag([2, 0.5, 1, 0, 0]).astype(float)
    expected[3:, 3:] = [[3 / 4, 1 / 4], [1 / 4, 3 / 4]]
    np.testing.assert_allclose(a, expected, atol=1e-12)
    rng = np.random.default_rng(0)
    s0, s1 = (m @ m.T + np.eye(4) for m in rng.normal(size=(2, 4, 4)))
    a = gaussian_map(s0, s1)
    np.testing.assert_allclose(a @ s0 @ a.T, s1, atol=1e-10)
    assert np.linalg.eigvalsh(a).min() > 0
