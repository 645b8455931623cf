"""Data made by scripted teachers: what every stage keeps and drops, why, and that a run goes on where it was."""

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxstack.engine import Completion, SamplingParams
from jaxstack.reasoning.grading import CodeTest
from jaxstack.reasoning.longcot.recipe import (
    BEGIN_SOLUTION,
    BEGIN_THOUGHT,
    END_SOLUTION,
    END_THOUGHT,
    Problem,
    RecipeConfig,
    evaluation_grams,
    load_problems,
    make_data,
    parse_sections,
    similarity,
)
from jaxstack.runtime.errors import UserError
from jaxstack.serving import RequestResult

CONFIG = RecipeConfig(concurrency=2, retries=0, pause_s=0.0, grader_workers=1)


class Scripted:
    def __init__(self, say: Callable[[str], str | tuple[str, str]]):
        self._say, self.asked, self._lock = say, [], threading.Lock()

    def generate(self, prompts: Sequence[Any], sampling: Any = None, *, chat_kwargs: Any = None) -> list[RequestResult]:
        (messages,), (params,) = prompts, sampling
        with self._lock:
            self.asked.append((messages[-1]["content"], params))
        said = self._say(messages[-1]["content"])
        text, reason = said if isinstance(said, tuple) else (said, "stop")
        return [RequestResult([Completion(0, text=text, token_ids=[1], finish_reason=reason)])]  # type: ignore[arg-type]

    def stream(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError


def sections(thought: str, solution: str) -> str:
    return f"{BEGIN_THOUGHT}\n{thought}\n{END_THOUGHT}\n\n{BEGIN_SOLUTION}\n{solution}\n{END_SOLUTION}"


def test_sections_are_parsed_strictly():
    assert parse_sections(sections("a\n\nb", "c")) == ("a\n\nb", "c")
    for text in (
        "Sure! " + sections("a", "b"),
        sections("a", "b") + " Done.",
        sections("a", f"b {END_THOUGHT} c"),  # both of two formats in one
        sections("", "b"),
        f"{BEGIN_THOUGHT} a {END_THOUGHT} b",
        "Error: rate limit",
        "",
    ):
        assert parse_sections(text) is None, text


def test_similarity():
    original = " ".join(f"word{i}" for i in range(200))
    half = " ".join(f"word{i}" for i in range(100))
    assert similarity(original, "the end", original) == 1.0
    assert similarity(half, "", original) < 0.6  # left out
    assert similarity(half, " ".join(f"word{i}" for i in range(98, 200)), original) == 1.0
    assert similarity(original + " and more was made up " * 20, "", original) < 0.7
    assert similarity("other words", "", original) == 0.0 and similarity("", "", "") == 0.0
    backwards = " ".join(f"word{i}" for i in range(200, 0, -1))
    assert similarity(backwards, "", original) == 0.0


def run(tmp_path: Path, teacher: Scripted, problems: list[Problem], **options: Any) -> tuple[Any, list[Any], list[Any]]:
    summary = make_data(teacher, problems, options.pop("config", CONFIG), tmp_path, progress=False, **options)
    kept, rejected = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("data", "rejected"))
    return summary, [json.loads(line) for line in kept], [json.loads(line) for line in rejected]


SUM = "Ann has {} apples and Bob has one more than she does; how many do they have together in all?"


def test_from_problems_to_rows(tmp_path: Path):
    problems = [Problem(f"p{i}", SUM.format(i), str(2 * i + 1)) for i in range(1, 7)]
    problems.append(Problem("again", SUM.format(1).upper(), "3"))
    leak = "a train leaves the old station at noon and runs east for seven hours"
    problems.append(Problem("leak", f"Once, {leak.upper()}; how far?", "19"))
    problems.append(Problem("code", "Echo.", tests=(CodeTest("5", "5"),)))

    def teach(prompt: str) -> str | tuple[str, str]:
        if "Echo" in prompt:
            return "<think> read and print </think>\n```python\nprint(input())\n```"
        number = int(prompt.split("has ")[1].split()[0])
        return {
            2: (f"<think> {number} \\boxed{{5}}", "length"),  # cut short, though its thought holds the answer
            3: f"\\boxed{{{2 * number + 1}}}",  # no thought
            4: "<think> I guess </think> \\boxed{10}",  # wrong
            5: "<think> 11 </think> It is 11.",  # no box
        }.get(number, f"<think> {number} and {number + 1}\n\nso add </think> \\boxed{{{2 * number + 1}}}")

    teacher = Scripted(teach)
    known = {"AIME24/1": f"It is known that {leak}. Where is it?"}
    summary, kept, rejected = run(tmp_path, teacher, problems, evaluation=known)
    assert [row["id"] for row in kept] == ["p1", "p6", "code"] and summary["failed"] == 0
    assert {row["id"]: row["stage"] for row in rejected} == {
        "again": "deduplicate",
        "leak": "decontaminate",
        "p2": "generate",
        "p3": "divide",
        "p4": "grade",
        "p5": "grade",
    }
    assert summary["rejected"] == {"deduplicate": 1, "decontaminate": 1, "generate": 1, "divide": 1, "grade": 2}
    reasons = {row["id"]: row["reason"] for row in rejected}
    assert "AIME24/1" in reasons["leak"] and "length" in reasons["p2"] and "no_answer" in reasons["p5"]
    user, assistant = kept[0]["conversations"]
    assert user["from"] == "user" and user["value"].startswith("Ann has 1") and assistant["from"] == "assistant"
    assert parse_sections(assistant["value"]) == ("1 and 2\n\nso add", "\\boxed{3}")
    assert len(teacher.asked) == 7 and BEGIN_THOUGHT in kept[0]["system"]
    # Everything is there: nobody is asked again.
    idle = Scripted(teach)
    assert run(tmp_path, idle, problems, evaluation=known)[1:] == (kept, rejected) and not idle.asked
    # One problem more, one request more; its neighbours keep their rows.
    more = [*problems, Problem("p10", SUM.format(10), "21")]
    assert [row["id"] for row in run(tmp_path, idle, more, evaluation=known)[1]] == ["p1", "p6", "code", "p10"]
    assert len(idle.asked) == 1


def test_rewriting(tmp_path: Path):
    problems = [Problem(f"p{i}", SUM.format(i), str(2 * i + 1)) for i in range(1, 6)]

    def teach(prompt: str) -> str:
        number = int(prompt.split("has ")[1].split()[0])
        return f"Ann has {number}, so Bob has {number + 1}. Wait, together that is \\boxed{{{2 * number + 1}}}"

    def rewrite(prompt: str) -> str:
        original = prompt.partition("Write nothing else.\n\n")[2]
        number = int(original.split("has ")[1].split(",")[0])
        thought, solution = original.partition(" Wait")[0], "Wait" + original.partition("Wait")[2]
        if number == 2:
            return sections("Let us think about something else entirely here", solution)
        if number == 3:
            return f"Here you are: {sections(thought, solution)}"
        if number == 4:
            raise RuntimeError("too busy; retry in \\boxed{9} seconds")
        return sections(thought, solution)

    summary, kept, rejected = run(tmp_path, Scripted(teach), problems, rewriter=Scripted(rewrite))
    assert [row["id"] for row in kept] == ["p1", "p5"]
    assert summary == {"problems": 5, "kept": 2, "failed": 1, "rejected": {"rewrite": 2}}
    assert [row["reason"].split(",")[0] for row in rejected] == [
        "similarity 0.000",
        "not one thought and one solution section",
    ]
    healed = Scripted(lambda prompt: rewrite(prompt.replace("has 4", "has 1")))
    summary, kept, _ = run(tmp_path, Scripted(teach), problems, rewriter=healed)
    assert len(healed.asked) == 1 and summary["failed"] == 0


def test_nobody_answers(tmp_path: Path):
    def fail(prompt: str) -> str:
        raise ConnectionError("refused")

    with pytest.raises(UserError, match=r"generate: no answer in 1 tries: ConnectionError: refused"):
        make_data(Scripted(fail), [Problem("p", "q", "1")], CONFIG, tmp_path, progress=False)


def test_short_problems_are_compared_whole():
    grams = evaluation_grams({"a": "What is 1+1?", "b": " ".join("abcdefghijkl")}, 10)
    assert set(grams) == {("what", "is", "1", "1"), tuple("abcdefghij"), tuple("bcdefghijk"), tuple("cdefghijkl")}


def test_load_problems(tmp_path: Path):
    rows = [
        {"source": "olympiads", "problem": "N?", "solution": "so \\boxed{7}"},
        {"id": "x", "question": "A?", "answer": 12},
        {"problem_id": 3, "question": "C?", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})},
        {"question": "F?", "input_output": json.dumps({"inputs": [[1]], "outputs": [2], "fn_name": "f"})},
    ]
    file = tmp_path / "numina.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems([file])
    assert [problem.id for problem in problems] == ["numina/1", "x", "numina/3", "numina/4"]
    assert [problem.gold for problem in problems] == ["7", "12", "", ""]
    assert problems[2].tests == (CodeTest("1\n", "2\n"),) and "standard input" in problems[2].prompt
    assert "named f" in problems[3].prompt and "boxed" in problems[0].prompt
    for row, message in (
        ({"text": "?"}, "row 1: found the columns text, expected problem or question"),
        ({"problem": "?", "solution": "none"}, "row 1: found no answer"),
        ({"problem": "?", "input_output": "{"}, "input_output cannot be read"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=message):
            load_problems([file])


def test_bad_settings():
    with pytest.raises(UserError, match="least_similarity: found 2"):
        RecipeConfig(least_similarity=2.0)
    with pytest.raises(UserError, match="overlap_words: found 0"):
        dataclasses.replace(CONFIG, overlap_words=0)
    assert SamplingParams(max_tokens=16_384, temperature=0.7) == CONFIG.generation
