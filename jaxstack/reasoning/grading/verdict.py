"""What a grader says."""

import dataclasses
from typing import Literal

# A model's fault is `wrong`; `no_answer` says that nothing was found to grade (no box, a thought that never ended);
# `timeout` that the comparison or the program did not end in time; `error` that the grader itself failed.
Outcome = Literal["correct", "wrong", "no_answer", "timeout", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "no_answer", "timeout", "error")
_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An answer's grade.

    Attributes:
      outcome: only `correct` counts; the others are kept apart because they tell of different troubles.
      reason: in a few words, at most 300 characters.
      answer: what was graded, as extracted; None if nothing was.
    """

    outcome: Outcome
    reason: str = ""
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", shorten(self.reason, _LONGEST_REASON))

    @property
    def correct(self) -> bool:
        return self.outcome == "correct"


def shorten(text: str, length: int = 60) -> str:
    """`text` on one line, cut to `length` characters."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 3] + "..."
