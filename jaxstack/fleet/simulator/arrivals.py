"""Requests by their lengths and times."""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from jaxstack.engine.scheduling.arrivals import gamma_arrivals
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A request, and what became of it.

    Attributes:
      first_s, end_s: when it had its first and its last token; NaN before.
      replica: who served it.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    first_s: float = math.nan
    end_s: float = math.nan
    replica: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to its first token."""
        return self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 where there is only one."""
        return (self.end_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def requests_of(
    lengths: tuple[Sequence[int], Sequence[int]],
    rate_rps: float | Sequence[tuple[float, float]],
    duration_s: float,
    *,
    seed: int = 0,
    burstiness: float = 1.0,
) -> list[Request]:
    """Requests whose lengths are drawn, in pairs, from those given, and whose times are a Gamma process.

    Args:
      lengths: input and output tokens of requests that were seen.
      rate_rps: or, for a rate that changes, pairs (until_s, rate_rps) one after the other; the last holds on.
      burstiness: coefficient of variation of the gaps; 1 is Poisson.

    Raises:
      UserError: no lengths, a duration or rate that is not positive.
    """
    if not len(lengths[0]) or len(lengths[0]) != len(lengths[1]):
        raise UserError(f"lengths: found {len(lengths[0])} and {len(lengths[1])}, expected as many of both, at least 1")
    if not duration_s > 0:
        raise UserError(f"duration_s: found {duration_s}, expected a positive number of seconds")
    pieces = [(math.inf, float(rate_rps))] if isinstance(rate_rps, int | float) else [(t, r) for t, r in rate_rps]
    if not pieces or any(rate < 0 or not math.isfinite(rate) for _, rate in pieces):
        raise UserError(f"rate_rps: found {rate_rps}, expected rates >= 0")
    draw = random.Random(f"{seed} arrivals")
    # Requests are counted by a clock that runs at the current rate, and put back on ours.
    begins = [0.0, *(until for until, _ in pieces[:-1])]
    if any(b <= a for a, b in itertools.pairwise(begins)):
        raise UserError("rate_rps: found times that do not increase, expected pairs (until_s, rate_rps) in order")
    rates = [rate for _, rate in pieces]
    counted = [0.0]
    for begin, end, rate in zip(begins, begins[1:], rates):
        counted.append(counted[-1] + (end - begin) * rate)
    total = counted[-1] + max(0.0, duration_s - begins[-1]) * rates[-1]
    if total <= 0:
        return []
    places = np.fromiter(gamma_arrivals(1.0, total, draw, cv=burstiness), dtype=float)
    piece = np.searchsorted(counted, places, side="right") - 1
    at_rate = np.array(rates)[piece]
    times = np.array(begins)[piece] + (places - np.array(counted)[piece]) / np.maximum(at_rate, 1e-300)
    times = times[times < duration_s]
    chosen = np.random.default_rng([seed, 1]).integers(len(lengths[0]), size=len(times))
    read, written = np.asarray(lengths[0])[chosen], np.asarray(lengths[1])[chosen]
    return [Request(t, max(1, i), max(1, o)) for t, i, o in zip(times.tolist(), read.tolist(), written.tolist())]
