"""What one step computes, as the scheduler plans it. Plain Python, no jax."""

import dataclasses
import functools

from jaxstack.engine.request import Sequence


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens `[start, start + count)` of a sequence. `samples`: they reach its end, so a new token is drawn. `scores`:
    the logprobs of the prompt tokens behind each of them are wanted. `draft`: the one token, guessed; the row counts
    only if it turns out to be the right one.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    scores: bool = False
    draft: int | None = None

    @property
    def decode(self) -> bool:
        """Whether a decode step will do: one token in, one token out."""
        return self.count == 1 and self.samples and not self.sequence.request.needs_hidden(self.start)


@dataclasses.dataclass
class StepPlan:
    """Rows of one step, those that a decode step would do for first. `decodes` counts these. Fixed once made."""

    rows: list[Row]
    decodes: int

    @functools.cached_property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @functools.cached_property
    def drafted(self) -> bool:
        """Whether it guesses, so that nobody knows how far its sequences get before it has settled."""
        return any(row.draft is not None for row in self.rows)
