"""The natural primal-dual hybrid gradient method (Liu, Osher, Li, arXiv 2411.06278) as one compiled iteration.

    eta'  = eta + tau_phi G_phi^+ d/d eta [E - eps/2 |phi|^2],      xi' likewise
    phi~  = phi_eta' + omega (phi_eta' - phi_eta),                  psi~ likewise: extrapolated as functions
    theta' = theta - tau_u G_u^+ d/d theta [E(u, phi~, psi~) + lam |B u - g|^2]

on fresh samples, shared by the three solves, drawn inside the step from the iteration's number: a resumed run draws
what an undisturbed one would have.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxstack.pde.domains import Cutoff
from jaxstack.pde.forms import Fields, Form, Samples
from jaxstack.pde.gram import Linearized, preconditioner_named
from jaxstack.pde.minres import MinresResult, StopReason
from jaxstack.pde.network_config import NetworkConfig, network_options
from jaxstack.pde.networks import Mlp
from jaxstack.pde.problem import Problem
from jaxstack.runtime.errors import UserError


def convergence_factor(
    tau_u: float, tau_phi: float, omega: float = 1.0, epsilon: float = 1.0, sigma: float = 1.0
) -> float:
    """What one iteration multiplies the error by in function space: where u and phi range over one linear space, both
    metrics are M and the weak operator is sigma M, each error mode obeys a recursion with characteristic polynomial

        z^2 - (2 - eps tau_phi - (1 + omega) s) z + (1 - eps tau_phi - omega s),    s = sigma^2 tau_u tau_phi.

    Below one it converges; neither the dimension nor the equation enters.
    """
    s = sigma**2 * tau_u * tau_phi
    half = (2 - epsilon * tau_phi - (1 + omega) * s) / 2
    product = 1 - epsilon * tau_phi - omega * s
    discriminant = half**2 - product
    if discriminant < 0:
        return math.sqrt(product)
    return abs(half) + math.sqrt(discriminant)


def suggest_steps(omega: float = 1.0, epsilon: float = 1.0) -> tuple[float, float]:
    """(tau_u, tau_phi), equal and at most 0.3, that contract fastest in function space.

    Larger steps contract faster there, but a network's tangent space changes under them.
    """
    grid = np.arange(1, 31) / 100
    best = min(grid, key=lambda tau: convergence_factor(tau, tau, omega, epsilon))
    return float(best), float(best)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpdgConfig(NetworkConfig):
    """The method's settings; `NetworkConfig` has those of u's network, most of which phi and psi share.

    Attributes:
      tau_u, tau_phi, tau_psi: step sizes; None takes 0.3 from dimension 8 on and 0.05, 0.095, 0.095 below.
      omega: extrapolation. epsilon: regularisation of the dual players. boundary_weight: lam.
      minres_rtol, minres_max_iterations, minres_damping: of the three solves.
      interior_samples, boundary_samples: of an iteration.
      preconditioner: "auto" or a name of `gram.PRECONDITIONERS`.
      cutoff: of test functions on a box.
      strong_penalty: the u player also minimises the mean squared strong residual.
      phi_width, psi_width: of the test functions' networks; phi's is u's by default.
      n_dual, n_primal: steps of the dual and primal players in an iteration.
    """

    tau_u: float | None = None
    tau_phi: float | None = None
    tau_psi: float | None = None
    omega: float = 1.0
    epsilon: float = 1.0
    boundary_weight: float = 10.0
    minres_rtol: float = 1e-4
    minres_max_iterations: int = 200
    minres_damping: float = 0.0
    interior_samples: int = 400
    boundary_samples: int = 200
    preconditioner: str = "auto"
    cutoff: Cutoff = "harmonic"
    strong_penalty: bool = False
    phi_width: int | None = None
    psi_width: int = 32
    n_dual: int = 1
    n_primal: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "boundary_weight", "minres_max_iterations", "interior_samples", "boundary_samples", "psi_width", "n_dual",
            "n_primal",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: expected more than 0")
        for name in ("omega", "epsilon", "minres_rtol", "minres_damping"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name}={getattr(self, name)}: expected a finite number, at least 0")
        if self.phi_width is not None and self.phi_width < 1:
            raise UserError(f"phi_width={self.phi_width}: expected at least 1, or none")
        if self.cutoff not in ("harmonic", "min"):
            raise UserError(f"cutoff={self.cutoff!r}: expected harmonic or min")
        given = [t for t in (self.tau_u, self.tau_phi, self.tau_psi) if t is not None]
        if any(not t > 0 for t in given):
            raise UserError(f"tau={given}: expected step sizes above 0")
        for dim in (1, 8):
            tau_u, tau_phi, tau_psi = self.steps(dim)
            for name, tau in (("tau_phi", tau_phi), ("tau_psi", tau_psi)):
                factor = convergence_factor(tau_u, tau, self.omega, self.epsilon)
                if factor >= 1:
                    u, v = suggest_steps(self.omega, self.epsilon)
                    raise UserError(
                        f"tau_u={tau_u:g}, {name}={tau:g}, omega={self.omega:g}, epsilon={self.epsilon:g}: each "
                        f"iteration multiplies errors by {factor:.4g}, expected below 1; for instance tau_u={u:g}, "
                        f"{name}={v:g}"
                    )

    def steps(self, dim: int) -> tuple[float, float, float]:
        """(tau_u, tau_phi, tau_psi) in a dimension."""
        u, phi = (0.3, 0.3) if dim >= 8 else (0.05, 0.095)
        tau_phi = phi if self.tau_phi is None else self.tau_phi
        return u if self.tau_u is None else self.tau_u, tau_phi, tau_phi if self.tau_psi is None else self.tau_psi

    def networks(self, problem: Problem) -> tuple[Mlp, Mlp, Mlp]:
        """Those of u, phi and psi; test functions start with all inputs, for they answer whatever error u has."""
        common = network_options(problem, self.standardize) | {"activation": self.activation}
        dim = problem.dim
        return (
            self.network(problem),
            Mlp.of(dim, self.phi_width or self.width, self.depth, last_bias=True, **common),
            Mlp.of(dim, self.psi_width, self.depth, **common),
        )


class NpdgState(NamedTuple):
    """All that changes. Networks are flat vectors.

    Attributes:
      theta, eta, xi: parameters of u, phi, psi.
      iteration: how many were made; the samples' key is folded with it.
      rtol: of MINRES; a value, so that it can be lowered without compiling anew.
      tau_scale: all step sizes are multiplied by it.
      careful: iterations left with halved steps, after one was rejected.
      rejected, rejected_in_row: iterations whose outcome was not taken.
      norms: lengths of the last u steps, for what is out of the ordinary; NaN where there was none yet.
      key: of the run's samples, as key data.
    """

    theta: Float[Array, " u_parameters"]
    eta: Float[Array, " phi_parameters"]
    xi: Float[Array, " psi_parameters"]
    iteration: Int[Array, ""]
    rtol: Float[Array, ""]
    tau_scale: Float[Array, ""]
    careful: Int[Array, ""]
    rejected: Int[Array, ""]
    rejected_in_row: Int[Array, ""]
    norms: Float[Array, " recent"]
    key: Array


class StepReport(NamedTuple):
    """What an iteration did, players in the order phi, psi, u.

    Attributes:
      loss: E before the iteration, with the extrapolated test functions after it.
      misfit: root mean square of B u - g.
      gradient_norms, step_norms: of each player's parameters; steps as taken.
      minres_iterations, stop_reasons: of the solves.
      accepted: whether the outcome was taken.
    """

    loss: Float[Array, ""]
    misfit: Float[Array, ""]
    gradient_norms: Float[Array, " players"]
    step_norms: Float[Array, " players"]
    minres_iterations: Int[Array, " players"]
    stop_reasons: Int[Array, " players"]
    accepted: Bool[Array, ""]


# Of the u steps that a new one is compared with, and how much longer than their median it may be.
_RECENT, _OUTLIER = 16, 10.0
# Iterations with halved steps after a rejected one; rejections in a row that mean divergence.
_CAREFUL, DIVERGED_AFTER = 20, 3


class Npdg:
    """The method on a problem.

    Args:
      problem: the equation.
      config: the settings.

    Raises:
      UserError: an unknown preconditioner, or one that does not fit the problem.
    """

    name = "npdg"

    def __init__(self, problem: Problem, config: NpdgConfig | None = None):
        self.problem, self.config = problem, config or NpdgConfig()
        self.preconditioner_name, self.preconditioner = preconditioner_named(self.config.preconditioner, problem)
        self.u, self.phi, self.psi = self.config.networks(problem)
        self.form = Form(
            problem,
            boundary_weight=self.config.boundary_weight,
            cutoff=self.config.cutoff,
            tangential=self.preconditioner.tangential,
            strong_penalty=self.config.strong_penalty,
            test_laplacian=self.preconditioner.phi.laplacian,
        ).with_cutoff_scale()

    def init(self, key: PRNGKeyArray, theta: Float[Array, " u_parameters"] | None = None) -> NpdgState:
        """The first state; `theta` are parameters of u to start from."""
        u, phi, psi, samples = jax.random.split(key, 4)
        theta = self.u.init(u) if theta is None else theta
        zero = jnp.zeros((), jnp.int32)
        return NpdgState(
            theta=jnp.array(theta),  # a copy: the state is donated
            eta=self.phi.init(phi),
            xi=self.psi.init(psi),
            iteration=zero,
            rtol=jnp.asarray(self.config.minres_rtol, theta.dtype),
            tau_scale=jnp.ones((), theta.dtype),
            careful=zero,
            rejected=zero,
            rejected_in_row=zero,
            norms=jnp.full((_RECENT,), jnp.nan, theta.dtype),
            key=jax.random.key_data(samples),
        )

    def samples(self, state: NpdgState, previous: Callable | None = None) -> Samples:
        """Those of the state's next iteration."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.iteration)
        return self.form.samples(key, self.config.interior_samples, self.config.boundary_samples, previous=previous)

    def step(self, state: NpdgState, previous: Callable | None = None) -> tuple[NpdgState, StepReport]:
        """One iteration; pure, for `jax.jit` and `lax.scan`.

        Args:
          state: before it.
          previous: points -> the earlier solution's values, of a problem that takes one.
        """
        return self.step_on(state, self.samples(state, previous))

    def step_on(self, state: NpdgState, samples: Samples) -> tuple[NpdgState, StepReport]:
        """One iteration on given samples."""
        config, form = self.config, self.form
        tau_u, tau_phi, tau_psi = config.steps(self.problem.dim)
        scale = state.tau_scale * jnp.where(state.careful > 0, 0.5, 1.0)

        theta = state.theta
        u = Linearized(lambda p: form.u_fields(self.u, p, samples), theta)
        old_u = u.fields

        eta, xi = state.eta, state.xi
        phi_start: Fields | None = None
        psi_start: Fields | None = None
        phi_solve: _Solve | None = None
        psi_solve: _Solve | None = None
        for _ in range(config.n_dual):
            phi = Linearized(lambda p: form.phi_fields(self.phi, p, samples), eta)
            phi_start = phi.fields if phi_start is None else phi_start
            phi_solve = self._phi_solve(phi, old_u, samples, state.rtol)
            eta = eta + scale * tau_phi * phi_solve.result.x
            if form.has_edge:
                psi = Linearized(lambda p: form.psi_fields(self.psi, p, samples), xi)
                psi_start = psi.fields if psi_start is None else psi_start
                psi_solve = self._psi_solve(psi, old_u, samples, state.rtol)
                xi = xi + scale * tau_psi * psi_solve.result.x
        phi_ahead = self._extrapolated(phi_start, form.phi_fields(self.phi, eta, samples))
        psi_ahead = self._extrapolated(psi_start, form.psi_fields(self.psi, xi, samples)) if form.has_edge else None

        for index in range(config.n_primal):
            if index:
                u = Linearized(lambda p: form.u_fields(self.u, p, samples), theta)
            u_solve = self._u_solve(u, phi_ahead, psi_ahead, samples, state.rtol)
            theta = theta - scale * tau_u * u_solve.result.x

        assert phi_solve is not None
        steps = jnp.stack([_norm(eta - state.eta), _norm(xi - state.xi), _norm(theta - state.theta)])
        history = jnp.sum(jnp.isfinite(state.norms))
        usual = jnp.where(history >= _RECENT // 2, jnp.nanmedian(state.norms), jnp.inf)
        solves = [phi_solve, psi_solve, u_solve]
        broken = jnp.any(jnp.stack([s.result.stop_reason == StopReason.NOT_FINITE for s in solves if s is not None]))
        accepted = jnp.all(jnp.isfinite(steps)) & (steps[2] <= _OUTLIER * usual) & ~broken
        keep = lambda new, old: jnp.where(accepted, new, old)  # noqa: E731
        report = StepReport(
            loss=form.interior(samples, old_u, phi_ahead)
            + (form.boundary(samples, old_u, psi_ahead) if psi_ahead is not None else 0.0),
            misfit=jnp.sqrt(jnp.mean(form.misfit(samples, old_u) ** 2)) if form.has_edge else jnp.zeros(()),
            gradient_norms=jnp.stack([_norm(s.gradient) if s else jnp.zeros(()) for s in solves]),
            step_norms=steps,
            minres_iterations=jnp.stack([s.result.iterations if s else jnp.zeros((), jnp.int32) for s in solves]),
            stop_reasons=jnp.stack([s.result.stop_reason if s else jnp.zeros((), jnp.int32) for s in solves]),
            accepted=accepted,
        )
        return NpdgState(
            theta=keep(theta, state.theta),
            eta=keep(eta, state.eta),
            xi=keep(xi, state.xi),
            iteration=state.iteration + 1,
            rtol=state.rtol,
            tau_scale=state.tau_scale,
            careful=jnp.where(accepted, jnp.maximum(state.careful - 1, 0), _CAREFUL),
            rejected=state.rejected + ~accepted,
            rejected_in_row=jnp.where(accepted, 0, state.rejected_in_row + 1),
            norms=keep(jnp.roll(state.norms, 1).at[0].set(steps[2]), state.norms),
            key=state.key,
        ), report

    # -------------------------------------------------------------------------------------------------- the players

    def _minres(self, player: Linearized, gradient: Array, half_square: Callable, rtol: Array) -> "_Solve":
        return _Solve(
            gradient,
            player.natural_gradient(
                gradient,
                half_square,
                rtol=rtol,
                max_iterations=self.config.minres_max_iterations,
                damping=self.config.minres_damping,
            ),
        )

    def _phi_solve(self, phi: Linearized, u: Fields, samples: Samples, rtol: Array) -> "_Solve":
        metric = self.preconditioner.phi
        weights = metric.weights(self.form, samples, u)
        half_square = lambda v: metric.half_square(self.form, samples, v, weights)  # noqa: E731
        gradient = phi.gradient(lambda v: self.form.interior(samples, u, v) - self.config.epsilon * half_square(v))
        return self._minres(phi, gradient, half_square, rtol)

    def _psi_solve(self, psi: Linearized, u: Fields, samples: Samples, rtol: Array) -> "_Solve":
        half_square = lambda v: self.preconditioner.psi_half_square(self.form, samples, v)  # noqa: E731
        gradient = psi.gradient(lambda v: self.form.boundary(samples, u, v) - self.config.epsilon * half_square(v))
        return self._minres(psi, gradient, half_square, rtol)

    def _u_solve(self, u: Linearized, phi: Fields, psi: Fields | None, samples: Samples, rtol: Array) -> "_Solve":
        metric = self.preconditioner.u
        weights = metric.weights(self.form, samples, u.fields)
        half_square = lambda v: metric.half_square(self.form, samples, v, weights)  # noqa: E731
        gradient = u.gradient(lambda v: self.form.u_loss(samples, v, phi, psi))
        return self._minres(u, gradient, half_square, rtol)

    def _extrapolated(self, old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: b + self.config.omega * (b - a), old, new)


class _Solve(NamedTuple):
    gradient: Array
    result: MinresResult


def _norm(v: Array) -> Array:
    return jnp.sqrt(jnp.vdot(v, v))
