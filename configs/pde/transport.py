"""The Monge-Ampere equation as optimal transport: Gaussians in five dimensions, at a size for two cores.

`--config.equation=transport_mixture --config.dim=1` and `--config.equation=transport_circle --config.dim=50` are the
paper's other two.
"""

from jaxstack.pde.job import PdeJob
from jaxstack.pde.transport import TransportConfig


def get_config() -> PdeJob:
    """The map between the two is known."""
    return PdeJob(
        equation="transport_gaussians", dim=5, budget_s=60.0,
        transport=TransportConfig(tau_map=0.05, tau_phi=0.09, width=64, depth=4),
    )  # fmt: skip
