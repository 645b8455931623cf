"""What labels say of an entry: a posterior over its threshold, with a prior that all entries share.

An entry answers a request of similarity s rightly with probability sigma(gamma (s - t)). Its (t, gamma) is unknown; on
a grid of both, the posterior is exact and a label is one addition. The prior over the grid is what the labels of all
entries say together (empirical Bayes, by EM), so an entry without any label of its own already has an opinion.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxstack.serving.semantic_cache.policy import NO_ENTRY

# Chance that a label is wrong: the likelihood keeps this far from 0 and 1.
_LABEL_NOISE = 0.0025
_SIMILARITIES = 1001
# Of a new table, whose owner may never ask twice: a row takes 5 kB.
_ROWS = 4

# Labels after which the prior is learned anew, and every how many afterwards; from how many entries, how many steps.
_EARLY, _EVERY = (25, 50, 100, 150), 200
_PRIOR_ENTRIES, _EM_STEPS = 3000, 8
# Pseudo-counts of the prior, over all cells together.
_PRIOR_WEIGHT = 2.0


@dataclasses.dataclass(frozen=True)
class ThresholdGrid:
    """Cells (t, gamma). t beyond 1 lets an entry be one that is never right.

    Attributes:
      version: of the grid; a prior belongs to one.
    """

    thresholds: int = 31
    highest_threshold: float = 1.2
    slopes: int = 10
    slope_range: tuple[float, float] = (3.0, 200.0)

    @property
    def version(self) -> str:
        low, high = self.slope_range
        return f"{self.thresholds}x{self.slopes}:{self.highest_threshold:g}:{low:g}-{high:g}:{_LABEL_NOISE:g}"

    @property
    def size(self) -> int:
        return self.thresholds * self.slopes

    @functools.cached_property
    def t(self) -> Float[np.ndarray, "cells"]:
        return np.repeat(np.linspace(0, self.highest_threshold, self.thresholds), self.slopes)

    @functools.cached_property
    def gamma(self) -> Float[np.ndarray, "cells"]:
        return np.tile(np.geomspace(*self.slope_range, self.slopes), self.thresholds)

    def right(self, similarity: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n cells"]:
        """P(right | s) in each cell."""
        z = self.gamma * (np.asarray(similarity)[..., None] - self.t)
        return _LABEL_NOISE + (1 - 2 * _LABEL_NOISE) * (0.5 + 0.5 * np.tanh(z / 2))

    @functools.cached_property
    def table(self) -> Float[np.ndarray, "similarities cells"]:
        """`right` at each similarity of three decimals."""
        return self.right(np.arange(_SIMILARITIES) / (_SIMILARITIES - 1))


@functools.cache
def default_grid() -> ThresholdGrid:
    """One for the process: its table takes 2.5 MB."""
    return ThresholdGrid()


class PosteriorTable:
    """Likelihoods of all labelled entries, and the prior.

    Row 0 is every entry without a label. Rows hold likelihoods divided by their maximum (a posterior needs only
    ratios), which saves an exponential at each decision, and their logarithms, to which labels are added.

    Attributes:
      prior: pi, sums to 1.
      labels: taken in so far.
    """

    def __init__(self, grid: ThresholdGrid | None = None):
        self.grid = grid or default_grid()
        self.prior: Float[np.ndarray, cells] = np.full(self.grid.size, 1 / self.grid.size)
        self.labels = 0
        self._learned_at = 0
        self._rows: dict[int, int] = {}  # entry -> row, in the order of their first labels
        self._free: list[int] = []
        self._log = np.zeros((_ROWS, self.grid.size))
        self._ratio = np.ones((_ROWS, self.grid.size))

    def __len__(self) -> int:
        """Entries with labels."""
        return len(self._rows)

    def add(self, entry: int, similarity: float, correct: bool) -> None:
        """Takes in one label. One at a time, in any order: additions commute."""
        row = self._rows.get(entry)
        if row is None:
            row = self._rows[entry] = self._new_row()
        p = self.grid.table[_index(similarity)]
        log = self._log[row]
        log += np.log(p if correct else 1 - p)
        log -= log.max()
        np.exp(log, out=self._ratio[row])
        self.labels += 1

    def forget(self, entry: int) -> None:
        row = self._rows.pop(entry, None)
        if row is not None:
            self._log[row], self._ratio[row] = 0.0, 1.0
            self._free.append(row)

    def alpha(self, entries: Int[np.ndarray, "*n"], similarity: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
        """P(right | everything seen so far), the posterior mean; 0 for `NO_ENTRY`."""
        entries = np.asarray(entries)
        flat = entries.ravel().tolist()
        rows = np.array([self._rows.get(entry, 0) for entry in flat], dtype=np.intp)
        right = self.grid.table[_index(similarity).ravel()]
        weight = self._ratio[rows] * self.prior
        alpha = np.einsum("ng,ng->n", weight, right) / weight.sum(axis=1)
        return np.where(entries == NO_ENTRY, 0.0, alpha.reshape(entries.shape))

    def posterior(self, entry: int) -> Float[np.ndarray, "cells"]:
        """w_k: the prior for an entry without labels."""
        weight = self._ratio[self._rows.get(entry, 0)] * self.prior
        return weight / weight.sum()

    @property
    def due(self) -> bool:
        """Whether enough labels have come since the prior was learned."""
        after = next((n for n in _EARLY if n > self._learned_at), None)
        return self.labels >= (after if after is not None else self._learned_at + _EVERY)

    def learn_prior(self) -> None:
        """EM over the newest labelled entries, from the prior at hand.

        A step is W = softmax(L + log pi), pi ~ sum_k W_k + 2 / cells. With r = exp(L - max L) at hand it is two
        matrix-vector products: sum_k W_k = pi * (r^T (1 / (r pi))).
        """
        self._learned_at = self.labels
        newest = list(self._rows.values())[-_PRIOR_ENTRIES:]
        if not newest:
            return
        ratio, pi = self._ratio[newest], self.prior
        for _ in range(_EM_STEPS):
            count = pi * ((1 / (ratio @ pi)) @ ratio) + _PRIOR_WEIGHT / self.grid.size
            pi = count / count.sum()
        self.prior = pi

    def restore_prior(self, prior: Sequence[float], labels: int) -> bool:
        """Takes back a prior. Returns whether it fits the grid."""
        found = np.asarray(prior, dtype=np.float64)
        if found.shape != (self.grid.size,) or not np.isfinite(found).all() or (found <= 0).any():
            return False
        self.prior = found / found.sum()
        self._learned_at = labels
        return True

    def _new_row(self) -> int:
        if self._free:
            return self._free.pop()
        row = len(self._rows) + 1
        if row >= len(self._log):
            more = len(self._log)
            self._log = np.concatenate([self._log, np.zeros((more, self.grid.size))])
            self._ratio = np.concatenate([self._ratio, np.ones((more, self.grid.size))])
        return row


def _index(similarity: Float[np.ndarray, "*n"] | float) -> Int[np.ndarray, "*n"]:
    """Rows of the table; not a number is row 0."""
    return np.rint(np.fmin(np.fmax(similarity, 0.0), 1.0) * (_SIMILARITIES - 1)).astype(np.intp)
