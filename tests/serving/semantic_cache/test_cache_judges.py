"""Whether two answers say the same."""

import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.judge import CascadeJudge, ExactJson, NormalisedText, calibrate


def test_judges():
    plain = NormalisedText()
    assert plain.same("", "The answer is 1,000.0!", "the  answer is 1000")
    assert not plain.same("", "it is 3.5", "it is 35")
    assert not plain.same("", "it is -3", "it is 3")
    assert ExactJson().same("", '{"a": 1, "b": 2}', '{"b":2,"a":1.0}')
    assert ExactJson().same("", "{", "{}") is None
    assert CascadeJudge(plain, ExactJson()).same("", "[1, 2]", "[1,2]")
    assert CascadeJudge(plain, ExactJson()).same("", "no json", "none") is None


def test_signs_that_change_what_is_said_are_not_punctuation():
    plain = NormalisedText()
    for a, b in (
        ("x < 3", "x > 3"), ("a == b", "a != b"), ("2 * 3", "2 / 3"), ("2*3", "2+3"), ("50%", "50"), ("$5", "5 €"),
        ("C#", "C"), ("C++", "C"), ("👍", "👎"), ("?!", "..."), ("1.0.2", "1.2"), ("10.0.0.1", "10.0.1"),
    ):  # fmt: skip
        assert not plain.same("", a, b), (a, b)
    for a, b in (
        ("**Yes**, *it* is.", "yes it is"), ("# Yes\n\n* a\n* b", "Yes a b"), ("`x`", "x"), ("x<3", "x < 3"),
        ("50 %", "50%."), ("3.0.", "3"), ("1,000.00 and 2.50", "1000 and 2.50"), ("\u201cSo\u201d", "so"),
        ("!", "!"),
    ):  # fmt: skip
        assert plain.same("", a, b), (a, b)


def test_a_model_that_disagrees_with_itself_sets_what_delta_can_be():
    answers = iter(["a", "a", "a", "b"] * 5)
    found = calibrate(NormalisedText(), lambda prompt: next(answers), ["p", "q"] * 5)
    assert (found.share, found.pairs) == (0.5, 10)
    found.check(0.5)
    with pytest.raises(UserError, match=r"0\.02, expected at least 0\.5"):
        found.check(0.02)
