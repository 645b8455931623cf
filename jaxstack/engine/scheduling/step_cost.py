"""How long a step takes: `base + token * rows + context_token * context + pair * pairs`, fitted to a live engine's log.

Rows are what the device computes, so a step padded to a compiled shape costs what the shape costs. Context is the
tokens whose keys and values the step reads, counted once for each sequence: what a decode waits for. Pairs are of a
prompt's token and one that it attends to: what attention in a long prefill computes.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxstack.engine.observer import Silent
from jaxstack.engine.step_plan import StepPlan
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepSample:
    """One step that was measured."""

    rows: int
    context_tokens: int
    pairs: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class FitError:
    """How far a cost model is off, on `samples` steps: relative errors of one step, and of their sum."""

    samples: int
    median: float
    p90: float
    total: float

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """The sizes that steps are padded to, ascending: of steps that only decode, and of the others."""

    decode: tuple[int, ...] = ()
    mixed: tuple[int, ...] = ()

    def rows(self, plan: StepPlan) -> int:
        sizes = self.decode if plan.decodes == len(plan.rows) else self.mixed
        return next((size for size in sizes if size >= plan.tokens), plan.tokens)


UNPADDED = StepShapes()


@dataclasses.dataclass(frozen=True)
class StepCostModel:
    """Seconds of a step.

    Args:
      base_s: of any step.
      token_s: of each row, padding among them.
      context_token_s: of each token whose keys and values are read.
      pair_s: of each token of a prompt and each that it attends to.
      shapes: what steps are padded to; to nothing by default.

    Raises:
      UserError: a negative cost, or all of them zero.
    """

    base_s: float
    token_s: float
    context_token_s: float = 0.0
    pair_s: float = 0.0
    shapes: StepShapes = UNPADDED

    def __post_init__(self) -> None:
        for name in ("base_s", "token_s", "context_token_s", "pair_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name}: found {getattr(self, name)}, expected seconds >= 0")
        if not self.base_s + self.token_s:
            raise UserError("base_s and token_s: found 0 for both, expected steps that take time")

    def seconds(self, rows: int, context_tokens: int = 0, pairs: int = 0) -> float:
        return self.base_s + self.token_s * rows + self.context_token_s * context_tokens + self.pair_s * pairs

    def of(self, plan: StepPlan) -> float:
        """Seconds of a planned step."""
        return self.seconds(self.shapes.rows(plan), *attention(plan))

    def scaled(self, factor: float) -> "StepCostModel":
        """A model of steps that take `factor` times as long."""
        names = ("base_s", "token_s", "context_token_s", "pair_s")
        return dataclasses.replace(self, **{name: factor * getattr(self, name) for name in names})

    @classmethod
    def fit(cls, samples: Sequence[StepSample], shapes: StepShapes = UNPADDED) -> "StepCostModel":
        """Least squares on relative errors, no cost negative: a step that something else delayed weighs little.

        Raises:
          UserError: fewer than 8 samples, or all of one size.
        """
        if len(samples) < 8 or len({sample.rows for sample in samples}) < 2:
            sizes = len({sample.rows for sample in samples})
            raise UserError(f"samples: found {len(samples)} steps of {sizes} sizes, expected at least 8 of 2 sizes")
        seconds = np.array([sample.seconds for sample in samples])
        features = np.array([[1.0, s.rows, s.context_tokens, s.pairs] for s in samples]) / seconds[:, None]
        best, best_error = np.zeros(4), np.inf
        for size in (4, 3, 2, 1):  # of all sets of costs that are not zero, the best in which none is negative
            for kept in itertools.combinations(range(4), size):
                found = np.linalg.lstsq(features[:, kept], np.ones(len(samples)), rcond=None)[0]
                if (found < 0).any():
                    continue
                costs = np.zeros(4)
                costs[list(kept)] = found
                error = float(((features @ costs - 1) ** 2).sum())
                if error < best_error - 1e-12 and costs[0] + costs[1] > 0:
                    best, best_error = costs, error
        base_s, token_s, context_token_s, pair_s = map(float, best)
        return cls(base_s, token_s, context_token_s, pair_s, shapes)

    def error(self, samples: Sequence[StepSample]) -> FitError:
        seconds = np.array([sample.seconds for sample in samples])
        predicted = np.array([self.seconds(s.rows, s.context_tokens, s.pairs) for s in samples])
        relative = np.abs(predicted / seconds - 1)
        median, p90 = np.quantile(relative, (0.5, 0.9))
        return FitError(len(samples), float(median), float(p90), float(predicted.sum() / seconds.sum() - 1))


def attention(plan: StepPlan) -> tuple[int, int]:
    """Context tokens and pairs of a step."""
    chunks = [row for row in plan.rows if row.count > 1]
    pairs = sum(row.count * row.start + row.count * (row.count + 1) // 2 for row in chunks)
    return sum(row.start + row.count for row in plan.rows), pairs


class StepLog(Silent):
    """An observer that keeps a sample of every step: from the end of the one before, if it had to wait for that."""

    def __init__(self) -> None:
        self.samples: list[StepSample] = []
        self._free_s = float("-inf")

    def on_step(self, plan: StepPlan, rows: int, launched_s: float, settled_s: float) -> None:
        seconds = settled_s - max(launched_s, self._free_s)
        self._free_s = settled_s
        if seconds > 0:
            self.samples.append(StepSample(rows, *attention(plan), seconds))
