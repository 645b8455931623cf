"""Graded answers become figures, each over problems, with intervals: pass@k, majority votes, budgets, groups."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxstack.reasoning.grading import OUTCOMES
from jaxstack.reasoning.statistics import Interval, bootstrap_mean, majority_vote, pass_at_k


@dataclasses.dataclass(frozen=True)
class Answer:
    """One graded answer.

    Attributes:
      question: its id.
      sample: its number; None for the greedy one.
      correct, outcome: of the strict verdict.
      vote: what it counts for in a majority vote; None abstains.
      tokens: generated; None where the server does not tell.
      truncated: it met the token limit.
      lenient: correct, or correct by its last number where it has no box.
    """

    question: str
    sample: int | None
    correct: bool
    outcome: str
    vote: str | None
    tokens: int | None
    truncated: bool
    lenient: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """A model's figures on a benchmark. Intervals are over problems: 95 %, by bootstrap.

    Attributes:
      questions: with at least one answer.
      failed: answers that could not be had; they count nowhere.
      greedy: accuracy of the greedy answers; None without.
      pass_at: k -> pass@k, unbiased, over the questions with at least k samples; pass@1 is the mean over samples.
      majority: accuracy of the vote among all samples of a question; None without samples or for programs.
      lenient: pass@1 (greedy without samples) with the last number where there is no box.
      budgets: tokens -> pass@1 (greedy without samples) when every answer that had not ended by then counts as wrong.
      groups: name -> pass@1 (greedy without samples) in it; `group_sizes` says of how many questions.
      outcomes: how many answers of each verdict.
      truncated: answers that met the token limit.
      mean_tokens: of an answer; None where unknown.
    """

    task: str
    model: str
    questions: int
    samples: int
    failed: int
    greedy: Interval | None
    pass_at: Mapping[int, Interval]
    majority: Interval | None
    lenient: Interval | None
    budgets: Mapping[int, Interval]
    groups: Mapping[str, Interval]
    group_sizes: Mapping[str, int]
    outcomes: Mapping[str, int]
    truncated: int
    mean_tokens: float | None

    @property
    def failed_share(self) -> float:
        answered = sum(self.outcomes.values())
        return self.failed / max(1, answered + self.failed)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-ready values; an interval is `{"mean", "ci95"}`."""

        def plain(value: Any) -> Any:
            if isinstance(value, Interval):
                return {"mean": round(value.mean, 4), "ci95": [round(value.low, 4), round(value.high, 4)]}
            if isinstance(value, Mapping):
                return {str(key): plain(inner) for key, inner in value.items()}
            return value

        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def table(self) -> str:
        """The figures, one a line."""
        rows: list[tuple[str, Interval | None]] = [("greedy", self.greedy)]
        rows += [(f"pass@{k}", interval) for k, interval in self.pass_at.items()]
        rows += [(f"majority of {self.samples}", self.majority), ("  with last number", self.lenient)]
        rows += [(f"  within {budget} tokens", interval) for budget, interval in self.budgets.items()]
        lines = [f"{self.task}: {self.questions} questions, {self.samples} samples each, {self.failed} failed"]
        lines += [f"{name:<28} {interval.describe(self.questions)}" for name, interval in rows if interval is not None]
        lines += [
            f"  {f'{name} ({size})':<26} {self.groups[name].describe(size)}" for name, size in self.group_sizes.items()
        ]
        lines.append("  ".join(f"{name} {count}" for name, count in self.outcomes.items() if count))
        return "\n".join(lines)


def summarise(
    task: str,
    model: str,
    groups: Mapping[str, str],
    answers: Sequence[Answer],
    *,
    budgets: Sequence[int],
    failed: int,
    voting: bool = True,
) -> Report:
    """The report of `answers` to the questions whose ids `groups` maps to their groups, "" being none.

    Every figure is a mean over questions of a mean over that question's answers. `voting`: answers can be voted on.
    """
    greedy = [answer for answer in answers if answer.sample is None]
    sampled = [answer for answer in answers if answer.sample is not None]
    by_question: dict[str, list[Answer]] = {}
    for answer in sampled:
        by_question.setdefault(answer.question, []).append(answer)
    samples = max(map(len, by_question.values()), default=0)
    main = sampled or greedy
    told = [answer.tokens for answer in main if answer.tokens is not None]
    knows_tokens = bool(main) and len(told) == len(main)
    votes = {question: _majority(given) for question, given in by_question.items()}
    members: dict[str, list[Answer]] = {name: [] for name in sorted({group for group in groups.values() if group})}
    for answer in main:
        if groups[answer.question]:
            members[groups[answer.question]].append(answer)
    return Report(
        task=task,
        model=model,
        questions=len({answer.question for answer in answers}),
        samples=samples,
        failed=failed,
        greedy=_mean(greedy, lambda answer: answer.correct),
        pass_at={k: _pass_at(by_question, k) for k in _ks(samples)},
        majority=bootstrap_mean(np.array(list(votes.values()), bool)) if votes and voting else None,
        lenient=_mean(main, lambda answer: answer.lenient),
        budgets={budget: _within(main, budget) for budget in sorted(set(budgets))} if knows_tokens else {},
        groups={
            name: interval
            for name, given in members.items()
            if (interval := _mean(given, lambda answer: answer.correct)) is not None
        },
        group_sizes={name: len({answer.question for answer in given}) for name, given in members.items() if given},
        outcomes={outcome: Counter(answer.outcome for answer in answers)[outcome] for outcome in OUTCOMES},
        truncated=sum(answer.truncated for answer in answers),
        mean_tokens=round(float(np.mean(told)), 2) if knows_tokens else None,
    )


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    return sorted({*(k for k in (1 << i for i in range(20)) if k <= samples), *([samples] if samples else [])})


def _mean(answers: Sequence[Answer], value: Callable[[Answer], bool]) -> Interval | None:
    by_question: dict[str, list[bool]] = {}
    for answer in answers:
        by_question.setdefault(answer.question, []).append(value(answer))
    return bootstrap_mean(np.array([np.mean(values) for values in by_question.values()])) if by_question else None


def _within(answers: Sequence[Answer], budget: int) -> Interval:
    interval = _mean(answers, lambda answer: answer.correct and (answer.tokens or 0) <= budget)
    assert interval is not None
    return interval


def _pass_at(by_question: Mapping[str, Sequence[Answer]], k: int) -> Interval:
    chances = [
        pass_at_k(len(given), sum(answer.correct for answer in given), k)
        for given in by_question.values()
        if len(given) >= k
    ]
    return bootstrap_mean(np.array(chances))


def _majority(given: Sequence[Answer]) -> bool:
    ordered = sorted(given, key=lambda answer: answer.sample or 0)
    winner = majority_vote([answer.vote for answer in ordered])
    return winner is not None and ordered[winner].correct
