"""The published settings, for an accelerator: networks of 256, thousands of samples, thousands of iterations.

    python -m launch.pde --config=configs/pde/paper.py --workdir=work/paper   # variable, 50 dimensions
    python -m launch.pde --config=configs/pde/paper.py --config.equation=poisson --config.npdg.activation=tanh ...

`get_config(name, dim)` has them all.
"""

import dataclasses
from typing import Any

from jaxstack.pde import NpdgConfig
from jaxstack.pde.job import PdeJob
from jaxstack.pde.marching import MarchConfig
from jaxstack.pde.transport import TransportConfig

_ELLIPTIC = NpdgConfig(
    tau_u=0.05, tau_phi=0.095, tau_psi=0.095, boundary_weight=10.0, minres_rtol=1e-4, minres_max_iterations=1000,
    interior_samples=4000, boundary_samples=4000, cutoff="min", width=256, psi_width=128, depth=6,
)  # fmt: skip
_REACTION = NpdgConfig(
    tau_u=0.05, tau_phi=0.09, tau_psi=0.09, omega=2.0, boundary_weight=1.0, minres_rtol=1e-3, minres_max_iterations=200,
    interior_samples=4000, boundary_samples=80, preconditioner="reaction_large", strong_penalty=True, width=128,
    psi_width=64, depth=5,
)  # fmt: skip


def get_config(equation: str = "variable", dim: int = 50) -> PdeJob:
    """The paper's run of an equation: published step sizes, networks, samples and iterations."""
    replace = dataclasses.replace
    common: dict[str, Any] = {"equation": equation, "dim": dim, "budget_s": None, "method": "npdg"}
    match equation:
        case "poisson":
            return PdeJob(**common, max_iterations=20_000, npdg=replace(_ELLIPTIC, boundary_samples=80 * dim))
        case "variable" if dim <= 20:
            npdg = replace(
                _ELLIPTIC, tau_u=0.1, tau_phi=0.19, tau_psi=0.19, minres_rtol=5e-4, depth=4, activation="softplus",
                boundary_samples=80 * dim,
            )  # fmt: skip
            return PdeJob(**common, max_iterations=3000, npdg=npdg)
        case "variable":
            npdg = replace(_ELLIPTIC, interior_samples=6000, boundary_samples=80 * dim, activation="softplus")
            return PdeJob(**common, max_iterations=3000, npdg=npdg)
        case "semilinear":
            npdg = replace(_ELLIPTIC, depth=4, boundary_samples=40 * dim, minres_max_iterations=800)
            return PdeJob(**common, max_iterations=10_000, npdg=npdg)
        case "allen_cahn" if dim == 1:
            npdg = replace(
                _REACTION, tau_u=0.01, tau_phi=0.02, tau_psi=0.02, omega=1.0, minres_rtol=1e-4,
                minres_max_iterations=800, interior_samples=2400, boundary_samples=2, width=128, psi_width=32, depth=3,
                preconditioner="reaction_small",
            )  # fmt: skip
            return PdeJob(**common, march=MarchConfig(npdg=npdg, iterations=6000))
        case "allen_cahn":
            return PdeJob(**common, march=MarchConfig(npdg=_REACTION, iterations=1000))
    common["method"] = "transport"
    match equation:
        case "transport_mixture":
            transport = TransportConfig(tau_map=0.1, tau_phi=0.15, samples=2400, width=50, depth=3)
            return PdeJob(**common, max_iterations=6000, transport=transport)
        case "transport_gaussians":
            transport = TransportConfig(tau_map=0.05, tau_phi=0.09, samples=2000, width=80, depth=4)
            return PdeJob(**common, max_iterations=12_000, transport=transport)
        case _:
            transport = TransportConfig(
                tau_map=0.005, tau_phi=0.005, omega=5.0, samples=2000, width=120, depth=6, minres_rtol=1e-4,
                image_after=1000,
            )  # fmt: skip
            return PdeJob(**common, max_iterations=20_000, transport=transport)
