"""Countdown-3: combine three numbers with + - * to reach a target. Problems, solutions, the split, and the grader.

The task of the embedded model and of the long-CoT study's control arm. Plain Python, no jax: the grader runs in
servers, in data generators and in reward functions alike.

    3 5 7 -> 26        numbers 3 5 7 target 26        answer ( 3 * 7 ) + 5

A *candidate* is a first operation on two of the numbers; its three *leaves* combine the result with the remaining
number. The search that the traces show (`jaxstack.reasoning.traces`) tries the candidates in the canonical order of
`candidates()`.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from jaxstack.runtime.errors import UserError

NUMBER_RANGE = range(1, 13)
TARGET_RANGE = range(10, 100)
OPERATORS = "+-*"
LARGEST_INTERMEDIATE = 99
# A prompt enters the splits only if the search meets its first hit at one of this many first candidates.
SEARCH_DEPTH = 6
HELD_OUT_PROBLEMS = 600
_SPLIT_SEED = 7
_LONGEST_ANSWER = 200
_PAIRS = ((0, 1), (0, 2), (1, 2))

Split = Literal["train", "held_out"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Three numbers, in the order in which the prompt shows them, and a target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def content(self) -> str:
        """The user message: `numbers 11 2 10 target 19`."""
        return f"numbers {' '.join(map(str, self.numbers))} target {self.target}"

    @property
    def identity(self) -> tuple[tuple[int, ...], int]:
        """What makes two prompts the same problem: the multiset of numbers and the target."""
        return tuple(sorted(self.numbers)), self.target


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A first operation `left operator right = value`, and the number that remains."""

    left: int
    operator: str
    right: int
    value: int
    remaining: int

    @property
    def leaves(self) -> tuple[int, int, int]:
        """The three results within reach: sum, distance and product of `value` and `remaining`."""
        return self.value + self.remaining, abs(self.value - self.remaining), self.value * self.remaining

    def expression(self, leaf: int) -> str:
        """The whole expression of leaf 0 (+), 1 (-) or 2 (*), tokens separated by one space."""
        inner = f"( {self.left} {self.operator} {self.right} )"
        if leaf == 1 and self.value < self.remaining:
            return f"{self.remaining} - {inner}"
        return f"{inner} {OPERATORS[leaf]} {self.remaining}"

    def last_operation(self, leaf: int) -> str:
        """The second operation with its result: `9 + 10 = 19`."""
        larger, smaller = self.value, self.remaining
        if leaf == 1 and larger < smaller:
            larger, smaller = smaller, larger
        return f"{larger} {OPERATORS[leaf]} {smaller} = {self.leaves[leaf]}"


@dataclasses.dataclass(frozen=True)
class Solution:
    """The first hit in canonical order: candidate number `depth` (from 0) and which of its leaves equals the target."""

    depth: int
    candidate: Candidate
    leaf: int

    @property
    def expression(self) -> str:
        return self.candidate.expression(self.leaf)


@dataclasses.dataclass(frozen=True)
class Grade:
    """Whether an answer is correct, and why (not) in a few words."""

    correct: bool
    reason: str


def candidates(numbers: Sequence[int]) -> tuple[Candidate, ...]:
    """All first operations in canonical order: pairs (0,1), (0,2), (1,2), for each + - *; `-` is larger minus smaller.

    A candidate is kept when its value is in 1..99, so there are at most nine; none for other than three numbers.
    """
    if len(numbers) != 3:
        return ()
    found = []
    for i, j in _PAIRS:
        remaining = numbers[3 - i - j]
        for operator in OPERATORS:
            left, right = numbers[i], numbers[j]
            if operator == "+":
                value = left + right
            elif operator == "-":
                left, right = max(left, right), min(left, right)
                value = left - right
            else:
                value = left * right
            if 1 <= value <= LARGEST_INTERMEDIATE:
                found.append(Candidate(left, operator, right, value, remaining))
    return tuple(found)


def solve(problem: Problem) -> Solution | None:
    """The first hit in canonical order, or None if no candidate reaches the target."""
    for depth, candidate in enumerate(candidates(problem.numbers)):
        if problem.target in candidate.leaves:
            return Solution(depth, candidate, candidate.leaves.index(problem.target))
    return None


@lru_cache(maxsize=1)
def _splits() -> dict[str, tuple[Problem, ...]]:
    reachable = [
        Problem(numbers, target)
        for numbers in itertools.combinations_with_replacement(NUMBER_RANGE, 3)
        for target in TARGET_RANGE
        if solve(Problem(numbers, target))
    ]
    random.Random(_SPLIT_SEED).shuffle(reachable)
    return {"held_out": tuple(reachable[:HELD_OUT_PROBLEMS]), "train": tuple(reachable[HELD_OUT_PROBLEMS:])}


def problems(split: Split) -> tuple[Problem, ...]:
    """The problems of a split, numbers ascending: 600 held out, 2,458 to train on; no problem is in both."""
    return _splits()[split]


@lru_cache(maxsize=2)
def prompts(split: Split) -> tuple[Problem, ...]:
    """Every order of the numbers of the split's problems whose first hit is among the first six candidates.

    9,932 prompts to train on, 2,421 held out.
    """
    kept = []
    for problem in problems(split):
        for numbers in sorted(set(itertools.permutations(problem.numbers))):
            ordered = Problem(numbers, problem.target)
            solution = solve(ordered)
            if solution is not None and solution.depth < SEARCH_DEPTH:
                kept.append(ordered)
    return tuple(kept)


def held_out(count: int, *, seed: int = 5) -> tuple[Problem, ...]:
    """The first `count` held-out prompts of the shuffle `seed`. Seed 5 is kept for final figures.

    Raises:
      UserError: `count` is not in 1..2421.
    """
    pool = list(prompts("held_out"))
    if not 1 <= count <= len(pool):
        raise UserError(f"held-out problems: asked for {count}, expected 1 to {len(pool)}")
    random.Random(seed).shuffle(pool)
    return tuple(pool[:count])


_PROBLEM_TEXT = re.compile(
    r"\s*(?:numbers\s+)?([0-9]{1,6})[\s,]+([0-9]{1,6})[\s,]+([0-9]{1,6})\s*(?:->|=>|→|target)\s*([0-9]{1,6})\s*"
)


def parse_problem(text: str) -> Problem:
    """Reads `3 5 7 -> 26` (or the prompt's own `numbers 3 5 7 target 26`).

    Raises:
      UserError: anything else, numbers outside 1..12, or a target outside 10..99.
    """
    match = _PROBLEM_TEXT.fullmatch(text)
    if match is None:
        shown = " ".join(text[:60].split()) + ("..." if len(text) > 60 else "")
        raise UserError(f"not a Countdown problem: {shown!r}; expected three numbers and a target like '3 5 7 -> 26'")
    *numbers, target = (int(group) for group in match.groups())
    for number in numbers:
        if number not in NUMBER_RANGE:
            raise UserError(f"number {number} is outside {NUMBER_RANGE[0]}..{NUMBER_RANGE[-1]}")
    if target not in TARGET_RANGE:
        raise UserError(f"target {target} is outside {TARGET_RANGE[0]}..{TARGET_RANGE[-1]}")
    return Problem(tuple(numbers), target)


def grade(problem: Problem, text: str, *, operators: str = OPERATORS) -> Grade:
    """Grades a completion: what follows the last `</think>` must be `answer EXPRESSION`, using each number once.

    Strict: nothing is searched for in a thought, and an answer cut short is wrong. The expression is evaluated in exact
    rational arithmetic by a parser of its own. Never raises, whatever the text.

    Args:
      problem: the numbers to use and the target to reach.
      text: a completion, with or without its thought (`... </think> answer ( 3 * 7 ) + 5`); a final `<eos>` is allowed.
      operators: which of + - * / may appear.
    """
    if problem.target not in TARGET_RANGE:
        return Grade(False, f"target {problem.target} is outside {TARGET_RANGE[0]}..{TARGET_RANGE[-1]}")
    tail = text.rpartition("</think>")[2].strip() if isinstance(text, str) else ""
    if tail != "answer" and not tail.startswith("answer "):
        return Grade(False, "no answer")
    expression = tail.removeprefix("answer").removesuffix("<eos>").strip()
    if len(expression) > _LONGEST_ANSWER:
        return Grade(False, f"answer of {len(expression)} characters, at most {_LONGEST_ANSWER} allowed")
    try:
        value, used = _evaluate(expression, operators)
    except _BadExpression as error:
        return Grade(False, str(error))
    if sorted(used) != sorted(problem.numbers):
        return Grade(False, f"uses {_listed(used)}, expected each of {_listed(problem.numbers)} once")
    if value != problem.target:
        unsolvable = "" if solve(problem) else "; no candidate reaches it"
        return Grade(False, f"value {value}, target {problem.target}{unsolvable}")
    return Grade(True, "correct")


class _BadExpression(ValueError):
    """The text is no expression; the message is the grade's reason."""


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, sorted(numbers))) or "no number"


_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def _evaluate(expression: str, operators: str) -> tuple[Fraction, list[int]]:
    """Value and the numbers used, by the shunting-yard algorithm: two stacks, no recursion, no eval."""
    tokens = re.findall(r"[0-9]+|\S", expression)
    values: list[Fraction] = []
    pending: list[str] = []
    used: list[int] = []

    def reduce_once() -> None:
        right, left = values.pop(), values.pop()
        operator = pending.pop()
        if operator == "/" and right == 0:
            raise _BadExpression("division by zero")
        values.append(
            left + right if operator == "+" else left - right if operator == "-" else left * right if operator == "*"
            else left / right
        )  # fmt: skip

    wants_operand = True
    for token in tokens:
        if token[0] in "0123456789":
            if not wants_operand:
                raise _BadExpression(f"unexpected {token[:12]!r}")
            used.append(int(token))
            values.append(Fraction(used[-1]))
            wants_operand = False
        elif token == "(":
            if not wants_operand:
                raise _BadExpression("unexpected '('")
            pending.append(token)
        elif token == ")":
            if wants_operand:
                raise _BadExpression("unexpected ')'")
            while pending and pending[-1] != "(":
                reduce_once()
            if not pending:
                raise _BadExpression("')' without '('")
            pending.pop()
        elif token in _PRECEDENCE and token in operators:
            if wants_operand:
                raise _BadExpression(f"unexpected {token!r}")
            while pending and pending[-1] != "(" and _PRECEDENCE[pending[-1]] >= _PRECEDENCE[token]:
                reduce_once()
            pending.append(token)
            wants_operand = True
        else:
            raise _BadExpression(f"unknown token {token[:12]!r}")
    if wants_operand:
        raise _BadExpression("incomplete expression" if tokens else "empty answer")
    while pending:
        if pending[-1] == "(":
            raise _BadExpression("'(' without ')'")
        reduce_once()
    return values[0], used
