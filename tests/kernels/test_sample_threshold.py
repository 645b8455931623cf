"""Thresholds of the sampling filters against a sort in float64, on rows made to be awkward."""

import functools

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sample_threshold import kept, pallas_gpu, pallas_tpu, sample_threshold

FORMS = ["ref", "xla", "interpret gpu", "interpret tpu"]
PALLAS = {"interpret gpu": pallas_gpu.sample_threshold, "interpret tpu": pallas_tpu.sample_threshold}
VOCAB = 200


def expected(row, k, p, m):
    """The kept ids of one row by a stable float64 sort, and how near a decision was to going the other way."""
    row = row.astype(np.float64)
    ids = np.argsort(-row, kind="stable")
    ids = ids[row[ids] > -np.inf][: k or None]
    weights = np.exp(row[ids] - row.max())
    probabilities = weights / weights.sum()
    before = np.cumsum(probabilities) - probabilities
    margin = np.abs(before[1:] - p).min(initial=1.0) if p < 1 else 1.0
    keep = np.ones(len(ids), bool) if p >= 1 else (before < p)
    if m > 0:
        keep &= weights >= m
        # The most likely one has weight 1 exactly, in any precision.
        margin = min(margin, np.abs(np.log(weights[weights < 1] / m)).min(initial=1.0))
    keep[0] = True
    return set(ids[keep].tolist()), margin


@functools.cache
def compiled(form):
    def run(scaled, k, p, m):
        if form in PALLAS:
            threshold = PALLAS[form](scaled, k, p, m, interpret=True)
        else:
            threshold = sample_threshold(scaled, k, p, m, implementation=form)
        return threshold, kept(scaled, threshold)

    return jax.jit(run)


def run(form, scaled, k, p, m):
    arguments = [np.asarray(v, dtype) for v, dtype in zip((k, p, m), (np.int32, np.float32, np.float32))]
    return jax.tree.map(np.asarray, compiled(form)(np.asarray(scaled, np.float32), *arguments))


def check(form, scaled, k, p, m):
    scaled = np.asarray(scaled, np.float32)
    (value, ties, _), keep = run(form, scaled, k, p, m)
    checked = 0
    for i, row in enumerate(scaled):
        wanted, margin = expected(row, k[i], np.float32(p[i]), np.float32(m[i]))
        if margin < 1e-5:
            continue
        checked += 1
        equal = np.flatnonzero(row == value[i])[: ties[i]]
        assert set(np.flatnonzero(row > value[i])) | set(equal) == wanted, (i, k[i], p[i], m[i])
        assert set(np.flatnonzero(keep[i])) == wanted
        assert (value[i] == -np.inf) == (len(wanted) == (row > -np.inf).sum())
    return checked


def awkward_rows(rng):
    """Plain, tied, spiked, masked, huge and tiny logits."""
    rows = [rng.normal(size=VOCAB) * s for s in (1.0, 5.0, 1e-3, 30.0)]
    rows += [rng.integers(0, 4, VOCAB).astype(float), np.zeros(VOCAB), np.where(np.arange(VOCAB) % 2, 0.0, -0.0)]
    one_hot = np.full(VOCAB, -np.inf)
    one_hot[57] = 3.0
    masked = np.where(rng.random(VOCAB) < 0.8, -np.inf, rng.normal(size=VOCAB))
    return np.stack([*rows, one_hot, masked, rng.normal(size=VOCAB) - 1e30, np.arange(VOCAB) * 1e-30])


@pytest.mark.parametrize("form", FORMS)
def test_equals_a_sort_in_float64(form):
    rng = np.random.default_rng(0)
    rows = awkward_rows(rng)
    n, checked, total = len(rows), 0, 0
    for k in (0, 1, 7, VOCAB - 1, VOCAB, VOCAB + 50):
        for p, m in [
            (1.0, 0.0),
            (0.9, 0.0),
            (0.31, 0.0),
            (1e-6, 0.0),
            (0.0, 0.0),
            (1.0, 0.2),
            (0.7731, 0.05),
            (1.0, 1.0),
        ]:
            checked += check(form, rows, [k] * n, [p] * n, [m] * n)
            total += n
    assert checked > 0.95 * total


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_different_filters_do_not_meet(form):
    rng = np.random.default_rng(1)
    rows = awkward_rows(rng)
    n = len(rows)
    k, p, m = rng.choice([0, 1, 5, 60, 500], n), rng.choice([1.0, 0.95, 0.4], n), rng.choice([0.0, 0.1], n)
    together, _ = run(form, rows, k, p, m)
    for i in range(n):
        alone, _ = run(form, *([v[i]] * n for v in (rows, k, p, m)))
        np.testing.assert_array_equal(alone.value, together.value[i])
        np.testing.assert_array_equal(alone.ties, together.ties[i])


@given(
    st.lists(st.integers(-8, 3).map(lambda i: -np.inf if i == -8 else i / 2), min_size=VOCAB, max_size=VOCAB),
    st.integers(0, VOCAB + 1),
    st.floats(2.0**-7, 1.0, width=32),
    st.floats(0.0, 1.0, width=32),
)
@settings(max_examples=60, deadline=None)
def test_ties_and_masks(row, k, p, m):
    if max(row) > -np.inf:
        n = len(awkward_rows(np.random.default_rng(0)))  # the shape that is compiled already
        check("xla", [row] * n, [k] * n, [p] * n, [m] * n)


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_vocabulary_of_many_blocks(form):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(4, 9_000)) * 3
    assert check(form, rows, [0, 1000, 0, 7_000], [0.999, 0.97, 1.0, 0.5], [0.0, 0.0, 1e-4, 0.0]) >= 3


def test_a_row_without_any_token_is_harmless():
    (value, ties, _), keep = run("xla", np.full((2, 9), -np.inf), [3, 0], [0.5, 1.0], [0.1, 0.0])
    assert (value == -np.inf).all() and not ties.any() and not keep.any()


def test_what_does_not_fit_is_named():
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match=r"float32\[rows, V\]"):
        sample_threshold(jnp.ones((2, 5), jnp.bfloat16), ones, ones, ones)
    with pytest.raises(ValueError, match="top_p of shape"):
        sample_threshold(jnp.ones((2, 5)), ones, ones[:1], ones)


def test_interpret_through_the_operation():
    rows = awkward_rows(np.random.default_rng(3))
    n = len(rows)
    assert check("interpret", rows, [20] * n, [0.7731] * n, [0.01] * n) > n // 2


@pytest.mark.parametrize("device", [*lowering.GPUS, *lowering.TPUS])
def test_lowers_for_accelerators(device):
    for rows, vocab in [(64, 151_936), (3, 1000)]:
        each = [jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
        logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
        text = lowering.lowered_text(sample_threshold, logits, *each, device=device)
        assert (lowering.TRITON if device in lowering.GPUS else lowering.TPU) in text
    assert pallas_tpu.vmem_bytes(262_144) < 48 << 20
