"""Partial differential equations in 1 to 50 dimensions, solved by networks.

A `Problem` is data: a domain, coefficients, a boundary condition. Its weak form (`forms`) is a saddle function of the
solution and of test functions; natural gradients are matrix-free solves (`minres`) in a metric (`gram`) that knows the
operator. The strong form of the same problem is evaluated by the forward Laplacian (`operators`).
"""

from jaxstack.pde.domains import Ball, Box, Interval, SignedDistance
from jaxstack.pde.evolution import Evolution
from jaxstack.pde.problem import Dirichlet, Neumann, Periodic, Problem, Robin, WeakForm, manufactured

__all__ = [
    "Ball",
    "Box",
    "Dirichlet",
    "Evolution",
    "Interval",
    "Neumann",
    "Periodic",
    "Problem",
    "Robin",
    "SignedDistance",
    "WeakForm",
    "manufactured",
]
