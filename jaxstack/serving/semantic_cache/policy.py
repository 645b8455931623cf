"""What every rule for answering from the cache can do.

A policy sees similarities and labels, never texts. It is one tenant's: what it learns is learned from that tenant's
requests alone. It is plain numpy and has no clock, so a study replays streams through the very object that a server
asks. It is not thread-safe; whoever shares one holds a lock.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxstack.runtime.errors import UserError

Nearest = Int[np.ndarray, "requests k"]
"""Of each request, the ids of its nearest entries, nearest first."""
Cosines = Float[np.ndarray, "requests k"]
"""Their similarities."""
Each = Float[np.ndarray, "requests"]
"""One number for each request."""

# No candidate: the entry id of a column that is not filled.
NO_ENTRY = -1
# tau of a decision without a coin: always answer from the cache, or never.
ALWAYS, NEVER = -1.0, 1.0


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What became of a batch of requests.

    Attributes:
      column: the candidate that would answer; -1 where there is none.
      alpha: the policy's belief that this candidate's answer is right; NaN from policies that hold none.
      tau: the probability of exploring: of asking the model although there is a candidate. At most 0: never.
      hit: whether the candidate answers.
    """

    column: Int[np.ndarray, "requests"]
    alpha: Float[np.ndarray, "requests"]
    tau: Float[np.ndarray, "requests"]
    hit: Bool[np.ndarray, "requests"]


class Policy:
    """Decides whether cached entries answer.

    The life of a request: `decide`. A hit ends there. Otherwise the model answers; if there was a candidate and the
    policy `learns`, its answer is compared with the candidate's and `label` is told. The new answer becomes an entry
    unless the label said that the candidate's was right (`learns`), or always (not `learns`).

    Attributes:
      name: as configurations spell it.
      learns: explored requests want labels.
      k: how many candidates `decide` looks at.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = True
    k: int = 1

    def decide(self, entries: Nearest, similarity: Cosines, u: Each, delta: Each | None = None) -> Decisions:
        """Decides for a batch; the same as one after the other.

        Args:
          entries: ids of the nearest entries, nearest first; `NO_ENTRY` fills a row up. May have more columns than `k`.
          similarity: their cosines; whatever is outside [0, 1] is clipped.
          u: one uniform number in [0, 1) for each request: explore if u <= tau.
          delta: lower error bounds for single requests.
        """
        raise NotImplementedError

    def label(self, entry: int, similarity: float, correct: bool | None, tau: float, *, controls: bool = True) -> None:
        """Whether `entry`'s answer would have been right for a request that was explored with probability `tau`.

        Args:
          correct: None if nobody can tell.
          controls: the request was explored by the policy's own coin. False for what users report: it teaches, but who
            reports is no random sample.
        """

    def forget(self, entry: int) -> None:
        """The entry is gone."""

    def missing(self, tau: float) -> None:
        """A request that was explored with probability `tau` will never have a label."""

    def refresh(self) -> None:
        """Work on all that was learned which need not happen at each label; see `due`."""

    @property
    def due(self) -> bool:
        """Whether `refresh` is worth its time. Policies refresh themselves unless `refreshes_itself` is False."""
        return False

    refreshes_itself: bool = True

    @property
    def stopped(self) -> str | None:
        """Why the policy answers nothing from the cache at present; None if it may."""
        return None

    def state(self) -> dict[str, Any]:
        """What a restart needs beside the labels: JSON values."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`. State that is not understood is left alone."""


def cosines(similarity: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
    """Similarities as observations hold them: in [0, 1], three decimals. Not a number: 0."""
    return np.rint(np.fmin(np.fmax(similarity, 0.0), 1.0) * 1000.0) / 1000.0


def deltas(delta: float, asked: Each | None, requests: int) -> Each:
    """The bound of each request: its own if that is lower."""
    own = np.full(requests, delta)
    return own if asked is None else np.minimum(own, asked)


def check_delta(delta: float) -> float:
    if not 0 < delta <= 0.5:
        raise UserError(f"delta: found {delta}, expected more than 0 and at most 0.5", exit_code=2)
    return float(delta)


def nearest_only(entries: Nearest, tau: Each, u: Each, alpha: Each | None = None) -> Decisions:
    """The decisions of a policy that looks at the nearest entry."""
    there = entries[:, 0] != NO_ENTRY if entries.shape[1] else np.zeros(len(entries), dtype=bool)
    tau = np.where(there, tau, NEVER)
    alpha = np.full(len(tau), np.nan) if alpha is None else np.where(there, alpha, np.nan)
    return Decisions(np.where(there, 0, -1), alpha, tau, there & (u > tau))
