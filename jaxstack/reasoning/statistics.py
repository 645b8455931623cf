"""Figures about graded answers: pass@k, majority votes, and intervals by bootstrap.

Everything here is numpy in float64 or exact integers; a seed gives the same interval again.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from jaxstack.runtime.errors import UserError

# Indices drawn at once: bounds the memory of a bootstrap over many problems (32 MB).
_DRAWN_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, `low <= high`."""

    low: float
    mean: float
    high: float

    @property
    def degenerate(self) -> bool:
        """Whether no resample differed from the mean: the bootstrap cannot see what it has not met."""
        return self.low == self.high

    def describe(self, trials: int) -> str:
        """`0.973 [0.953, 0.992]`; a degenerate interval of `trials` trials is followed by its rule-of-three bound."""
        text = f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"
        return f"{text} (no variation in {trials}: within {rule_of_three(trials):.3g})" if self.degenerate else text


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of `k` answers is correct, estimated without bias from `n`, of which `c` are.

    1 - C(n - c, k) / C(n, k), in exact integers (Chen et al., Evaluating Large Language Models Trained on Code, eq. 1).

    Raises:
      UserError: not 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise UserError(f"pass@k: found {c} correct of {n} answers, expected 0 to {n}")
    if not 1 <= k <= n:
        raise UserError(f"pass@k: found k = {k} with {n} answers, expected 1 to {n}")
    return float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))


def majority_vote(answers: Sequence[Hashable]) -> int | None:
    """The index of the first answer that says what most say; None where nothing was answered.

    None among the answers is an abstention. Of equally frequent answers the one given first wins.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return None
    most = max(counts.values())
    return next(i for i, answer in enumerate(answers) if answer is not None and counts[answer] == most)


def rule_of_three(trials: int) -> float:
    """3 / trials: the 95 % bound on the rate of what did not happen once in `trials`; at most 1.

    Raises:
      UserError: `trials` is below 1.
    """
    if trials < 1:
        raise UserError(f"rule of three: found {trials} trials, expected at least 1")
    return min(1.0, 3.0 / trials)


def bootstrap_mean(
    values: Shaped[np.ndarray, "*seeds problems"],
    *,
    clusters: Sequence[Hashable] | None = None,
    n: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean over problems, and its 95 % percentile interval.

    Args:
      values: bools or numbers; with a first axis of seeds (training runs), these are resampled, too.
      clusters: for each problem whose it is: problems of one cluster are drawn together. Each its own by default.
      n: resamples.
      seed: of the resampling.

    Raises:
      UserError: no values, values that are not finite, or clusters of another length.
    """
    table = np.asarray(values, np.float64)
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2 or table.size == 0:
        raise UserError(f"bootstrap: found shape {np.shape(values)}, expected [problems] or [seeds, problems]")
    if not np.isfinite(table).all():
        raise UserError("bootstrap: found values that are not finite")
    if n < 1:
        raise UserError(f"bootstrap: found {n} resamples, expected at least 1")
    problems = table.shape[1]
    if clusters is None:
        sums, sizes = table, np.ones(problems, np.int64)
    else:
        if len(clusters) != problems:
            raise UserError(f"bootstrap: found {len(clusters)} clusters, expected one for each of {problems} problems")
        numbers: dict[Hashable, int] = {}
        member = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
        sizes = np.bincount(member)
        sums = np.stack([np.bincount(member, weights=row) for row in table])
    means = _resampled_means(sums, sizes, n, np.random.default_rng(seed))
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(table.mean()), float(high))


def paired_bootstrap(
    a: Shaped[np.ndarray, "*seeds problems"],
    b: Shaped[np.ndarray, "*seeds problems"],
    *,
    clusters: Sequence[Hashable] | None = None,
    n: int = 10_000,
    seed: int = 0,
) -> Interval:
    """mean(a) - mean(b) with its 95 % percentile interval, where both answered the same problems.

    With a first axis of seeds the bootstrap has two levels: seeds and problems are resampled independently of each
    other, and a seed of `a` stays with the same seed of `b`. A difference that never varies gives a degenerate
    interval (`Interval.degenerate`); `rule_of_three` bounds it.

    Args:
      a, b: bools or numbers, the same problem (and seed) at the same place.
      clusters, n, seed: as in `bootstrap_mean`.

    Raises:
      UserError: shapes that differ, or as `bootstrap_mean`.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise UserError(f"paired bootstrap: found shapes {first.shape} and {second.shape}, expected the same problems")
    return bootstrap_mean(first - second, clusters=clusters, n=n, seed=seed)


def _resampled_means(
    sums: Float64[np.ndarray, "seeds clusters"], sizes: Int64[np.ndarray, " clusters"], n: int, rng: np.random.Generator
) -> Float64[np.ndarray, " n"]:
    """Means of `n` resamples: as many clusters as there are, with replacement, and as many seeds, with replacement."""
    seeds, clusters = sums.shape
    equal = bool((sizes == sizes[0]).all())
    means = np.empty(n)
    at_once = max(1, _DRAWN_AT_ONCE // clusters)
    for start in range(0, n, at_once):
        count = min(at_once, n - start)
        drawn = rng.integers(clusters, size=(count, clusters))
        drawn_seeds = rng.integers(seeds, size=(count, seeds))
        weights = np.stack([(drawn_seeds == s).sum(1) for s in range(seeds)], axis=1) / seeds
        total = np.zeros(count)
        for s in range(seeds):
            total += weights[:, s] * sums[s][drawn].sum(1)
        means[start : start + count] = total / (clusters * sizes[0] if equal else sizes[drawn].sum(1))
    return means
