"""The methods by name, behind one face: a state, and a pure step from state to state."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxstack.pde.baselines.first_order import DeepRitz, PinnAdam, TrainConfig, Wan
from jaxstack.pde.baselines.second_order import CurvatureConfig, PinnEngd, PinnLbfgs, PinnSpring
from jaxstack.pde.networks import Mlp
from jaxstack.pde.npdg import Npdg, NpdgConfig
from jaxstack.pde.problem import Problem
from jaxstack.pde.transport import OptimalTransport, Transport, TransportConfig
from jaxstack.runtime.errors import UserError

MethodConfig = NpdgConfig | TrainConfig | CurvatureConfig | TransportConfig


class Method(Protocol):
    """What a run asks of a method. States are NamedTuples with `theta`, `iteration` and `rejected_in_row`; reports have
    `loss` and `accepted`."""

    name: str
    problem: Any
    config: Any
    u: Mlp

    def init(self, key: PRNGKeyArray, theta: Float[Array, " parameters"] | None = None) -> Any: ...

    def step(self, state: Any) -> tuple[Any, Any]: ...


class _Entry(NamedTuple):
    make: Any
    config: type
    chunk: int
    patience: int


# Chunk: iterations of one call, so that a call takes about a tenth of a second at the sizes of a laptop and Ctrl-C is
# obeyed at once. Patience: rejected iterations in a row that mean divergence; a line search may fail a few times while
# its damping rises.
METHODS: Mapping[str, _Entry] = {
    "npdg": _Entry(Npdg, NpdgConfig, 5, 3),
    "pinn_adam": _Entry(PinnAdam, TrainConfig, 20, 3),
    "pinn_lbfgs": _Entry(PinnLbfgs, CurvatureConfig, 5, 5),
    "pinn_engd": _Entry(PinnEngd, CurvatureConfig, 1, 12),
    "pinn_spring": _Entry(PinnSpring, CurvatureConfig, 1, 12),
    "deepritz": _Entry(DeepRitz, TrainConfig, 20, 3),
    "wan": _Entry(Wan, TrainConfig, 20, 3),
    "transport": _Entry(Transport, TransportConfig, 10, 3),
}
"""Name -> the method, the type of its settings, iterations of a call, patience with rejected ones."""


def make_method(name: str, problem: Problem | OptimalTransport, config: MethodConfig | None = None) -> Method:
    """A method on a problem.

    Raises:
      UserError: an unknown method, settings of another one, or a problem that the method cannot solve.
    """
    if name not in METHODS:
        raise UserError(f"method={name!r}: expected auto or one of {', '.join(METHODS)}")
    if isinstance(problem, OptimalTransport) != (name == "transport"):
        fitting = (
            "transport" if isinstance(problem, OptimalTransport) else ", ".join(m for m in METHODS if m != "transport")
        )
        raise UserError(f"method={name} on {problem.name}: expected {fitting}")
    if isinstance(problem, Problem) and problem.takes_previous:
        raise UserError(f"method={name} on {problem.name}: a time step is solved by solve_evolution")
    entry = METHODS[name]
    config = entry.config() if config is None else config
    if not isinstance(config, entry.config):
        raise UserError(f"method={name}: found a {type(config).__name__}, expected a {entry.config.__name__}")
    return entry.make(problem, config)


def chunk_of(method: Method, steps: int) -> Any:
    """`steps` iterations as one function of the state, for `jax.jit` with the state donated."""

    def chunk(state: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda s, _: method.step(s), state, length=steps)

    return chunk
