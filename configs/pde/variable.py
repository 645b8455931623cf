"""The elliptic equation with a variable coefficient on [-1, 1]^dim, at a size for two cores."""

from jaxstack.pde import NpdgConfig
from jaxstack.pde.job import PdeJob


def get_config() -> PdeJob:
    """Ten dimensions. A heavy boundary: the solution is small there, and its slope is not."""
    return PdeJob(
        equation="variable", dim=10, budget_s=60.0, npdg=NpdgConfig(boundary_weight=100.0, tau_u=0.2, tau_phi=0.2)
    )
