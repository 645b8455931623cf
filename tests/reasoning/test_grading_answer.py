"""What counts as a text's answer, choices included: strict rules, traps, and time linear in the text."""

import time

import pytest

from jaxstack.reasoning.grading.answer import after_thought, last_boxed, last_number, split_list, unboxed
from jaxstack.reasoning.grading.choice import extract_letter, grade_choice, shuffled_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> maybe \\boxed{1} </think> \\boxed{2}", " \\boxed{2}"),
        ("so far </think> more </think> end", " end"),
        ("<|begin_of_thought|>x<|end_of_thought|>\n\n<|begin_of_solution|>y", "\n\n<|begin_of_solution|>y"),
        ("no thought at all", "no thought at all"),
        ("<think> maybe \\boxed{1}", None),
        ("</think> x <think> again", None),
    ],
)
def test_after_thought(text: str, expected: str | None):
    assert after_thought(text) == expected


def test_a_thought_begun_by_the_prompt_must_end():
    assert after_thought("maybe \\boxed{1}") == "maybe \\boxed{1}"
    assert after_thought("maybe \\boxed{1}", thinking=True) is None
    assert after_thought("x </think>y", thinking=True) == "y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} or \boxed{\frac{1}{2}", "7"),  # cut off: the last whole one
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{x \boxed{3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ \boxed {4} } }", "4"),
        (r"\fbox{5} $\boxed{$6$}$", "6"),
        (r"the word boxed{9} and \boxed 9 and \text{boxed: 9}", None),
        (r"\boxed{1", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, expected: str | None):
    assert last_boxed(text) == expected


def test_unboxed():
    assert unboxed(r" $\boxed{12}$ ") == "12" and unboxed("$12$") == "12"
    assert unboxed(r"\boxed{1}+\boxed{2}") == r"\boxed{1}+\boxed{2}"
    assert unboxed("$1$, $2$") == "$1$, $2$"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is 12, then 1,234.5 .", "1234.5"),
        ("x1 = -3", "-3"),
        ("half is 1/2", "1/2"),
        ("a .5 b", ".5"),
        ("v2 none", None),
    ],
)
def test_last_number(text: str, expected: str | None):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1, 2", ["1", "2"]),
        ("$1$, $2$", ["1", "2"]),
        ("(1,2), (3,4)", ["(1,2)", "(3,4)"]),
        (r"\frac{1}{2}; f(x,y)", [r"\frac{1}{2}", "f(x,y)"]),
        (r"1 \text{ and } 2 or 3", ["1", "2", "3"]),
        (r"\{1,2\}, 12{,}345", [r"\{1,2\}", "12345"]),
        (r"\left(1, 2\right)", [r"\left(1, 2\right)"]),
    ],
)
def test_split_list(text: str, expected: list[str]):
    assert split_list(text) == expected


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 30_000, "\\boxed{" * 20_000 + "}" * 20_000, "(" * 100_000, "1," * 50_000]
)
def test_hostile_texts_take_linear_time(text: str):
    start = time.process_time()
    last_boxed(text), last_number(text), split_list(text), after_thought(text), extract_letter(text, 4)
    assert time.process_time() - start < 20  # quadratic ones would take hours


def test_options_depend_on_the_question_alone():
    seen = [shuffled_options("right", ["a", "b", "c"], f"q{i}") for i in range(400)]
    assert seen == [shuffled_options("right", ["a", "b", "c"], f"q{i}") for i in range(400)]
    assert all(options["ABCD".index(letter)] == "right" for options, letter in seen)
    counts = [sum(letter == wanted for _, letter in seen) for wanted in "ABCD"]
    assert min(counts) > 70  # each place about 100 times
    assert [shuffled_options("right", ["a", "b", "c"], f"q{i}", seed=1) for i in range(400)] != seen


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(B)}} done", "B"),
        (r"\boxed{D. both}", "D"),
        ("A first. The answer is (C).", "C"),
        ("**Answer: B**", "B"),
        ("Answer: A\nAnswer: D", "D"),
        ("B", "B"),
        ("(C).", "C"),
        ("<think> answer is A </think> answer is B", "B"),
        ("<think> answer is A", None),
        ("A cat is an animal", None),
        ("The answer is a mystery", None),
        ("The answer: A cat", None),
        (r"\boxed{Dog}", None),
        (r"\boxed{E}", None),  # of four options
        ("I would say B or C", None),
    ],
)
def test_extract_letter(text: str, letter: str | None):
    assert extract_letter(text, 4) == letter


def test_grade_choice():
    assert grade_choice("Answer: J", "J", 10).correct
    assert grade_choice("Answer: B", "A", 4).outcome == "wrong"
    assert grade_choice("Answer: A", "A", 4, thinking=True).reason == "the thought never ended"
    assert grade_choice("hm", "A", 4).reason == "no letter in 'hm'"
