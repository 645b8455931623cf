"""Algorithm 2 against its own text, and continuous refill: nothing is lost, nothing overflows, nobody starves."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory.batching import RefilledBatches, Waiting, batch_requests, decode_steps
from jaxstack.runtime.errors import UserError

lengths = st.lists(st.integers(1, 60), max_size=40)


@given(lengths, st.integers(1, 6), st.integers(1, 9), st.integers(1, 20), st.integers(80, 400))
@settings(max_examples=150, deadline=None)
def test_algorithm_2_line_by_line(prompts, n_ub, ubs, gen_len, cache_tokens):
    requests = [Waiting(i, length, gen_len) for i, length in enumerate(prompts)]
    found = batch_requests(requests, n_micro_batches=n_ub, micro_batch=ubs, cache_tokens=cache_tokens)
    parts, sums, emitted, aborted = [[] for _ in range(n_ub)], [0] * n_ub, [], []
    for r in sorted(requests, key=lambda each: each.prompt_tokens, reverse=True):
        if not parts:
            aborted.append(r)
            continue
        p = sums.index(min(sums))
        if sums[p] + r.prompt_tokens + (1 + len(parts[p])) * gen_len > cache_tokens:
            aborted.append(r)
            continue
        parts[p].append(r)
        sums[p] += r.prompt_tokens
        if len(parts[p]) == ubs:
            emitted.append(parts.pop(p))
            sums.pop(p)
    emitted += [part for part in parts if part]
    assert [list(part) for part in found.micro_batches] == emitted
    assert list(found.deferred) == aborted
    everyone = [r.id for part in found.micro_batches for r in part] + [r.id for r in found.deferred]
    assert sorted(everyone) == list(range(len(prompts)))
    for part in found.micro_batches:
        assert len(part) <= ubs and sum(r.tokens for r in part) <= cache_tokens


def test_micro_batches_are_balanced():
    rng = random.Random(0)
    requests = [Waiting(i, rng.randint(1, 400), 10) for i in range(64)]
    found = batch_requests(requests, n_micro_batches=4, micro_batch=16, cache_tokens=10_000)
    sums = [sum(r.prompt_tokens for r in part) for part in found.micro_batches]
    assert max(sums) <= 1.1 * min(sums) and not found.deferred


def test_what_can_never_fit_is_refused_by_name():
    with pytest.raises(UserError, match="request big: found 110 tokens with its answer, expected at most the 100"):
        batch_requests([Waiting("big", 100, 10)], n_micro_batches=1, micro_batch=1, cache_tokens=100)
    batches = RefilledBatches(n_micro_batches=1, micro_batch=1, cache_tokens=100)
    with pytest.raises(UserError, match="request big"):
        batches.add([Waiting("small", 10, 10), Waiting("big", 100, 10)])
    assert batches.waiting == 0
    with pytest.raises(UserError, match="micro_batch: found 0"):
        RefilledBatches(n_micro_batches=1, micro_batch=0, cache_tokens=1)
    with pytest.raises(UserError, match="prompt_tokens: found 0"):
        Waiting("empty", 0, 1)


@given(
    lengths,
    st.lists(st.integers(1, 20), min_size=40, max_size=40),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 50),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_slots_are_refilled_and_nothing_is_lost(prompts, answers, n_ub, ubs, chunk, rng):
    batches = RefilledBatches(n_micro_batches=n_ub, micro_batch=ubs, cache_tokens=120)
    requests = [Waiting(i, prompt, 20) for i, prompt in enumerate(prompts)]
    left = {r.id: length for r, length in zip(requests, answers)}
    read = dict.fromkeys(left, 0)
    batches.add(requests)
    placed_order, aborted, steps = [], set(), 0
    while batches.waiting or batches.running:
        steps += 1
        assert steps < 5000
        placed = batches.fill()
        placed_order += [place.request.id for place in placed]
        assert len({(p.micro_batch, p.slot) for p in placed}) == len(placed)
        budget = chunk
        for piece in batches.prefill(chunk):
            who = piece.placed.request
            assert piece.start == read[who.id] and piece.count >= 1
            read[who.id] += piece.count
            budget -= piece.count
        assert budget >= 0
        seen = set()
        for j, part in enumerate(batches.decoding()):
            assert sum(place.request.tokens for place in part) <= batches.used_tokens(j) <= 120
            for place in part:
                assert place.micro_batch == j and (j, place.slot) not in seen
                seen.add((j, place.slot))
                who = place.request
                assert read[who.id] == who.prompt_tokens
                left[who.id] -= 1
                if left[who.id] == 0:
                    batches.finish(who.id)
                elif rng.random() < 0.05:
                    batches.finish(who.id)
                    aborted.add(who.id)
    assert placed_order == [r.id for r in requests], "first come, first placed"
    assert all(left[r.id] == 0 or r.id in aborted for r in requests)
    assert all(batches.used_tokens(j) == 0 for j in range(n_ub))


def test_an_unread_request_can_leave():
    batches = RefilledBatches(n_micro_batches=1, micro_batch=2, cache_tokens=100)
    batches.add([Waiting("a", 30, 5), Waiting("b", 30, 5), Waiting("c", 30, 5)])
    batches.fill()
    assert [(c.placed.request.id, c.start, c.count) for c in batches.prefill(10)] == [("a", 0, 10)]
    batches.finish("a")
    assert batches.cancel("c") and not batches.cancel("c")
    assert [(c.placed.request.id, c.start, c.count) for c in batches.prefill(40)] == [("b", 0, 30)]
    assert [[place.request.id for place in part] for part in batches.decoding()] == [["b"]]


def test_refill_needs_fewer_steps_than_answers_of_one_length():
    rng = random.Random(1)
    requests = [Waiting(i, rng.randint(5, 40), 64) for i in range(200)]
    answers = [min(64, 1 + int(rng.expovariate(1 / 16))) for _ in requests]
    shape = {"n_micro_batches": 4, "micro_batch": 8, "cache_tokens": 2000}
    fixed = decode_steps(requests, answers, refill=False, **shape)
    refilled = decode_steps(requests, answers, refill=True, **shape)
    assert refilled >= -(-sum(answers) // 32)
    assert refilled < 0.6 * fixed
