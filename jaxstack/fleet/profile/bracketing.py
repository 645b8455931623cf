"""The highest rate that passes a test, found by doubling and halving, bucket after bucket.

Whoever tests is not known here: a probe of a live endpoint (`live.py`), or a function.
"""

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a span of arrivals at one rate came to.

    Args:
      passed: the objective was kept, and no queue grew.
      why: it did not pass; empty if it did.
      concurrency: requests under way, on average.
      possible: False where the endpoint refuses such requests altogether.
    """

    rate_rps: float
    passed: bool
    why: str = ""
    requests: int = 0
    attainment: float = 0.0
    concurrency: float = 0.0
    ttft_p99_s: float = 0.0
    tpot_p50_s: float = 0.0
    tpot_p99_s: float = 0.0
    possible: bool = True

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Found:
    """The highest rate that passed, what was under way then, and all that was tried. `limited`: there was no need to
    look beyond the highest rate allowed.
    """

    rate_rps: float
    concurrency: float
    tried: tuple[ProbeResult, ...]
    limited: bool = False


async def highest_rate(
    probe: Callable[[float], Awaitable[ProbeResult]],
    *,
    start_rps: float,
    lowest_rps: float,
    highest_rps: float,
    tolerance: float = 0.05,
) -> Found:
    """Doubles from `start_rps` until a probe fails (or halves until one passes), then halves what is in between.

    Args:
      lowest_rps: where not even this rate passes, the answer is 0.
      highest_rps: no higher rate is tried.
      tolerance: the answer passes, and a rate at most 1 + tolerance times as high did not.

    Raises:
      UserError: rates that are not in order.
    """
    if not 0 < lowest_rps <= highest_rps or not tolerance > 0:
        raise UserError(
            f"rates: found from {lowest_rps:g} to {highest_rps:g} with tolerance {tolerance:g}, expected 0 < lowest <= "
            "highest and a tolerance > 0"
        )
    tried: list[ProbeResult] = []

    async def test(rate: float) -> bool:
        tried.append(await probe(rate))
        return tried[-1].passed

    def found(limited: bool = False) -> Found:
        passed = [result for result in tried if result.passed]
        best = max(passed, key=lambda result: result.rate_rps, default=None)
        if best is None:
            return Found(0.0, 0.0, tuple(tried))
        return Found(best.rate_rps, best.concurrency, tuple(tried), limited)

    good, bad = 0.0, float("inf")
    rate = min(max(start_rps, lowest_rps), highest_rps)
    while True:
        if await test(rate):
            good = rate
            if rate >= highest_rps:
                return found(limited=True)
            if bad < float("inf"):
                break
            rate = min(2 * rate, highest_rps)
        else:
            bad = rate
            if rate <= lowest_rps or not tried[-1].possible:
                return found()
            if good > 0:
                break
            rate = max(rate / 2, lowest_rps)
    while bad > good * (1 + tolerance):
        middle = (good * bad) ** 0.5
        if await test(middle):
            good = middle
        else:
            bad = middle
    return found()
