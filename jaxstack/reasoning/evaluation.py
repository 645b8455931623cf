"""Lets a language model answer Countdown problems and grades what it says."""

import dataclasses
from collections.abc import Sequence

from jaxstack.engine import Engine, SamplingParams
from jaxstack.reasoning.countdown import Problem, grade

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
    engine: Engine, problems: Sequence[Problem], *, thinking: bool, sampling: SamplingParams | None = None
) -> list[Outcome]:
    """One graded answer for each problem, in order.

    Args:
      engine: of a model whose chat template knows `enable_thinking`.
      problems: what to ask.
      thinking: whether the model may think.
      sampling: greedy with 150 tokens by default.
    """
    sampling = sampling or SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    prompts = [
        tokenizer.encode(
            tokenizer.render_chat([{"role": "user", "content": problem.content}], enable_thinking=thinking),
            add_special_tokens=False,
        )
        for problem in problems
    ]
    outcomes = []
    for problem, output in zip(problems, engine.generate(prompts, sampling)):
        completion = output.completions[0]
        result = grade(problem, completion.text)
        outcomes.append(Outcome(problem, completion.text, result.correct, result.reason, len(completion.token_ids)))
    return outcomes


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """The share of correct answers; nan for none."""
    return round(sum(outcome.correct for outcome in outcomes) / len(outcomes), 4) if outcomes else float("nan")
