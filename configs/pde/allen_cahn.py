"""Reaction and diffusion by implicit Euler: Allen-Cahn in one dimension, or with `--config.dim=2` in two."""

from jaxstack.pde import NpdgConfig
from jaxstack.pde.job import PdeJob
from jaxstack.pde.marching import MarchConfig


def get_config() -> PdeJob:
    """Two time steps of a thousandth."""
    npdg = NpdgConfig(
        tau_u=0.05, tau_phi=0.09, boundary_weight=1.0, preconditioner="reaction_large", strong_penalty=True,
        minres_rtol=1e-4, interior_samples=600, boundary_samples=80, standardize=True,
    )  # fmt: skip
    return PdeJob(equation="allen_cahn", dim=1, march=MarchConfig(npdg=npdg, iterations=300))
