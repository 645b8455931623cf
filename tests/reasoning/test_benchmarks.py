"""Evaluation from files of the published forms to a report, by scripted models: figures, resumed runs, failures."""

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxstack.engine import Completion, EngineDead, SamplingParams
from jaxstack.reasoning.benchmark_report import Answer, summarise
from jaxstack.reasoning.benchmark_tasks import find_task, load_questions
from jaxstack.reasoning.benchmarks import EvaluationConfig, evaluate
from jaxstack.runtime.errors import UserError
from jaxstack.serving import RequestResult

CONFIG = EvaluationConfig(
    samples=4, sampling=SamplingParams(max_tokens=100, temperature=0.6), concurrency=3, pause_s=0.0
)


class Scripted:
    """A `LanguageModel` that says what `say(prompt, sampling)` returns, and notes what it was asked."""

    def __init__(self, say: Callable[[str, SamplingParams], str]):
        self._say, self.asked, self._lock = say, [], threading.Lock()

    def generate(self, prompts: Sequence[Any], sampling: Any = None, *, chat_kwargs: Any = None) -> list[RequestResult]:
        results = []
        for messages, params in zip(prompts, sampling):
            with self._lock:
                self.asked.append((messages, params, chat_kwargs))
            text = self._say(messages[-1]["content"], params)
            results.append(
                RequestResult([Completion(0, text=text, token_ids=list(range(len(text))), finish_reason="stop")])
            )
        return results

    def stream(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def aime(tmp_path: Path) -> Any:
    rows = [{"id": i, "problem": f"What is {i}+{i}?", "answer": f"{2 * i:03}"} for i in range(1, 7)]
    task = find_task("AIME24")
    return task, load_questions(task, [jsonl(tmp_path / "aime.jsonl", rows)])


def test_from_file_to_report(aime: Any, tmp_path: Path):
    """Question i is right whenever its seed says so: the report against what the model really said."""
    task, questions = aime
    said: dict[str, list[bool]] = {}
    lock = threading.Lock()

    def say(prompt: str, params: SamplingParams) -> str:
        number = int(prompt.rpartition("is ")[2].partition("+")[0])
        right = params.temperature == 0 or (params.seed or 0) % 7 < number
        if params.temperature:
            with lock:
                said.setdefault(prompt, []).append(right)
        return f"<think> \\boxed{{1}} </think> It is \\boxed{{{2 * number if right else 0}}}."

    model = Scripted(say)
    config = dataclasses.replace(CONFIG, samples=8, budgets=(10, 100), system="Be exact.", enable_thinking=True)
    report = evaluate(model, task, questions, config, tmp_path / "run", label="m", progress=False)
    assert report.questions == 6 and report.samples == 8 and report.failed == 0
    assert report.greedy is not None and report.greedy.mean == 1.0 and report.greedy.degenerate
    assert report.pass_at[1].mean == pytest.approx(np.mean(list(said.values())))
    assert report.pass_at[8].mean == np.mean([any(given) for given in said.values()])
    assert list(report.pass_at) == [1, 2, 4, 8] and report.pass_at[1].low < report.pass_at[1].mean
    assert report.majority is not None and report.lenient == report.pass_at[1]
    assert report.budgets[10].mean == 0.0 and report.budgets[100] == report.pass_at[1]
    assert report.outcomes["correct"] == 6 + sum(map(sum, said.values()))
    messages, _, chat_kwargs = model.asked[0]
    assert [m["role"] for m in messages] == ["system", "user"] and chat_kwargs == {"enable_thinking": True}
    assert len({params.seed for _, params, _ in model.asked if params.temperature}) == 48
    json.dumps(report.as_json())
    assert "pass@8" in report.table() and "AIME24: 6 questions" in report.table()


def test_a_run_that_was_killed_goes_on(aime: Any, tmp_path: Path):
    task, questions = aime
    workdir = tmp_path / "run"

    def say(prompt: str, params: SamplingParams) -> str:
        return f"\\boxed{{{(params.seed or 0) % 5}}}"

    whole = evaluate(Scripted(say), task, questions, CONFIG, tmp_path / "whole", progress=False)
    first = Scripted(say)
    part = evaluate(first, task, questions[:2], dataclasses.replace(CONFIG, samples=2), workdir, progress=False)
    assert len(first.asked) == 6 and part.questions == 2
    answers = workdir / "answers.jsonl"
    before = answers.read_bytes()
    answers.write_bytes(before[:-20])  # torn
    second = Scripted(say)
    report = evaluate(second, task, questions, CONFIG, workdir, progress=False)
    assert len(second.asked) == 30 - 5 and report == whole
    assert len(answers.read_bytes().splitlines()) == 30
    third = Scripted(say)
    assert evaluate(third, task, questions, CONFIG, workdir, progress=False) == whole and not third.asked
    # Another model's answers, or another prompt's, are not these.
    assert evaluate(third, task, questions[:1], CONFIG, workdir, label="other", progress=False).questions == 1
    assert len(third.asked) == 5
    answers.write_bytes(b'{"no": "answer"}\n')
    with pytest.raises(UserError, match=r"answers.jsonl:1: no row of such a run"):
        evaluate(third, task, questions, CONFIG, workdir, progress=False)


def test_what_fails_is_retried_then_marked_and_had_again_next_time(aime: Any, tmp_path: Path):
    task, questions = aime
    broken, tries = True, 0

    def say(prompt: str, params: SamplingParams) -> str:
        nonlocal tries
        if "3+3" in prompt and broken:
            tries += 1
            raise RuntimeError("Error: 6 is what I meant")
        return "\\boxed{6}"

    config = dataclasses.replace(CONFIG, samples=0, retries=2, concurrency=1)
    report = evaluate(Scripted(say), task, questions, config, tmp_path / "run", progress=False)
    assert tries == 3 and report.failed == 1 and report.questions == 5
    assert report.greedy is not None and report.greedy.mean == 0.0  # an error's text is no answer
    assert report.failed_share == pytest.approx(1 / 6)
    broken = False
    again = Scripted(say)
    report = evaluate(again, task, questions, config, tmp_path / "run", progress=False)
    assert len(again.asked) == 1 and report.failed == 0 and report.outcomes["correct"] == 1

    def dead(prompt: str, params: SamplingParams) -> str:
        raise EngineDead("gone")

    with pytest.raises(EngineDead):
        evaluate(Scripted(dead), task, questions, config, tmp_path / "dead", progress=False)

    def nobody(prompt: str, params: SamplingParams) -> str:
        raise UserError("cannot be reached")

    with pytest.raises(UserError, match=r"AIME24: no answer in 6 tries: UserError: cannot be reached"):
        evaluate(Scripted(nobody), task, questions, config, tmp_path / "nobody", progress=False)


def test_every_kind_is_graded(tmp_path: Path):
    """One row of each published form, answered rightly and wrongly."""
    lcb = {
        "question_content": "Add.",
        "question_id": "a",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        "private_test_cases": "[]",
    }
    gpqa = {"Record ID": "r", "Question": "Which?", "Correct Answer": "right"}
    gpqa |= {f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)}
    code = "```python\na, b = map(int, input().split())\nprint(a {} b)\n```"
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("MATH500", {"problem": "?", "answer": r"\frac12", "level": 2}, r"\boxed{0.5}", r"\boxed{0.6}"),
        (
            "OlympiadBench",
            {"question": "?", "final_answer": ["1, 2"], "is_multiple_answer": True},
            r"\boxed{2,1}",
            "1, 2",
        ),
        ("GPQA-Diamond", gpqa, "?", r"\boxed{E}"),
        ("MMLU", {"question": "?", "choices": ["a", "b"], "answer": 1}, "Answer: B", "Answer: A"),
        ("LiveCodeBench", lcb, code.format("+"), code.format("-")),
    ]
    for name, row, right, wrong in cases:
        task = find_task(name)
        questions = load_questions(task, [jsonl(tmp_path / "x.jsonl", [row])])
        if name == "GPQA-Diamond":
            right = f"\\boxed{{{questions[0].gold}}}"
        config = dataclasses.replace(CONFIG, samples=1)

        def say(prompt: str, params: SamplingParams, right: str = right, wrong: str = wrong) -> str:
            return wrong if params.temperature else right

        report = evaluate(Scripted(say), task, questions, config, tmp_path / name, progress=False)
        assert report.greedy is not None and report.greedy.mean == 1.0, name
        assert report.pass_at[1].mean == 0.0, name
        assert (report.majority is None) == (name == "LiveCodeBench")
        if name == "OlympiadBench":  # no box: strictly no answer, and its last number is not both
            assert report.outcomes["no_answer"] == 1 and report.lenient is not None and report.lenient.mean == 0.0


def test_votes_and_groups():
    def answer(question: str, sample: int, vote: str | None, correct: bool, tokens: int | None = 5) -> Answer:
        return Answer(question, sample, correct, "correct" if correct else "wrong", vote, tokens, False, correct)

    answers = [answer("a", i, vote, vote == "7") for i, vote in enumerate(["3", "7", "7", None])]
    answers += [answer("b", i, vote, vote == "1") for i, vote in enumerate(["2", "1", None, None])]
    report = summarise("t", "m", {"a": "easy", "b": "hard"}, answers, budgets=[5], failed=0)
    assert report.majority is not None and report.majority.mean == 0.5  # b: a tie, 2 was said first
    assert report.groups["easy"].mean == 0.5 and report.groups["hard"].mean == 0.25
    assert report.group_sizes == {"easy": 1, "hard": 1} and "easy (1)" in report.table()
    assert "no variation in 1: within 1" in report.table()
    assert report.pass_at[4].mean == 1.0 and report.pass_at[2].mean == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert report.budgets[5].mean == 0.375 and report.mean_tokens == 5.0
    answers[0] = dataclasses.replace(answers[0], tokens=None)
    assert summarise("t", "m", {"a": "", "b": ""}, answers, budgets=[5], failed=0).budgets == {}


def test_bad_settings():
    for settings, message in (
        ({"samples": -1}, "samples: found -1"),
        ({"samples": 0, "greedy": False}, "something to measure"),
        ({"budgets": (0,)}, "budgets: found 0"),
        ({"sampling": SamplingParams(n=2)}, "found n or seed"),
    ):
        with pytest.raises(UserError, match=message):
            EvaluationConfig(**settings)  # type: ignore[arg-type]
