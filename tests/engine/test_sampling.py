"""The sampler against sorting in float64, and against chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.sampling import RowParams, _filtered, _inverse_cdf, sample


def params(rows, *, temperature=1.0, top_p=1.0, top_k=0, seed=0, position=None, logprobs=0):
    full = lambda value, dtype: jnp.full((rows,), value, dtype)  # noqa: E731
    return RowParams(
        full(temperature, jnp.float32),
        full(top_p, jnp.float32),
        full(top_k, jnp.int32),
        jnp.tile(jnp.array([[0, seed]], jnp.uint32), (rows, 1)),
        jnp.zeros((rows,), jnp.int32),
        jnp.arange(rows) if position is None else full(position, jnp.int32),
        jnp.int32(logprobs),
    )


def allowed(logits, temperature, top_k, top_p):
    """Token ids that may be drawn and their probabilities, by sorting in float64."""
    z = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-z, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp(z[order] - z[order[0]])
    p /= p.sum()
    before = np.cumsum(p) - p
    keep = (before < top_p) & (p > 0)
    p = np.where(keep, p, 0)
    out = np.zeros(len(z))
    out[order] = p / p.sum()
    return out


draw = jax.jit(sample)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "vocab"),
    [
        (0, 1.0, 1.0, 50),
        (5, 1.0, 0.7, 50),
        (0, 0.8, 1.0, 50),
        (7, 0.6, 1.3, 700),
        (0, 0.95, 1.0, 700),
        (200, 0.9, 1.0, 700),
    ],
)
def test_frequencies_match_the_sorted_distribution(top_k, top_p, temperature, vocab):
    rng = np.random.default_rng(vocab + top_k)
    logits = rng.normal(0, 1.0, vocab).astype(np.float32)
    expected = allowed(logits, temperature, top_k, top_p)
    rows, rounds = 2000, 10
    counts = np.zeros(vocab)
    for seed in range(rounds):
        tiled = jnp.tile(jnp.asarray(logits), (rows, 1))
        out = draw(tiled, params(rows, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed))
        counts += np.bincount(np.asarray(out.token), minlength=vocab)
    total = rows * rounds
    assert counts[expected == 0].sum() == 0
    big = expected * total >= 5
    chi2 = ((counts - expected * total)[big] ** 2 / (expected * total)[big]).sum()
    degrees = big.sum() - 1
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees), (chi2, degrees)


@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 3.0]), min_size=2, max_size=40),
    st.integers(0, 45),
    st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999]),
)
@settings(max_examples=120, deadline=None)
def test_the_exact_filter_keeps_what_sorting_keeps(values, top_k, top_p):
    """Many equal logits, so that the order among ties matters (lowest id first)."""
    logits = np.full(40, -np.inf, np.float32)
    logits[: len(values)] = values
    k = min(top_k, len(values))
    expected = allowed(logits, 1.0, k, top_p)
    scaled = jnp.asarray(logits)[None]
    weights = filtered(scaled, jnp.max(scaled, -1, keepdims=True), params(1, top_k=k, top_p=top_p))
    kept = np.asarray(weights[0] > 0)
    disputed = np.isclose(np.cumsum(np.sort(expected)[::-1]), top_p, atol=1e-6).any()
    if not disputed:
        sure = np.asarray(expected > 0)
        np.testing.assert_array_equal(kept, sure)


filtered = jax.jit(_filtered)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = jnp.zeros((3, 100)).at[1, 40].set(1.0).at[1, 70].set(1.0).at[2].set(-jnp.inf).at[2, 99].set(-5.0)
    assert np.asarray(draw(logits, params(3, temperature=0.0)).token).tolist() == [0, 40, 99]


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 3, (8, 1000)).astype(np.float32))
    mixed = params(8)._replace(
        temperature=jnp.array([0, 1, 1, 0.5, 2, 1, 0, 1.0], jnp.float32),
        top_k=jnp.array([0, 5, 0, 100, 0, 0, 3, 900], jnp.int32),
        top_p=jnp.array([1, 0.9, 1, 0.99, 0.2, 0.97, 1, 0.5], jnp.float32),
    )
    together = np.asarray(draw(logits, mixed).token)
    alone = jax.jit(lambda logits, p: sample(logits, p).token)
    for i in range(8):
        one = RowParams(*(x[i : i + 1] if x.ndim else x for x in mixed))
        assert int(alone(logits[i : i + 1], one)[0]) == together[i]


def test_logprobs_are_of_the_unmodified_distribution():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (2, 300)).astype(np.float32)
    out = draw(jnp.asarray(logits), params(2, temperature=0.3, top_k=3, logprobs=1))
    z = logits.astype(np.float64)
    exact = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    np.testing.assert_allclose(out.logprob, exact[np.arange(2), np.asarray(out.token)], atol=2e-5)
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(out.top_tokens, order)
    np.testing.assert_allclose(out.top_logprobs, np.take_along_axis(exact, order, -1), atol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_flagged_and_the_others_are_not(bad):
    logits = jnp.zeros((2, 30)).at[0, 3].set(bad).at[1, 4].set(2.0)
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
