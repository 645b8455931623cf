"""Relay: carry a value through a chain of look-ups. Problems, split, traces, wrong traces, and the grader.

The task of the long-CoT study. Values are 0..29; the six rules A..F are fixed random permutations of them. A problem
gives a start value, three rules and a number of steps n: the rules are applied in turn, r1 r2 r3 r1 ..., n times.

    let 21 A D C times 11       <think> #11 21 A D C = 18 \\n\\n #10 18 D C A = ... </think> answer 01

A step restates its operands, applies the first rule, and the next one counts down and rotates the rules: every look-up
is local, and the chain is n deep. So a model that knows the rules (the base stage) lacks nothing but the order of
steps, which the demonstrations teach; and a wrong step may stand anywhere and hold any value, as slips in real traces
do.
Texts are words separated by one space, a blank line being the word "\\n\\n", as in `jaxstack.reasoning.traces`.
"""

import dataclasses
import itertools
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

from jaxstack.reasoning.countdown import Grade, Split
from jaxstack.reasoning.traces import BLANK_LINE, END_THINK, THINK, thought_text
from jaxstack.runtime.errors import UserError

VALUES = 30
RULE_NAMES = "ABCDEF"
LENGTHS = range(8, 13)
LONGEST = LENGTHS[-1]
SHORT_LENGTHS = range(1, 4)
RECHECK_WORDS = ("Wait", "Hmm")
RECHECK_PROBABILITY = 0.25
SLIP_PROBABILITY = 0.4
"""Of a rechecked step: its value was a deliberate slip, which the recheck repairs."""
MOST_RECHECKS = 3
HELD_OUT_SHARE = 5
_RULE_SEED = 11


def _draw_rules() -> dict[str, tuple[int, ...]]:
    rng = random.Random(_RULE_SEED)
    return {name: tuple(rng.sample(range(VALUES), VALUES)) for name in RULE_NAMES}


RULES = _draw_rules()
"""Rule name -> the value that each of 0..29 becomes."""

WORDS = (
    *("let", "times", "=", BLANK_LINE, *RECHECK_WORDS, ",", "check", "answer"),
    *(f"#{counter}" for counter in range(1, LONGEST + 1)),
    *(f"{value:02d}" for value in range(VALUES)),
    *RULE_NAMES,
)
"""The words of every Relay text, `<think>` and `</think>` aside."""

Wrong = Literal["wrong", "wrongP", "wrongL", "wrongLP"]
WRONG_KINDS: tuple[Wrong, ...] = ("wrong", "wrongP", "wrongL", "wrongLP")


@dataclasses.dataclass(frozen=True)
class RelayProblem:
    """A start value, three rules, and how often a rule is applied."""

    start: int
    rules: tuple[str, str, str]
    times: int

    @property
    def content(self) -> str:
        """The user message: `let 21 A D C times #11`."""
        return f"let {self.start:02d} {' '.join(self.rules)} times #{self.times}"

    @property
    def identity(self) -> str:
        return f"{self.start} {' '.join(self.rules)} {self.times}"

    @property
    def split(self) -> Split:
        """One problem in five is held out, by the checksum of its identity."""
        return "train" if zlib.crc32(self.identity.encode()) % HELD_OUT_SHARE else "held_out"


@dataclasses.dataclass(frozen=True)
class Trace:
    """A training text: the problem shown (None for steps without one), the thought, and what follows it.

    `solution` opens with `</think>`; it is empty, and no `<eos>` follows, where the text does not stop.
    """

    problem: RelayProblem | None
    thought: str
    solution: str = ""

    @property
    def stops(self) -> bool:
        return bool(self.solution)

    @property
    def response(self) -> str:
        return f"{self.thought} {self.solution}".strip(" ")


@dataclasses.dataclass(frozen=True)
class Step:
    """One look-up as a trace shows it: `#11 21 A D C = 18`, `Wait , check ...` where it is a recheck."""

    counter: int
    value: int
    rules: tuple[str, str, str]
    result: int
    recheck: str | None = None

    @property
    def text(self) -> str:
        opening = f"{self.recheck} , check " if self.recheck else ""
        return f"{opening}#{self.counter} {self.value:02d} {' '.join(self.rules)} = {self.result:02d}"

    @property
    def right(self) -> bool:
        """Whether the result is what the first rule makes of the value."""
        return self.result == RULES[self.rules[0]][self.value]


def solve(problem: RelayProblem) -> tuple[int, ...]:
    """The value after each of the `times` steps; the last is the answer."""
    values, value = [], problem.start
    for place in range(problem.times):
        value = RULES[problem.rules[place % 3]][value]
        values.append(value)
    return tuple(values)


@lru_cache(maxsize=2)
def problems(split: Split) -> tuple[RelayProblem, ...]:
    """All problems of a split: of 32,400, about a fifth is held out."""
    everything = (
        RelayProblem(start, (first, second, third), times)
        for start in range(VALUES)
        for first, second, third in itertools.product(RULE_NAMES, repeat=3)
        for times in LENGTHS
    )
    return tuple(problem for problem in everything if problem.split == split)


def held_out(count: int, *, seed: int = 5) -> tuple[RelayProblem, ...]:
    """The first `count` held-out problems of the shuffle `seed`.

    Raises:
      UserError: `count` is not in the split's range.
    """
    pool = list(problems("held_out"))
    if not 1 <= count <= len(pool):
        raise UserError(f"held-out problems: asked for {count}, expected 1 to {len(pool)}")
    random.Random(seed).shuffle(pool)
    return tuple(pool[:count])


def trace_steps(problem: RelayProblem, rng: random.Random, *, wrong: Wrong | None = None) -> list[Step]:
    """The steps of a trace, rechecks included.

    After a step, with probability 0.25 and at most three times, a recheck restates it; 0.4 of the rechecked steps were
    slips. A wrong trace holds one more slip, which no recheck repairs and all later steps carry on: since rules are
    permutations, its answer is wrong.

    Args:
      wrong: "wrong": at a uniform place, a uniform wrong value. "wrongP": a uniform place, always the right value + 1.
        "wrongL": always the last step, a uniform wrong value. "wrongLP": the last step, the right value + 1.
    """
    place = -1
    if wrong is not None:
        place = problem.times - 1 if wrong in ("wrongL", "wrongLP") else rng.randrange(problem.times)
    steps: list[Step] = []
    value, rules, rechecks = problem.start, problem.rules, 0
    for number in range(problem.times):
        right = RULES[rules[0]][value]
        step = Step(problem.times - number, value, rules, right)
        if number == place:
            shown = (right + 1) % VALUES if wrong in ("wrongP", "wrongLP") else _other_value(right, rng)
            steps.append(dataclasses.replace(step, result=shown))
        else:
            shown = right
            if rechecks < MOST_RECHECKS and rng.random() < RECHECK_PROBABILITY:
                rechecks += 1
                steps += _rechecked(step, rng)
            else:
                steps.append(step)
        value, rules = shown, (rules[1], rules[2], rules[0])
    return steps


def trace(problem: RelayProblem, rng: random.Random, *, wrong: Wrong | None = None) -> Trace:
    """A whole demonstration: thought and answer; `wrong` as in `trace_steps`."""
    steps = trace_steps(problem, rng, wrong=wrong)
    return Trace(problem, _thought(steps), f"{END_THINK} answer {steps[-1].result:02d}")


def slipped_thought(problem: RelayProblem, rng: random.Random) -> str:
    """The beginning of a thought: right steps up to a uniform place, of which the last shows a wrong value, and the
    blank line behind it. Demonstrations recheck such a step; who does not, carries on to a wrong answer.
    """
    place = rng.randrange(problem.times)
    values = (problem.start, *solve(problem))
    rules = problem.rules
    steps = []
    for number in range(place + 1):
        steps.append(Step(problem.times - number, values[number], rules, values[number + 1]))
        rules = (rules[1], rules[2], rules[0])
    steps[-1] = dataclasses.replace(steps[-1], result=_other_value(steps[-1].result, rng))
    return f"{_thought(steps)} {BLANK_LINE}"


def base_trace(rng: random.Random) -> Trace:
    """A document of the base stage, which teaches single steps and short chains, and no long one.

    20 % 1 to 3 bare steps without a problem; 30 % complete chains of 1 to 3 steps; 50 % prompts of long problems
    followed by 1 to 14 unrelated steps that never stop, so that no position of a long text is left untrained.
    """
    kind = rng.random()
    if kind < 0.2:
        return Trace(None, _thought(_random_steps(rng.randint(1, 3), rng)))
    if kind < 0.5:
        return trace(RelayProblem(rng.randrange(VALUES), _random_rules(rng), rng.choice(SHORT_LENGTHS)), rng)
    return Trace(rng.choice(problems("train")), _thought(_random_steps(rng.randint(1, 14), rng)))


def training_traces(count: int, *, seed: int, wrong: Wrong | None = None) -> Iterator[Trace]:
    """`count` demonstrations on training problems drawn with replacement; a larger `count` only appends.

    The problems depend on the seed alone: one seed shows the same problems right and wrong.
    """
    pool = problems("train")
    for number in range(count):
        problem = random.Random(f"relay problem {seed} {number}").choice(pool)
        yield trace(problem, random.Random(f"relay trace {seed} {number}"), wrong=wrong)


def random_numbers(text: str, fraction: float, rng: random.Random) -> str:
    """Each value becomes a uniform value and each counter a uniform counter, with probability `fraction`."""

    def replaced(found: re.Match[str]) -> str:
        if rng.random() >= fraction:
            return found[0]
        return f"#{rng.randint(1, LONGEST)}" if found[0].startswith("#") else f"{rng.randrange(VALUES):02d}"

    return re.sub(r"#?\b[0-9]+", replaced, text)


def grade(problem: RelayProblem, text: str) -> Grade:
    """Grades a completion: what follows the last `</think>` must be `answer VALUE`. Strict, and never raises."""
    tail = text.rpartition(END_THINK)[2].strip() if isinstance(text, str) else ""
    words = tail.removesuffix("<eos>").split()
    if not words or words[0] != "answer":
        return Grade(False, "no answer")
    if len(words) != 2 or not re.fullmatch(r"[0-9]{1,3}", words[1]):
        shown = " ".join(words[1:4])[:20]
        return Grade(False, f"answer {shown!r} is not one value" if shown else "empty answer")
    expected = solve(problem)[-1]
    if int(words[1]) != expected:
        return Grade(False, f"value {int(words[1])}, expected {expected}")
    return Grade(True, "correct")


_STEP = re.compile(
    rf"(?:(?P<recheck>{'|'.join(RECHECK_WORDS)}) , )?(?P<check>check )?"
    rf"#(?P<counter>[0-9]{{1,3}}) (?P<value>[0-9]{{1,2}}) "
    rf"(?P<rules>[{RULE_NAMES}] [{RULE_NAMES}] [{RULE_NAMES}]) = (?P<result>[0-9]{{1,2}})"
)


def parse_steps(thought: str) -> list[Step | None]:
    """What each paragraph of a generated thought says; None where it is no step. Never raises."""
    parsed: list[Step | None] = []
    for paragraph in thought.partition(END_THINK)[0].split(BLANK_LINE):
        text = paragraph.strip().removeprefix(THINK).strip()
        if not text:
            continue
        found = _STEP.fullmatch(text)
        if found is None or int(found["value"]) >= VALUES:
            parsed.append(None)
            continue
        recheck = found["recheck"] or ("check" if found["check"] else None)
        a, b, c = found["rules"].split()
        parsed.append(Step(int(found["counter"]), int(found["value"]), (a, b, c), int(found["result"]), recheck))
    return parsed


@dataclasses.dataclass
class Coherence:
    """What the steps of generated thoughts have in common with a chain, as counts.

    Attributes:
      paragraphs: of all thoughts.
      illegal: of these, no steps.
      right: steps whose result follows from their operands: local skill.
      steps: legal ones.
      transitions: pairs of steps in a row, where the later one is no recheck.
      carried: of these, the later one's value is the earlier one's result.
      counted_down: of these, the later one's counter is the earlier one's less one.
      repeated: of these, the later one restates the earlier one's operands.
      keywords: rechecks that open with a keyword.
    """

    paragraphs: int = 0
    illegal: int = 0
    right: int = 0
    steps: int = 0
    transitions: int = 0
    carried: int = 0
    counted_down: int = 0
    repeated: int = 0
    keywords: int = 0

    def add(self, text: str) -> None:
        """Counts one generated thought in."""
        before: Step | None = None
        for step in parse_steps(text):
            self.paragraphs += 1
            if step is None:
                self.illegal += 1
                before = None
                continue
            self.steps += 1
            self.right += step.right
            self.keywords += step.recheck in RECHECK_WORDS
            if before is not None and step.recheck is None:
                self.transitions += 1
                self.carried += step.value == before.result
                self.counted_down += step.counter == before.counter - 1
                self.repeated += (step.counter, step.value, step.rules) == (before.counter, before.value, before.rules)
            before = step


def _thought(steps: Sequence[Step]) -> str:
    return thought_text([step.text for step in steps])


def _rechecked(step: Step, rng: random.Random) -> list[Step]:
    """The step, a slip in 0.4 of all cases, and its recheck, which is right."""
    slip = rng.random() < SLIP_PROBABILITY
    first = dataclasses.replace(step, result=_other_value(step.result, rng)) if slip else step
    return [first, dataclasses.replace(step, recheck=rng.choice(RECHECK_WORDS))]


def _random_steps(count: int, rng: random.Random) -> list[Step]:
    steps: list[Step] = []
    rechecks = 0
    for _ in range(count):
        rules = _random_rules(rng)
        value = rng.randrange(VALUES)
        step = Step(rng.randint(1, LONGEST), value, rules, RULES[rules[0]][value])
        if rechecks < MOST_RECHECKS and rng.random() < RECHECK_PROBABILITY:
            rechecks += 1
            steps += _rechecked(step, rng)
        else:
            steps.append(step)
    return steps


def _random_rules(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(RULE_NAMES), rng.choice(RULE_NAMES), rng.choice(RULE_NAMES)


def _other_value(right: int, rng: random.Random) -> int:
    return (right + rng.randint(1, VALUES - 1)) % VALUES
