"""The paper's rule, and the variants it is compared with: one logistic curve for each entry, fitted to its labels.

Source: Schroeder et al., "vCache: Verified Semantic Prompt Caching" (arXiv 2502.03771; the first version, "Adaptive
Semantic Prompt Caching with VectorQ", has the same curve with three regions of similarity: never answer, try at random,
answer; here, tau = 1, between, and tau <= 0). The guarantee assumes that the curve is logistic, that an entry's
similarities are independent and equally distributed, and that labels are right.
"""

import functools
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import expit, ndtri

from jaxstack.serving.semantic_cache.policy import (
    ALWAYS,
    NEVER,
    NO_ENTRY,
    Cosines,
    Decisions,
    Each,
    Nearest,
    Policy,
    check_delta,
    cosines,
    deltas,
    nearest_only,
)

# Every entry starts with two observations that nobody made: unlike is wrong, equal is right.
_PSEUDO = ((0.0, 0.0), (1.0, 1.0))
_FEWEST = 6
_EPSILONS = np.linspace(1e-6, 1 - 1e-6, 50)
_QUANTILES = ndtri(1 - _EPSILONS)
# Newton on separable labels runs away without these.
_RIDGE, _LONGEST_STEP, _STEPS, _TOLERANCE = 1e-6, 20.0, 100, 1e-8
# Variance of the threshold where labels are perfectly separated, by how many there are; linear in between.
_SEPARATED_AT, _SEPARATED_VARIANCE = (6, 10, 20, 30), (0.0354, 0.0194, 0.0131, 0.0080)


class Fit(NamedTuple):
    """sigma(gamma (s - t)), and how sure t is."""

    t: float
    gamma: float
    variance: float


def fit_logistic(similarity: Float[np.ndarray, "n"], correct: Float[np.ndarray, "n"]) -> Fit:
    """The maximum-likelihood curve, t and gamma rounded to three decimals, t in [0, 1]. Needs both labels."""
    s, c = np.asarray(similarity, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    intercept, slope = 0.0, 0.0
    for _ in range(_STEPS):
        p = expit(intercept + slope * s)
        missing, weight = c - p, p * (1 - p)
        weighted = weight * s
        # Newton's step: the 2x2 system by hand, since this runs after every label.
        g0, g1 = float(missing.sum()) - _RIDGE * intercept, float(missing @ s) - _RIDGE * slope
        h00, h01, h11 = float(weight.sum()) + _RIDGE, float(weighted.sum()), float(weighted @ s) + _RIDGE
        determinant = h00 * h11 - h01 * h01
        step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        longest = max(abs(step0), abs(step1))
        scale = min(1.0, _LONGEST_STEP / longest) if longest > 0 else 0.0
        intercept, slope = intercept + scale * step0, slope + scale * step1
        if longest < _TOLERANCE:
            break
    slope = max(slope, 1e-6)
    t = round(min(max(-intercept / slope, 0.0), 1.0), 3)
    gamma = max(round(slope, 3), 1e-6)
    return Fit(t, gamma, _threshold_variance(s, c, intercept, slope))


def _threshold_variance(
    s: Float[np.ndarray, "n"],
    c: Float[np.ndarray, "n"],
    intercept: float,
    slope: float,
) -> float:
    right, wrong = s[c == 1], s[c == 0]
    if right.min() > wrong.max():
        return float(np.interp(len(s), _SEPARATED_AT, _SEPARATED_VARIANCE))
    p = expit(intercept + slope * s)
    x = np.stack([np.ones_like(s), s], axis=1)
    information = (x * (p * (1 - p))[:, None]).T @ x + 1e-12 * np.eye(2)
    g = np.array([-1 / slope, intercept / slope**2])
    return max(0.0, float(g @ np.linalg.solve(information, g)))


def exploration(
    fits: Float[np.ndarray, "n 3"], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
    """tau(s): the least probability of exploring with which an answer is right with probability 1 - delta.

    Exploring is always right, so P(right) = tau + (1 - tau) P(right | s) >= 1 - delta iff
    tau >= 1 - delta / (1 - alpha), for any alpha <= P(right | s). With probability 1 - eps, t lies below its upper
    confidence bound t'(eps); alpha = (1 - eps) sigma(gamma (s - t')); the best eps is taken.
    """
    t, gamma, variance = fits.T
    upper = np.clip(t[:, None] + _QUANTILES * np.sqrt(variance)[:, None], 0.0, 1.0)
    alpha = (1 - _EPSILONS) * expit(gamma[:, None] * (similarity[:, None] - upper))
    return (1 - delta[:, None] / np.maximum(1 - alpha, 1e-12)).min(axis=1)


class _Observations:
    """Labels of one entry, and what was last made of them."""

    def __init__(self) -> None:
        self.pairs: list[tuple[float, float]] = list(_PSEUDO)
        self._fit: Fit | None = None

    def add(self, similarity: float, correct: bool) -> None:
        self.pairs.append((similarity, float(correct)))
        self._fit = None

    @property
    def enough(self) -> bool:
        return len(self.pairs) >= _FEWEST

    @property
    def fit(self) -> Fit:
        if self._fit is None:
            pairs = np.array(self.pairs)
            self._fit = fit_logistic(pairs[:, 0], pairs[:, 1])
        return self._fit


class _PerEntryRule(Policy):
    """A rule that looks at the labels of the nearest entry alone."""

    def __init__(self, delta: float):
        self.delta = check_delta(delta)
        self._entries: dict[int, _Observations] = {}

    def decide(self, entries: Nearest, similarity: Cosines, u: Each, delta: Each | None = None) -> Decisions:
        if not entries.shape[1]:
            return nearest_only(entries, np.full(len(u), NEVER), u)
        nearest = entries[:, 0].tolist()
        return nearest_only(entries, self.taus(nearest, similarity[:, 0], deltas(self.delta, delta, len(u))), u)

    def taus(
        self, entries: list[int], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        """tau of each entry at each similarity; 1 while it has too few labels."""
        seen = [self._observations(entry) for entry in entries]
        tau = np.full(len(entries), NEVER)
        ready = [i for i, o in enumerate(seen) if o is not None and o.enough]
        if ready:
            tau[ready] = self._taus([o for i in ready if (o := seen[i])], cosines(similarity[ready]), delta[ready])
        return tau

    def label(self, entry: int, similarity: float, correct: bool | None, tau: float, *, controls: bool = True) -> None:
        if correct is not None and entry != NO_ENTRY:
            self._entries.setdefault(self._key(entry), _Observations()).add(float(cosines(similarity)), correct)

    def forget(self, entry: int) -> None:
        self._entries.pop(entry, None)

    def _key(self, entry: int) -> int:
        return entry

    def _observations(self, entry: int) -> _Observations | None:
        return None if entry == NO_ENTRY else self._entries.get(self._key(entry))

    def _taus(
        self, seen: list[_Observations], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        """tau where there are enough labels."""
        raise NotImplementedError


class VCacheRule(_PerEntryRule):
    """The paper's rule. See `exploration`."""

    name = "vcache"

    def _taus(
        self, seen: list[_Observations], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        return exploration(np.array([o.fit for o in seen]), similarity, delta)


class GlobalThreshold(VCacheRule):
    """The paper's rule with one curve for all entries."""

    name = "global"
    _ALL: ClassVar[int] = 0

    def _key(self, entry: int) -> int:
        return self._ALL

    def forget(self, entry: int) -> None:
        """What it taught was never its own."""


class SigmoidOnly(_PerEntryRule):
    """Answers iff s >= t: the curve without its doubt."""

    name = "sigmoid-only"

    def _taus(
        self, seen: list[_Observations], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        return _answer_iff(similarity >= np.array([o.fit.t for o in seen]))


class SigmoidProbability(_PerEntryRule):
    """Answers iff the curve says that it is right with probability 1 - delta."""

    name = "sigmoid-probability"

    def _taus(
        self, seen: list[_Observations], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        t, gamma, _ = np.array([o.fit for o in seen]).T
        return _answer_iff(expit(gamma * (similarity - t)) >= 1 - delta)


class WilsonIID(_PerEntryRule):
    """Answers above a threshold that enough wrong labels lie below; believes nothing but that they are i.i.d."""

    name = "wilson-iid"

    def _taus(
        self, seen: list[_Observations], similarity: Float[np.ndarray, "n"], delta: Float[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        thresholds = [wilson_threshold(tuple(o.pairs), bound) for o, bound in zip(seen, delta.tolist(), strict=True)]
        return _answer_iff(similarity > np.array(thresholds))


@functools.lru_cache(maxsize=4096)
def wilson_threshold(pairs: tuple[tuple[float, float], ...], delta: float) -> float:
    """The smallest threshold of which, for some eps, with confidence 1 - eps, errors above it stay below delta.

    delta' = delta n / n_wrong; for eps < delta', the Wilson lower bound of F_wrong(threshold) must exceed
    1 - (delta' - eps) / (1 - eps). Infinity if there is none.
    """
    wrong = np.array([s for s, c in pairs if c == 0.0])
    share = delta * len(pairs) / len(wrong)
    thresholds = np.linspace(0, 1, 100)
    below = (wrong[:, None] <= thresholds).mean(axis=0)
    use = share > _EPSILONS
    lower = wilson_lower(below[:, None], len(wrong), _QUANTILES[use])
    enough = (lower > 1 - (share - _EPSILONS[use]) / (1 - _EPSILONS[use])).any(axis=1)
    return float(thresholds[enough].min()) if enough.any() else float("inf")


def wilson_lower(share: Float[np.ndarray, "*n"], count: int, z: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Lower end of the one-sided Wilson score interval."""
    centre = share + z * z / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count)


def _answer_iff(sure: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return np.where(sure, ALWAYS, NEVER)


PAPER_RULES: dict[str, type[Any]] = {
    rule.name: rule for rule in (VCacheRule, GlobalThreshold, SigmoidOnly, SigmoidProbability, WilsonIID)
}
