"""Bias, masks, penalties: against a plain numpy account of each rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.logit_rules import (
    ENDS_BARRED,
    GUIDED,
    RESTRICTED,
    RecordLayout,
    RowParams,
    apply_rules,
    bits,
    needs_record,
    note_drawn,
    touched,
    write_record,
)
from jaxstack.engine.request import SamplingParams
from jaxstack.engine.sampling import sample

VOCAB, ROWS, LENGTH = 70, 4, 300
LAYOUT = RecordLayout(LENGTH, VOCAB)
ENDS = (3, 69)

rules = jax.jit(apply_rules)
drawn = jax.jit(sample)
write = jax.jit(write_record)
note = jax.jit(note_drawn)


def unbits(row):
    return np.unpackbits(np.asarray(row).astype("<i4").view(np.uint8), bitorder="little")[:VOCAB].astype(bool)


def params(requests, **changes):
    """Rows of `requests`, a list of (sampling, prompt length, position, guided); slot i belongs to row i."""
    column = lambda values, dtype: jnp.asarray(np.array(values, dtype))  # noqa: E731
    samplings = [r[0] for r in requests]
    flags = [
        (RESTRICTED if s.allowed_token_ids is not None else 0)
        | (ENDS_BARRED if position < s.min_tokens else 0)
        | (GUIDED if guided else 0)
        for s, _, position, guided in requests
    ]
    made = RowParams(
        temperature=column([s.temperature for s in samplings], np.float32),
        top_p=column([s.top_p for s in samplings], np.float32),
        min_p=column([s.min_p for s in samplings], np.float32),
        repetition=column([s.repetition_penalty for s in samplings], np.float32),
        frequency=column([s.frequency_penalty for s in samplings], np.float32),
        presence=column([s.presence_penalty for s in samplings], np.float32),
        top_k=column([s.top_k for s in samplings], np.int32),
        seed=jnp.zeros((len(requests), 2), jnp.uint32),
        choice=jnp.zeros(len(requests), jnp.int32),
        position=column([r[2] for r in requests], np.int32),
        slot=jnp.arange(len(requests)),
        prompt_length=column([r[1] for r in requests], np.int32),
        biases=column([len(s.biases) for s in samplings], np.int32),
        flags=column(flags, np.int32),
        wants_logprobs=jnp.int32(0),
    )
    return made._replace(**changes)


def expected(logits, sampling, tokens, prompt_length, position, grammar):
    """The rules in float64, one after the other."""
    z = logits.astype(np.float64)
    for token, value in sampling.biases:
        z[token] += value
    allowed = np.ones(VOCAB, bool)
    if sampling.allowed_token_ids is not None:
        allowed = np.isin(np.arange(VOCAB), sampling.allowed_token_ids)
    if grammar is not None:
        allowed &= unbits(grammar)
    if position < sampling.min_tokens:
        without = allowed & ~np.isin(np.arange(VOCAB), [*ENDS, *sampling.stop_token_ids])
        allowed = without if without.any() else allowed
    z[~allowed] = -np.inf
    prompt, answer = tokens[:prompt_length], tokens[prompt_length : prompt_length + position]
    r = sampling.repetition_penalty
    for token in {*prompt, *answer}:
        z[token] = z[token] / r if z[token] > 0 else z[token] * r
    counts = np.bincount(np.asarray(answer, int), minlength=VOCAB)
    return z - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)


ids = st.integers(0, VOCAB - 1)
requests = st.builds(
    SamplingParams,
    max_tokens=st.none(),
    temperature=st.sampled_from([0.0, 1.0]),
    logit_bias=st.one_of(st.none(), st.dictionaries(ids, st.sampled_from([-100.0, -2.5, 3.25, 100.0]), max_size=30)),
    allowed_token_ids=st.one_of(st.none(), st.lists(ids, min_size=1, max_size=20).map(tuple)),
    min_tokens=st.sampled_from([0, 0, 5, 200]),
    stop_token_ids=st.sampled_from([(), (5, 6)]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 2.0, -0.3]),
)
rows = st.tuples(requests, st.integers(1, 140), st.integers(0, 140), st.booleans())


@given(st.lists(rows, min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_the_rules_are_those_of_numpy(requests, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH))
    grammar = rng.integers(-(2**31), 2**31, (ROWS, 3)).astype(np.int32)
    state = LAYOUT.new_state(ROWS)
    for i, (sampling, length, position, _) in enumerate(requests):
        # A slot that nobody needs holds what somebody else has left there.
        left = SamplingParams(logit_bias={1: 50.0}, allowed_token_ids=(2,), presence_penalty=1.0, min_tokens=1)
        used = sampling if needs_record(sampling) else left
        ends = [*ENDS, *sampling.stop_token_ids]
        state = write(state, i, LAYOUT.pack(used, tokens[i, : length + position].tolist(), ends))
    asked = params(requests)
    found = np.asarray(rules(logits, asked, state, grammar))
    for i, (sampling, length, position, guided) in enumerate(requests):
        row = expected(logits[i], sampling, tokens[i], length, position, grammar[i] if guided else None)
        np.testing.assert_allclose(found[i], row, rtol=1e-5, atol=2e-4)
        if not np.asarray(touched(asked))[i]:
            np.testing.assert_array_equal(found[i], logits[i])
    # Greedy is the arg max of that, lowest id first, and -2 where nothing is left.
    picked = np.asarray(drawn(logits, asked, state, grammar).token)
    for i, (sampling, *_) in enumerate(requests):
        if np.isneginf(found[i]).all():
            assert picked[i] == -2
        elif sampling.greedy:
            assert picked[i] == np.argmax(found[i])
        else:
            assert np.isfinite(found[i, picked[i]])


def test_a_row_is_the_same_beside_rows_with_rules():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    plain = (SamplingParams(temperature=0.8, seed=1, top_p=0.9), 10, 7, False)
    ruled = (SamplingParams(repetition_penalty=1.3, logit_bias={4: 9.0}, allowed_token_ids=(4, 5, 6)), 10, 7, True)
    state = LAYOUT.new_state(ROWS)
    state = write(state, 1, LAYOUT.pack(ruled[0], list(range(17)), ENDS))
    grammar = np.full((ROWS, 3), -1, np.int32)
    alone = drawn(logits, params([plain] * ROWS), state, grammar)
    beside = drawn(logits, params([plain, ruled, plain, plain]), state, grammar)
    for i in (0, 2, 3):
        assert int(alone.token[i]) == int(beside.token[i])
    assert int(beside.token[1]) in (4, 5, 6)


def test_drawn_tokens_are_counted_without_the_host():
    """Frequency 2 and logits that fall slowly: each token is drawn as often as a plain loop says."""
    logits = np.linspace(6, 0, VOCAB, dtype=np.float32)[None].repeat(ROWS, 0)
    sampling = SamplingParams(temperature=0.0, frequency_penalty=2.0, repetition_penalty=1.1)
    prompts = [[1, 2], [0] * 140, [7], [69, 3, 3]]
    state = LAYOUT.new_state(ROWS)
    for i, prompt in enumerate(prompts):
        state = write(state, i, LAYOUT.pack(sampling, prompt, ()))
    answers = [[] for _ in prompts]
    for position in range(30):
        asked = params([(sampling, len(p), position, False) for p in prompts])
        token = drawn(logits, asked, state, np.zeros((ROWS, 3), np.int32)).token
        state = note(state, asked, token)
        for answer, t in zip(answers, np.asarray(token).tolist()):
            answer.append(t)
    for prompt, answer in zip(prompts, answers):
        for position in range(30):
            z = expected(logits[0], sampling, prompt + answer, len(prompt), position, None)
            assert z[answer[position]] >= z.max() - 1e-4


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 151_936])
def test_bits_round_trip(vocab):
    members = sorted({0, vocab // 2, vocab - 1})
    packed = bits(members, vocab)
    assert packed.dtype == np.int32
    assert packed.shape == (-(-vocab // 32),)
    assert [t for t in range(vocab) if int(packed[t // 32]) >> (t % 32) & 1] == members


def test_all_biases_count():
    """The most entries that are allowed, more than one round of the loop."""
    layout = RecordLayout(1, 1200)
    sampling = SamplingParams(temperature=0.0, logit_bias={i: float(i % 7) for i in range(1024)})
    state = write(layout.new_state(1), 0, layout.pack(sampling, [], ()))
    asked = params([(sampling, 1, 0, False)])
    found = np.asarray(rules(np.zeros((1, 1200), np.float32), asked, state, np.zeros((1, 38), np.int32)))[0]
    np.testing.assert_array_equal(found, [i % 7 if i < 1024 else 0 for i in range(1200)])
