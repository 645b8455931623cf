r"""Graders: a completion and the true answer in, a `Verdict` out.

    answer.py         what a text gives as its answer: after the thought, the last \boxed{}
    math.py           mathematical answers, compared by math-verify in processes that are killed when they hang
    choice.py         multiple choice, and the order of its options
    code.py           programs, run on tests. Not a sandbox: read its first lines
    verdict.py        correct, wrong, no_answer, timeout, error

The two `*_worker.py` are programs of their own that import nothing of this package.
"""

from jaxstack.reasoning.grading.choice import grade_choice, shuffled_options
from jaxstack.reasoning.grading.code import CodeLimits, CodeTest, grade_code
from jaxstack.reasoning.grading.math import MathGrader, grade_integer
from jaxstack.reasoning.grading.verdict import OUTCOMES, Verdict

__all__ = [
    "OUTCOMES",
    "CodeLimits",
    "CodeTest",
    "MathGrader",
    "Verdict",
    "grade_choice",
    "grade_code",
    "grade_integer",
    "shuffled_options",
]
