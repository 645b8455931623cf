"""How wrong a solution is: against an exact one, and without.

Three relative errors, because one flatters: in high dimension a sum of many terms concentrates around its mean, and a
constant already has a small relative L2 error. `c_l2` divides by the exact solution's standard deviation instead.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.pde.forms import Fields, Form, Samples
from jaxstack.pde.gram import Linearized, Metric
from jaxstack.pde.networks import Mlp, value_and_gradient
from jaxstack.pde.problem import Problem

HELD_OUT_POINTS = 4000
_HELD_OUT_SEED = 20_240
# Of the indicator: fewer points, because each of its products is a sweep over all of them.
_INDICATOR_POINTS, _INDICATOR_EDGE = 1000, 400


class HeldOut(NamedTuple):
    """Points on which solutions are judged, with what they should be there; None where that is not known."""

    x: Float[Array, "points dim"]
    value: Float[Array, " points"]
    gradient: Float[Array, "points dim"]


class Errors(NamedTuple):
    """Relative errors.

    Attributes:
      c_l2: RMS(u - u*) / standard deviation of u*; the best constant has 1.
      rel_l2: RMS(u - u*) / RMS(u*).
      rel_h1: RMS|grad u - grad u*| / RMS|grad u*|.
    """

    c_l2: Float[Array, ""]
    rel_l2: Float[Array, ""]
    rel_h1: Float[Array, ""]


def held_out(problem: Problem, points: int = HELD_OUT_POINTS) -> HeldOut:
    """The same points for every method and seed."""
    exact = problem.exact

    def drawn(key: Array) -> HeldOut:
        x = problem.domain.sample_interior(key, points)
        if exact is None:
            return HeldOut(x, None, None)  # type: ignore[arg-type]
        return HeldOut(x, *jax.vmap(jax.value_and_grad(lambda p: jnp.asarray(exact(p), p.dtype)))(x))

    return jax.jit(drawn)(jax.random.key(_HELD_OUT_SEED))


def errors(net: Mlp, theta: Float[Array, " parameters"], points: HeldOut) -> Errors:
    """Those of a network's function; the exact solution must be known."""
    value, gradient = value_and_gradient(lambda x: net(theta, x), points.x)
    rms = lambda v: jnp.sqrt(jnp.mean(v))  # noqa: E731
    gap = rms((value - points.value) ** 2)
    return Errors(
        c_l2=gap / jnp.maximum(jnp.std(points.value), 1e-12),
        rel_l2=gap / jnp.maximum(rms(points.value**2), 1e-12),
        rel_h1=rms(jnp.sum((gradient - points.gradient) ** 2, axis=1))
        / jnp.maximum(rms(jnp.sum(points.gradient**2, axis=1)), 1e-12),
    )


class Indicator:
    """An estimate of the error in the energy seminorm that needs no exact solution.

    For a coercive form, the error is about sup over phi of E(u, phi) / |grad phi|. Here phi ranges over the tangent
    space of a random network: with g the derivative of E(u, .) by its parameters and G the Gram matrix of gradients,
    the supremum is sqrt(g . G^+ g), by one tight MINRES solve. To it is added sqrt(lam) times the boundary's RMS
    misfit. Not a bound: a finite space of test functions sees part of the residual, and the boundary enters by a
    weight.
    """

    def __init__(self, form: Form, net: Mlp, *, width: int = 64):
        self._form = form.with_cutoff_scale()
        self._net = net
        # Tangent functions of a network in its initial state: smooth, and plenty.
        self._phi = Mlp.of(net.dim, width, 3, last_bias=True, periods=net.periods)
        self._eta = jax.jit(self._phi.init)(jax.random.key(_HELD_OUT_SEED + 1))
        self._key = jax.random.key(_HELD_OUT_SEED + 2)

    def __call__(self, theta: Float[Array, " parameters"]) -> Float[Array, ""]:
        form = self._form
        samples = form.samples(self._key, _INDICATOR_POINTS, _INDICATOR_EDGE, strong=False)
        u = form.u_fields(self._net, theta, samples)
        phi = Linearized(lambda p: form.phi_fields(self._phi, p, samples), self._eta)
        g = phi.gradient(lambda v: form.interior(samples, u, v))
        metric = Metric(identity=None if form.vanishing else "one", gradient="diffusion")
        half_square = lambda v: metric.half_square(form, samples, v, None)  # noqa: E731
        solved = phi.natural_gradient(g, half_square, rtol=1e-4, max_iterations=60)
        inside = jnp.sqrt(jnp.maximum(jnp.vdot(g, solved.x), 0.0))
        if not form.has_edge:
            return inside
        return inside + jnp.sqrt(form.boundary_weight * jnp.mean(form.misfit(samples, u) ** 2))


def energy_seminorm_error(form: Form, net: Mlp, theta: Float[Array, " parameters"], samples: Samples) -> Array:
    """The RMS of grad(u - u*) in the metric of A, which `Indicator` estimates."""
    exact = form.problem.exact
    assert exact is not None
    gradient = jax.vmap(jax.grad(lambda p: jnp.asarray(exact(p), p.dtype)))(samples.x)
    gap = value_and_gradient(lambda x: net(theta, x), samples.x)[1] - gradient
    square = Metric(gradient="diffusion").half_square(form, samples, Fields(gradient=gap), None)
    return jnp.sqrt(2 * square)
