"""Second-order operators of networks: the forward Laplacian, and what it is compared with.

The forward Laplacian carries (value, Jacobian, second-order term) through the layers: for z = h W + b and h' = s(z),

    J' = s'(z) J W,    L' = s'(z) L W + s''(z) sum_kl A_kl (J W)_k (J W)_l,

so one sweep gives u, its gradient and sum_kl A_kl d_k d_l u. Nested differentiation makes d sweeps over a graph that
has already been differentiated once, and keeps all of them for the parameters' gradient.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxstack.pde.networks import ACTIVATIONS, Mlp

Coefficient = Float[Array, " points"] | Float[Array, "points dim"] | Float[Array, "points dim dim"]
"""A at each point: a multiple of the identity, a diagonal, or a symmetric matrix."""


class SecondOrder(NamedTuple):
    """A scalar field at points with its gradient, and sum_kl A_kl d_k d_l u."""

    value: Float[Array, " points"]
    gradient: Float[Array, "points dim"]
    second: Float[Array, " points"]


def forward_laplacian(
    net: Mlp,
    flat: Float[Array, " parameters"],
    x: Float[Array, "points dim"],
    coefficient: Coefficient | None = None,
) -> SecondOrder:
    """Value, gradient and A : D^2 u of a perceptron with one output, in one forward sweep.

    Args:
      net, flat: the network and its parameters.
      x: the points.
      coefficient: A; the identity by default.
    """
    points, dim = x.shape
    scalar = coefficient if coefficient is not None and coefficient.ndim == 1 else None
    matrix = coefficient if coefficient is not None and coefficient.ndim > 1 else None

    def contract(jacobian: Array) -> Array:
        """sum_kl A_kl J_k J_l, for J of shape (points or 1, dim, width)."""
        if matrix is None:
            return jnp.sum(jacobian * jacobian, axis=1)
        if matrix.ndim == 2:
            return jnp.sum(matrix[:, :, None] * jacobian * jacobian, axis=1)
        return jnp.sum((matrix @ jacobian) * jacobian, axis=1)

    derivatives = ACTIVATIONS[net.activation][1]
    h, jacobian, second = _features(net, x, contract)
    layers = net.layers(flat)
    for index, (weight, bias) in enumerate(layers):
        z = h @ weight if bias is None else h @ weight + bias
        jz = jacobian @ weight
        lz = jnp.zeros((), x.dtype) if second is None else second @ weight
        if index == len(layers) - 1:
            h, jacobian, second = z, jz, lz
            break
        s, slope, curve = derivatives(z)
        keep = net.residual and h.shape == s.shape
        previous = (h, jacobian, second)
        h, jacobian, second = s, slope[:, None, :] * jz, slope * lz + curve * contract(jz)
        if keep:
            h = h + previous[0]
            jacobian = jacobian + previous[1]
            second = second if previous[2] is None else second + previous[2]
    gradient = jnp.broadcast_to(jacobian[:, :, 0], (points, dim))
    total = jnp.zeros((points,), x.dtype) if second is None else jnp.broadcast_to(second, (points, 1))[:, 0]
    return SecondOrder(h[:, 0], gradient, total if scalar is None else scalar * total)


def _features(net: Mlp, x: Array, contract: Callable[[Array], Array]) -> tuple[Array, Array, Array | None]:
    """The first layer's input with its Jacobian, which has one row for all points where it is constant."""
    h = net.inputs(x)
    scale = jnp.ones((net.dim,), x.dtype)
    if net.half_width is not None:
        scale = scale / jnp.asarray(net.half_width, x.dtype)
    if net.periods is None:
        return h, jnp.diag(scale)[None], None
    rate = scale * (2 * jnp.pi / jnp.asarray(net.periods, x.dtype))
    sine, cosine = jnp.split(h, 2, axis=-1)
    eye = jnp.eye(net.dim, dtype=x.dtype)
    jacobian = jnp.concatenate([eye * (cosine * rate)[:, :, None], eye * (-sine * rate)[:, :, None]], axis=-1)
    # d_k d_l of sin(rate x_j) is -rate^2 sin where k = l = j.
    ones = jnp.broadcast_to(eye, (x.shape[0], net.dim, net.dim))
    diagonal = contract(ones) * rate**2
    return h, jacobian, jnp.concatenate([-sine * diagonal, -cosine * diagonal], axis=-1)


def nested_laplacian(
    function: Callable[[Float[Array, " dim"]], Float[Array, ""]], x: Float[Array, "points dim"]
) -> Float[Array, " points"]:
    """The trace of `jax.hessian`, for any function of one point: exact, and d times the memory."""
    return jax.vmap(lambda point: jnp.trace(jax.hessian(function)(point)))(x)


def jvp_laplacian(
    function: Callable[[Float[Array, "points dim"]], Float[Array, " points"]], x: Float[Array, "points dim"]
) -> Float[Array, " points"]:
    """The Laplacian of any batched scalar field, a coordinate at a time: forward over reverse."""

    def gradient(at: Array) -> Array:
        return jax.grad(lambda y: jnp.sum(function(y)))(at)

    def along(total: Array, direction: Array) -> tuple[Array, None]:
        tangent = jnp.broadcast_to(direction, x.shape)
        return total + jnp.sum(jax.jvp(gradient, (x,), (tangent,))[1] * direction, axis=1), None

    return jax.lax.scan(along, jnp.zeros(x.shape[0], x.dtype), jnp.eye(x.shape[1], dtype=x.dtype))[0]


def hutchinson_laplacian(
    function: Callable[[Float[Array, "points dim"]], Float[Array, " points"]],
    x: Float[Array, "points dim"],
    key: PRNGKeyArray,
    *,
    probes: int = 16,
) -> Float[Array, " points"]:
    """An unbiased estimate of the Laplacian from random signs, for dimensions in the hundreds."""

    def gradient(at: Array) -> Array:
        return jax.grad(lambda y: jnp.sum(function(y)))(at)

    def probe(total: Array, k: Array) -> tuple[Array, None]:
        signs = jax.random.rademacher(k, x.shape, x.dtype)
        return total + jnp.sum(jax.jvp(gradient, (x,), (signs,))[1] * signs, axis=1), None

    total = jax.lax.scan(probe, jnp.zeros(x.shape[0], x.dtype), jax.random.split(key, probes))[0]
    return total / probes
