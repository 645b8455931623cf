"""Mathematical grading with the real math-verify in real worker processes: known rows, hostile expressions, limits."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxstack.reasoning.grading import math as grading_math
from jaxstack.reasoning.grading.math import MathGrader, grade_integer
from jaxstack.runtime.errors import UserError


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader(workers=1) as grader:
        yield grader


# Gold, answer, whether they are equal.
ROWS = [
    (r"\frac12", "0.5", True),  # a gold without a box parses to nothing unless it is boxed
    (r"\frac{1}{2}", r"\dfrac{2}{4}", True),
    ("1/2", r"\frac12", True),
    (r"\boxed{3}", "3", True),
    (r"$2\sqrt{2}$", r"\sqrt{8}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
    (r"(-\infty, 2)", r"(-\infty,2)", True),
    (r"\text{Evelyn}", r"\text{Evelyn}", True),
    ("1,000", "1000", True),
    (r"90^\circ", "90", True),
    ("2", "3", False),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    ("(1, 2)", "(2, 1)", False),
    (r"\text{Evelyn}", r"\text{Briana}", False),
    ("x+1", "x+2", False),
    ("5", r"\text{Error: no answer}", False),
]


@pytest.mark.parametrize(("gold", "answer", "equal"), ROWS)
def test_known_rows(grader: MathGrader, gold: str, answer: str, equal: bool):
    verdict = grader.grade(f"<think> \\boxed{{77}} </think> It is $\\boxed{{{answer}}}$.", gold)
    assert verdict.outcome == ("correct" if equal else "wrong"), verdict


def test_the_gold_comes_first(grader: MathGrader):
    """math-verify takes an interval for an inequality, but not the other way round."""
    assert grader.compare("(1, 2)", "1 < x < 2").correct
    assert grader.compare("1 < x < 2", "(1, 2)").outcome == "wrong"


def test_lists_and_tolerances(grader: MathGrader):
    assert grader.compare(r"2, \frac{2}{4}", r"\frac12, 2", several=True).correct
    assert grader.compare("1, 2, 2", "1, 2, 1", several=True).outcome == "wrong"
    assert grader.compare("1, 2", "1", several=True).reason == "found 2 answers, expected 1"
    assert grader.compare("3.1416", r"\pi", tolerance=1e-4).correct
    assert grader.compare("3.142", r"\pi", tolerance=1e-4).outcome == "wrong"


def test_strict_and_the_last_number_beside_it(grader: MathGrader):
    for text in ("The answer is 5", "boxed: 5", "<think> \\boxed{5}", "<think> x </think> \\boxed{5"):
        assert grader.grade(text, "5").outcome == "no_answer", text
    assert grader.grade_last_number("The answer is 5", "5").correct
    assert grader.grade_last_number("\\boxed{4} of 5", "5").outcome == "wrong"
    assert grader.grade_last_number("<think> 5", "5").outcome == "no_answer"
    assert grader.grade("x \\boxed{5}", "5", thinking=True).reason == "the thought never ended"


@pytest.fixture(scope="module")
def hasty() -> Iterator[MathGrader]:
    with MathGrader(workers=1, limit_s=1.0) as grader:
        yield grader


HOSTILE = ["10^{10^{10}}", "(" * 900 + "1" + ")" * 900]


def test_hostile_expressions_end_in_time(hasty: MathGrader):
    assert hasty.compare("2", "1+1").correct  # the worker runs
    for answer in HOSTILE:
        start = time.monotonic()
        verdict = hasty.compare(answer, "7")
        # The limit, and a worker that is started again under load; without the limit it never ends.
        assert time.monotonic() - start < 300
        assert verdict.outcome != "correct", answer
    assert hasty.compare("2", "1+1").correct  # and it is well again


def test_a_hung_worker_is_killed_and_replaced(hasty: MathGrader):
    assert hasty.compare("2", "1+1").correct
    worker = hasty._workers[0]
    process = worker._process
    assert process is not None
    os.kill(process.pid, 19)  # SIGSTOP: it will not answer
    verdict = hasty.compare("3", "1+2")
    assert (verdict.outcome, verdict.reason) == ("timeout", "the comparison took more than 1 s")
    assert process.returncode == -9 and worker._process is None
    assert hasty.compare("3", "1+2").correct
    os.kill(worker._process.pid, 9)
    verdict = hasty.compare("3", "1+2")
    assert verdict.outcome == "error" and "the worker died (exit status -9)" in verdict.reason


def test_from_threads(grader: MathGrader):
    """Signals work in main threads only: the workers', not the caller's."""
    assert threading.current_thread() is threading.main_thread()
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda i: grader.compare(str(2 * i), f"{i}+{i}"), range(12)))
    assert all(verdict.correct for verdict in verdicts)


def test_long_answers_are_not_read(grader: MathGrader):
    assert "2001 characters" in grader.compare("1" * 2001, "1").reason


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text('print(\'{"missing": "No module named math_verify"}\')')
    monkeypatch.setattr(grading_math, "_WORKER", worker)
    with MathGrader(workers=1) as grader, pytest.raises(UserError, match="expected math-verify to be installed"):
        grader.compare("1", "2")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (r"\boxed{025}", "correct"),
        (r"\boxed{$25$}", "correct"),
        (r"\boxed{\text{25}}", "correct"),
        (r"\boxed{25.0}", "wrong"),
        (r"\boxed{24+1}", "wrong"),
        (r"\boxed{1025}", "wrong"),
        (r"\boxed{-25}", "wrong"),
        ("25", "no_answer"),
    ],
)
def test_grade_integer(text: str, outcome: str):
    assert grade_integer(text, 25).outcome == outcome


def test_bad_settings():
    with pytest.raises(UserError, match="found 0 workers"):
        MathGrader(workers=0)
    with pytest.raises(UserError, match="found a limit of 0 s"):
        MathGrader(limit_s=0)
