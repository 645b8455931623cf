"""Poisson's equation on the unit cube, at a size for two cores.

python -m launch.pde --config=configs/pde/poisson.py --config.dim=20 --config.budget_s=30 --workdir=work/poisson
"""

from jaxstack.pde.job import PdeJob


def get_config() -> PdeJob:
    """Ten dimensions; `--config.dim` takes any."""
    return PdeJob(equation="poisson", dim=10, budget_s=30.0)
