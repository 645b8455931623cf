r"""Makes long chain-of-thought training data with a teacher: generate, rewrite, reject, and write ShareGPT rows.

As Sky-T1's data were made (Li et al., arXiv 2502.07374, and its repository): a teacher answers problems whose answers
are known; a rewriter copies each answer into a thought and a solution section, nearly word for word; what is cut short,
does not parse, strays from the original or is wrong is rejected. Problems that are there twice, or share ten words in a
row with an evaluation problem, are left out beforehand: what is not kept need not be generated.

Every stage writes rows named by the sha256 of the request they answer. A later run reads them and does what is left;
`rejected.jsonl` says of everything that was dropped at which stage, and why.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxstack.engine import SamplingParams
from jaxstack.reasoning.asking import RowFile, Unanswered, ask, digest, side_by_side
from jaxstack.reasoning.benchmark_tasks import read_rows
from jaxstack.reasoning.grading import CodeLimits, CodeTest, MathGrader, Verdict, grade_code
from jaxstack.reasoning.grading.answer import last_boxed
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import WorkdirLock
from jaxstack.serving import LanguageModel

BEGIN_THOUGHT, END_THOUGHT = "<|begin_of_thought|>", "<|end_of_thought|>"
BEGIN_SOLUTION, END_SOLUTION = "<|begin_of_solution|>", "<|end_of_solution|>"
SYSTEM = (
    "You solve problems in two sections. First think at length: explore, check, go back and revise, in steps that are "
    f"separated by blank lines, between {BEGIN_THOUGHT} and {END_THOUGHT}. Then give the solution, precise and "
    f"complete, between {BEGIN_SOLUTION} and {END_SOLUTION}."
)
_MATH = "Put the final answer in \\boxed{}."
_PROGRAM = "Write a Python program that reads standard input and prints to standard output, in one ```python block."
_FUNCTION = "Write a Python function named {name}, in one ```python block."
_REWRITE = (
    "Copy the answer below into two sections, word for word wherever possible; correct the format, never the content. "
    f"Write the reasoning between {BEGIN_THOUGHT} and {END_THOUGHT}, its steps separated by blank lines, and then the "
    f"final solution, with its \\boxed{{}} or code block, between {BEGIN_SOLUTION} and {END_SOLUTION}. Write nothing "
    "else."
)
_SECTIONS = re.compile(
    rf"\s*{re.escape(BEGIN_THOUGHT)}(.*){re.escape(END_THOUGHT)}\s*"
    rf"{re.escape(BEGIN_SOLUTION)}(.*){re.escape(END_SOLUTION)}\s*",
    re.DOTALL,
)
_SAMPLING: Any = {"temperature": 0.7, "max_tokens": 16_384}
_MARKERS = (BEGIN_THOUGHT, END_THOUGHT, BEGIN_SOLUTION, END_SOLUTION)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the teacher is asked. It has a gold (LaTeX) or tests."""

    id: str
    question: str
    gold: str = ""
    tests: tuple[CodeTest, ...] = ()

    @property
    def prompt(self) -> str:
        if not self.tests:
            return f"{self.question}\n\n{_MATH}"
        name = self.tests[0].function
        return f"{self.question}\n\n{_FUNCTION.format(name=name) if name else _PROGRAM}"


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    """How data are made.

    Attributes:
      generation: the teacher's sampling.
      rewriting: the rewriter's sampling.
      least_similarity: of a rewritten answer with the original (see `similarity`).
      overlap_words: words in a row shared with an evaluation problem that make a problem contaminated.
      thought_opened: the teacher's prompt ends inside its thought.
      system: of the training rows.
      concurrency, retries, pause_s, grader_workers, code_limits: as in `EvaluationConfig`.
    """

    generation: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(**_SAMPLING))
    rewriting: SamplingParams = dataclasses.field(default_factory=lambda: SamplingParams(**_SAMPLING))
    least_similarity: float = 0.9
    overlap_words: int = 10
    thought_opened: bool = False
    system: str = SYSTEM
    concurrency: int = 32
    retries: int = 3
    pause_s: float = 1.0
    grader_workers: int = 2
    code_limits: CodeLimits = dataclasses.field(default_factory=CodeLimits)

    def __post_init__(self) -> None:
        if not 0 <= self.least_similarity <= 1:
            raise UserError(f"least_similarity: found {self.least_similarity}, expected 0 to 1")
        for name, least in (("overlap_words", 1), ("concurrency", 1), ("retries", 0), ("grader_workers", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}, expected an integer >= {least}")


def load_problems(paths: Sequence[str | Path]) -> list[Problem]:
    """Problems of JSONL, JSON, CSV or parquet files.

    Columns: `problem` or `question`; and `answer`, or `solution` with a \\boxed{} (NuminaMath), or `input_output` with
    inputs, outputs and perhaps fn_name (APPS, TACO). `id` is optional.

    Raises:
      UserError: a file or row cannot be read, or an id is there twice.
    """
    problems: dict[str, Problem] = {}
    for path in map(Path, paths):
        for number, row in enumerate(read_rows(path), 1):
            problem = _problem(row, f"{path.stem}/{number}", f"{path}: row {number}")
            if problem.id in problems:
                raise UserError(f"{path}: row {number}: found the id {problem.id!r} a second time")
            problems[problem.id] = problem
    return list(problems.values())


def _problem(row: Mapping[str, Any], name: str, where: str) -> Problem:
    name = str(row["id"]) if row.get("id") is not None else name
    question = row.get("problem") or row.get("question")
    if not isinstance(question, str):
        raise UserError(f"{where}: found the columns {', '.join(map(str, row))}, expected problem or question")
    if row.get("input_output"):
        return Problem(name, question, tests=_tests(row["input_output"], where))
    gold = str(row["answer"]) if row.get("answer") is not None else last_boxed(str(row.get("solution") or ""))
    if not gold:
        raise UserError(f"{where}: found no answer, expected answer, a \\boxed{{}} in solution, or input_output")
    return Problem(name, question, gold)


def _tests(text: Any, where: str) -> tuple[CodeTest, ...]:
    try:
        told = json.loads(text) if isinstance(text, str) else dict(text)
        function = told.get("fn_name")
        return tuple(CodeTest(given, out, function) for given, out in zip(told["inputs"], told["outputs"], strict=True))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: input_output cannot be read ({type(error).__name__}: {error})") from None


def similarity(thought: str, solution: str, original: str) -> float:
    """How nearly a rewritten answer is a copy, from 0 to 1, in time linear in the texts.

    The smaller of two shares of words in threes: of those of the thought, how many the original has, so that nothing
    was made up; and of those of the original, how many the rewritten has, so that nothing was left out.
    """
    told, all_told, first = _threes(thought), _threes(f"{thought}\n{solution}"), _threes(original)
    if not told or not first:
        return 0.0
    return min((told & first).total() / told.total(), (all_told & first).total() / first.total())


def _words(text: str) -> list[str]:
    for marker in (*_MARKERS, "<think>", "</think>"):
        text = text.replace(marker, " ")
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _threes(text: str) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(zip(words, words[1:], words[2:])) or Counter(zip(words))


def parse_sections(text: str) -> tuple[str, str] | None:
    """Thought and solution of a text that is these two sections and nothing else; None for any other."""
    found = _SECTIONS.fullmatch(text)
    if found is None or any(text.count(marker) != 1 for marker in _MARKERS):
        return None
    thought, solution = (part.strip() for part in found.groups())
    return (thought, solution) if thought and solution else None


def contaminated(question: str, grams: Mapping[tuple[str, ...], str], n: int) -> str | None:
    """What the question shares with an evaluation problem of `evaluation_grams`, in words; None for nothing."""
    for gram in _grams(question, n):
        if gram in grams:
            return f"shares {' '.join(gram)!r} with {grams[gram]}"
    return None


def evaluation_grams(questions: Mapping[str, str], n: int) -> dict[tuple[str, ...], str]:
    """The runs of `n` words of evaluation problems (id -> text), with whose they are."""
    return {gram: name for name, text in questions.items() for gram in _grams(text, n)}


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    # A problem shorter than that is compared whole.
    return iter([tuple(words)] if len(words) < n else list(zip(*(words[i:] for i in range(n)))))


def make_data(
    teacher: LanguageModel,
    problems: Sequence[Problem],
    config: RecipeConfig,
    workdir: str | Path,
    *,
    rewriter: LanguageModel | None = None,
    evaluation: Mapping[str, str] | None = None,
    label: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """Runs all stages and writes `data.jsonl` (ShareGPT rows with `system`) and `rejected.jsonl`. Blocks.

    Args:
      teacher, rewriter: called from several threads. Without a rewriter the teacher's own marks divide its answer.
      evaluation: problems that must not be trained on, id -> text.
      workdir: stages found there are continued.
      label: names teacher and rewriter: rows of others are not mistaken for theirs.

    Returns: counts: problems, kept, failed, and rejected by stage.

    Raises:
      UserError: the workdir cannot be used, or the teacher cannot be asked at all.
    """
    workdir = Path(workdir)
    run = _Run(config, label, workdir, progress)
    with WorkdirLock(workdir):
        chosen = run.select(problems, evaluation or {})
        answers = run.generate(teacher, chosen)
        divided = run.divide(chosen, answers) if rewriter is None else run.rewrite(rewriter, chosen, answers)
        kept = run.grade(chosen, divided)
        rows = [_sharegpt(problem, *divided[problem.id], config.system) for problem in kept]
        write_atomically(workdir / "data.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomically(workdir / "rejected.jsonl", "".join(json.dumps(row) + "\n" for row in run.rejected))
    by_stage = Counter(row["stage"] for row in run.rejected)
    return {"problems": len(problems), "kept": len(rows), "failed": run.failed, "rejected": dict(by_stage)}


def _sharegpt(problem: Problem, thought: str, solution: str, system: str) -> dict[str, Any]:
    said = f"{BEGIN_THOUGHT}\n\n{thought}\n\n{END_THOUGHT}\n\n{BEGIN_SOLUTION}\n\n{solution}\n\n{END_SOLUTION}"
    turns = [{"from": "user", "value": problem.prompt}, {"from": "assistant", "value": said}]
    return {"id": problem.id, "system": system, "conversations": turns}


class _Run:
    """The stages of one run; `rejected` and `failed` grow with each."""

    def __init__(self, config: RecipeConfig, label: str, workdir: Path, progress: bool):
        self._config, self._label, self._workdir, self._progress = config, label, workdir, progress
        self.rejected: list[dict[str, str]] = []
        self.failed = 0

    def _reject(self, problem: Problem, stage: str, reason: str) -> None:
        self.rejected.append({"id": problem.id, "stage": stage, "reason": reason})

    def select(self, problems: Sequence[Problem], evaluation: Mapping[str, str]) -> list[Problem]:
        n = self._config.overlap_words
        grams = evaluation_grams(evaluation, n)
        seen: dict[str, str] = {}
        kept = []
        for problem in problems:
            text = " ".join(_words(problem.question))
            if text in seen:
                self._reject(problem, "deduplicate", f"the same problem as {seen[text]}")
                continue
            seen[text] = problem.id
            shared = contaminated(problem.question, grams, n)
            if shared:
                self._reject(problem, "decontaminate", shared)
                continue
            kept.append(problem)
        return kept

    def generate(self, teacher: LanguageModel, problems: Sequence[Problem]) -> dict[str, str]:
        messages = {problem.id: [{"role": "user", "content": problem.prompt}] for problem in problems}
        rows = self._ask("generate", teacher, messages, self._config.generation)
        answers = {}
        for problem in problems:
            row = rows.get(problem.id)
            if row is None:
                continue
            if row["finish_reason"] != "stop":
                self._reject(problem, "generate", f"did not end by itself ({row['finish_reason']})")
            else:
                answers[problem.id] = row["text"]
        return answers

    def divide(self, problems: Sequence[Problem], answers: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        divided = {}
        for problem in problems:
            if problem.id not in answers:
                continue
            text = answers[problem.id].strip()
            sections = parse_sections(text) or _by_think(text, self._config.thought_opened)
            if sections is None:
                self._reject(problem, "divide", "no thought and solution; a rewriter might find them")
            else:
                divided[problem.id] = sections
        return divided

    def rewrite(
        self, rewriter: LanguageModel, problems: Sequence[Problem], answers: Mapping[str, str]
    ) -> dict[str, tuple[str, str]]:
        asked = {name: [{"role": "user", "content": f"{_REWRITE}\n\n{text}"}] for name, text in answers.items()}
        rows = self._ask("rewrite", rewriter, asked, self._config.rewriting)
        divided = {}
        for problem in problems:
            if problem.id not in rows:
                continue
            sections = parse_sections(rows[problem.id]["text"])
            if sections is None:
                self._reject(problem, "rewrite", "not one thought and one solution section")
                continue
            alike = similarity(*sections, answers[problem.id])
            if alike < self._config.least_similarity:
                self._reject(problem, "rewrite", f"similarity {alike:.3f}, below {self._config.least_similarity}")
            else:
                divided[problem.id] = sections
        return divided

    def grade(self, problems: Sequence[Problem], divided: Mapping[str, tuple[str, str]]) -> list[Problem]:
        with MathGrader(workers=self._config.grader_workers) as grader:

            def verdict(problem: Problem) -> Verdict:
                solution = divided[problem.id][1]
                if problem.tests:
                    return grade_code(solution, problem.tests, limits=self._config.code_limits)
                return grader.grade(solution, problem.gold)

            def work(named: tuple[str, Problem]) -> dict[str, Any]:
                found = verdict(named[1])
                return {"key": named[0], "id": named[1].id, "outcome": found.outcome, "reason": found.reason}

            keys = {
                p.id: digest("grade", divided[p.id][1], p.gold, [dataclasses.asdict(test) for test in p.tests]).hex()
                for p in problems
                if p.id in divided
            }
            items = [(keys[p.id], p) for p in problems if p.id in divided]
            rows = self._stage("grade", items, work, self._config.grader_workers)
        kept = []
        for problem in problems:
            row = rows.get(keys.get(problem.id, ""))
            if row is None:
                continue
            if row["outcome"] == "correct":
                kept.append(problem)
            else:
                self._reject(problem, "grade", f"{row['outcome']}: {row['reason']}")
        return kept

    def _ask(
        self, stage: str, model: LanguageModel, messages: Mapping[str, list[dict[str, str]]], sampling: SamplingParams
    ) -> dict[str, dict[str, Any]]:
        """id -> row, of those that were answered."""
        config = self._config

        def work(named: tuple[str, str]) -> dict[str, Any]:
            key, name = named
            # Seeded by the request: a run that goes on would have said the same.
            seeded = dataclasses.replace(sampling, seed=int(key[:14], 16))
            try:
                said = ask(model, messages[name], seeded, retries=config.retries, pause_s=config.pause_s)
            except Unanswered as error:
                return {"key": key, "id": name, "error": str(error)}
            return {"key": key, "id": name, "finish_reason": said.finish_reason, "text": said.text}

        keys = {
            name: digest(stage, self._label, name, asked, dataclasses.asdict(sampling)).hex()
            for name, asked in messages.items()
        }
        rows = self._stage(stage, [(key, name) for name, key in keys.items()], work, config.concurrency)
        return {name: rows[key] for name, key in keys.items() if key in rows}

    def _stage(
        self,
        name: str,
        items: Sequence[tuple[str, Any]],
        work: Callable[[tuple[str, Any]], dict[str, Any]],
        threads: int,
    ) -> dict[str, dict[str, Any]]:
        """key -> row: those of an earlier run, and those of now."""
        with RowFile(self._workdir / f"{name}.jsonl", wanted={key for key, _ in items}) as file:
            left = [item for item in items if item[0] not in file.rows]
            failures = 0
            with Progress(
                len(items), name, unit="row", initial=len(items) - len(left), enabled=self._progress and bool(items)
            ) as bar:
                for row in side_by_side(work, left, threads):
                    file.append(row)
                    bar.advance()
                    if "error" in row:
                        failures += 1
                        if not file.rows and failures == min(16, len(items)):
                            raise UserError(f"{name}: no answer in {failures} tries: {row['error']}")
            self.failed += failures
            return file.rows


def _by_think(text: str, opened: bool) -> tuple[str, str] | None:
    """Divides at the one `</think>`."""
    thought, marker, solution = text.partition("</think>")
    begun = thought.startswith("<think>")
    if not marker or "</think>" in solution or not (begun or opened):
        return None
    thought, solution = thought.removeprefix("<think>").strip(), solution.strip()
    return (thought, solution) if thought and solution else None
