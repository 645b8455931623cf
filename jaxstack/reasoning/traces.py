"""Texts that teach Countdown: search traces, direct answers, and the base stage's single skills.

Every text is words separated by one space (`jaxstack.reasoning.tokenizer` gives each word one id); a blank line is the
word "\\n\\n". A thought is steps, one paragraph each:

    try 11 + 2 = 13 & 10 : 23 3 big goal 19 no \\n\\n
    Hmm , try 11 - 2 = 9 & 10 : 19 1 90 goal 19 yes \\n\\n
    check 9 + 10 = 19 ok \\n\\n

A step restates the target beside its three local results, so the verdict compares neighbours: without `goal T` a
three-layer model does not learn it in minutes. From the second step on a step opens with one of three keywords, drawn
uniformly.
"""

import dataclasses
import random
from collections.abc import Sequence

from jaxstack.reasoning.countdown import Candidate, Problem, Solution, candidates, solve
from jaxstack.runtime.errors import UserError

BLANK_LINE = "\n\n"
KEYWORDS = ("Wait", "Hmm", "Alternatively")
THINK, END_THINK = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One training text: the problem shown to the model, whether it may think, and the response it is to learn.

    `response` follows the chat template's generation prompt: after `<think>` when `thinking`, after `<think> </think>`
    when not. So an empty thought is never a trained text. No `<eos>` is part of it; `stops` says whether one follows.
    """

    problem: Problem
    response: str
    thinking: bool
    stops: bool = True


def step_text(candidate: Candidate, target: int, keyword: str | None = None) -> str:
    """One step: first operation, remaining number, the three results (`big` from 100 on), target, verdict."""
    results = " ".join(str(leaf) if leaf < 100 else "big" for leaf in candidate.leaves)
    opening = f"{keyword} , try" if keyword else "try"
    operation = f"{candidate.left} {candidate.operator} {candidate.right} = {candidate.value}"
    verdict = "yes" if target in candidate.leaves else "no"
    return f"{opening} {operation} & {candidate.remaining} : {results} goal {target} {verdict}"


def check_text(solution: Solution) -> str:
    """The paragraph after a hit: `check 9 + 10 = 19 ok`."""
    return f"check {solution.candidate.last_operation(solution.leaf)} ok"


def search_steps(problem: Problem, rng: random.Random) -> list[str]:
    """The paragraphs of a search in canonical order up to the first hit and its check.

    Raises:
      UserError: no candidate reaches the target.
    """
    solution = _solution(problem)
    tried = candidates(problem.numbers)[: solution.depth + 1]
    steps = [step_text(c, problem.target, rng.choice(KEYWORDS) if i else None) for i, c in enumerate(tried)]
    return [*steps, check_text(solution)]


def answer_text(solution: Solution) -> str:
    """`answer ( 11 - 2 ) + 10`"""
    return f"answer {solution.expression}"


def thought_text(steps: Sequence[str]) -> str:
    """Paragraphs joined into a thought: a blank line follows each."""
    return " ".join(f"{step} {BLANK_LINE}" for step in steps)


def search_trace(problem: Problem, rng: random.Random) -> Sample:
    """A search with thinking, then the answer; `rng` draws the keywords."""
    thought = thought_text(search_steps(problem, rng))
    return Sample(problem, f"{thought} {END_THINK} {answer_text(_solution(problem))}", thinking=True)


def direct_answer(problem: Problem) -> Sample:
    """The answer alone, for a prompt whose thought is already closed (NoThinking)."""
    return Sample(problem, answer_text(_solution(problem)), thinking=False)


def random_steps(problem: Problem, rng: random.Random, *, most: int = 6) -> Sample:
    """1 to `most` steps on candidates drawn with replacement, which never stop: local skill without search order.

    Contexts are as long as a search's, so that no position is left untrained.
    """
    options = candidates(problem.numbers)
    drawn = [rng.choice(options) for _ in range(rng.randint(1, most))]
    steps = [step_text(c, problem.target, rng.choice(KEYWORDS) if i else None) for i, c in enumerate(drawn)]
    return Sample(problem, thought_text(steps), thinking=True, stops=False)


def hit_step(problem: Problem, rng: random.Random) -> Sample:
    """One step that hits, its check and the answer, for any of the problem's hits."""
    hits = [
        Solution(depth, candidate, candidate.leaves.index(problem.target))
        for depth, candidate in enumerate(candidates(problem.numbers))
        if problem.target in candidate.leaves
    ]
    if not hits:
        raise UserError(f"no candidate reaches the target of {problem.content!r}")
    hit = rng.choice(hits)
    thought = thought_text([step_text(hit.candidate, problem.target), check_text(hit)])
    return Sample(problem, f"{thought} {END_THINK} {answer_text(hit)}", thinking=True)


def base_sample(problem: Problem, rng: random.Random) -> Sample:
    """A document of the base stage: 60 % random steps, 25 % a hit step with check and answer, 15 % a direct answer."""
    kind = rng.random()
    if kind < 0.60:
        return random_steps(problem, rng)
    return hit_step(problem, rng) if kind < 0.85 else direct_answer(problem)


def sft_sample(problem: Problem, rng: random.Random) -> Sample:
    """A sample of the SFT stage: 75 % search traces, 25 % direct answers."""
    return search_trace(problem, rng) if rng.random() < 0.75 else direct_answer(problem)


def _solution(problem: Problem) -> Solution:
    solution = solve(problem)
    if solution is None:
        raise UserError(f"no candidate reaches the target of {problem.content!r}")
    return solution
