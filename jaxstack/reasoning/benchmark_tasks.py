r"""The benchmarks a reasoning model is measured on: their published columns, prompts and graders.

Data are files on this machine (JSONL, JSON, CSV or parquet) with the columns of the published data sets; nothing is
downloaded. `countdown` needs no file.
"""

import base64
import binascii
import csv
import dataclasses
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from jaxstack.reasoning import countdown
from jaxstack.reasoning.grading import CodeTest, shuffled_options
from jaxstack.reasoning.grading.choice import LETTERS
from jaxstack.runtime.errors import UserError

Kind = Literal["integer", "math", "choice", "code", "countdown"]
Row = Mapping[str, Any]

_MATH = "Solve this problem step by step. Put your final answer in \\boxed{}."
_SEVERAL = "Solve this problem step by step. Put all your final answers in one \\boxed{}, separated by commas."
_CHOICE = "Work out which option is correct. Put its letter, and nothing else, in \\boxed{}."
_PROGRAM = (
    "Write a Python program that solves this problem. It reads standard input and prints to standard output. Give the "
    "whole program in one block that begins with ```python."
)
_FUNCTION = (
    "Solve this problem in Python by completing the code below. Give the whole of it in one block that begins with "
    "```python."
)
_LARGEST_TESTS = 1 << 30


@dataclasses.dataclass(frozen=True)
class Question:
    """One problem of a benchmark.

    Attributes:
      id: unique in the task.
      prompt: what the user says: an instruction and the problem.
      problem: without the instruction, to look for elsewhere.
      gold: the true answer: an int, LaTeX, a letter, a tuple of `CodeTest`, or a `countdown.Problem`.
      group: what results are also reported by: difficulty, level or subject; "" for none.
      options: of a choice, how many.
      tolerance: of a number, the largest absolute error.
      several: the answer is a list without order.
    """

    id: str
    prompt: str
    problem: str
    gold: Any
    group: str = ""
    options: int = 0
    tolerance: float | None = None
    several: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      kind: how it is graded.
      size: problems in the published set, for orientation.
      source: the published set whose columns are read; "" if it needs no data.
      read: a row, numbered from 1, becomes a question; None for a row that is not of this benchmark.
    """

    name: str
    kind: Kind
    size: int
    source: str
    read: Callable[[Row, int], Question | None]


def load_questions(task: Task, paths: Sequence[str | Path] = (), *, limit: int | None = None) -> list[Question]:
    """The questions in files of the task's published form, in order; the first `limit` of them.

    Raises:
      UserError: no file, a file or row that cannot be read (file, row, what was found and expected), an id twice, or no
        question at all.
    """
    if limit is not None and limit < 1:
        raise UserError(f"{task.name}: found a limit of {limit} questions, expected at least 1")
    if not task.source:
        if paths:
            raise UserError(f"{task.name}: found {str(paths[0])!r}, expected no data: its problems are made here")
        return [task.read({}, number) for number in range(1, (limit or task.size) + 1)]  # type: ignore[misc]
    if not paths:
        raise UserError(f"{task.name}: no data; expected files with the columns of {task.source}")
    questions: dict[str, Question] = {}
    for path in map(Path, paths):
        for number, row in enumerate(read_rows(path), 1):
            if limit is not None and len(questions) >= limit:
                break
            try:
                question = task.read(row, number)
            except _Unreadable as error:
                raise UserError(f"{path}: row {number}: {error}") from None
            if question is None:
                continue
            if question.id in questions:
                raise UserError(f"{path}: row {number}: found the question {question.id!r} a second time")
            questions[question.id] = question
    if not questions:
        raise UserError(f"{task.name}: {', '.join(map(str, paths))}: no question of it, expected rows of {task.source}")
    return list(questions.values())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json (a list), .csv (with a header) or .parquet file.

    Raises:
      UserError: it cannot be read, or is none of these.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: found a {path.suffix or 'nameless'} file, expected one of {', '.join(readers)}")
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(path, number, line)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: found {type(row).__name__}, expected an object")
    return row


def _json_list(path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects")
    yield from rows


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import duckdb

    with duckdb.connect() as database:
        try:
            found = database.execute("SELECT * FROM read_parquet(?)", [str(path)])
        except duckdb.Error as error:
            raise UserError(f"{path}: not parquet ({str(error).splitlines()[0]})") from None
        names = [column[0] for column in found.description or ()]
        while rows := found.fetchmany(1024):
            yield from (dict(zip(names, row)) for row in rows)


class _Unreadable(ValueError):
    """A row lacks something; the message says what."""


def _column(row: Row, *names: str) -> Any:
    """The first of `names` that the row has."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise _Unreadable(f"found the columns {found}, expected {' or '.join(names)}")


def _integer(value: Any) -> int:
    try:
        if float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise _Unreadable(f"answer: found {value!r}, expected an integer")


def _of_year(row: Row, year: int) -> bool:
    """Whether a competition's row is of that year, as far as it says."""
    if row.get("year") is not None:
        return str(row["year"]) == str(year)
    return str(year) in str(row["url"]) if row.get("url") else True


def _aime24(row: Row, number: int) -> Question | None:
    if not _of_year(row, 2024):
        return None
    problem = str(_column(row, "problem", "question"))
    return Question(str(row.get("id", number)), f"{_MATH}\n\n{problem}", problem, _integer(_column(row, "answer")))


def _amc23(row: Row, number: int) -> Question | None:
    if not _of_year(row, 2023):
        return None
    answer = _column(row, "answer")
    gold = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).removesuffix(".0")
    problem = str(_column(row, "problem", "question"))
    return Question(str(row.get("id", number)), f"{_MATH}\n\n{problem}", problem, gold)


def _math500(row: Row, number: int) -> Question:
    return Question(
        id=str(row.get("unique_id", number)),
        prompt=f"{_MATH}\n\n{_column(row, 'problem')}",
        problem=str(_column(row, "problem")),
        gold=str(_column(row, "answer")),
        group=f"level {row['level']}" if row.get("level") is not None else "",
    )


def _olympiad(row: Row, number: int) -> Question | None:
    """OE_TO_maths_en_COMP: open-ended, text only, mathematics, English, competition."""
    wanted = {"question_type": "Open-ended", "modality": "Text-only", "subject": "Math", "language": "English"}
    if any(row.get(name) not in (None, value) for name, value in wanted.items()):
        return None
    answers = _column(row, "final_answer")
    answers = [str(answer) for answer in answers] if isinstance(answers, list | tuple) else [str(answers)]
    several = str(row.get("is_multiple_answer")).lower() == "true"
    error = str(row.get("error") or "").strip()
    try:
        tolerance = float(error) if error else None
    except ValueError:
        tolerance = None  # one for each part, as "0.1,0.1": exact comparison is the stricter reading
    context = f"{row['context']}\n\n" if row.get("context") else ""
    return Question(
        id=str(row.get("id", number)),
        prompt=f"{_SEVERAL if several else _MATH}\n\n{context}{_column(row, 'question')}",
        problem=str(_column(row, "question")),
        gold=", ".join(answer.strip().strip("$") for answer in answers),
        group=str(row.get("subfield") or ""),
        tolerance=tolerance,
        several=several or len(answers) > 1,
    )


def _choice_prompt(question: str, options: Iterable[str]) -> str:
    listed = "\n".join(f"{letter}) {str(option).strip()}" for letter, option in zip(LETTERS, options))
    return f"{_CHOICE}\n\n{question.strip()}\n\n{listed}"


def _gpqa(row: Row, number: int) -> Question:
    name = str(row.get("Record ID") or number)
    others = [str(_column(row, f"Incorrect Answer {i}")) for i in (1, 2, 3)]
    options, letter = shuffled_options(str(_column(row, "Correct Answer")), others, name)
    group = str(row.get("High-level domain") or "")
    problem = str(_column(row, "Question"))
    return Question(name, _choice_prompt(problem, options), problem, letter, group, options=4)


def _mmlu(row: Row, number: int) -> Question:
    options = list(_column(row, "choices"))
    answer = _integer(_column(row, "answer"))
    if not 0 <= answer < len(options):
        raise _Unreadable(f"answer: found {answer}, expected 0 to {len(options) - 1}")
    subject = str(row.get("subject") or "")
    problem = str(_column(row, "question"))
    prompt = _choice_prompt(problem, options)
    return Question(f"{subject}/{number}", prompt, problem, LETTERS[answer], subject, options=len(options))


def _mmlu_pro(row: Row, number: int) -> Question:
    options = [option for option in _column(row, "options") if str(option) != "N/A"]
    letter = str(_column(row, "answer"))
    if letter not in LETTERS[: len(options)]:
        raise _Unreadable(f"answer: found {letter!r}, expected a letter of {LETTERS[: len(options)]}")
    problem, group = str(_column(row, "question")), str(row.get("category") or "")
    prompt = _choice_prompt(problem, options)
    return Question(str(row.get("question_id", number)), prompt, problem, letter, group, options=len(options))


def _livecodebench(row: Row, number: int) -> Question:
    starter = str(row.get("starter_code") or "")
    metadata = json.loads(row.get("metadata") or "{}")
    function = metadata.get("func_name") if isinstance(metadata, dict) else None
    tests = [
        _code_test(case, function)
        for name in ("public_test_cases", "private_test_cases")
        for case in _test_cases(_column(row, name), name)
    ]
    problem = str(_column(row, "question_content")).strip()
    prompt = (
        f"{_FUNCTION}\n\n{problem}\n\n```python\n{starter.rstrip()}\n```" if starter else f"{_PROGRAM}\n\n{problem}"
    )
    group = str(row.get("difficulty") or "")
    return Question(str(row.get("question_id", number)), prompt, problem, tuple(tests), group)


def _test_cases(value: Any, name: str) -> list[dict[str, Any]]:
    """A list of `{"input", "output", "testtype"}` as JSON, or that JSON pickled, compressed and in base64."""
    try:
        try:
            cases = json.loads(value)
        except ValueError:
            unpacker = zlib.decompressobj()
            pickled = unpacker.decompress(base64.b64decode(value, validate=True), _LARGEST_TESTS)
            cases = json.loads(_PlainUnpickler(BytesIO(pickled)).load())
    except (ValueError, TypeError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise _Unreadable(f"{name}: cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(cases, list) or not all(isinstance(case, dict) and "input" in case for case in cases):
        raise _Unreadable(f"{name}: expected a list of objects with input and output")
    return cases


class _PlainUnpickler(pickle.Unpickler):
    """Of strings and numbers alone: a pickle may otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"found {module}.{name}, expected a plain string")


def _code_test(case: Mapping[str, Any], function: str | None) -> CodeTest:
    if case.get("testtype", "stdin") != "functional":
        return CodeTest(str(case["input"]), str(_column(case, "output")))
    if function is None:
        raise _Unreadable("metadata: no func_name, expected one for tests of a function")
    try:
        arguments = [json.loads(line) for line in str(case["input"]).split("\n") if line.strip()]
        return CodeTest(arguments, json.loads(_column(case, "output")), function)
    except ValueError as error:
        raise _Unreadable(f"a test of {function} is not JSON ({error})") from None


def _countdown(row: Row, number: int) -> Question:
    problem = _held_out(number)
    solution = countdown.solve(problem)
    assert solution is not None
    group = f"first hit at {solution.depth}"
    return Question(f"held out {number}", problem.content, problem.content, problem, group)


def _held_out(number: int) -> countdown.Problem:
    return countdown.held_out(number)[-1]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("AIME24", "integer", 30, "AI-MO/aimo-validation-aime", _aime24),
        Task("AMC23", "math", 40, "AI-MO/aimo-validation-amc", _amc23),
        Task("MATH500", "math", 500, "HuggingFaceH4/MATH-500", _math500),
        Task("OlympiadBench", "math", 674, "Hothan/OlympiadBench, OE_TO_maths_en_COMP", _olympiad),
        Task("GPQA-Diamond", "choice", 198, "Idavidrein/gpqa, gpqa_diamond", _gpqa),
        Task("LiveCodeBench", "code", 511, "livecodebench/code_generation_lite, release_v2", _livecodebench),
        Task("MMLU", "choice", 14_042, "cais/mmlu, all", _mmlu),
        Task("MMLU-Pro", "choice", 12_032, "TIGER-Lab/MMLU-Pro", _mmlu_pro),
        Task("countdown", "countdown", 64, "", _countdown),
    )
}


def find_task(name: str) -> Task:
    """The task of that name, in any case and with or without hyphens.

    Raises:
      UserError: there is none.
    """

    def plain(text: str) -> str:
        return re.sub(r"[-_ ]", "", text.lower())

    for task in TASKS.values():
        if plain(task.name) == plain(name):
            return task
    raise UserError(f"task {name!r} is unknown; known are {', '.join(TASKS)}")
