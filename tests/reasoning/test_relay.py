"""Relay: problems against brute force, traces step by step, and graders that only the right answer passes."""

import random
import zlib
from collections import Counter

import pytest

from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning import relay
from jaxstack.reasoning.relay import Coherence, RelayProblem, Step
from jaxstack.reasoning.tokenizer import BOS, RELAY_VOCABULARY, build_tokenizer, write_tokenizer
from jaxstack.runtime.errors import UserError

PROBLEM = RelayProblem(21, ("A", "D", "C"), 11)


def by_hand(problem: RelayProblem) -> list[int]:
    """The values by list rotation and item-by-item search of the rule, as `solve` does not do it."""
    rules, value, seen = list(problem.rules), problem.start, []
    for _ in range(problem.times):
        (value,) = [out for place, out in enumerate(relay.RULES[rules[0]]) if place == value]
        rules.append(rules.pop(0))
        seen.append(value)
    return seen


def test_rules_are_the_published_permutations():
    rng = random.Random(11)
    for name in "ABCDEF":
        assert list(relay.RULES[name]) == rng.sample(range(30), 30)
        assert sorted(relay.RULES[name]) == list(range(30))


def test_problems_are_split_by_checksum():
    train, held_out = set(relay.problems("train")), set(relay.problems("held_out"))
    assert len(train) + len(held_out) == 30 * 6**3 * 5
    assert not train & held_out
    assert 0.18 < len(held_out) / 32400 < 0.22
    for problem in random.Random(0).sample(sorted(held_out, key=lambda p: p.identity), 50):
        key = f"{problem.start} {' '.join(problem.rules)} {problem.times}"
        assert zlib.crc32(key.encode()) % 5 == 0


def test_held_out_is_a_fixed_draw():
    first, again = relay.held_out(40), relay.held_out(60)
    assert first == again[:40]
    assert len(set(again)) == 60
    assert relay.held_out(40, seed=6) != first
    with pytest.raises(UserError, match="asked for 0, expected 1 to"):
        relay.held_out(0)


def test_solve_against_the_search():
    rng = random.Random(1)
    for problem in rng.sample(relay.problems("train"), 200):
        assert list(relay.solve(problem)) == by_hand(problem)


@pytest.mark.parametrize("wrong", [None, *relay.WRONG_KINDS])
def test_traces(wrong):
    rng = random.Random(2)
    slips, places, shown, rechecks, traces = 0, Counter(), set(), 0, 600
    for problem in rng.sample(relay.problems("train"), traces):
        steps = relay.trace_steps(problem, rng, wrong=wrong)
        main = [step for step in steps if step.recheck is None]
        assert [step.counter for step in main] == list(range(problem.times, 0, -1))
        value, rules, final_slips = problem.start, list(problem.rules), []
        for place, step in enumerate(steps):
            if step.recheck:
                rechecks += 1
                before = steps[place - 1]
                assert (step.counter, step.value, step.rules) == (before.counter, before.value, before.rules)
                assert before.recheck is None and step.right
                value = step.result
                continue
            assert (step.value, list(step.rules)) == (value, rules)
            value, rules = step.result, [*rules[1:], rules[0]]
            rechecked = place + 1 < len(steps) and steps[place + 1].recheck is not None
            slips += rechecked and not step.right
            if not rechecked and not step.right:
                final_slips.append(step)
        assert sum(step.recheck is not None for step in steps) <= 3
        answer = relay.trace(problem, random.Random(0), wrong=wrong)
        assert relay.grade(problem, answer.response).correct == (wrong is None)
        assert len(final_slips) == (wrong is not None)
        for step in final_slips:
            places[problem.times - step.counter] += 1
            shown.add((step.result - relay.RULES[step.rules[0]][step.value]) % 30)
            if wrong in ("wrongL", "wrongLP"):
                assert step.counter == 1
    assert 0.33 < slips / rechecks < 0.47  # 0.4 of rechecked steps were slips
    if wrong in ("wrong", "wrongP"):
        assert set(places) == set(range(12))
    if wrong in ("wrongP", "wrongLP"):
        assert shown == {1}
    if wrong in ("wrong", "wrongL"):
        assert shown == set(range(1, 30))


def test_a_slipped_thought_begins_right_and_ends_wrong():
    places = set()
    for number, problem in enumerate(relay.held_out(60)):
        thought = relay.slipped_thought(problem, random.Random(number))
        assert thought.endswith(f" {relay.BLANK_LINE}") and set(thought.split(" ")) <= set(relay.WORDS)
        *before, last = relay.parse_steps(thought)
        values = [problem.start, *relay.solve(problem)]
        for place, step in enumerate([*before, last]):
            assert step.counter == problem.times - place and step.value == values[place] and step.recheck is None
        assert all(step.right for step in before) and not last.right
        places.add(len(before))
        # Repaired by a recheck and carried on, it ends in the right answer; carried on as it stands, in a wrong one.
        assert relay.RULES[last.rules[0]][last.value] == values[len(before) + 1] != last.result
    assert {0, 1, 7} <= places


def test_lengths_and_words():
    vocabulary = set(RELAY_VOCABULARY)
    assert len(vocabulary) == 63
    rng, lengths = random.Random(3), []
    for trace in relay.training_traces(400, seed=0):
        words = trace.response.split(" ")
        assert set(words) <= vocabulary
        assert len(trace.problem.content.split(" ")) + 2 == 9  # <bos> and <think>
        lengths.append(len(words) + 1)
    assert max(lengths) <= 133  # 12 steps of 8, 3 rechecks of 11, the answer and the ends
    assert 102 < sum(lengths) / len(lengths) < 112
    kinds = Counter()
    for _ in range(2000):
        trace = relay.base_trace(rng)
        assert set(trace.response.split(" ")) <= vocabulary
        kinds["bare" if trace.problem is None else "chain" if trace.stops else "long"] += 1
        if trace.stops:
            assert trace.problem.times <= 3 and relay.grade(trace.problem, trace.response).correct
        elif trace.problem is not None:
            assert trace.problem.split == "train"
            assert "answer" not in trace.response
    assert 0.17 < kinds["bare"] / 2000 < 0.23 and 0.27 < kinds["chain"] / 2000 < 0.33


def test_training_traces_append_and_never_meet_the_held_out():
    short, long = (list(relay.training_traces(count, seed=4)) for count in (30, 50))
    assert long[:30] == short
    assert all(trace.problem.split == "train" for trace in long)
    wrong = list(relay.training_traces(30, seed=4, wrong="wrong"))
    assert [trace.problem for trace in wrong] == [trace.problem for trace in short]
    assert list(relay.training_traces(30, seed=5)) != short


def test_the_grader_takes_only_the_right_value():
    right = by_hand(PROBLEM)[-1]
    for value in range(30):
        assert relay.grade(PROBLEM, f"#11 ... </think> answer {value:02d} <eos>").correct == (value == right)
    wrong_texts = {
        "": "no answer",
        f"#1 05 A D C = {right:02d}": "no answer",
        f"answer {right:02d} </think>": "no answer",
        "</think> answer": "empty answer",
        f"</think> answer {right:02d} {right:02d}": "is not one value",
        "</think> answer A": "is not one value",
        "</think> answer " + "9" * 5000: "is not one value",
        "</think> answers 01": "no answer",
    }
    for text, reason in wrong_texts.items():
        verdict = relay.grade(PROBLEM, text)
        assert not verdict.correct and reason in verdict.reason
    assert relay.grade(PROBLEM, None).reason == "no answer"


def test_random_numbers():
    text = Step(11, 21, ("A", "D", "C"), 5).text + " \n\n"
    assert relay.random_numbers(text, 0.0, random.Random(0)) == text
    counters, values, changed = set(), set(), 0
    for seed in range(400):
        noisy = relay.random_numbers(text, 1.0, random.Random(seed))
        words = noisy.split(" ")
        assert words[2:6] == ["A", "D", "C", "="] and words[-1] == "\n\n"
        counters.add(words[0])
        values |= {words[1], words[6]}
        changed += relay.random_numbers(text, 0.3, random.Random(seed)).split(" ")[6] != "05"
    assert counters == {f"#{n}" for n in range(1, 13)}
    assert values == {f"{v:02d}" for v in range(30)}
    assert 0.2 < changed / 400 < 0.38  # 0.3 * 29/30


def test_coherence_counts():
    first = relay.RULES["A"][21]
    second = relay.RULES["D"][first]
    text = " \n\n ".join(
        [
            f"#11 21 A D C = {(first + 3) % 30:02d}",
            f"Wait , check #11 21 A D C = {first:02d}",
            f"#10 {first:02d} D C A = {second:02d}",  # carried on and counted down
            f"#10 {first:02d} D C A = {second:02d}",  # repeated
            f"#5 {(second + 1) % 30:02d} C A D = 00",  # neither
            "nonsense 12",
            "#4 01 A B C = 02",  # follows no step
        ]
    )
    counts = Coherence()
    counts.add(f"{text} \n\n </think> answer 04")
    assert (counts.paragraphs, counts.illegal, counts.steps) == (7, 1, 6)
    assert (counts.transitions, counts.carried, counts.counted_down, counts.repeated) == (3, 1, 1, 1)
    assert counts.keywords == 1
    parsed = [step for step in relay.parse_steps(text) if step]
    assert counts.right == sum(step.result == relay.RULES[step.rules[0]][step.value] for step in parsed)
    assert relay.parse_steps("#1 99 A B C = 01 \n\n") == [None]


def test_a_perfect_trace_is_coherent():
    counts = Coherence()
    for trace in relay.training_traces(100, seed=9):
        counts.add(trace.response)
    assert counts.illegal == counts.repeated == 0
    assert counts.carried == counts.counted_down == counts.transitions
    assert 0.88 < counts.right / counts.steps < 0.96


def test_tokenizer_of_relay(tmp_path):
    write_tokenizer(tmp_path, max_length=288, vocabulary=RELAY_VOCABULARY)
    tokenizer = load_tokenizer(tmp_path)
    text = next(relay.training_traces(1, seed=0)).response
    ids = build_tokenizer(RELAY_VOCABULARY).encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) == len(text.split(" "))
    prompt = tokenizer.render_chat([{"role": "user", "content": PROBLEM.content}])
    assert prompt == f"{BOS} let 21 A D C times #11 <think>"
