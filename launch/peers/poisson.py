"""Poisson's equation as the peers' programs know it: -Delta u = f on the unit cube, u = sum_k sin(pi x_k / 2), which is
also the boundary's value. And how a solution is judged.

Imported by a peer's program as its neighbour, under its own interpreter: numpy alone. `sin` is that of the arrays.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def exact(x: Any, sin: Callable[[Any], Any] = np.sin) -> Any:
    """u at points (points, dim), as a column."""
    return sin(x * (math.pi / 2)).sum(axis=-1)[:, None]


def source(x: Any, sin: Callable[[Any], Any] = np.sin) -> Any:
    """f at points, as a column."""
    return (math.pi**2 / 4) * exact(x, sin)


def residual(x: Any, laplacian: Any, sin: Callable[[Any], Any] = np.sin) -> Any:
    """-Delta u - f, as a column."""
    return -laplacian - source(x, sin)


def centred_error(found: np.ndarray, value: np.ndarray) -> float:
    """RMS(found - value) over the standard deviation of the values: the best constant has 1."""
    gap = np.ravel(found).astype(np.float64) - np.ravel(value)
    return float(np.sqrt(np.mean(gap**2)) / np.std(np.ravel(value).astype(np.float64)))
