"""Methods that Adam trains: physics-informed networks (PINN), the deep Ritz method, weak adversarial networks (WAN)."""

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxstack.pde.forms import Form, Samples, apply_coefficient
from jaxstack.pde.network_config import NetworkConfig
from jaxstack.pde.networks import value_and_gradient
from jaxstack.pde.problem import Problem
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(NetworkConfig):
    """Settings of the methods that descend a loss; `NetworkConfig` has those of the network.

    Attributes:
      learning_rate: Adam's; with `decay_steps` it falls to zero over so many iterations along a cosine.
      boundary_weight: lam, of the mean squared boundary misfit.
      interior_samples, boundary_samples: fresh in every iteration.
      test_steps: WAN's steps of the test function in an iteration.
      test_learning_rate: of the test function; `learning_rate` by default.
    """

    learning_rate: float = 1e-3
    decay_steps: int | None = None
    boundary_weight: float = 100.0
    interior_samples: int = 400
    boundary_samples: int = 200
    test_steps: int = 1
    test_learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("learning_rate", "boundary_weight", "interior_samples", "boundary_samples", "test_steps"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name}={value}: expected a finite number above 0")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise UserError(f"decay_steps={self.decay_steps}: expected at least 1, or none")

    def adam(self, rate: float | None = None) -> optax.GradientTransformation:
        """Adam as in the paper's comparison, with betas 0.9 and 0.99."""
        rate = self.learning_rate if rate is None else rate
        schedule = rate if self.decay_steps is None else optax.cosine_decay_schedule(rate, self.decay_steps)
        return optax.adam(schedule, b1=0.9, b2=0.99)


class LossReport(NamedTuple):
    """What an iteration saw and whether its outcome was taken (it was finite)."""

    loss: Float[Array, ""]
    accepted: Bool[Array, ""]


class AdamState(NamedTuple):
    theta: Float[Array, " parameters"]
    moments: Any
    iteration: Int[Array, ""]
    rejected_in_row: Int[Array, ""]
    key: Array


class Trained(abc.ABC):
    """A network trained on fresh samples in every iteration."""

    name = "descent"
    needs_strong = True

    def __init__(self, problem: Problem, config: TrainConfig | None = None):
        self.problem, self.config = problem, config or TrainConfig()
        self.u = self.config.network(problem)
        self.form = Form(problem, boundary_weight=self.config.boundary_weight)
        self._optimizer = self.config.adam()

    def sample(self, key: Array, iteration: Int[Array, ""]) -> Samples:
        """The samples of an iteration."""
        key = jax.random.fold_in(jax.random.wrap_key_data(key), iteration)
        config = self.config
        return self.form.samples(key, config.interior_samples, config.boundary_samples, strong=self.needs_strong)

    def boundary_loss(self, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, ""]:
        """lam times the mean squared misfit."""
        if not self.form.has_edge:
            return jnp.zeros(())
        return self.config.boundary_weight * jnp.mean(self.form.net_misfit(self.u, theta, samples) ** 2)

    def init(self, key: PRNGKeyArray, theta: Float[Array, " parameters"] | None = None) -> Any:
        """The first state; `theta` are parameters to start from."""
        network, samples = jax.random.split(key)
        theta = self.u.init(network) if theta is None else jnp.array(theta)
        zero = jnp.zeros((), jnp.int32)
        return AdamState(theta, self._optimizer.init(theta), zero, zero, jax.random.key_data(samples))

    @abc.abstractmethod
    def step(self, state: Any) -> tuple[Any, LossReport]:
        """One iteration; an outcome that is not finite is not taken."""


class Descent(Trained):
    """Descends one loss by Adam."""

    @abc.abstractmethod
    def loss(self, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, ""]:
        """What is descended."""

    def step(self, state: Any) -> tuple[Any, LossReport]:
        samples = self.sample(state.key, state.iteration)
        loss, gradient = jax.value_and_grad(self.loss)(state.theta, samples)
        updates, moments = self._optimizer.update(gradient, state.moments, state.theta)
        accepted = jnp.isfinite(loss) & jnp.all(jnp.isfinite(gradient))
        new = (optax.apply_updates(state.theta, updates), moments)
        theta, moments = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, (state.theta, state.moments))
        in_row = jnp.where(accepted, 0, state.rejected_in_row + 1)
        return AdamState(theta, moments, state.iteration + 1, in_row, state.key), LossReport(loss, accepted)


class PinnAdam(Descent):
    """The mean squared strong residual and boundary misfit (Raissi et al. 2019)."""

    name = "pinn_adam"

    def loss(self, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, ""]:
        residual = self.form.net_residual(self.u, theta, samples)
        return jnp.mean(residual**2) + self.boundary_loss(theta, samples)


class DeepRitz(Descent):
    """The energy whose minimiser solves the equation, and a penalty for the boundary (E and Yu 2018).

    Raises:
      UserError: an equation that no energy has: a reaction that depends on grad u, or a weak form of one's own.
    """

    name = "deepritz"
    needs_strong = False
    # Gauss-Legendre on [0, 1]: exact for reactions that are polynomials up to degree 15 in u.
    _QUADRATURE = np.polynomial.legendre.leggauss(8)

    def __init__(self, problem: Problem, config: TrainConfig | None = None):
        super().__init__(problem, config)
        if problem.weak_form is not None:
            raise UserError("deepritz on a weak form of one's own: its energy is not known")
        if problem.reaction is not None and _depends_on_gradient(self.form):
            raise UserError(f"deepritz on {problem.name}: its reaction depends on grad u, so no energy belongs to it")

    def energy_density(
        self, samples: Samples, value: Float[Array, " points"], gradient: Float[Array, "points dim"]
    ) -> Float[Array, " points"]:
        """1/2 grad u . A grad u + integral of N from 0 to u - f u."""
        flux = apply_coefficient(samples.diffusion, gradient)
        density = 0.5 * jnp.sum(flux * gradient, axis=1) - samples.source * value
        if self.problem.reaction is None:
            return density
        nodes, weights = (jnp.asarray(v, value.dtype) for v in self._QUADRATURE)
        along = jax.vmap(lambda t: self.form.reaction(samples, t * value, gradient))(0.5 * (1 + nodes))
        return density + value * (0.5 * weights @ along)

    def loss(self, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, ""]:
        energy = jnp.mean(self.energy_density(samples, *value_and_gradient(lambda x: self.u(theta, x), samples.x)))
        if self.form.has_flux:
            edge = self.u(theta, samples.y)
            flux = samples.edge_value * edge
            if samples.alpha is not None:
                flux = flux - 0.5 * samples.alpha * edge**2
            ratio = self.problem.domain.surface_to_volume
            assert ratio is not None  # a problem with a flux is not made without it
            energy = energy - ratio * jnp.mean(flux)
        return energy + self.boundary_loss(theta, samples)


def _depends_on_gradient(form: Form) -> bool:
    samples = form.samples(jax.random.key(0), 16, 2)
    ones, p = jnp.ones(16), jax.random.normal(jax.random.key(1), samples.x.shape)
    slope = jax.grad(lambda q: jnp.sum(form.reaction(samples, ones, q) ** 2))(p)
    return bool(jnp.any(slope != 0))


class WanState(NamedTuple):
    theta: Float[Array, " parameters"]
    eta: Float[Array, " parameters"]
    moments: Any
    test_moments: Any
    iteration: Int[Array, ""]
    rejected_in_row: Int[Array, ""]
    key: Array


class Wan(Trained):
    """The weak form's norm over adversarial test functions, log E^2 - log |phi|^2, and the boundary misfit (Zang et al.
    2020). Each player descends its own loss by its own parameters.
    """

    name = "wan"
    needs_strong = False

    def __init__(self, problem: Problem, config: TrainConfig | None = None):
        super().__init__(problem, config)
        self.form = self.form.with_cutoff_scale()
        self.phi = dataclasses.replace(self.u, last_bias=True)
        self._test_optimizer = self.config.adam(self.config.test_learning_rate)

    def weak_norm(
        self, theta: Float[Array, " parameters"], eta: Float[Array, " parameters"], samples: Samples
    ) -> Float[Array, ""]:
        """log of the squared weak residual over the test function's mean square."""
        u = self.form.u_fields(self.u, theta, samples)
        phi = self.form.phi_fields(self.phi, eta, samples)
        return jnp.log(self.form.interior(samples, u, phi) ** 2 + 1e-20) - jnp.log(jnp.mean(phi.value**2) + 1e-20)

    def player_loss(
        self, theta: Float[Array, " parameters"], eta: Float[Array, " parameters"], samples: Samples
    ) -> Float[Array, ""]:
        """What the solution descends."""
        return self.weak_norm(theta, eta, samples) + self.boundary_loss(theta, samples)

    def init(self, key: PRNGKeyArray, theta: Float[Array, " parameters"] | None = None) -> WanState:
        first = super().init(key, theta)
        eta = self.phi.init(jax.random.fold_in(key, 1))
        test = self._test_optimizer.init(eta)
        return WanState(first.theta, eta, first.moments, test, first.iteration, first.rejected_in_row, first.key)

    def step(self, state: WanState) -> tuple[WanState, LossReport]:
        samples = self.sample(state.key, state.iteration)
        eta, test_moments = state.eta, state.test_moments
        for _ in range(self.config.test_steps):
            ascent = jax.grad(lambda e: -self.weak_norm(state.theta, e, samples))(eta)
            updates, test_moments = self._test_optimizer.update(ascent, test_moments, eta)
            eta = optax.apply_updates(eta, updates)
        loss, gradient = jax.value_and_grad(self.player_loss)(state.theta, eta, samples)
        updates, moments = self._optimizer.update(gradient, state.moments, state.theta)
        new = (optax.apply_updates(state.theta, updates), eta, moments, test_moments)
        old = (state.theta, state.eta, state.moments, state.test_moments)
        accepted = jnp.isfinite(loss) & jnp.all(jnp.isfinite(new[0])) & jnp.all(jnp.isfinite(eta))
        theta, eta, moments, test_moments = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
        in_row = jnp.where(accepted, 0, state.rejected_in_row + 1)
        return WanState(theta, eta, moments, test_moments, state.iteration + 1, in_row, state.key), LossReport(
            loss, accepted
        )
