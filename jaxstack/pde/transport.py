"""The Monge-Ampere equation det(D^2 u) rho1(grad u) = rho0 as optimal transport of rho0 to rho1 at quadratic cost.

The map T = grad u and a potential phi play

    inf_T sup_phi  1/2 E_rho0 |T(x) - x|^2 + E_rho0 phi(T(x)) - E_rho1 phi(y),

without a boundary and without regularisation; T's metric is L2(rho0), phi's that of gradients under rho1 or, once T is
near, under T's image of rho0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxstack.pde.gram import Linearized
from jaxstack.pde.minres import StopReason
from jaxstack.pde.networks import ACTIVATIONS, Mlp, value_and_gradient
from jaxstack.pde.npdg import convergence_factor, suggest_steps
from jaxstack.pde.references import gaussian_map, increasing_map, mixture_cdf
from jaxstack.runtime.errors import UserError

Sampler = Callable[[PRNGKeyArray, int], Float[Array, "points dim"]]


@dataclasses.dataclass(frozen=True)
class OptimalTransport:
    """Two distributions given by samplers.

    Attributes:
      sample_source, sample_target: (key, n) -> n points, for the inside of a compiled step.
      dim: of the space.
      exact_map: points -> points, where the optimal map is known.
      name: for reports.
    """

    sample_source: Sampler
    sample_target: Sampler
    dim: int
    exact_map: Callable[[Float[np.ndarray, "points dim"]], Float[np.ndarray, "points dim"]] | None = None
    name: str = "transport"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"transport dim={self.dim}: expected at least 1")
        for name in ("sample_source", "sample_target"):
            sampler = getattr(self, name)
            shape = jax.eval_shape(lambda k, f=sampler: f(k, 7), jax.random.key(0)).shape
            if shape != (7, self.dim):
                raise UserError(f"{name} returns shape {shape} for 7 points, expected (7, {self.dim})")

    @property
    def exact(self) -> Any:
        return self.exact_map

    def check_values(self, seed: int = 0, points: int = 256) -> None:
        """Draws from both samplers.

        Raises:
          UserError: points that are not finite.
        """
        for name in ("sample_source", "sample_target"):
            if not np.isfinite(getattr(self, name)(jax.random.key(seed), points)).all():
                raise UserError(f"{name} returns points that are not finite")


@dataclasses.dataclass(frozen=True)
class TransportConfig:
    """Settings, as in `NpdgConfig`.

    Attributes:
      tau_map, tau_phi: step sizes. omega: extrapolation.
      metric: of phi: "nabla", or "identity" for comparison.
      image_after: iterations after which phi's metric is taken under T's image of the source; None for never.
      samples: of each distribution in an iteration.
    """

    tau_map: float = 0.1
    tau_phi: float = 0.15
    omega: float = 1.0
    metric: Literal["nabla", "identity"] = "nabla"
    image_after: int | None = None
    samples: int = 1000
    minres_rtol: float = 1e-3
    minres_max_iterations: int = 200
    width: int = 50
    depth: int = 3
    activation: str = "softplus"

    def __post_init__(self) -> None:
        for name in ("tau_map", "tau_phi", "samples", "minres_rtol", "minres_max_iterations", "width"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name}={value}: expected a finite number above 0")
        if self.metric not in ("nabla", "identity"):
            raise UserError(f"metric={self.metric!r}: expected nabla or identity")
        if self.depth < 2 or self.activation not in ACTIVATIONS:
            raise UserError(
                f"depth={self.depth}, activation={self.activation!r}: expected at least 2 layers, and one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        factor = convergence_factor(self.tau_map, self.tau_phi, self.omega, 0.0)
        if factor >= 1:
            tau, _ = suggest_steps(self.omega, 0.0)
            raise UserError(
                f"tau_map={self.tau_map:g}, tau_phi={self.tau_phi:g}, omega={self.omega:g}: each iteration multiplies "
                f"errors by {factor:.4g}, expected below 1; for instance {tau:g} for both"
            )


class TransportState(NamedTuple):
    """Parameters of the map (theta) and of the potential (eta)."""

    theta: Float[Array, " map_parameters"]
    eta: Float[Array, " phi_parameters"]
    iteration: Int[Array, ""]
    rejected_in_row: Int[Array, ""]
    key: Array


class TransportReport(NamedTuple):
    """`loss` is the saddle function; players in the order phi, map; `misfit` is the RMS length of T(x) - x."""

    loss: Float[Array, ""]
    misfit: Float[Array, ""]
    minres_iterations: Int[Array, " players"]
    stop_reasons: Int[Array, " players"]
    accepted: Bool[Array, ""]


class Transport:
    """The primal-dual method on a transport problem."""

    name = "transport"

    def __init__(self, problem: OptimalTransport, config: TransportConfig | None = None):
        self.problem, self.config = problem, config or TransportConfig()
        c, dim = self.config, problem.dim
        self.u = Mlp.of(dim, c.width, c.depth, outputs=dim, activation=c.activation, last_bias=True, skip=True)
        self.phi = Mlp.of(dim, c.width, c.depth, activation=c.activation)

    def init(self, key: PRNGKeyArray, theta: Float[Array, " parameters"] | None = None) -> TransportState:
        """The first state; `theta` are parameters of the map to start from."""
        first, second, samples = jax.random.split(key, 3)
        theta = self.u.init(first) if theta is None else jnp.array(theta)
        zero = jnp.zeros((), jnp.int32)
        return TransportState(theta, self.phi.init(second), zero, zero, jax.random.key_data(samples))

    def step(self, state: TransportState) -> tuple[TransportState, TransportReport]:
        """One iteration."""
        config, problem = self.config, self.problem
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.iteration)
        source, target = jax.random.split(key)
        x = problem.sample_source(source, config.samples)
        y = problem.sample_target(target, config.samples)
        solver: dict[str, Any] = {"rtol": config.minres_rtol, "max_iterations": config.minres_max_iterations}

        mapping = Linearized(lambda p: self.u(p, x), state.theta)
        image = mapping.fields
        # A value and not a branch: where phi's metric is taken changes during a run, and nothing is compiled for it.
        late = jnp.inf if config.image_after is None else config.image_after
        places = jnp.where(state.iteration >= late, image, y)

        def potential(p: Array) -> tuple[Array, Array, Array]:
            """phi on the image and on the target, and what its metric squares."""
            on_image, on_target = self.phi(p, image), self.phi(p, y)
            if config.metric == "identity":
                return on_image, on_target, self.phi(p, places)
            return on_image, on_target, value_and_gradient(lambda z: self.phi(p, z), places)[1]

        phi = Linearized(potential, state.eta)
        gradient = phi.gradient(lambda f: jnp.mean(f[0]) - jnp.mean(f[1]))
        phi_solve = phi.natural_gradient(gradient, lambda f: 0.5 * jnp.sum(f[2] ** 2) / config.samples, **solver)
        eta = state.eta + config.tau_phi * phi_solve.x

        slope = lambda p: value_and_gradient(lambda z: self.phi(p, z), image)[1]  # noqa: E731
        new, old = slope(eta), slope(state.eta)
        ahead = new + config.omega * (new - old)
        gradient = mapping.gradient(lambda t: jnp.mean(jnp.sum(0.5 * (t - x) ** 2 + ahead * t, axis=1)))
        map_solve = mapping.natural_gradient(gradient, lambda t: 0.5 * jnp.sum(t**2) / config.samples, **solver)
        theta = state.theta - config.tau_map * map_solve.x

        reasons = jnp.stack([phi_solve.stop_reason, map_solve.stop_reason])
        accepted = jnp.all(jnp.isfinite(theta)) & jnp.all(jnp.isfinite(eta)) & jnp.all(reasons != StopReason.NOT_FINITE)
        cost = jnp.mean(jnp.sum((image - x) ** 2, axis=1))
        report = TransportReport(
            loss=0.5 * cost + jnp.mean(phi.fields[0]) - jnp.mean(phi.fields[1]),
            misfit=jnp.sqrt(cost),
            minres_iterations=jnp.stack([phi_solve.iterations, map_solve.iterations]),
            stop_reasons=reasons,
            accepted=accepted,
        )
        return TransportState(
            theta=jnp.where(accepted, theta, state.theta),
            eta=jnp.where(accepted, eta, state.eta),
            iteration=state.iteration + 1,
            rejected_in_row=jnp.where(accepted, 0, state.rejected_in_row + 1),
            key=state.key,
        ), report

    # ------------------------------------------------------------------------------------------------ how good it is

    def evaluator(self) -> Callable[[Array], dict[str, Array]]:
        """parameters -> errors on held-out points: `c_l2` against the exact map where it is known, the sliced
        Wasserstein distance between T's image and the target, and the share of pairs that T turns around.
        """
        problem = self.problem
        first, second, third = jax.random.split(jax.random.key(20_240), 3)
        x, y = problem.sample_source(first, 4000), problem.sample_target(second, 4000)
        directions = jax.random.normal(third, (problem.dim, 64))
        directions = directions / jnp.linalg.norm(directions, axis=0)
        target_sorted = jnp.sort(y @ directions, axis=0)
        exact = None if problem.exact_map is None else jnp.asarray(problem.exact_map(np.asarray(x, float)), x.dtype)

        def evaluate(theta: Array) -> dict[str, Array]:
            image = self.u(theta, x)
            found = {
                "sliced_w2": jnp.sqrt(jnp.mean((jnp.sort(image @ directions, axis=0) - target_sorted) ** 2)),
                "turned_pairs": jnp.mean(jnp.sum((image[::2] - image[1::2]) * (x[::2] - x[1::2]), axis=1) < 0),
            }
            if exact is not None:
                square = jnp.sum((image - exact) ** 2, axis=1)
                found["map_rms"] = jnp.sqrt(jnp.mean(square))
                spread = jnp.mean(jnp.sum((exact - exact.mean(axis=0)) ** 2, axis=1))
                found["c_l2"] = found["map_rms"] / jnp.sqrt(spread)
            return found

        return evaluate


# The paper's problems.


def mixture_1d() -> OptimalTransport:
    """N(0, 1) to 2/3 N(-1, 1/4) + 1/3 N(1, 1/4) on the line; the map is that of distribution functions."""
    weights, means, deviations = [2 / 3, 1 / 3], [-1.0, 1.0], [0.5, 0.5]
    source, target = mixture_cdf([1.0], [0.0], [1.0]), mixture_cdf(weights, means, deviations)

    def sample_target(key: PRNGKeyArray, n: int) -> Array:
        which, noise = jax.random.split(key)
        left = jax.random.uniform(which, (n, 1)) < weights[0]
        return jnp.where(left, means[0], means[1]) + deviations[0] * jax.random.normal(noise, (n, 1))

    return OptimalTransport(
        lambda key, n: jax.random.normal(key, (n, 1)),
        sample_target,
        1,
        lambda x: increasing_map(source, target, x[:, 0])[:, None],
        "transport-mixture-1",
    )


def gaussians(dim: int = 5) -> OptimalTransport:
    """Two Gaussians that differ in the first five coordinates: S0 = diag(1/4, 1, 1, 1, 1); S1 = 1 but for S1[1, 1] =
    1/4 and the block [[5/8, 3/8], [3/8, 5/8]] in coordinates 3 and 4 (counted from 0).

    Raises:
      UserError: fewer than five dimensions.
    """
    if dim < 5:
        raise UserError(f"gaussians dim={dim}: expected at least 5")
    source, target = np.eye(dim), np.eye(dim)
    source[0, 0] = 0.25
    target[1, 1] = 0.25
    target[3:5, 3:5] = [[5 / 8, 3 / 8], [3 / 8, 5 / 8]]
    matrix = gaussian_map(source, target)
    roots = [np.linalg.cholesky(s) for s in (source, target)]

    def sampler(root: np.ndarray) -> Sampler:
        return lambda key, n: jax.random.normal(key, (n, dim)) @ jnp.asarray(root.T)

    return OptimalTransport(
        sampler(roots[0]), sampler(roots[1]), dim, lambda x: x @ matrix.T, f"transport-gaussians-{dim}"
    )


CIRCLE = (10, 20)
"""Coordinates of the plane of `circle_mixture`'s modes."""


def circle_mixture(dim: int = 50) -> OptimalTransport:
    """A standard Gaussian to eight Gaussians of deviation 0.4 on a circle of radius 3 in coordinates 10 and 20, with
    weights 0.05 and 0.2 in turn. No map is known.

    Raises:
      UserError: 20 or fewer dimensions.
    """
    if dim <= max(CIRCLE):
        raise UserError(f"circle_mixture dim={dim}: expected at least {max(CIRCLE) + 1}")
    centers = np.zeros((8, dim))
    angles = np.arange(8) * np.pi / 4
    centers[:, CIRCLE[0]], centers[:, CIRCLE[1]] = 3 * np.cos(angles), 3 * np.sin(angles)
    weights = np.tile([0.05, 0.2], 4)

    def sample_target(key: PRNGKeyArray, n: int) -> Array:
        which, noise = jax.random.split(key)
        mode = jax.random.choice(which, 8, (n,), p=jnp.asarray(weights / weights.sum()))
        return jnp.asarray(centers)[mode] + 0.4 * jax.random.normal(noise, (n, dim))

    return OptimalTransport(
        lambda key, n: jax.random.normal(key, (n, dim)), sample_target, dim, None, f"transport-circle-{dim}"
    )


def mode_weights(points: Float[np.ndarray, "points dim"]) -> Float[np.ndarray, " 8"]:
    """The share of points nearest to each of `circle_mixture`'s modes."""
    angles = np.arctan2(points[:, CIRCLE[1]], points[:, CIRCLE[0]])
    nearest = np.round(angles / (np.pi / 4)).astype(int) % 8
    return np.bincount(nearest, minlength=8) / len(points)
