"""Lets a language model answer Countdown problems and grades what it says."""

import dataclasses
from collections.abc import Sequence

from jaxstack.engine import RequestOutput, SamplingParams
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.reasoning.countdown import Problem, grade
from jaxstack.serving import LanguageModel
from jaxstack.training import GenerationEval

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


def evaluation_in_training(
    problems: Sequence[Problem], tokenizer: Tokenizer, *, thinking: bool, sampling: SamplingParams | None = None
) -> GenerationEval:
    """For `jaxstack.training.train_sft`: at every evaluation the model being trained answers these problems.

    Scores are `accuracy`, `tokens` (of an answer, on average) and `unfinished` (the share of answers that ran into the
    limit of tokens).

    Args: as of `answer_problems`; `tokenizer` is the model's.
    """

    def score(outputs: Sequence[RequestOutput]) -> dict[str, float]:
        answers = [output.completions[0] for output in outputs]
        correct = [grade(problem, answer.text).correct for problem, answer in zip(problems, answers)]
        count = len(answers)
        return {
            "accuracy": sum(correct) / count,
            "tokens": sum(len(answer.token_ids) for answer in answers) / count,
            "unfinished": sum(answer.finish_reason == "length" for answer in answers) / count,
        }

    texts = (
        tokenizer.render_chat([{"role": "user", "content": problem.content}], enable_thinking=thinking)
        for problem in problems
    )
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return GenerationEval(prompts, score, sampling or SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS))


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """The share of correct answers; nan for none."""
    return round(sum(outcome.correct for outcome in outcomes) / len(outcomes), 4) if outcomes else float("nan")
