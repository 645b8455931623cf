"""What would change the answer: more or less traffic, other prices. By solving again."""

import dataclasses
from collections.abc import Mapping, Sequence

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.fleet.allocation.solving import solve

RATE_FACTORS = (0.5, 0.75, 1.0, 1.2, 1.5, 2.0)


@dataclasses.dataclass(frozen=True)
class PriceFlip:
    """Where another choice of types begins: at `factor` times its present price, `types` are rented."""

    name: str
    factor: float
    types: tuple[str, ...]


def costs_by_rate(
    problem: AllocationProblem, factors: Sequence[float] = RATE_FACTORS, *, time_limit_s: float = 10.0
) -> Mapping[float, Allocation]:
    """The plan for each multiple of the rate."""
    rate = problem.workload.rate_rps
    return {
        factor: solve(
            dataclasses.replace(problem, workload=problem.workload.at_rate(rate * factor)), time_limit_s=time_limit_s
        )
        for factor in factors
    }


def price_flips(
    problem: AllocationProblem, *, widest: float = 3.0, steps: int = 10, time_limit_s: float = 10.0
) -> list[PriceFlip]:
    """For each type, the nearest price above and below the present one at which other types are rented than now.

    Args:
      widest: looks from 1 / widest of the price to widest times it.
      steps: of bisection, in the logarithm of the price. The choice may flip more than once; one flip is found.
    """
    base = _rented(solve(problem, time_limit_s=time_limit_s))
    flips = []
    for number, kind in enumerate(problem.types):

        def rented(factor: float, number: int = number) -> tuple[str, ...]:
            types = list(problem.types)
            types[number] = dataclasses.replace(
                types[number], price_usd_per_hour=types[number].price_usd_per_hour * factor
            )
            return _rented(solve(dataclasses.replace(problem, types=tuple(types)), time_limit_s=time_limit_s))

        for end in (1 / widest, widest):
            if rented(end) == base:
                continue
            same, other = 1.0, end
            for _ in range(steps):
                middle = (same * other) ** 0.5
                same, other = (middle, other) if rented(middle) == base else (same, middle)
            flips.append(PriceFlip(kind.name, other, rented(other)))
    return flips


def _rented(allocation: Allocation) -> tuple[str, ...]:
    return tuple(name for name, count in sorted(allocation.counts.items()) if count)
