"""Methods that minimise the strong residual with curvature: L-BFGS, and energy natural gradients in sample space.

The natural gradient of a mean of squares with P parameters and n samples is J^T (J J^T + mu I)^-1 r, an n x n solve
(Mueller and Zeinhofer 2023; in this form "ENGD-W", arXiv 2505.12149). SPRING adds the previous step, less what the new
samples already explain of it (Goldshlager et al. 2024).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxstack.pde.baselines.first_order import LossReport
from jaxstack.pde.forms import Form, Samples
from jaxstack.pde.network_config import NetworkConfig
from jaxstack.pde.problem import Problem
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvatureConfig(NetworkConfig):
    """Settings of the methods with curvature; `NetworkConfig` has those of the network.

    Attributes:
      boundary_weight: lam, of the mean squared boundary misfit.
      interior_samples, boundary_samples: of an iteration (natural gradients) or of `renew` iterations (L-BFGS).
      memory: pairs that L-BFGS keeps. renew: its iterations on the same samples.
      damping: mu's first value, relative to the kernel's mean diagonal; it is lowered after steps that help and raised
        after steps that do not (Levenberg-Marquardt), never below `least_damping`.
      momentum: SPRING's.
      averaging: natural gradients return a running mean of their iterates that keeps so much of itself in each
        iteration. An iterate fits the samples that it was made from, and is noisy elsewhere; the mean is not. 0 returns
        the iterates.
    """

    boundary_weight: float = 100.0
    interior_samples: int = 300
    boundary_samples: int = 200
    memory: int = 20
    renew: int = 100
    damping: float = 1e-4
    least_damping: float = 1e-6
    momentum: float = 0.9
    averaging: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "boundary_weight", "interior_samples", "boundary_samples", "memory", "renew", "damping", "least_damping",
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name}={value}: expected a finite number above 0")
        for name in ("momentum", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 0 and below 1")


class _LeastSquares:
    """A problem as residuals whose sum of squares is the mean squared residual plus lam times the misfit's."""

    def __init__(self, problem: Problem, config: CurvatureConfig | None = None):
        self.problem, self.config = problem, config or CurvatureConfig()
        self.u = self.config.network(problem)
        self.form = Form(problem, boundary_weight=self.config.boundary_weight)

    def sample(self, key: Array, number: Int[Array, ""]) -> Samples:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), number)
        return self.form.samples(key, self.config.interior_samples, self.config.boundary_samples, strong=True)

    def residuals(self, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, " residuals"]:
        """Interior residuals over sqrt(n), then misfits times sqrt(lam / n)."""
        inside = self.form.net_residual(self.u, theta, samples)
        inside = inside / math.sqrt(inside.size)
        if not self.form.has_edge:
            return inside
        edge = self.form.net_misfit(self.u, theta, samples)
        return jnp.concatenate([inside, edge * math.sqrt(self.config.boundary_weight / edge.size)])

    def loss(self, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, ""]:
        """The sum of their squares."""
        r = self.residuals(theta, samples)
        return jnp.vdot(r, r)


class LbfgsState(NamedTuple):
    theta: Float[Array, " parameters"]
    memory: Any
    iteration: Int[Array, ""]
    rejected_in_row: Int[Array, ""]
    key: Array


class PinnLbfgs(_LeastSquares):
    """L-BFGS with a zoom line search; samples are renewed, and the memory emptied, every `renew` iterations: curvature
    pairs are differences of gradients on the same samples.
    """

    name = "pinn_lbfgs"

    def __init__(self, problem: Problem, config: CurvatureConfig | None = None):
        super().__init__(problem, config)
        self._optimizer = optax.lbfgs(memory_size=self.config.memory)

    def init(self, key: PRNGKeyArray, theta: Float[Array, " parameters"] | None = None) -> LbfgsState:
        """The first state; `theta` are parameters to start from."""
        network, samples = jax.random.split(key)
        theta = self.u.init(network) if theta is None else jnp.array(theta)
        zero = jnp.zeros((), jnp.int32)
        return LbfgsState(theta, self._optimizer.init(theta), zero, zero, jax.random.key_data(samples))

    def step(self, state: LbfgsState) -> tuple[LbfgsState, LossReport]:
        """One iteration with its line search."""
        samples = self.sample(state.key, state.iteration // self.config.renew)
        objective = lambda p: self.loss(p, samples)  # noqa: E731
        fresh = state.iteration % self.config.renew == 0
        empty = self._optimizer.init(state.theta)
        memory = jax.tree.map(lambda a, b: jnp.where(fresh, a, b), empty, state.memory)
        value, gradient = jax.value_and_grad(objective)(state.theta)
        updates, memory = self._optimizer.update(
            gradient, memory, state.theta, value=value, grad=gradient, value_fn=objective
        )
        theta = optax.apply_updates(state.theta, updates)
        accepted = jnp.all(jnp.isfinite(theta)) & jnp.isfinite(value)
        # After a step that is not finite the memory is of no use, either.
        theta, memory = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), (theta, memory), (state.theta, empty))
        in_row = jnp.where(accepted, 0, state.rejected_in_row + 1)
        return LbfgsState(theta, memory, state.iteration + 1, in_row, state.key), LossReport(value, accepted)


class NaturalState(NamedTuple):
    """`theta` is what the method answers, `iterate` where it goes on: the same without averaging."""

    theta: Float[Array, " parameters"]
    iterate: Float[Array, " parameters"]
    direction: Float[Array, " parameters"]
    damping: Float[Array, ""]
    iteration: Int[Array, ""]
    rejected_in_row: Int[Array, ""]
    key: Array


class PinnEngd(_LeastSquares):
    """Energy natural gradients, solved in sample space, with a line search over nine halvings.

    A step is taken where it lowers the loss on the samples it was made from. Where none does, the damping is raised.
    """

    name = "pinn_engd"
    _momentum = 0.0
    _halvings = 9

    def init(self, key: PRNGKeyArray, theta: Float[Array, " parameters"] | None = None) -> NaturalState:
        """The first state; `theta` are parameters to start from."""
        network, samples = jax.random.split(key)
        theta = self.u.init(network) if theta is None else jnp.array(theta)
        zero = jnp.zeros((), jnp.int32)
        damping = jnp.asarray(self.config.damping, theta.dtype)
        # Two copies: the state is donated.
        return NaturalState(
            theta, jnp.array(theta), jnp.zeros_like(theta), damping, zero, zero, jax.random.key_data(samples)
        )

    def jacobian(
        self, theta: Float[Array, " parameters"], samples: Samples
    ) -> tuple[Float[Array, " residuals"], Float[Array, "residuals parameters"]]:
        """Residuals and their derivatives, a row each, by one reverse sweep a sample."""

        def inside(p: Array, point: Samples) -> Array:
            one = jax.tree.map(lambda a: a[None], point)
            return self.form.net_residual(self.u, p, one)[0]

        def outside(p: Array, point: Samples) -> Array:
            one = jax.tree.map(lambda a: a[None], point)
            return self.form.net_misfit(self.u, p, one)[0]

        interior, edge = samples.split()
        rows = jax.vmap(jax.value_and_grad(inside), in_axes=(None, 0))(theta, interior)
        scale = 1 / math.sqrt(samples.x.shape[0])
        r, j = rows[0] * scale, rows[1] * scale
        if not self.form.has_edge:
            return r, j
        rows = jax.vmap(jax.value_and_grad(outside), in_axes=(None, 0))(theta, edge)
        scale = math.sqrt(self.config.boundary_weight / samples.y.shape[0])
        return jnp.concatenate([r, rows[0] * scale]), jnp.concatenate([j, rows[1] * scale])

    def direction(self, state: NaturalState, r: Array, j: Array) -> Float[Array, " parameters"]:
        """What is subtracted from the parameters, at full length."""
        kept = self._momentum * state.direction
        kernel = j @ j.T
        mu = state.damping * jnp.trace(kernel) / kernel.shape[0]
        factor = jax.scipy.linalg.cho_factor(kernel + mu * jnp.eye(kernel.shape[0], dtype=kernel.dtype))
        return j.T @ jax.scipy.linalg.cho_solve(factor, r - j @ kept) + kept

    def step(self, state: NaturalState) -> tuple[NaturalState, LossReport]:
        """One iteration."""
        samples = self.sample(state.key, state.iteration)
        at = state.iterate
        r, j = self.jacobian(at, samples)
        loss = jnp.vdot(r, r)
        direction = self.direction(state, r, j)
        lengths = 2.0 ** -jnp.arange(self._halvings, dtype=state.theta.dtype)
        trials = jax.lax.map(lambda t: self.loss(at - t * direction, samples), lengths)
        trials = jnp.where(jnp.isfinite(trials), trials, jnp.inf)
        best = jnp.argmin(trials)
        accepted = trials[best] < loss
        length = jnp.where(accepted, lengths[best], 0.0)
        direction = jnp.where(jnp.isfinite(direction), direction, 0.0)
        lower = jnp.maximum(state.damping / 3, self.config.least_damping)
        higher = jnp.minimum(state.damping * 10, 1.0)
        damping = jnp.where(accepted, jnp.where(best <= 1, lower, state.damping), higher)
        in_row = jnp.where(accepted, 0, state.rejected_in_row + 1)
        iterate = at - length * direction
        kept = self.config.averaging
        return NaturalState(
            theta=kept * state.theta + (1 - kept) * iterate if kept else iterate,
            iterate=iterate,
            direction=jnp.where(accepted, length, 0.0) * direction,
            damping=damping,
            iteration=state.iteration + 1,
            rejected_in_row=in_row,
            key=state.key,
        ), LossReport(loss, accepted)


class PinnSpring(PinnEngd):
    """ENGD with SPRING's momentum."""

    name = "pinn_spring"

    def __init__(self, problem: Problem, config: CurvatureConfig | None = None):
        super().__init__(problem, config)
        self._momentum = self.config.momentum
