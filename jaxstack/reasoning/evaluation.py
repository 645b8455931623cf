"""Lets a language model answer Countdown problems and grades what it says."""

import dataclasses
from collections.abc import Sequence

from jaxstack.engine import SamplingParams
from jaxstack.reasoning.countdown import Problem, grade
from jaxstack.serving import LanguageModel

# The longest search has 132 tokens.
MAX_TOKENS = 150


@dataclasses.dataclass(frozen=True)
class Outcome:
    """An answer and its grade; `tokens` counts generated tokens."""

    problem: Problem
    text: str
    correct: bool
    reason: str
    tokens: int


def answer_problems(
    model: LanguageModel, problems: Sequence[Problem], *, thinking: bool, sampling: SamplingParams | None = None
) -> list[Outcome]:
    """One graded answer for each problem, in order.

    Args:
      model: its chat template must know `enable_thinking`.
      problems: what to ask.
      thinking: whether the model may think.
      sampling: greedy with 150 tokens by default.
    """
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    prompts = [[{"role": "user", "content": problem.content}] for problem in problems]
    outcomes = []
    for problem, result in zip(problems, model.generate(prompts, sampling, chat_kwargs={"enable_thinking": thinking})):
        verdict = grade(problem, result.text)
        outcomes.append(Outcome(problem, result.text, verdict.correct, verdict.reason, result.completion_tokens))
    return outcomes


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """The share of correct answers; nan for none."""
    return round(sum(outcome.correct for outcome in outcomes) / len(outcomes), 4) if outcomes else float("nan")
