"""Partial differential equations in 1 to 50 dimensions, solved by networks: the natural primal-dual hybrid gradient
method.

A `Problem` is data: a domain, coefficients, a boundary condition. `verify` checks that it is the one that was meant.
`solve` returns a `Solution`, by stages of methods on one clock. Inside, a problem's weak form (`forms`) is a saddle
function of the solution and of test functions; `npdg` makes natural-gradient steps on both sides, each a matrix-free
solve (`minres`) in a metric (`gram`) that knows the operator. The strong form of the same problem, by the forward
Laplacian (`operators`), is what the rivals in `baselines` minimise. `Evolution` (`marching`) steps in time;
`OptimalTransport` (`transport`) is the Monge-Ampere equation.
"""

from jaxstack.pde.domains import Ball, Box, Interval, SignedDistance
from jaxstack.pde.evolution import Evolution
from jaxstack.pde.marching import EvolutionSolution, MarchConfig, solve_evolution
from jaxstack.pde.npdg import Npdg, NpdgConfig, convergence_factor, suggest_steps
from jaxstack.pde.problem import Dirichlet, Neumann, Periodic, Problem, Robin, WeakForm, manufactured
from jaxstack.pde.solution import Solution
from jaxstack.pde.solve import Stage, automatic_stages, solve
from jaxstack.pde.transport import OptimalTransport, TransportConfig
from jaxstack.pde.verify import VerifyReport, verify

__all__ = [
    "Ball",
    "Box",
    "Dirichlet",
    "Evolution",
    "EvolutionSolution",
    "Interval",
    "MarchConfig",
    "Neumann",
    "Npdg",
    "NpdgConfig",
    "OptimalTransport",
    "Periodic",
    "Problem",
    "Robin",
    "SignedDistance",
    "Solution",
    "Stage",
    "TransportConfig",
    "VerifyReport",
    "WeakForm",
    "automatic_stages",
    "convergence_factor",
    "manufactured",
    "solve",
    "solve_evolution",
    "suggest_steps",
    "verify",
]
