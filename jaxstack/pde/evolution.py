"""Equations in time, by implicit Euler: every time step is one boundary value problem, warm-started from the last.

u_t = div(A grad u) - N(x, u, grad u) + f   becomes   u + h N - h div(A grad u) = h f + previous u.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxstack.pde.problem import Boundary, Neumann, PointFunction, Problem, Robin
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Evolution:
    """An initial value problem.

    Attributes:
      problem: the operator: diffusion A, reaction N, source f and the boundary condition; none depends on time.
      initial: u at time 0, a function of one point.
      step: the time step h.
      final_time: a multiple of it.
    """

    problem: Problem
    initial: PointFunction
    step: float
    final_time: float

    def __post_init__(self) -> None:
        if not (self.step > 0 and math.isfinite(self.step)):
            raise UserError(f"evolution step={self.step}: expected a positive, finite number")
        ratio = self.final_time / self.step
        if not (ratio > 0.5 and abs(ratio - round(ratio)) < 1e-6 * max(1, ratio)):
            raise UserError(f"evolution final_time={self.final_time}: expected a multiple of step={self.step}")
        if self.problem.weak_form is not None or self.problem.takes_previous:
            raise UserError("evolution: expected a problem given by diffusion, reaction and source")
        self.problem._check("initial", self.initial, ((),))

    @property
    def steps(self) -> int:
        """How many time steps."""
        return round(self.final_time / self.step)

    def step_problem(self) -> Problem:
        """One implicit Euler step as a problem that takes the previous solution."""
        problem, h = self.problem, self.step
        reaction = problem.reaction

        def implicit(x: Array, u: Array, du: Array, previous: Array) -> Array:
            value = u - previous
            return value if reaction is None else value + h * reaction(x, u, du)

        boundary: Boundary = problem.boundary
        match boundary:
            case Neumann(flux):
                boundary = Neumann(_scaled(flux, h))
            case Robin(alpha, value):
                boundary = Robin(_scaled(alpha, h), _scaled(value, h))
        return dataclasses.replace(
            problem,
            diffusion=_scaled(problem.diffusion, h),
            source=_scaled(problem.source, h),
            reaction=implicit,
            boundary=boundary,
            takes_previous=True,
            exact=None,
            name=f"a step of {problem.name}",
        )


def _scaled(function: PointFunction | float, h: float) -> Any:
    if callable(function):
        return lambda x: h * jnp.asarray(function(x))
    return h * function
