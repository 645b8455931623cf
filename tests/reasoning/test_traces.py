"""Traces: the published example word for word, right arithmetic in every step, and lengths that fit the packed rows."""

import random

import pytest

from jaxstack.reasoning import traces
from jaxstack.reasoning.countdown import Problem, grade, prompts, solve
from jaxstack.runtime.errors import UserError

EXAMPLE = Problem((11, 2, 10), 19)


class SecondKeyword(random.Random):
    def choice(self, options):
        return options[1]


def test_the_published_trace():
    sample = traces.search_trace(EXAMPLE, SecondKeyword())
    assert sample.response == (
        "try 11 + 2 = 13 & 10 : 23 3 big goal 19 no \n\n "
        "Hmm , try 11 - 2 = 9 & 10 : 19 1 90 goal 19 yes \n\n "
        "check 9 + 10 = 19 ok \n\n "
        "</think> answer ( 11 - 2 ) + 10"
    )
    assert sample.thinking
    assert sample.stops


def test_direct_answer():
    assert traces.direct_answer(EXAMPLE) == traces.Sample(EXAMPLE, "answer ( 11 - 2 ) + 10", thinking=False)


def test_difference_is_written_larger_first():
    problem = Problem((1, 2, 12), 10)
    assert traces.direct_answer(problem).response == "answer 12 - ( 1 * 2 )"
    assert "check 12 - 2 = 10 ok" in traces.search_trace(problem, random.Random(0)).response


def check_step(step, target):
    """Recomputes one `try` paragraph from its words."""
    words = step.split()
    words = words[words.index("try") + 1 :]
    left, operator, right, value, remaining = int(words[0]), words[1], int(words[2]), int(words[4]), int(words[6])
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    leaves = [value + remaining, abs(value - remaining), value * remaining]
    assert value == result
    assert words[8:11] == [str(leaf) if leaf < 100 else "big" for leaf in leaves]
    assert words[11:] == ["goal", str(target), "yes" if target in leaves else "no"]
    return target in leaves


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_trace_searches_in_order_and_answers_correctly(split):
    rng = random.Random(0)
    for problem in rng.sample(prompts(split), 300):
        response = traces.search_trace(problem, rng).response
        *steps, check, answer = response.split(f" {traces.BLANK_LINE} ")
        verdicts = [check_step(step, problem.target) for step in steps]
        assert verdicts == [False] * solve(problem).depth + [True]
        assert [step.split()[0] in traces.KEYWORDS for step in steps] == [False] + [True] * (len(steps) - 1)
        assert check.startswith("check ")
        assert answer.startswith("</think> answer ")
        assert grade(problem, response).correct


def test_random_steps_are_right_and_never_stop():
    rng = random.Random(1)
    for problem in rng.sample(prompts("train"), 200):
        sample = traces.random_steps(problem, rng)
        steps = sample.response.removesuffix(f" {traces.BLANK_LINE}").split(f" {traces.BLANK_LINE} ")
        assert 1 <= len(steps) <= 6
        assert not sample.stops
        for step in steps:
            check_step(step, problem.target)


def test_hit_steps_answer_correctly():
    rng = random.Random(2)
    for problem in rng.sample(prompts("train"), 200):
        assert grade(problem, traces.hit_step(problem, rng).response).correct


def test_a_problem_without_solution_is_refused():
    for make in (traces.search_trace, traces.hit_step):
        with pytest.raises(UserError, match="no candidate reaches the target of 'numbers 1 1 1 target 50'"):
            make(Problem((1, 1, 1), 50), random.Random(0))


def test_mixtures():
    rng = random.Random(3)
    pool = prompts("train")
    base = [traces.base_sample(rng.choice(pool), rng) for _ in range(2000)]
    assert sum(not s.stops for s in base) == pytest.approx(1200, abs=100)
    assert sum(not s.thinking for s in base) == pytest.approx(300, abs=70)
    sft = [traces.sft_sample(rng.choice(pool), rng) for _ in range(2000)]
    assert sum(s.thinking for s in sft) == pytest.approx(1500, abs=90)
