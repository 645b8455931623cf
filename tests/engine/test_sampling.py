"""The sampler against sorting in float64, and against chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine import sampling
from jaxstack.engine.logit_rules import PROCESSED, RecordLayout, RowParams, words
from jaxstack.engine.sampling import _inverse_cdf, _kept, sample

# Each shape of logits is a program of its own, which takes longer to compile than to run: tests share shapes.


def params(rows, *, seed=0, position=None, logprobs=0, **given):
    neutral = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "frequency": 0.0, "presence": 0.0}
    zeros = ("top_k", "choice", "slot", "prompt_length", "biases", "flags")
    return RowParams(
        **{name: jnp.full((rows,), given.get(name, value), jnp.float32) for name, value in neutral.items()},
        **{name: jnp.full((rows,), given.get(name, 0), jnp.int32) for name in zeros},
        seed=jnp.tile(jnp.array([[0, seed]], jnp.uint32), (rows, 1)),
        position=jnp.arange(rows) if position is None else jnp.full((rows,), position, jnp.int32),
        wants_logprobs=jnp.int32(logprobs),
    )


def draw(logits, params, program=None, **options):
    """Rows without any rule."""
    rows, vocab = logits.shape
    state, grammar = RecordLayout(1, vocab).new_state(1), jnp.zeros((rows, words(vocab)), jnp.int32)
    return (program or jitted)(logits, params, state, grammar, **options)


jitted = jax.jit(sample, static_argnames="kind")
on_gpu = jax.jit(lambda *arguments: sample(*arguments))


@pytest.fixture(params=[False, True], ids=["branches", "none"])
def drawn(request, monkeypatch):
    """`draw` as it is here, and in the form without branches that a GPU gets."""
    if not request.param:
        return draw
    monkeypatch.setattr(sampling, "platform", lambda: "gpu")
    monkeypatch.setattr(sampling, "_BLOCKS", (128,))  # all pairs of columns are a sixteenth of what they are with 512
    return lambda *arguments: draw(*arguments, on_gpu)


def allowed(logits, temperature, top_k, top_p, min_p=0.0):
    """Token ids that may be drawn and their probabilities, by sorting in float64."""
    z = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-z, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp(z[order] - z[order[0]])
    p /= p.sum()
    before = np.cumsum(p) - p
    keep = (before < top_p) & (p > 0) & (p >= min_p * p[0])
    p = np.where(keep, p, 0)
    out = np.zeros(len(z))
    out[order] = p / p.sum()
    return out


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "temperature", "vocab"),
    [
        (0, 1.0, 0.0, 1.0, 50),
        (5, 1.0, 0.0, 0.7, 50),
        (0, 0.8, 0.1, 1.0, 50),
        (7, 0.6, 0.0, 1.3, 700),
        (0, 0.95, 0.0, 1.0, 700),
        (200, 0.9, 0.0, 1.0, 700),
        (0, 1.0, 0.02, 1.0, 700),
        (0, 0.9, 0.3, 1.0, 700),
        (300, 0.9, 0.01, 1.0, 700),
    ],
)
def test_frequencies_match_the_sorted_distribution(top_k, top_p, min_p, temperature, vocab, drawn):
    rng = np.random.default_rng(vocab + top_k)
    logits = rng.normal(0, 1.0, vocab).astype(np.float32)
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    rows, rounds = 500, 20
    counts = np.zeros(vocab)
    for seed in range(rounds):
        tiled = jnp.tile(jnp.asarray(logits), (rows, 1))
        asked = params(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        out = drawn(tiled, asked)
        counts += np.bincount(np.asarray(out.token), minlength=vocab)
    total = rows * rounds
    assert counts[expected == 0].sum() == 0
    big = expected * total >= 5
    chi2 = ((counts - expected * total)[big] ** 2 / (expected * total)[big]).sum()
    degrees = big.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees), (chi2, degrees)


@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 3.0]), min_size=1, max_size=40),
    st.integers(0, 45),
    st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.0, 0.004, 0.1, 0.5, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_exact_filter_keeps_what_sorting_keeps(values, top_k, top_p, min_p):
    """Many equal logits, so that the order among ties matters (lowest id first); also a single finite one."""
    logits = np.full(40, -np.inf, np.float32)
    logits[: len(values)] = values
    k = min(top_k, len(values))
    expected = allowed(logits, 1.0, k, top_p, min_p)
    asked = params(1, top_k=k, top_p=top_p, min_p=min_p)
    found = np.asarray(kept(jnp.asarray(logits)[None], asked, jnp.array([True]))[0]) & np.isfinite(logits)
    base = allowed(logits, 1.0, k, 1.0)
    disputed = top_p < 1 and np.isclose(np.cumsum(np.sort(base)[::-1]), top_p, atol=1e-6).any()
    if not disputed:
        np.testing.assert_array_equal(found, expected > 0)


kept = jax.jit(_kept)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = jnp.zeros((4, 300)).at[1, 40].set(1.0).at[1, 70].set(1.0).at[2].set(-jnp.inf).at[2, 299].set(-5.0)
    assert np.asarray(draw(logits, params(4, temperature=0.0)).token).tolist() == [0, 40, 299, 0]


def test_a_row_does_not_depend_on_its_batch(drawn):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (8, 1000)).astype(np.float32))
    mixed = params(8)._replace(
        temperature=jnp.array([0, 1, 1, 0.5, 2, 1, 0, 1.0], jnp.float32),
        top_k=jnp.array([0, 5, 0, 100, 0, 0, 3, 900], jnp.int32),
        top_p=jnp.array([1, 0.9, 1, 0.99, 0.2, 0.97, 1, 0.5], jnp.float32),
        min_p=jnp.array([0, 0, 0.1, 0, 0, 0.001, 0.3, 0], jnp.float32),
    )
    together = np.asarray(drawn(logits, mixed).token)
    for i in range(8):
        one = RowParams(*(x[i : i + 1] if x.ndim else x for x in mixed))
        assert int(drawn(logits[i : i + 1], one).token[0]) == together[i]


def test_what_is_known_beforehand_changes_no_token():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (8, 1000)).astype(np.float32)).at[3].set(jnp.nan)
    mixed = params(8, top_p=0.9)._replace(temperature=jnp.array([0, 1, 1, 0.5, 2, 1, 0, 1.0], jnp.float32))
    for asked, kinds in ((mixed, ["plain"]), (params(8, temperature=0.0), ["plain", "greedy"])):
        wanted = draw(logits, asked)
        for kind in kinds:
            np.testing.assert_array_equal(draw(logits, asked, kind=kind).token, wanted.token)


@pytest.mark.parametrize("vocab", [40, 700])
def test_a_single_possible_token_is_drawn_whatever_the_filters(vocab, drawn):
    logits = jnp.full((2, vocab), -jnp.inf).at[0, 7].set(-1e30).at[1, vocab - 1].set(1e30)
    for filters in ({}, {"top_p": 1e-6}, {"top_k": vocab}, {"min_p": 1.0}, {"top_k": 1}, {"temperature": 0.0}):
        assert np.asarray(drawn(logits, params(2, **filters)).token).tolist() == [7, vocab - 1]


def test_no_row_is_ever_sorted_whole():
    """XLA sorts where it fails to see a top-k, which costs more than all the rest of a step."""
    vocab = 4096
    shapes = (
        jnp.zeros((4, vocab)),
        params(4),
        RecordLayout(1, vocab).new_state(1),
        jnp.zeros((4, words(vocab)), jnp.int32),
    )
    assert " sort(" not in jitted.lower(*shapes).compile().as_text()


def test_neutral_filters_change_nothing():
    logits = jnp.asarray(np.random.default_rng(3).normal(0, 2, (500, 700)).astype(np.float32))
    free = np.asarray(draw(logits, params(500)).token)
    np.testing.assert_array_equal(np.asarray(draw(logits, params(500, top_k=700)).token), free)


def test_logprobs_are_of_the_unmodified_distribution():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (2, 700)).astype(np.float32)
    out = draw(jnp.asarray(logits), params(2, temperature=0.3, top_k=3, logprobs=1))
    z = logits.astype(np.float64)
    exact = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    np.testing.assert_allclose(out.logprob, exact[np.arange(2), np.asarray(out.token)], atol=2e-5)
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(out.top_tokens, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(exact, order, -1), atol=2e-5)


def test_processed_logprobs_are_of_what_was_drawn_from():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, (4, 300)).astype(np.float32)
    asked = params(4, temperature=0.5, top_k=90, top_p=0.97, min_p=0.001, logprobs=1)
    asked = asked._replace(
        flags=jnp.array([PROCESSED, 0, PROCESSED, PROCESSED]), temperature=jnp.array([0.5, 0.5, 0, 4], jnp.float32)
    )
    out = draw(jnp.asarray(logits), asked)
    raw = np.log(allowed(logits[1], 1.0, 0, 1.0))
    with np.errstate(divide="ignore"):
        expected = [np.log(allowed(logits[i], t, 90, 0.97, 0.001)) for i, t in ((0, 0.5), (3, 4))]
    rows = [expected[0], raw, np.log(allowed(logits[2], 1.0, 0, 1.0)), expected[1]]
    for i, row in enumerate(rows):
        row = np.maximum(row, -9999.0)
        np.testing.assert_allclose(out.logprob[i], row[int(out.token[i])], atol=3e-5)
        top = np.asarray(out.top_tokens[i])
        np.testing.assert_allclose(out.top_logprobs[i], row[top], atol=3e-5)
        np.testing.assert_allclose(np.sort(row)[::-1][:20], row[top], atol=3e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_flagged_and_the_others_are_not(bad):
    logits = jnp.zeros((2, 40)).at[0, 3].set(bad).at[1, 4].set(2.0)
    assert np.asarray(draw(logits, params(2, temperature=0.0)).token).tolist() == [-1, 4]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=1200), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_the_inverse_cdf_never_picks_a_column_without_weight(weights, uniform):
    w = np.zeros(1200, np.float32)
    w[: len(weights)] = weights
    if w.sum() == 0:
        w[5] = 1.0
    column = int(inverse(jnp.asarray(w)[None], jnp.array([uniform], jnp.float32))[0])
    assert w[column] > 0
    exact = np.cumsum(w.astype(np.float64))
    assert exact[column] >= uniform * exact[-1] * (1 - 1e-4) - 1e-3


inverse = jax.jit(_inverse_cdf)
