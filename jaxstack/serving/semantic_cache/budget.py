"""Keeps the error below delta whatever the labels do.

A policy believes a model of its entries. This believes nothing: a request is explored with a probability tau that is
known and never below tau_min, so the labels of explored requests tell, without bias, how often answering from the cache
would have been wrong. If that exceeds what was promised, the policy is given a smaller delta, down to none at all.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# Share of what is wanted below which nothing is answered from the cache any more: delta / 50.
_LOWEST = -math.log(50)
# Labels that do not come: of about how many of the latest explored requests, from how many on, and how many may.
_WINDOW, _ENOUGH, _MISSING = 100, 20, 0.2


class ErrorEstimate(NamedTuple):
    """The share of wrong answers among all requests, estimated without knowing any answer to be right.

    Attributes:
      error: the estimate.
      half_width: of its 95 % confidence interval.
      requests: that it is of.
    """

    error: float
    half_width: float
    requests: int


class ErrorBudget:
    """The controller of one tenant.

    Explored: e = (1 - tau) / tau * [the entry was wrong]; answered from the cache: e = 0. Then E[e] is the chance that
    the cache would have answered wrongly. x <- min(0, x + eta (1 - e / (aim delta))), and the policy's bound is
    delta exp(x); below delta / 50 it is none. Since x <= 0 only ever falls by what e adds,

        mean(e) <= aim delta + (aim delta log 50 / eta + (1 - tau_min) / tau_min) / n

    for every sequence of labels, plus (1 - tau_min) / (tau_min n) for each label that is still to come.

    Args:
      delta: errors a request, at most.
      tau_min: the least probability of exploring that the policy may use.
      eta: step size.
      aim: share of delta that is steered to. The rest is for what the first errors cost until they are noticed.
      max_pending: labels with tau < 1 that may be outstanding; while there are that many, nothing is answered.
      strict_labels: a label that never comes counts as an error. Otherwise labels are assumed to be missing at random.
    """

    def __init__(
        self,
        delta: float,
        tau_min: float,
        eta: float = 0.002,
        max_pending: int = 64,
        strict_labels: bool = False,
        aim: float = 0.9,
    ):
        self.delta, self.tau_min, self.eta, self.aim = delta, tau_min, eta, aim
        self.max_pending, self.strict_labels = max_pending, strict_labels
        self.x = 0.0
        self.requests = 0
        self.pending = 0
        self._sum = self._squares = 0.0
        self._missing, self._asked = 0.0, 0.0

    # ------------------------------------------------------------------------------------------------------- requests

    def answered(self) -> None:
        """A request was answered from the cache."""
        self.requests += 1
        self._step(0.0)

    def explored(self, tau: float) -> None:
        """A request went to the model although it might have been answered with probability 1 - tau > 0."""
        self.requests += 1
        if tau < 1:
            self.pending += 1
        else:
            self._step(0.0)

    def labelled(self, tau: float, correct: bool) -> None:
        """The label of an explored request."""
        self._heard(missing=False)
        if tau < 1:
            self.pending = max(0, self.pending - 1)
            self._step(0.0 if correct else (1 - tau) / tau)

    def missing(self, tau: float) -> None:
        """The label of an explored request will not come."""
        self._heard(missing=True)
        if tau < 1:
            self.pending = max(0, self.pending - 1)
            if self.strict_labels:
                self._step((1 - tau) / tau)

    # --------------------------------------------------------------------------------------------------------- state

    @property
    def delta_eff(self) -> float:
        """What the policy may spend; 0 while nothing may be answered."""
        return 0.0 if self.stopped else self.delta * math.exp(self.x)

    @property
    def stopped(self) -> str | None:
        """Why nothing may be answered from the cache; None if it may."""
        if self.x < _LOWEST:
            return "budget"
        if self.pending >= self.max_pending:
            return "pending"
        if self._asked >= _ENOUGH and self._missing > _MISSING * self._asked:
            return "labels"
        return None

    @property
    def bound(self) -> float:
        """What mean(e) cannot exceed, for any labels whatever, those to come included."""
        if not self.requests:
            return self.delta
        most = (1 - self.tau_min) / self.tau_min
        slack = self.aim * self.delta * max(-_LOWEST, -self.x) / self.eta + most * (1 + self.pending)
        return self.aim * self.delta + slack / self.requests

    def estimate(self) -> ErrorEstimate:
        return estimate_of(self.state())

    def state(self) -> dict[str, Any]:
        # A label that is outstanding when the process ends never comes.
        return {"x": self.x, "requests": self.requests, "sum": self._sum, "squares": self._squares}

    def restore(self, state: dict[str, Any]) -> None:
        self.x, self.requests = min(0.0, float(state["x"])), int(state["requests"])
        self._sum, self._squares = float(state["sum"]), float(state["squares"])

    def _step(self, e: float) -> None:
        self._sum += e
        self._squares += e * e
        self.x = min(0.0, self.x + self.eta * (1 - e / (self.aim * self.delta)))

    def _heard(self, *, missing: bool) -> None:
        keep = 1 - 1 / _WINDOW
        self._asked = self._asked * keep + 1
        self._missing = self._missing * keep + missing


def estimate_of(state: Mapping[str, Any]) -> ErrorEstimate:
    """The estimate that goes with `ErrorBudget.state()`."""
    requests = int(state["requests"])
    if not requests:
        return ErrorEstimate(0.0, math.nan, 0)
    mean = float(state["sum"]) / requests
    variance = max(0.0, float(state["squares"]) / requests - mean * mean)
    return ErrorEstimate(mean, 1.96 * math.sqrt(variance / requests), requests)
