"""The policies by name: ours, the paper's with its variants, and what others do."""

import math
from typing import Any

import numpy as np

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.budget import ErrorBudget
from jaxstack.serving.semantic_cache.paper_rules import (
    PAPER_RULES,
    GlobalThreshold,
    SigmoidOnly,
    SigmoidProbability,
    VCacheRule,
    WilsonIID,
)
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
from jaxstack.serving.semantic_cache.posterior import PosteriorTable, ThresholdGrid

__all__ = [
    "POLICIES",
    "PROMISING",
    "BayesThreshold",
    "Decisions",
    "GPTCacheRule",
    "GlobalThreshold",
    "NoCache",
    "Policy",
    "SigmoidOnly",
    "SigmoidProbability",
    "StaticThreshold",
    "VCacheRule",
    "WilsonIID",
    "make_policy",
]

# Candidates this close to the nearest one's similarity are as good: the one with the best record answers.
_AS_NEAR = 0.05


class NoCache(Policy):
    """Answers nothing."""

    name, learns = "none", False

    def decide(self, entries: Nearest, similarity: Cosines, u: Each, delta: Each | None = None) -> Decisions:
        return nearest_only(entries, np.full(len(u), NEVER), u)


class StaticThreshold(Policy):
    """Answers iff s >= threshold, the same for every entry."""

    name, learns = "static", False

    def __init__(self, threshold: float):
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold: found {threshold}, expected a number from 0 to 1", exit_code=2)
        self.threshold = float(threshold)

    def decide(self, entries: Nearest, similarity: Cosines, u: Each, delta: Each | None = None) -> Decisions:
        near = cosines(similarity[:, :1]).max(axis=1, initial=-1.0) >= self.threshold
        return nearest_only(entries, np.where(near, ALWAYS, NEVER), u)


class GPTCacheRule(Policy):
    """GPTCache's rule: a rank 4 - |x - y|^2 of at least 4 threshold, and a coin whether to look at all.

    Args:
      threshold: 0.8 is its default; of unit vectors, that is a cosine of 0.6.
      temperature: above 0, the cache is passed over with the softmax probability of 0 against 1; from 2 on, always.
    """

    name, learns = "gptcache", False

    def __init__(self, threshold: float = 0.8, temperature: float = 0.0):
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold: found {threshold}, expected a number from 0 to 1", exit_code=2)
        self.threshold, self.temperature = float(threshold), float(temperature)
        if temperature <= 0:
            self._passed_over = ALWAYS
        elif temperature >= 2:
            self._passed_over = NEVER
        else:
            self._passed_over = 1 / (1 + math.exp(1 / temperature))

    def decide(self, entries: Nearest, similarity: Cosines, u: Each, delta: Each | None = None) -> Decisions:
        nearest = np.asarray(similarity[:, :1], dtype=np.float64).max(axis=1, initial=-1.0)
        near = 4 - (2 - 2 * nearest) >= 4 * self.threshold
        return nearest_only(entries, np.where(near, self._passed_over, NEVER), u)


class BayesThreshold(Policy):
    """The default: the posterior mean of each entry's curve, a prior that entries share, and a budget of errors.

    tau = max(tau_min, 1 - delta_eff / (1 - alpha)), where alpha is `PosteriorTable.alpha`. What is asked is a bound on
    the expected error, and for that the posterior mean is the exact quantity. delta_eff comes from `ErrorBudget`,
    which holds the bound where the posterior is wrong, as under drift; `budget=None` leaves it out, for studies.

    Args:
      k: candidates; of those about as near as the nearest, the one with the largest alpha answers.
    """

    name = "bayes"

    def __init__(
        self,
        delta: float = 0.02,
        tau_min: float = 0.05,
        k: int = 4,
        grid: ThresholdGrid | None = None,
        controller: bool = True,
        max_pending: int = 64,
        strict_labels: bool = False,
    ):
        self.delta = check_delta(delta)
        if not 0 < tau_min < 1:
            raise UserError(f"tau_min: found {tau_min}, expected more than 0 and less than 1", exit_code=2)
        if k < 1:
            raise UserError(f"k: found {k}, expected at least 1", exit_code=2)
        self.tau_min, self.k, self.controller = float(tau_min), int(k), controller
        self.table = PosteriorTable(grid)
        self.budget = ErrorBudget(self.delta, self.tau_min, max_pending=max_pending, strict_labels=strict_labels)

    def decide(self, entries: Nearest, similarity: Cosines, u: Each, delta: Each | None = None) -> Decisions:
        n = len(u)
        column, alpha, tau = np.full(n, -1), np.full(n, np.nan), np.full(n, NEVER)
        hit = np.zeros(n, dtype=bool)
        entries, s = entries[:, : self.k], cosines(similarity[:, : self.k])
        asked = deltas(self.delta, delta, n).tolist()
        if entries.shape[1]:
            there = entries != NO_ENTRY
            near = there & (s >= s[:, :1] - _AS_NEAR)
            scores = np.where(near, self.table.alpha(entries, s), -1.0)
            best = scores.argmax(axis=1)
            column = np.where(there[:, 0], best, -1)
            alpha = np.where(there[:, 0], scores[np.arange(n), best], np.nan)
        # One after the other: each decision moves the budget.
        for i in range(n):
            if column[i] >= 0:
                tau[i] = self._tau(float(alpha[i]), asked[i])
                hit[i] = u[i] > tau[i]
            if hit[i]:
                self.budget.answered()
            else:
                self.budget.explored(float(tau[i]))
        return Decisions(column, alpha, tau, hit)

    def _tau(self, alpha: float, asked: float) -> float:
        if not self.controller:
            return max(self.tau_min, 1 - asked / max(1 - alpha, 1e-12))
        effective = min(1.0, asked / self.delta) * self.budget.delta_eff
        return max(self.tau_min, 1 - effective / max(1 - alpha, 1e-12)) if effective else NEVER

    def label(self, entry: int, similarity: float, correct: bool | None, tau: float, *, controls: bool = True) -> None:
        if correct is None:
            if controls:
                self.budget.missing(tau)
            return
        if controls:
            self.budget.labelled(tau, correct)
        if entry == NO_ENTRY:
            return
        self.table.add(entry, similarity, correct)
        if self.refreshes_itself and self.table.due:
            self.table.learn_prior()

    def missing(self, tau: float) -> None:
        self.budget.missing(tau)

    def forget(self, entry: int) -> None:
        self.table.forget(entry)

    @property
    def due(self) -> bool:
        return self.table.due

    def refresh(self) -> None:
        self.table.learn_prior()

    @property
    def stopped(self) -> str | None:
        return self.budget.stopped if self.controller else None

    def state(self) -> dict[str, Any]:
        prior = {"grid": self.table.grid.version, "pi": self.table.prior.tolist()}
        return {"prior": prior, "budget": self.budget.state()}

    def restore(self, state: dict[str, Any]) -> None:
        prior = state.get("prior")
        if prior and prior.get("grid") == self.table.grid.version:
            self.table.restore_prior(prior["pi"], self.table.labels)
        if state.get("budget"):
            self.budget.restore(state["budget"])


# ----------------------------------------------------------------------------------------------------------- by name

PROMISING: tuple[str, ...] = ("bayes", *PAPER_RULES)
"""Those that have a delta."""
POLICIES = (*PROMISING, "static", "gptcache", "none")


def make_policy(
    name: str, *, delta: float = 0.02, tau_min: float = 0.05, k: int = 4, threshold: float = 0.8, **options: Any
) -> Policy:
    """A policy of one tenant. Raises UserError for an unknown name or a value out of range.

    Args:
      threshold: of "static" (a cosine) and "gptcache" (its own scale).
      options: further ones of `BayesThreshold`.
    """
    if name == "bayes":
        return BayesThreshold(delta, tau_min, k, **options)
    if name in PAPER_RULES:
        rule: Policy = PAPER_RULES[name](delta)
        return rule
    if name == "static":
        return StaticThreshold(threshold)
    if name == "gptcache":
        return GPTCacheRule(threshold)
    if name == "none":
        return NoCache()
    raise UserError(f"policy: found {name!r}, expected one of {', '.join(POLICIES)}", exit_code=2)
