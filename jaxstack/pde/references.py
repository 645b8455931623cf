"""Reference solutions that are not formulas: implicit Euler on grids, and optimal maps from distribution functions.

NumPy and float64 throughout: what others are measured against.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy import fft, linalg, special

from jaxstack.runtime.errors import UserError

Nodes1 = Float[np.ndarray, " nodes"]
Nodes2 = Float[np.ndarray, "nodes nodes"]


def implicit_euler_1d(
    initial: Nodes1, *, length: float, diffusion: float, rate: float, step: float, steps: int
) -> Float[np.ndarray, "steps nodes"]:
    """u_t = diffusion u_xx - rate (u^3 - u) without flux through the ends, by Newton's method on second differences.

    Args:
      initial: u at equally spaced nodes, both ends included.
      length: of the interval.
      diffusion, rate: coefficients.
      step, steps: of time.
    """
    n = len(initial)
    d = diffusion * step * ((n - 1) / length) ** 2
    # Rows: the diagonals above, on and below; a mirrored node beyond each end doubles its neighbour's weight.
    bands = np.zeros((3, n))
    bands[0, 1:] = bands[2, :-1] = -d
    bands[0, 1] = bands[2, n - 2] = -2 * d
    found, u = [], np.array(initial, float)
    for _ in range(steps):
        previous = u.copy()
        for _ in range(50):
            curvature = -2 * u
            curvature[1:-1] += u[:-2] + u[2:]
            curvature[0] += 2 * u[1]
            curvature[-1] += 2 * u[-2]
            residual = u + step * rate * (u**3 - u) - d * curvature - previous
            bands[1] = 1 + step * rate * (3 * u**2 - 1) + 2 * d
            change = linalg.solve_banded((1, 1), bands, residual)
            u = u - change
            if np.abs(change).max() < 1e-13:
                break
        found.append(u.copy())
    return np.stack(found)


def implicit_euler_2d(
    initial: Nodes2, *, length: float, diffusion: float, rate: float, step: float, steps: int
) -> Float[np.ndarray, "steps nodes nodes"]:
    """The same on a square: the linear part, shifted by W'' = 2, is inverted by cosine transforms, and the rest
    iterated.

    Raises:
      UserError: the iteration does not converge (a step too long for it).
    """
    n = initial.shape[0]
    angle = np.pi * np.arange(n) / (n - 1)
    eigenvalues = (2 - 2 * np.cos(angle)) * ((n - 1) / length) ** 2
    shift = 2 * step * rate
    symbol = 1 + shift + step * diffusion * (eigenvalues[:, None] + eigenvalues[None, :])
    found, u = [], np.array(initial, float)
    for _ in range(steps):
        previous = u.copy()
        for _ in range(5000):
            right = previous - step * rate * (u**3 - u) + shift * u
            new = fft.idctn(fft.dctn(right, type=1) / symbol, type=1)
            gap = np.abs(new - u).max()
            u = new
            if gap < 1e-12:
                break
        else:
            raise UserError(f"implicit_euler_2d: step={step:g} with rate={rate:g} does not converge")
        found.append(u.copy())
    return np.stack(found)


def increasing_map(
    source_cdf: Callable[[np.ndarray], np.ndarray],
    target_cdf: Callable[[np.ndarray], np.ndarray],
    x: Nodes1,
    *,
    low: float = -50.0,
    high: float = 50.0,
) -> Nodes1:
    """The optimal map between two distributions on the line, F1^-1(F0(x)), by bisection between `low` and `high`."""
    level = source_cdf(np.asarray(x, float))
    a, b = np.full_like(level, low), np.full_like(level, high)
    for _ in range(200):
        middle = (a + b) / 2
        below = target_cdf(middle) < level
        a, b = np.where(below, middle, a), np.where(below, b, middle)
    return (a + b) / 2


def mixture_cdf(
    weights: list[float], means: list[float], deviations: list[float]
) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of a mixture of Gaussians on the line."""

    def cdf(x: np.ndarray) -> np.ndarray:
        return sum(w * special.ndtr((np.asarray(x) - m) / s) for w, m, s in zip(weights, means, deviations))  # type: ignore[return-value]

    return cdf


def gaussian_map(source: Float[np.ndarray, "d d"], target: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The matrix of the optimal map between centred Gaussians, S0^-1/2 (S0^1/2 S1 S0^1/2)^1/2 S0^-1/2."""
    root = _power(source, 0.5)
    inverse = _power(source, -0.5)
    return inverse @ _power(root @ target @ root, 0.5) @ inverse


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T
