"""The paper's equations, each with its exact or reference solution (section 5 and appendix of arXiv 2411.06278)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.pde.domains import Ball, Box, Interval
from jaxstack.pde.evolution import Evolution
from jaxstack.pde.problem import Dirichlet, Neumann, Problem
from jaxstack.runtime.errors import UserError


def poisson(dim: int) -> Problem:
    """-Delta u = f on the unit cube, u = sum_k sin(pi x_k / 2)."""

    def exact(x: Float[Array, " dim"]) -> Float[Array, ""]:
        return jnp.sum(jnp.sin(jnp.pi * x / 2))

    return Problem(
        domain=Box(0.0, 1.0, dim),
        source=lambda x: (math.pi**2 / 4) * exact(x),
        boundary=Dirichlet(exact),
        exact=exact,
        name=f"poisson-{dim}",
    )


def poisson_rotated(dim: int) -> Problem:
    """`poisson` with a solution turned at random inside the cube: a sum over directions that no axis is one of, so that
    nothing is gained by a network that knows the axes. In one dimension it is `poisson`.
    """
    gaussian = np.random.default_rng(20_241).normal(size=(dim, dim))
    turn = np.linalg.qr(gaussian)[0] if dim > 1 else np.eye(1)

    def exact(x: Float[Array, " dim"]) -> Float[Array, ""]:
        return jnp.sum(jnp.sin(jnp.pi / 2 * (jnp.asarray(turn, x.dtype) @ (x - 0.5) + 0.5)))

    return Problem(
        domain=Box(0.0, 1.0, dim),
        source=lambda x: (math.pi**2 / 4) * exact(x),
        boundary=Dirichlet(exact),
        exact=exact,
        name=f"poisson-rotated-{dim}",
    )


def variable_coefficient(dim: int) -> Problem:
    """-div(sigma grad u) = f on [-1, 1]^dim, sigma = 1 + 1/2 sum_k lambda_k x_k^2 with lambda = 1, 4, 1, 4, ...,
    u = 1/2 sum_k x_k^2 / lambda_k.
    """

    def rates(x: Array) -> Array:
        return jnp.where(jnp.arange(dim) % 2 == 0, 1.0, 4.0).astype(x.dtype)

    def sigma(x: Float[Array, " dim"]) -> Float[Array, ""]:
        return 1 + 0.5 * jnp.sum(rates(x) * x**2)

    def exact(x: Float[Array, " dim"]) -> Float[Array, ""]:
        return 0.5 * jnp.sum(x**2 / rates(x))

    return Problem(
        domain=Box(-1.0, 1.0, dim),
        diffusion=sigma,
        source=lambda x: -(jnp.sum(x**2) + sigma(x) * jnp.sum(1 / rates(x))),
        boundary=Dirichlet(exact),
        exact=exact,
        name=f"variable-{dim}",
    )


def semilinear(dim: int = 5, radius: float = 3.0) -> Problem:
    """-Delta u + |grad u|^2 / 2 + V = 0 on a ball whose radius is odd, u = cos(pi r / 2), zero on the sphere.

    Raises:
      UserError: a radius at which the solution is not zero.
    """
    if radius != int(radius) or int(radius) % 2 == 0:
        raise UserError(f"semilinear radius={radius}: expected an odd integer, where the solution is zero")

    def distance(x: Array) -> Array:
        # The bound keeps the root's derivative finite at the origin.
        return jnp.sqrt(jnp.maximum(jnp.sum(x**2), 1e-12))

    def exact(x: Float[Array, " dim"]) -> Float[Array, ""]:
        return jnp.cos(jnp.pi * distance(x) / 2)

    def minus_potential(x: Float[Array, " dim"]) -> Float[Array, ""]:
        r = distance(x)
        sine, cosine = jnp.sin(jnp.pi * r / 2), jnp.cos(jnp.pi * r / 2)
        # sin(pi r / 2) / r, which has a limit at the origin.
        over_r = (jnp.pi / 2) * jnp.sinc(r / 2)
        return (jnp.pi**2 / 8) * sine**2 + (jnp.pi**2 / 4) * cosine + (jnp.pi / 2) * (dim - 1) * over_r

    return Problem(
        domain=Ball(dim, radius),
        source=minus_potential,
        reaction=lambda x, u, du: 0.5 * jnp.sum(du**2),
        boundary=Dirichlet(0.0),
        exact=exact,
        name=f"semilinear-{dim}",
    )


def double_well_slope(u: Array) -> Array:
    """W'(u) = u^3 - u of the double well (u^2 - 1)^2 / 4."""
    return u**3 - u


def allen_cahn(dim: int) -> Evolution:
    """u_t = a Delta u - b (u^3 - u) on [0, 2]^dim with no flux through the boundary.

    dim 1: a = 0.01, b = 100, h = 0.001, until 0.002, from (1 - cos(pi (x - 1))) cos(pi (x - 1)).
    dim 2: a = 0.1, b = 10, h = 0.1, until 0.4, from tanh((0.5 - |x - (1, 1)|) / 0.1).

    Raises:
      UserError: another dimension.
    """
    match dim:
        case 1:
            diffusion, rate, step, final = 0.01, 100.0, 0.001, 0.002
            domain = Interval(0.0, 2.0)

            def initial(x: Array) -> Array:
                wave = jnp.cos(jnp.pi * (x[0] - 1))
                return (1 - wave) * wave
        case 2:
            diffusion, rate, step, final = 0.1, 10.0, 0.1, 0.4
            domain = Box(0.0, 2.0, 2)

            def initial(x: Array) -> Array:
                return jnp.tanh((0.5 - jnp.sqrt(jnp.maximum(jnp.sum((x - 1) ** 2), 1e-12))) / 0.1)
        case _:
            raise UserError(f"allen_cahn dim={dim}: expected 1 or 2")
    problem = Problem(
        domain=domain,
        diffusion=diffusion,
        reaction=lambda x, u, du: rate * double_well_slope(u),
        boundary=Neumann(0.0),
        name=f"allen-cahn-{dim}",
    )
    return Evolution(problem, initial, step, final)
