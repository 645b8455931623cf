r"""Grades multiple choice: a letter, in a \boxed{} or after "answer is"."""

import random
import re
from collections.abc import Sequence

from jaxstack.reasoning.grading.answer import after_thought, last_boxed
from jaxstack.reasoning.grading.verdict import Verdict, shorten

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A letter by itself: not the article of "a cat" or the pronoun of "I think".
_LETTER = r"[(\[*\s]*([A-Z])(?![\w'])(?!\s+[a-z])[)\]*]*"
_SAID = re.compile(rf"\b[Aa]nswer(?:\s+is)?\s*[:=]?{_LETTER}")
_ALONE = re.compile(rf"{_LETTER}\s*[.:]?")
_BOXED = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*[(\[]?\s*([A-Z])(?![\w'])")


def shuffled_options(correct: str, others: Sequence[str], question_id: str, *, seed: int = 0) -> tuple[list[str], str]:
    """The options in an order that depends on the question's id and the seed alone, and the correct one's letter.

    So a run that is resumed, or asks fewer questions, or in another order, shows every question as before.
    """
    order = list(range(len(others) + 1))
    random.Random(f"options {seed} {question_id}").shuffle(order)
    options = [correct, *others]
    return [options[i] for i in order], LETTERS[order.index(0)]


def extract_letter(text: str, options: int, *, thinking: bool = False) -> str | None:
    r"""The letter a completion settles on, of the first `options`; None if it does not say.

    After the thought: the last `\boxed{}`, else the last "answer is C" or "Answer: (C)", else a letter that is all
    there is. A letter anywhere else is not taken for an answer.
    """
    rest = after_thought(text, thinking=thinking)
    if rest is None:
        return None
    boxed = last_boxed(rest)
    if boxed is not None:
        found = _BOXED.match(boxed)
    else:
        said = list(_SAID.finditer(rest))
        found = said[-1] if said else _ALONE.fullmatch(rest.strip()[:40])
    return found.group(1) if found and found.group(1) in LETTERS[:options] else None


def grade_choice(text: str, gold: str, options: int, *, thinking: bool = False) -> Verdict:
    """Grades a completion whose answer is one of the first `options` letters."""
    letter = extract_letter(text, options, thinking=thinking)
    if letter is None:
        rest = after_thought(text, thinking=thinking)
        if rest is None:
            return Verdict("no_answer", "the thought never ended")
        return Verdict("no_answer", f"no letter in {shorten(rest.strip()[-60:])!r}")
    return Verdict("correct", "", letter) if letter == gold else Verdict("wrong", f"{letter} is not {gold}", letter)
