"""Measures a language model on a benchmark: several sampled answers and a greedy one to each question, graded, with
intervals.

Every answer is appended to `answers.jsonl` as soon as it is graded, so a run that was killed goes on where it was, and
more samples or questions only add to it. An answer's seed comes of the question and its number, not of the order.
"""

import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxstack.engine import SamplingParams
from jaxstack.reasoning import countdown
from jaxstack.reasoning.asking import RowFile, Unanswered, ask, digest, side_by_side
from jaxstack.reasoning.benchmark_report import Answer, Report, summarise
from jaxstack.reasoning.benchmark_tasks import TASKS, Kind, Question, Task, find_task, load_questions
from jaxstack.reasoning.grading import CodeLimits, MathGrader, Verdict, grade_choice, grade_code, grade_integer
from jaxstack.reasoning.grading.answer import last_number
from jaxstack.reasoning.grading.math import normalised
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import WorkdirLock
from jaxstack.serving import EngineModel, LanguageModel
from jaxstack.serving.reasoning import thinking_begun

__all__ = [
    "TASKS",
    "EvaluationConfig",
    "Grader",
    "Question",
    "Report",
    "Task",
    "evaluate",
    "find_task",
    "load_questions",
]

# Failures without a single answer after which a run is given up: nobody is there.
_HOPELESS = 16


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How a benchmark is run.

    Attributes:
      samples: answers sampled to each question, beside the greedy one. Thirty problems with one sample each have a
        standard error of nine points: take eight or more.
      greedy: also take one greedy answer to each question.
      sampling: of the sampled answers; the greedy one has its limits and a temperature of 0. Its `n` and `seed` are set
        here.
      seed: of all seeds.
      budgets: token budgets at which the accuracy is reported, too.
      system: what a system message says; None sends none.
      enable_thinking: passed to the chat template; None passes nothing.
      thought_opened: the prompt ends inside the model's thought, so a text without its end is all thought. None: found
        out for an engine in this process, and taken for False behind an endpoint.
      concurrency: answers under way at once.
      retries: further tries of an answer, with pauses that double from `pause_s`.
      grader_workers: processes that compare mathematical answers, and programs run at once.
      code_limits: of programs.
    """

    samples: int = 8
    greedy: bool = True
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.6, top_p=0.95, max_tokens=32_768)
    )
    seed: int = 0
    budgets: tuple[int, ...] = ()
    system: str | None = None
    enable_thinking: bool | None = None
    thought_opened: bool | None = None
    concurrency: int = 32
    retries: int = 3
    pause_s: float = 1.0
    grader_workers: int = 2
    code_limits: CodeLimits = dataclasses.field(default_factory=CodeLimits)

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("concurrency", 1), ("retries", 0), ("grader_workers", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}, expected an integer >= {least}")
        if not self.samples and not self.greedy:
            raise UserError("samples: found 0 without a greedy answer, expected something to measure")
        if any(budget < 1 for budget in self.budgets):
            raise UserError(f"budgets: found {min(self.budgets)}, expected tokens >= 1")
        if self.sampling.n != 1 or self.sampling.seed is not None:
            raise UserError("sampling: found n or seed, which are set for each answer; expected neither")


def evaluate(
    model: LanguageModel,
    task: Task,
    questions: Sequence[Question],
    config: EvaluationConfig,
    workdir: str | Path,
    *,
    label: str = "",
    progress: bool = True,
) -> Report:
    """Asks, grades and reports; blocks.

    Args:
      model: called from `config.concurrency` threads at once, one prompt each. An engine of this process must have been
        started.
      task: where the questions are from.
      questions: of `load_questions`.
      workdir: `answers.jsonl` is made or continued there.
      label: the model's name: answers of another one in the same workdir are not mistaken for its own.
      progress: a bar with the remaining time on stderr.

    Raises:
      UserError: the workdir cannot be used, or the model cannot be asked at all.
      EngineDead: the engine in this process has died.
    """
    if not questions:
        raise UserError(f"{task.name}: no questions")
    asked = list(_requests(task, questions, config, label))
    wanted = {request.key for request in asked}
    with WorkdirLock(workdir), RowFile(Path(workdir) / "answers.jsonl", wanted=wanted) as file:
        done = file.rows
        left = [request for request in asked if request.key not in done]
        with (
            Grader(config) as grader,
            Progress(len(asked), task.name, unit="answer", initial=len(done), enabled=progress) as bar,
        ):
            answer = functools.partial(_answer, model, task, config, grader, _thought_opened(model, config, questions))
            failures, correct = 0, sum(row["outcome"] == "correct" for row in done.values())
            for row in side_by_side(answer, left, config.concurrency):
                file.append(row)
                bar.advance()
                if "error" in row:
                    failures += 1
                    if not done and failures == min(_HOPELESS, len(asked)):
                        raise UserError(f"{task.name}: no answer in {failures} tries: {row['error']}")
                    continue
                correct += row["outcome"] == "correct"
                bar.figures(correct=correct / len(done))
    answers = [
        Answer(
            question=request.question.id,
            sample=request.sample,
            correct=row["outcome"] == "correct",
            outcome=row["outcome"],
            vote=row["vote"],
            tokens=row["tokens"],
            truncated=row["finish_reason"] == "length",
            lenient=row["lenient"],
        )
        for request in asked
        if request.key in done
        for row in (done[request.key],)
    ]
    groups = {question.id: question.group for question in questions}
    failed, voting = len(asked) - len(answers), task.kind != "code"
    return summarise(task.name, label, groups, answers, budgets=config.budgets, failed=failed, voting=voting)


@dataclasses.dataclass(frozen=True)
class _Request:
    """One answer to be had; `key` says everything it depends on. `sample` is None for the greedy one."""

    question: Question
    sample: int | None
    messages: list[dict[str, str]]
    sampling: SamplingParams
    chat_kwargs: dict[str, Any]
    key: str


def _requests(task: Task, questions: Sequence[Question], config: EvaluationConfig, label: str) -> Iterator[_Request]:
    """Question by question: the answers to one share its computed prompt."""
    chat_kwargs = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    for question in questions:
        messages = [*system, {"role": "user", "content": question.prompt}]
        for sample in [*([None] if config.greedy else []), *range(config.samples)]:
            seed = int.from_bytes(digest(config.seed, task.name, question.id, sample)[:7], "big")
            changes: dict[str, Any] = {"seed": seed} if sample is not None else {"temperature": 0.0, "seed": 0}
            sampling = dataclasses.replace(config.sampling, **changes)
            asked = (
                label,
                task.name,
                dataclasses.asdict(question),
                sample,
                messages,
                chat_kwargs,
                dataclasses.asdict(sampling),
            )
            yield _Request(question, sample, messages, sampling, chat_kwargs, digest(*asked).hex())


class Grader:
    """Grades answers to questions of any task; safe to use from several threads. To be closed."""

    def __init__(self, config: EvaluationConfig):
        self._limits = config.code_limits
        # Programs that wait for each other's processors would meet their wall-clock limit.
        self._programs = threading.Semaphore(config.grader_workers)
        self._math = MathGrader(workers=config.grader_workers)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self._math.close()

    def grade(self, kind: Kind, question: Question, text: str, *, thinking: bool = False) -> Verdict:
        """The strict verdict. `thinking`: the prompt has opened the thought."""
        if kind == "integer":
            return grade_integer(text, question.gold, thinking=thinking)
        if kind == "math":
            return self._math.grade(
                text, question.gold, tolerance=question.tolerance, several=question.several, thinking=thinking
            )
        if kind == "choice":
            return grade_choice(text, question.gold, question.options, thinking=thinking)
        if kind == "code":
            with self._programs:
                return grade_code(text, question.gold, limits=self._limits, thinking=thinking)
        verdict = countdown.grade(question.gold, text)
        said = text.rpartition("</think>")[2].removesuffix("<eos>").strip()
        return Verdict("correct" if verdict.correct else "wrong", verdict.reason, said)

    def lenient(self, kind: Kind, question: Question, text: str, strict: Verdict, *, thinking: bool = False) -> bool:
        """Whether the answer is correct when the last number stands in for a box that is missing."""
        if kind not in ("integer", "math") or strict.outcome != "no_answer":
            return strict.correct
        return self._math.grade_last_number(
            text, str(question.gold), tolerance=question.tolerance, thinking=thinking
        ).correct


def _vote(kind: Kind, verdict: Verdict) -> str | None:
    """What an answer counts for in a majority vote; None abstains. Programs do not vote: no two are the same."""
    if kind == "code" or verdict.answer is None or verdict.outcome == "no_answer":
        return None
    if kind == "integer":
        number = last_number(verdict.answer)
        return normalised(verdict.answer) if number is None else number.lstrip("0") or "0"
    return normalised(verdict.answer)


def _answer(
    model: LanguageModel, task: Task, config: EvaluationConfig, grader: Grader, thinking: bool, request: _Request
) -> dict[str, Any]:
    """Asks once, or a few times where asking fails, and grades: a row of answers.jsonl."""
    row: dict[str, Any] = {"key": request.key, "question": request.question.id, "sample": request.sample}
    try:
        completion = ask(
            model,
            request.messages,
            request.sampling,
            chat_kwargs=request.chat_kwargs,
            retries=config.retries,
            pause_s=config.pause_s,
        )
    except Unanswered as error:
        return {**row, "error": str(error)}
    question, kind = request.question, task.kind
    verdict = grader.grade(kind, question, completion.text, thinking=thinking)
    return {
        **row,
        "outcome": verdict.outcome,
        "reason": verdict.reason,
        "vote": _vote(kind, verdict),
        "lenient": grader.lenient(kind, question, completion.text, verdict, thinking=thinking),
        "tokens": len(completion.token_ids) or None,
        "finish_reason": completion.finish_reason,
        "text": completion.text,
    }


def _thought_opened(model: LanguageModel, config: EvaluationConfig, questions: Sequence[Question]) -> bool:
    if config.thought_opened is not None:
        return config.thought_opened
    tokenizer = model.engine.tokenizer if isinstance(model, EngineModel) else None
    if tokenizer is None or not tokenizer.has_chat_template:
        return False
    messages = [{"role": "user", "content": questions[0].prompt}]
    options = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    return thinking_begun(tokenizer.render_chat(messages, **options), messages, False)
