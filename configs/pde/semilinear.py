"""A semilinear elliptic equation on a ball in five dimensions, at a size for two cores."""

from jaxstack.pde.job import PdeJob


def get_config() -> PdeJob:
    """-Delta u + |grad u|^2 / 2 + V = 0 on |x| <= 3."""
    return PdeJob(equation="semilinear", dim=5, budget_s=60.0)
