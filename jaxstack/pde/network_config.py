"""What the methods have in common: the settings of the solution's network."""

import dataclasses
from typing import Any

import numpy as np

from jaxstack.pde.domains import Box
from jaxstack.pde.networks import ACTIVATIONS, Mlp
from jaxstack.pde.problem import Periodic, Problem
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The solution's network.

    Attributes:
      width, depth, activation: depth counts linear layers.
      standardize: it sees the domain's box as [-1, 1]^dim.
      inputs_per_unit: how many coordinates a unit of the first layer starts with, see `Mlp`; None for all of them.
    """

    width: int = 64
    depth: int = 4
    activation: str = "tanh"
    standardize: bool = False
    inputs_per_unit: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"width={self.width}: expected at least 1")
        if self.depth < 2:
            raise UserError(f"depth={self.depth}: expected at least 2 linear layers")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.inputs_per_unit is not None and self.inputs_per_unit < 1:
            raise UserError(f"inputs_per_unit={self.inputs_per_unit}: expected at least 1, or none")

    def network(self, problem: Problem) -> Mlp:
        """The solution's."""
        return Mlp.of(
            problem.dim,
            self.width,
            self.depth,
            activation=self.activation,
            inputs_per_unit=self.inputs_per_unit,
            **network_options(problem, self.standardize),
        )


def network_options(problem: Problem, standardize: bool) -> dict[str, Any]:
    """What a problem asks of its networks' inputs."""
    if isinstance(problem.boundary, Periodic):
        assert isinstance(problem.domain, Box)
        return {"periods": problem.domain.sides}
    if not standardize:
        return {}
    low, high = (np.asarray(corner) for corner in problem.domain.box)
    return {"center": tuple(map(float, (low + high) / 2)), "half_width": tuple(map(float, (high - low) / 2))}
