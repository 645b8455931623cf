"""The method where theory is exact: u and phi range over one space of sines, means are exact, solves are tight.

Each mode's error then obeys the two-term recursion of `npdg.convergence_factor`; whoever runs this measures the rate of
the real iteration, not of a model of it. Meant for float64 (`jax.enable_x64`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxstack.pde.domains import BoundaryPoints, Box, Cutoff
from jaxstack.pde.npdg import Npdg, NpdgConfig
from jaxstack.pde.problem import Problem


@dataclasses.dataclass(frozen=True)
class SineBasis:
    """Sines on [0, 1] in the place of a network."""

    modes: int
    dim: int = 1

    def init(self, key: PRNGKeyArray) -> Float[Array, " modes"]:
        """Smooth random coefficients."""
        return jax.random.normal(key, (self.modes,)) / (1 + jnp.arange(self.modes))

    def __call__(self, flat: Float[Array, " modes"], x: Float[Array, "points 1"]) -> Float[Array, " points"]:
        return jnp.sin(jnp.pi * jnp.arange(1, self.modes + 1) * x) @ flat


@dataclasses.dataclass(frozen=True)
class MidpointInterval(Box):
    """[0, 1] sampled at midpoints, on which these sines' means are exact; they vanish at the ends without a cutoff."""

    def sample_interior(self, key: PRNGKeyArray, n: int) -> Float[Array, "{n} dim"]:
        return ((jnp.arange(n) + 0.5) / n)[:, None]

    def sample_boundary(self, key: PRNGKeyArray, n: int) -> BoundaryPoints:
        return BoundaryPoints(jnp.asarray([[0.0], [1.0]]), jnp.asarray([[-1.0], [1.0]]))

    def cutoff(self, x: Float[Array, " dim"], kind: Cutoff = "harmonic") -> Float[Array, ""]:
        return jnp.ones((), x.dtype)


EXACT = (0.7, -0.4, 0.3, 0.2, -0.1)
"""Coefficients of the solution of -u'' = f."""


def linear_solver(**settings: Any) -> Npdg:
    """The method on -u'' = f in the space of the first five sines.

    Args:
      settings: fields of `NpdgConfig`; not validated, so that what happens past the stability limit can be seen.
    """
    k = jnp.arange(1, len(EXACT) + 1)
    coefficients = jnp.asarray(EXACT) * (jnp.pi * k) ** 2
    problem = Problem(MidpointInterval(0.0, 1.0, 1), source=lambda x: jnp.sin(jnp.pi * k * x[0]) @ coefficients)
    config = NpdgConfig(minres_rtol=1e-14, interior_samples=64, boundary_samples=2, depth=3, width=2, psi_width=2)
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    solver = Npdg(problem, config)
    basis: Any = SineBasis(len(EXACT))
    solver.u = solver.phi = solver.psi = basis
    return solver


def trajectories(
    solver: Npdg, iterations: int, *, seed: int = 0
) -> tuple[Float[np.ndarray, "iterations modes"], Float[np.ndarray, "iterations modes"]]:
    """Errors of u's coefficients and coefficients of phi: at the start and after each iteration."""

    @jax.jit
    def run(key: Array) -> tuple[Array, Array]:
        def step(state: Any, _: None) -> tuple[Any, tuple[Array, Array]]:
            new, _report = solver.step(state)
            return new, (new.theta, new.eta)

        first = solver.init(key)
        _, (theta, eta) = jax.lax.scan(step, first, length=iterations)
        return jnp.concatenate([first.theta[None], theta]), jnp.concatenate([first.eta[None], eta])

    theta, eta = run(jax.random.key(seed))
    return np.asarray(theta) - np.asarray(EXACT), np.asarray(eta)


def measured_factor(tau_u: float, tau_phi: float, omega: float = 1.0, epsilon: float = 1.0) -> float:
    """The fitted decay of the error over 400 iterations, less a start."""
    with jax.enable_x64(True):
        solver = linear_solver(tau_u=tau_u, tau_phi=tau_phi, tau_psi=tau_phi, omega=omega, epsilon=epsilon)
        errors, tests = trajectories(solver, 400)
    size = np.linalg.norm(np.concatenate([errors, tests], axis=1), axis=1)
    fitted = (np.arange(len(size)) >= 40) & (size > 1e-11)
    return float(np.exp(np.polyfit(np.arange(len(size))[fitted], np.log(size[fitted]), 1)[0]))
