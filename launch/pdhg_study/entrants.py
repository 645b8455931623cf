"""Who runs on what: problems with the error to reach, methods with their settings."""

import dataclasses
from typing import Any

from jaxstack.pde import NpdgConfig, Stage
from jaxstack.pde.baselines.first_order import TrainConfig
from jaxstack.pde.baselines.second_order import CurvatureConfig
from jaxstack.pde.compare import Case, Entrant

POISSON = (Case("poisson", 10, 0.05), Case("poisson", 20, 0.05), Case("poisson", 50, 0.2))
"""The headline's, with what counts as solved: a constant has 1, the best linear function 0.2."""
VARIABLE = (Case("variable", 10, 0.2), Case("variable", 20, 0.2), Case("variable", 50, 0.3))
LOW = (Case("poisson", 2, 0.01),)
FLOOR = (Case("poisson", 20, 0.01), Case("poisson", 50, 0.03), Case("poisson-rotated", 20, 0.03))
"""Where the error at equal time is reported, with what is aimed at."""

_SAMPLES = {2: (400, 200), 10: (400, 200), 20: (400, 200), 50: (1000, 500)}
"""Interior and boundary samples of an iteration, the same for every method but those tuned in this, too."""


def config_of(entrant: Entrant) -> Any:
    """Its settings; of a single method."""
    assert entrant.config is not None
    return entrant.config


def npdg(case: Case) -> Entrant:
    """The primal-dual method."""
    inner, edge = _SAMPLES[case.dim]
    config = NpdgConfig(interior_samples=inner, boundary_samples=edge)
    if case.equation == "variable":
        config = dataclasses.replace(config, preconditioner="kappa_nabla")
    return Entrant("npdg", "npdg", config)


def adam(case: Case) -> Entrant:
    """The paper's rival: the same network and sample sizes."""
    inner, edge = _SAMPLES[case.dim]
    return Entrant("pinn_adam", "pinn_adam", TrainConfig(interior_samples=inner, boundary_samples=edge))


def tuned_adam(case: Case) -> Entrant:
    """The practitioner's, free in its batch and schedule."""
    return Entrant("pinn_adam_tuned", "pinn_adam", TrainConfig(interior_samples=200, boundary_samples=100))


def main(case: Case) -> list[Entrant]:
    """Those of the headline."""
    return [npdg(case), adam(case), tuned_adam(case)]


def rivals(case: Case) -> list[Entrant]:
    """All others."""
    inner, edge = _SAMPLES[case.dim]
    curved = CurvatureConfig(interior_samples=300, boundary_samples=200)
    trained = TrainConfig(interior_samples=inner, boundary_samples=edge)
    return [
        Entrant("pinn_lbfgs", "pinn_lbfgs", dataclasses.replace(curved, interior_samples=inner, boundary_samples=edge)),
        Entrant("pinn_engd", "pinn_engd", curved),
        Entrant("pinn_spring", "pinn_spring", curved),
        Entrant("deepritz", "deepritz", trained),
        Entrant("wan", "wan", dataclasses.replace(trained, test_learning_rate=1e-2)),
    ]


def floor(case: Case) -> list[Entrant]:
    """For the error at equal time. One network for all: wider than the paper's miniature, its units start with one
    coordinate each (see `Mlp.inputs_per_unit`). Of the solution that no axis helps with, the method with and without.
    """
    network: dict[str, Any] = {"width": 128, "depth": 3, "inputs_per_unit": 1}
    # Few points of the inside and many of the boundary, which has most of the volume's neighbourhood in high dimension.
    inner = 100 if case.dim > 32 else 200
    ours: dict[str, Any] = {
        "interior_samples": inner,
        "boundary_samples": 400,
        "boundary_weight": 30.0,
        "phi_width": 64,
    }
    curved = CurvatureConfig(averaging=0.8, **network)
    cosine = TrainConfig(
        learning_rate=3e-3, decay_steps=3000 if case.dim > 32 else 6000, boundary_weight=1000.0, interior_samples=200,
        boundary_samples=200, **network,
    )  # fmt: skip

    def primal_dual(**network: Any) -> str | tuple[Stage, ...]:
        config = NpdgConfig(**ours, **network)
        if case.dim > 32:
            return (Stage("npdg", config),)
        polish = CurvatureConfig(averaging=0.8, **network)
        return (Stage("npdg", config, 0.1), Stage("pinn_engd", polish, 0.9))

    lbfgs = CurvatureConfig(interior_samples=1000, boundary_samples=500, renew=200, **network)
    best = Entrant("npdg and polish" if case.dim <= 32 else "npdg", primal_dual(**network))
    if case.equation == "poisson-rotated":
        return [best, Entrant("npdg, dense start", primal_dual(**(network | {"inputs_per_unit": None})))]
    # In the highest dimensions natural gradients of the residual see too few directions in an iteration to compete.
    natural = [
        Entrant("pinn_spring", "pinn_spring", dataclasses.replace(curved, momentum=0.5)),
        Entrant("pinn_engd", "pinn_engd", curved),
    ]
    return [
        best,
        *(natural if case.dim <= 32 else ()),
        Entrant("pinn_adam, cosine", "pinn_adam", cosine),
        Entrant("pinn_lbfgs", "pinn_lbfgs", lbfgs),
    ]
