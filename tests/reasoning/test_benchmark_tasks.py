"""Loaders on small files in the published forms: what becomes of a row, and one clear line for what cannot be read."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import duckdb
import pytest

from jaxstack.reasoning.benchmark_tasks import TASKS, Question, find_task, load_questions
from jaxstack.reasoning.grading import CodeTest
from jaxstack.runtime.errors import UserError


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As JSON lines, a JSON list, CSV or parquet, by the file's ending."""
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".parquet", ".csv"):
        with duckdb.connect() as database:
            kind = "PARQUET" if path.suffix == ".parquet" else "CSV, HEADER"
            database.execute(f"COPY (SELECT * FROM read_json_auto('{lines}')) TO '{path}' (FORMAT {kind})")
    return path


def load(name: str, path: Path, rows: list[dict[str, Any]], **options: Any) -> list[Question]:
    return load_questions(find_task(name), [write(path, rows)], **options)


AIME = [
    {
        "id": 60,
        "problem": "Every morning?",
        "solution": "...",
        "answer": "204",
        "url": "https://x/2024_AIME_I/Problem_1",
    },
    {"id": 61, "problem": "Last year?", "solution": "...", "answer": "070", "url": "https://x/2023_AIME_I/Problem_1"},
    {"id": 62, "problem": "There exist?", "solution": "...", "answer": "025", "url": "https://x/2024_AIME_I/Problem_2"},
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_aime_of_2024_in_every_form(tmp_path: Path, ending: str):
    questions = load("AIME24", tmp_path / f"aime{ending}", AIME)
    assert [(question.id, question.gold) for question in questions] == [("60", 204), ("62", 25)]
    assert questions[0].prompt.endswith("\n\nEvery morning?") and "\\boxed{}" in questions[0].prompt
    assert len(load("aime-24", tmp_path / f"aime{ending}", AIME, limit=1)) == 1
    newer = [
        {"id": 1, "problem": "p", "answer": "33", "year": 2024},
        {"id": 2, "problem": "p", "answer": "3", "year": 2025},
    ]
    assert [question.gold for question in load("AIME24", tmp_path / f"h4{ending}", newer)] == [33]


def test_amc(tmp_path: Path):
    rows = [
        {"id": 0, "problem": "a?", "answer": 142.0, "url": "https://x/2023_AMC_12A_Problems/Problem_1"},
        {"id": 1, "problem": "b?", "answer": 0.5, "url": "https://x/2023_AMC_12A_Problems/Problem_2"},
        {"id": 2, "problem": "c?", "answer": 3.0, "url": "https://x/2022_AMC_12A_Problems/Problem_2"},
    ]
    assert [question.gold for question in load("AMC23", tmp_path / "a.parquet", rows)] == ["142", "0.5"]
    assert load("AMC23", tmp_path / "b.jsonl", [{"id": 7, "question": "q?", "answer": "27.0"}])[0].gold == "27"


def test_math500(tmp_path: Path):
    row = {
        "problem": "Convert.",
        "solution": "s",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    (question,) = load("MATH500", tmp_path / "m.jsonl", [row])
    assert (question.id, question.group) == ("test/precalculus/807.json", "level 2")
    assert question.gold == row["answer"]


def test_olympiad(tmp_path: Path):
    row = {
        "id": 1606,
        "question": "Find all $x$.",
        "solution": ["..."],
        "final_answer": ["$2$, $-1$"],
        "context": None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": True,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": "Algebra",
        "subject": "Math",
        "language": "English",
    }
    rows = [
        row,
        {**row, "id": 2, "is_multiple_answer": False, "final_answer": ["3.14"], "error": "1e-2", "context": "Given."},
        {**row, "id": 3, "subject": "Physics"},
        {**row, "id": 4, "modality": "Multimodal"},
        {**row, "id": 5, "language": "Chinese"},
    ]
    several, one = load("OlympiadBench", tmp_path / "o.parquet", rows)
    assert several.several and several.tolerance is None and several.gold == "2$, $-1" and several.group == "Algebra"
    assert not one.several and one.tolerance == 0.01 and "Given.\n\nFind all" in one.prompt and one.gold == "3.14"


def test_gpqa_options_are_shuffled_by_the_question(tmp_path: Path):
    rows = [
        {
            "Record ID": f"rec{i}",
            "Question": "Which?",
            "Correct Answer": "right",
            "Incorrect Answer 1": "w1",
            "Incorrect Answer 2": "w2",
            "Incorrect Answer 3": "w3",
            "High-level domain": "Physics",
        }
        for i in range(40)
    ]
    questions = load("GPQA-Diamond", tmp_path / "g.csv", rows)
    assert all(f"{question.gold}) right" in question.prompt for question in questions)
    assert {question.gold for question in questions} == set("ABCD") and questions[0].group == "Physics"
    assert load("gpqa diamond", tmp_path / "g.csv", rows[::-1])[::-1] == questions


def test_mmlu(tmp_path: Path):
    rows = [{"question": "2+2?", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 3}] * 2
    questions = load("MMLU", tmp_path / "m.parquet", rows)  # questions that are there twice are two questions
    assert [(q.id, q.gold, q.options) for q in questions] == [("algebra/1", "D", 4), ("algebra/2", "D", 4)]
    assert "A) 1\nB) 2\nC) 3\nD) 4" in questions[0].prompt
    pro = {"question_id": 70, "question": "q", "options": [str(i) for i in range(10)], "answer": "I", "category": "law"}
    (question,) = load("MMLU-Pro", tmp_path / "p.parquet", [{**pro, "answer_index": 8}])
    assert (question.id, question.gold, question.group, question.options) == ("70", "I", "law", 10)


LCB = {
    "question_title": "t",
    "question_content": "Add.",
    "question_id": "abc301_a",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "metadata": "{}",
}


def packed(cases: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(cases))).decode()


def test_livecodebench(tmp_path: Path):
    hidden = [{"input": "4 5\n", "output": "9\n", "testtype": "stdin"}]
    (question,) = load(
        "LiveCodeBench", tmp_path / "a.jsonl", [{**LCB, "private_test_cases": packed(json.dumps(hidden))}]
    )
    assert question.gold == (CodeTest("1 2\n", "3\n"), CodeTest("4 5\n", "9\n")) and question.group == "easy"
    assert "standard input" in question.prompt
    function = {
        **LCB,
        "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
        "metadata": json.dumps({"func_name": "add"}),
        "public_test_cases": json.dumps([{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]),
        "private_test_cases": "[]",
    }
    (question,) = load("LiveCodeBench", tmp_path / "b.jsonl", [function])
    assert question.gold == (CodeTest([1, [2, 3]], 6, "add"),) and "def add" in question.prompt


class Harmful:
    def __reduce__(self):
        return print, ("run while unpickling",)


def test_a_pickle_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match=r"row 1: private_test_cases: cannot be read .*expected a plain string"):
        load("LiveCodeBench", tmp_path / "a.jsonl", [{**LCB, "private_test_cases": packed(Harmful())}])
    assert "run while" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("AIME24", {"id": 1, "problem": "p"}, r"row 1: found the columns id, problem, expected answer"),
        ("AIME24", {"problem": "p", "answer": "ten"}, r"row 1: answer: found 'ten', expected an integer"),
        ("AIME24", {"problem": "p", "answer": "1", "url": "of 1999"}, r"no question of it, expected rows of AI-MO"),
        ("MMLU", {"question": "q", "choices": ["a"], "answer": 1}, r"answer: found 1, expected 0 to 0"),
        ("MMLU-Pro", {"question": "q", "options": ["a"], "answer": "B"}, r"found 'B', expected a letter of A"),
        ("LiveCodeBench", {**LCB, "private_test_cases": "!"}, r"private_test_cases: cannot be read"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, task: str, row: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        load(task, tmp_path / "x.jsonl", [row])


def test_bad_files_are_named(tmp_path: Path):
    task = TASKS["AIME24"]
    with pytest.raises(UserError, match=r"AIME24: no data; expected files with the columns of AI-MO/"):
        load_questions(task)
    with pytest.raises(UserError, match="no such file"):
        load_questions(task, [tmp_path / "none.jsonl"])
    (tmp_path / "x.jsonl").write_text('{"id": 1}\nnot json\n')
    with pytest.raises(UserError, match=r"row 1: found the columns id"):
        load_questions(task, [tmp_path / "x.jsonl"])
    (tmp_path / "x.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"x.jsonl:1: not JSON"):
        load_questions(task, [tmp_path / "x.jsonl"])
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"x.parquet: not parquet"):
        load_questions(task, [tmp_path / "x.parquet"])
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"found a .txt file, expected one of .jsonl"):
        load_questions(task, [tmp_path / "x.txt"])
    with pytest.raises(UserError, match=r"the question '60' a second time"):
        load("AIME24", tmp_path / "twice.jsonl", [AIME[0], AIME[0]])
    with pytest.raises(UserError, match="task 'chess' is unknown; known are AIME24"):
        find_task("chess")
    with pytest.raises(UserError, match="expected no data"):
        load_questions(TASKS["countdown"], ["x.jsonl"])
    with pytest.raises(UserError, match="limit of 0"):
        load_questions(task, ["x.jsonl"], limit=0)


def test_countdown_needs_no_data():
    questions = load_questions(TASKS["countdown"], limit=5)
    assert len({question.prompt for question in questions}) == 5 and questions[0].prompt.startswith("numbers ")
