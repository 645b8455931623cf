"""Countdown-3: the counts of its split, the canonical search against brute force, and a grader that nothing breaks."""

import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxstack.reasoning.countdown import (
    Problem,
    candidates,
    grade,
    held_out,
    parse_problem,
    problems,
    prompts,
    solve,
)
from jaxstack.runtime.errors import UserError

EXAMPLE = Problem((11, 2, 10), 19)
numbers = st.tuples(*[st.integers(1, 12)] * 3)


def reachable_by_brute_force(values, target):
    """Every value of every expression over all orders and both shapes whose first operation stays in 1..99."""
    found = set()
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: abs(a - b), "*": lambda a, b: a * b}
    for a, b, c in itertools.permutations(values):
        for first in operations.values():
            inner = first(a, b)
            if 1 <= inner <= 99:
                found |= {second(inner, c) for second in operations.values()}
    return target in found


def test_split_has_the_published_counts():
    assert len(problems("train")) == 2458
    assert len(problems("held_out")) == 600
    assert len(prompts("train")) == 9932
    assert len(prompts("held_out")) == 2421


def test_no_problem_is_in_both_splits():
    train = {p.identity for p in prompts("train")}
    assert not train & {p.identity for p in prompts("held_out")}
    assert len(set(prompts("train"))) == 9932


@given(numbers, st.integers(10, 99))
def test_solve_finds_exactly_what_brute_force_finds(values, target):
    solution = solve(Problem(values, target))
    assert (solution is not None) == reachable_by_brute_force(values, target)
    if solution:
        assert grade(Problem(values, target), f"answer {solution.expression}").correct


@given(numbers)
def test_candidates_are_canonical(values):
    found = candidates(values)
    assert len(found) <= 9
    for candidate in found:
        assert 1 <= candidate.value <= 99
        assert candidate.left >= candidate.right or candidate.operator != "-"
        assert sorted((candidate.left, candidate.right, candidate.remaining)) == sorted(values)
        for leaf, value in enumerate(candidate.leaves):
            if value:
                problem = Problem(values, value)
                reason = grade(problem, f"answer {candidate.expression(leaf)}").reason
                assert reason == "correct" or reason.startswith(f"target {value} is outside")


def test_held_out_is_a_seeded_prefix():
    assert held_out(8) == held_out(64)[:8]
    assert held_out(8) != held_out(8, seed=0)
    assert set(held_out(64)) <= set(prompts("held_out"))
    with pytest.raises(UserError, match="expected 1 to 2421"):
        held_out(2422)


@pytest.mark.parametrize(
    "text",
    [
        "answer ( 11 - 2 ) + 10",
        "answer ( 11 - 2 ) + 10 <eos>",
        "answer 11 - 2 + 10",
        "answer (11-2)+10",
        "answer ((10)+((11-2)))",
        "try 11 + 2 = 13 \n\n </think> answer 10 - 2 + 11",
        "<think> answer 1 </think> thinking again </think> answer 10 - ( 2 - 11 )",
        "<think> </think> answer 11 + 10 - 2",
    ],
)
def test_correct_answers(text):
    assert grade(EXAMPLE, text) == (grade(EXAMPLE, "answer 11 - 2 + 10"))
    assert grade(EXAMPLE, text).correct


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no answer"),
        ("11 - 2 + 10", "no answer"),
        ("try 11 + 2 = 13 & 10 : 23 3 big goal 19 no answer 11 - 2 + 10", "no answer"),
        ("<think> answer 11 - 2 + 10", "no answer"),
        ("answer 11 - 2 + 10 </think>", "no answer"),
        ("answers 11 - 2 + 10", "no answer"),
        ("answer", "empty answer"),
        ("answer <eos>", "empty answer"),
        ("answer 11 + 2 + 10", "value 23, target 19"),
        ("answer 11 - ( 2 + 10 )", "value -1, target 19"),
        ("answer 10 + 9", "uses 9 10, expected each of 2 10 11 once"),
        ("answer 11 - 2 + 10 + 10 - 10", "uses 2 10 10 10 11, expected each of 2 10 11 once"),
        ("answer 19", "uses 19, expected"),
        ("answer " + "(" * 5000, "answer of 5000 characters, at most 200 allowed"),
        ("answer " + "(" * 150, "incomplete expression"),
        ("answer ( 11 - 2 ) + 10 )", "')' without '('"),
        ("answer ( ( 11 - 2 ) + 10", "'(' without ')'"),
        ("answer ( )", "unexpected ')'"),
        ("answer 11 2", "unexpected '2'"),
        ("answer - 2 + 11 + 10", "unexpected '-'"),
        ("answer 11 ( 2 )", "unexpected '('"),
        ("answer 11 - 2 + 10 +", "incomplete expression"),
        ("answer 11 - 2 + x", "unknown token 'x'"),
        ("answer __import__('os')", "unknown token '_'"),
        ("answer 11 ** 2", "unexpected '*'"),
        ("answer 11 / 2 + 10", "unknown token '/'"),
        ("answer 19.0", "unknown token '.'"),
        ("answer ١١ - 2 + 10", "unknown token '١'"),
        ("answer 11 - 2 + 10 = 19", "unknown token '='"),
    ],
)
def test_wrong_answers_say_why(text, reason):
    result = grade(EXAMPLE, text)
    assert not result.correct
    assert result.reason.startswith(reason)


def test_problems_that_cannot_be_solved():
    assert grade(Problem((1, 1, 1), 50), "answer 1 + 1 + 1").reason == "value 3, target 50; no candidate reaches it"
    assert grade(Problem((12, 12, 12), 1728), "answer 12 * 12 * 12").reason == "target 1728 is outside 10..99"
    assert not grade(Problem((), 10), "answer").correct
    assert not grade(EXAMPLE, None).correct


def test_division_is_exact_where_it_is_allowed():
    problem = Problem((10, 3, 9), 30)
    assert grade(problem, "answer 10 / 3 * 9", operators="+-*/").correct
    assert grade(problem, "answer 10 / ( 3 - 3 )", operators="+-*/").reason == "division by zero"


@given(st.text(alphabet="0123456789+-*/() answerx<>\n\t=", max_size=300))
def test_grading_never_raises(text):
    assert grade(EXAMPLE, "answer " + text).reason
    assert grade(EXAMPLE, text).reason


expressions = st.recursive(
    st.integers(1, 12).map(lambda n: (str(n), Fraction(n))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda x: (
            f"( {x[0][0]} {x[1]} {x[2][0]} )",
            x[0][1] + x[2][1] if x[1] == "+" else x[0][1] - x[2][1] if x[1] == "-" else x[0][1] * x[2][1],
        )
    ),
    max_leaves=6,
)


@given(expressions)
def test_values_agree_with_a_structural_evaluation(expression):
    text, value = expression
    used = tuple(int(token) for token in text.split() if token.isdigit())
    result = grade(Problem(used, 50), f"answer {text}")
    assert result.correct == (value == 50)
    if value != 50:
        assert result.reason.startswith(f"value {value}, ")


def test_left_associative_without_parentheses():
    rng = random.Random(0)
    for _ in range(200):
        text = str(rng.randint(1, 12))
        for _ in range(4):
            text += f" {rng.choice('+-*')} {rng.randint(1, 12)}"
        used = tuple(int(token) for token in text.split() if token.isdigit())
        # The oracle may use Python's own parser: the text is the test's.
        expected = eval(text)
        reason = grade(Problem(used, 10), f"answer {text}").reason
        assert reason == "correct" if expected == 10 else reason.startswith(f"value {expected}, ")


@pytest.mark.parametrize(
    "text", ["11 2 10 -> 19", " 11, 2, 10 => 19\n", "numbers 11 2 10 target 19", "11 2 10->19", "11 2 10 → 19"]
)
def test_parse_accepts(text):
    assert parse_problem(text) == EXAMPLE
    assert parse_problem(text).content == "numbers 11 2 10 target 19"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a Countdown problem: ''"),
        ("hello", "not a Countdown problem: 'hello'; expected three numbers and a target like '3 5 7 -> 26'"),
        ("3 5 -> 26", "not a Countdown problem"),
        ("3 5 7 9 -> 26", "not a Countdown problem"),
        ("3 5 7", "not a Countdown problem"),
        ("3 5 -7 -> 26", "not a Countdown problem"),
        ("3\n5\n7 -> 26; drop", "not a Countdown problem"),
        ("9" * 5000, "not a Countdown problem"),
        ("3 5 13 -> 26", "number 13 is outside 1..12"),
        ("0 5 7 -> 26", "number 0 is outside 1..12"),
        ("3 5 7 -> 9", "target 9 is outside 10..99"),
        ("3 5 7 -> 100", "target 100 is outside 10..99"),
    ],
)
def test_parse_refuses_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_problem(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200
