"""Steps and perturbations: properties of random thoughts, keywords case by case, and bad input in one line."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.reasoning.longcot import (
    KEYWORDS,
    KINDS,
    join_steps,
    keyword_spans,
    perturb,
    perturb_response,
    split_response,
    split_steps,
)
from jaxstack.reasoning.longcot.perturb import random_digits, without_keywords
from jaxstack.runtime.errors import UserError

# Steps that are told apart by their number; some hold keywords.
PARAGRAPH = st.sampled_from(["So 3 + 4 = 7.", "Wait, that is 12.", "x", "We get 0.5 here.\nBut maybe not.", "Hmm."])
THOUGHTS = st.lists(PARAGRAPH, min_size=1, max_size=12).map(
    lambda parts: [f"{part} [{number}]" for number, part in enumerate(parts)]
)
FRACTIONS = st.floats(0, 1)
STRUCTURE = st.sampled_from(["shuffle", "delete", "insert", "replace"])
BANK = [[f"foreign {sample} {step}" for step in range(4)] for sample in range(3)]


def is_subsequence(short, long):
    rest = iter(long)
    return all(item in rest for item in short)


@settings(deadline=None)
@given(THOUGHTS, st.sampled_from(["\n\n", " \n\n ", "\n\n\n"]), st.sampled_from(["", "\n", " \n\n "]))
def test_split_and_join(steps, separator, ending):
    thought = separator.join(steps) + ending
    assert split_steps(thought) == steps
    if len(steps) > 1:
        assert join_steps(steps, like=thought) == thought
    assert split_steps(join_steps(steps)) == steps
    assert join_steps([], like=thought) == ""


@settings(deadline=None)
@given(THOUGHTS, st.sampled_from(KINDS), st.integers(0, 5))
def test_nothing_changes_at_fraction_0(steps, kind, seed):
    thought = "\n" + "\n\n".join(steps) + "  \n"
    assert perturb(thought, kind, 0.0, bank=BANK, seed=seed, sample_id="a") == thought


@settings(deadline=None)
@given(THOUGHTS, STRUCTURE, FRACTIONS, st.integers(0, 1000))
def test_structure(steps, kind, fraction, seed):
    changed = split_steps(perturb("\n\n".join(steps), kind, fraction, bank=BANK, seed=seed, sample_id="a"))
    n, k = len(steps), int(fraction * len(steps) + 0.5)
    foreign = [step for step in changed if step.startswith("foreign")]
    own = [step for step in changed if not step.startswith("foreign")]
    if kind == "shuffle":
        assert Counter(changed) == Counter(steps)
        moved = sum(a != b for a, b in zip(changed, steps))
        assert moved <= k
        assert moved >= 2 if k >= 2 else moved == 0
    elif kind == "delete":
        assert len(changed) == n - k and is_subsequence(changed, steps)
        deleted = [step for step in steps if step not in changed]
        assert Counter(deleted) + Counter(changed) == Counter(steps)
    elif kind == "insert":
        assert own == steps and len(foreign) == k
    else:
        assert len(changed) == n and len(foreign) == k
        assert all(new == old or new.startswith("foreign") for new, old in zip(changed, steps))


@settings(deadline=None)
@given(THOUGHTS, st.sampled_from(KINDS), FRACTIONS, st.integers(0, 1000), st.text(max_size=40))
def test_the_solution_is_untouched(steps, kind, fraction, seed, rest):
    solution = "</think>" + rest.replace("</think>", "") + " Wait, 42."
    response = "<think>" + "\n\n".join(steps) + solution
    changed = perturb_response(response, kind, fraction, bank=BANK, seed=seed, sample_id="a")
    assert changed.endswith(solution)
    assert changed == perturb_response(response, kind, fraction, bank=BANK, seed=seed, sample_id="a")


@settings(deadline=None)
@given(THOUGHTS, FRACTIONS, st.integers(0, 1000))
def test_content_keeps_structure(steps, fraction, seed):
    thought = "\n\n".join(steps)
    noisy = perturb(thought, "digits", fraction, seed=seed, sample_id="a")
    assert len(noisy) == len(thought)
    assert all(a == b or (a.isdigit() and b.isdigit()) for a, b in zip(noisy, thought))
    bare = perturb(thought, "keywords", 1.0, seed=seed, sample_id="a")
    assert keyword_spans(bare) == []
    assert [c for c in bare if c.isdigit()] == [c for c in thought if c.isdigit()]


def test_randomness_is_keyed_by_seed_sample_and_kind():
    thought = "\n\n".join(f"step {number}" for number in range(30))

    def shuffled(seed, sample_id):
        return perturb(thought, "shuffle", 1.0, seed=seed, sample_id=sample_id)

    assert shuffled(0, "a") == shuffled(0, "a")
    assert len({shuffled(0, "a"), shuffled(1, "a"), shuffled(0, "b")}) == 3
    assert perturb(thought, "delete", 1.0, seed=0, sample_id="a") == ""


def test_rates():
    rng = random.Random(0)
    noisy = random_digits("5" * 20_000, 0.5, rng)
    assert 0.43 < sum(c != "5" for c in noisy) / 20_000 < 0.47  # a tenth of the replaced ones is the same digit
    counts = Counter(random_digits("5" * 20_000, 1.0, rng))
    assert set(counts) == set("0123456789") and max(counts.values()) < 2300
    left = without_keywords("Wait, so it is. " * 2000, 0.3, rng).count("Wait")
    assert 1300 < left < 1500
    places = Counter()
    for seed in range(1000):
        thought = "\n\n".join("abcde")
        places.update(split_steps(perturb(thought, "delete", 0.4, seed=seed, sample_id="a")))
    assert all(540 < places[step] < 660 for step in "abcde")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wait, that is wrong.", "That is wrong."),
        ("So 4. Wait, no. Then 5.", "So 4. No. Then 5."),
        ("Hmm. Let me see.", "Let me see."),
        ("Hmm... let me see.", "Let me see."),
        ("Let me double-check this: 3.5 + 4.", "This: 3.5 + 4."),
        ("But wait, maybe 7 is prime.", "7 is prime."),
        ("It is 7, but not 8.", "It is 7, not 8."),
        ("Is it 7, wait?", "Is it 7?"),
        ("Alternatively: use the rule.", "Use the rule."),
        ("button waiting butter", "button waiting butter"),
        ("WAIT - is it?", "Is it?"),
        ("first\nwait, second\nthird", "first\nsecond\nthird"),
    ],
)
def test_keyword_removal(text, expected):
    assert without_keywords(text, 1.0, random.Random(0)) == expected


def test_keywords_of_word_level_texts():
    text = "#3 05 A D C = 02 \n\n Wait , check #3 05 A D C = 02 \n\n "
    bare = perturb(text, "keywords", 1.0, seed=0, sample_id="a", repair_case=False)
    assert bare == "#3 05 A D C = 02 \n\n check #3 05 A D C = 02 \n\n "
    one = perturb("Hmm , a \n\n ", "insert", 1.0, bank=[["b"]], seed=0, sample_id="a")
    assert sorted(one.split(" ")) == sorted(["Hmm", ",", "a", "\n\n", "b", "\n\n", ""])
    assert len(split_steps(one)) == 2


def test_every_keyword_is_found():
    for keyword in KEYWORDS:
        for form in (keyword, keyword.upper(), keyword.capitalize()):
            assert keyword_spans(f"so {form}, then") == [(3, 3 + len(keyword))]


def test_keyword_splitter():
    thought = "We add 3. Then 4. Wait, check it. It is 7. Alternatively use 8. Done but fine."
    steps = ["We add 3. Then 4.", "Wait, check it. It is 7.", "Alternatively use 8. Done but fine."]
    assert split_steps(thought, splitter="keyword") == steps
    assert join_steps(steps, splitter="keyword") == thought
    mixed = perturb(thought, "shuffle", 1.0, seed=0, sample_id="a", splitter="keyword")
    assert mixed != thought and len(mixed) == len(thought)


def test_formulas_join_the_step_before():
    thought = "Add them:\n\n$$x + y = 3$$\n\n\\frac{1}{2} = 0.5\n\nSo x = 2"
    assert len(split_steps(thought)) == 4
    merged = split_steps(thought, merge_math=True)
    assert merged == ["Add them:\n\n$$x + y = 3$$\n\n\\frac{1}{2} = 0.5", "So x = 2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "reverse", 0.5), "perturbation 'reverse' is unknown; expected one of digits, keywords, shuffle"),
        (("a", "shuffle", 1.5), "fraction is 1.5, expected 0 to 1"),
        (("a", "digits", float("nan")), "fraction is nan, expected 0 to 1"),
        (("a", "delete", -0.1), "fraction is -0.1"),
        ((" \n\n ", "shuffle", 0.5), "sample s7 has no steps in its thought"),
        (("a", "insert", 0.5), "the bank of 1 samples has none but sample s7 itself"),
        (("a", "replace", 0.0), "the bank of 1 samples"),
    ],
)
def test_bad_perturbations(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        perturb(*arguments, bank=[["a"]], seed=0, sample_id="s7")
    assert "\n" not in str(caught.value)


def test_bad_responses():
    with pytest.raises(UserError, match="found </think> none, expected it once"):
        split_response("a thought that never ends")
    with pytest.raises(UserError, match="found </think> 2 times"):
        split_response("a</think>b</think>c")
    with pytest.raises(UserError, match="splitter='line': expected paragraph or keyword"):
        split_steps("a", splitter="line")
