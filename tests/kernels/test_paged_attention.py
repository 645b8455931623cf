"""Paged attention: the blocked form against the dense one, and the dense one against plain softmax in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.paged_attention import cpu, paged_attention, ragged

PAGE, HEAD_DIM, KV_HEADS, SEQUENCES, TABLE, PAGES = 4, 16, 2, 6, 48, 300


def batch(rng, decodes, chunks, rows):
    """Random cache and ragged batch: `decodes` context lengths, `chunks` of (new tokens, earlier tokens)."""
    new = [1] * len(decodes) + [n for n, _ in chunks]
    total = list(decodes) + [n + c for n, c in chunks]
    pad = SEQUENCES - len(new)
    starts = np.cumsum([0, *new, *[0] * pad])
    tables = rng.permutation(PAGES)[: SEQUENCES * TABLE].reshape(SEQUENCES, TABLE)
    as32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
    return (
        as32(tables),
        ragged(as32(tables), as32(total + [0] * pad), as32(starts), jnp.int32(len(decodes)), rows=rows),
        int(starts[-1]),
        total,
        new,
    )


# Where there is no compiler the engine uses "xla", and so does this test.
FORMS = ["ref", "xla"] + (["cpu"] if not cpu.why_not() else [])
CASES = [
    ([1, 17, 130, 64], []),
    ([], [(1, 0), (70, 0), (64, 13)]),
    ([5, 190], [(2, 3), (129, 40), (63, 1)]),
    ([192], [(65, 127)]),
]


@pytest.mark.parametrize("window", [2**30, 7, 64])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_blocked_equals_dense_equals_float64(case, group, window):
    rng = np.random.default_rng(case)
    decodes, chunks = CASES[case]
    rows = SEQUENCES if not chunks else 256
    tables, described, n, total, new = batch(rng, decodes, chunks, rows)
    kv = rng.normal(size=(2, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM)).astype(np.float32)
    q = rng.normal(size=(rows, KV_HEADS * group, HEAD_DIM)).astype(np.float32)
    forms = {
        name: np.asarray(attention(jnp.asarray(q), jnp.asarray(kv), 1, described, window, name))[:n] for name in FORMS
    }
    for name in FORMS:
        np.testing.assert_allclose(forms[name], forms["ref"], atol=2e-6, err_msg=name)

    np.testing.assert_allclose(forms["ref"], exact(q, kv[1], tables, total, new, window), atol=2e-6)


def exact(q, kv, tables, total, new, window, softcap=None, sinks=None):
    """The definition, in float64: one softmax for each row and head."""
    out = []
    group = q.shape[1] // KV_HEADS
    for s, (length, count) in enumerate(zip(total, new)):
        cached = kv[np.asarray(tables)[s]].reshape(-1, 2 * KV_HEADS, HEAD_DIM).astype(np.float64)
        for position in range(length - count, length):
            seen = slice(max(0, position - window + 1), position + 1)
            for h in range(q.shape[1]):
                keys, values = cached[seen, 2 * (h // group)], cached[seen, 2 * (h // group) + 1]
                scores = keys @ q[len(out) // q.shape[1], h] * 0.3
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                sink = -np.inf if sinks is None else sinks[h]
                top = max(scores.max(), sink)
                weights = np.exp(scores - top)
                out.append(weights @ values / (weights.sum() + np.exp(sink - top)))
    return np.reshape(out, (-1, *q.shape[1:]))


attention = jax.jit(
    lambda q, kv, layer, described, window, name, softcap=None, sinks=None, staged_pages=None: paged_attention(
        q,
        kv,
        layer,
        described,
        scale=0.3,
        window=window,
        softcap=softcap,
        sinks=sinks,
        staged_pages=staged_pages,
        implementation=name,
    ),
    static_argnums=(5, 6),
)


@pytest.mark.parametrize("softcap, with_sinks", [(1.5, False), (None, True), (20.0, True)])
def test_softcap_and_sinks_equal_float64(softcap, with_sinks):
    rng = np.random.default_rng(7)
    tables, described, n, total, new = batch(rng, [5, 190], [(2, 3), (40, 40)], 256)
    kv = rng.normal(size=(1, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM)).astype(np.float32)
    q = rng.normal(size=(256, KV_HEADS * 3, HEAD_DIM)).astype(np.float32)
    q[:n] *= np.geomspace(0.01, 30, n)[:, None, None]  # scores from far below the cap to far above
    # From one that takes nearly all weight to one that takes none.
    sinks = np.linspace(40, -40, KV_HEADS * 3).astype(np.float32) if with_sinks else None
    wanted = exact(q, kv[0], tables, total, new, 64, softcap, sinks)
    for name in FORMS:
        found = attention(jnp.asarray(q), jnp.asarray(kv), 0, described, 64, name, softcap, sinks)
        np.testing.assert_allclose(np.asarray(found)[:n], wanted, atol=2e-5, err_msg=name)


def test_bad_softcap_and_sinks_are_refused():
    _, described, *_ = batch(np.random.default_rng(0), [1], [], SEQUENCES)
    q, kv = jnp.ones((SEQUENCES, 4, HEAD_DIM)), jnp.ones((1, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM))
    with pytest.raises(ValueError, match=r"softcap: found 0.0"):
        paged_attention(q, kv, 0, described, scale=1.0, softcap=0.0)
    with pytest.raises(ValueError, match=r"sinks: found shape \(3,\)"):
        paged_attention(q, kv, 0, described, scale=1.0, sinks=jnp.ones(3))


@pytest.mark.skipif(bool(cpu.why_not()), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bfloat16_cache_is_read_as_it_is_and_computed_in_float32(dtype):
    """The same bits as the float32 form gives for the same numbers; bfloat16 results are those, rounded once."""
    rng = np.random.default_rng(3)
    _, described, n, *_ = batch(rng, [5, 190], [(2, 3), (70, 40)], 256)
    kv = jnp.asarray(rng.normal(size=(2, PAGES + 1, PAGE, 2 * KV_HEADS, 2 * HEAD_DIM)), jnp.bfloat16)
    q = jnp.asarray(rng.normal(size=(256, KV_HEADS * 3, 2 * HEAD_DIM)), dtype)
    found = attention(q, kv, 1, described, 70, "cpu")
    wanted = attention(q.astype(jnp.float32), kv.astype(jnp.float32), 1, described, 70, "cpu").astype(dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32)[:n], np.asarray(wanted, np.float32)[:n])


@pytest.mark.parametrize("name", FORMS[1:])
def test_rows_past_the_batch_are_finite_and_old_garbage_in_pages_reaches_nobody(name):
    rng = np.random.default_rng(0)
    tables, described, n, total, _ = batch(rng, [3], [(10, 0)], 256)
    kv = np.full((1, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM), np.nan, np.float32)
    for s, length in enumerate(total):
        for t in range(length):
            kv[0, int(tables[s, t // PAGE]), t % PAGE] = rng.normal(size=(2 * KV_HEADS, HEAD_DIM))
    out = attention(jnp.ones((256, 2, HEAD_DIM)), jnp.asarray(kv), 0, described, 2**30, name)
    assert n == 11 and np.isfinite(np.asarray(out[:n])).all()


@pytest.mark.skipif(bool(cpu.why_not()), reason="no C++ compiler")
@pytest.mark.parametrize("dtype, softcap, sink", [(jnp.float32, None, None), (jnp.bfloat16, 2.0, 0.5)])
def test_the_compiled_form_gives_a_query_the_same_bits_in_every_batch(dtype, softcap, sink):
    """Alone as a decode row, or as part of a chunk of any size that ends anywhere: the very same numbers."""
    rng = np.random.default_rng(1)
    length = 150
    tables, *_ = batch(rng, [], [], 256)
    kv = jnp.asarray(rng.normal(size=(2, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM)), dtype)
    sinks = None if sink is None else jnp.full(KV_HEADS * 3, sink)
    queries = rng.normal(size=(length, KV_HEADS * 3, HEAD_DIM)).astype(np.float32)

    def run(first, end):
        """The results of positions first..end as one chunk."""
        starts = np.full(SEQUENCES + 1, end - first)
        starts[0] = 0
        lens = np.zeros(SEQUENCES, np.int32)
        lens[0] = end
        as32 = lambda x: jnp.asarray(x, jnp.int32)  # noqa: E731
        decodes = int(end - first == 1)
        described = ragged(tables, as32(lens), as32(starts), jnp.int32(decodes), rows=256)
        q = np.zeros((256, KV_HEADS * 3, HEAD_DIM), np.float32)
        q[: end - first] = queries[first:end]
        return np.asarray(attention(jnp.asarray(q), kv, 1, described, 70, "cpu", softcap, sinks))[: end - first]

    whole = run(0, length)
    for first, end in [(0, 64), (10, 90), (63, 65), (64, 128), (149, 150), (5, 6), (70, 71), (100, 150)]:
        np.testing.assert_array_equal(run(first, end), whole[first:end])


def staged(rng, tables, kv, layer, share=0.5):
    """Some pages of a layer moved from the cache: tables, a cache with rubbish in their place, and those."""
    pages = kv.shape[1]
    moved = rng.permutation(pages)[: int(share * pages)]
    where = np.arange(pages)
    where[moved] = pages + np.arange(len(moved))
    spoilt = np.array(kv)
    spoilt[layer, moved] = np.nan
    return jnp.asarray(where[np.asarray(tables)], jnp.int32), jnp.asarray(spoilt), kv[layer, moved]


@pytest.mark.parametrize("case, dtype", [(0, jnp.float32), (2, jnp.float32), (2, jnp.bfloat16)])
def test_staged_pages_give_the_same_bits(case, dtype):
    rng = np.random.default_rng(case)
    decodes, chunks = CASES[case]
    rows = SEQUENCES if not chunks else 256
    tables, described, n, *_ = batch(rng, decodes, chunks, rows)
    kv = jnp.asarray(rng.normal(size=(2, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM)), dtype)
    q = jnp.asarray(rng.normal(size=(rows, KV_HEADS * 2, HEAD_DIM)), dtype)
    tables, spoilt, pages = staged(rng, tables, kv, 1)
    elsewhere = described._replace(block_tables=tables)
    for name in FORMS:
        cache = jnp.nan_to_num(spoilt) if name == "ref" else spoilt  # it multiplies by zero what nobody sees
        wanted = attention(q, kv, 1, described, 64, name)
        found = attention(q, cache, 1, elsewhere, 64, name, None, None, pages)
        np.testing.assert_array_equal(np.asarray(found)[:n], np.asarray(wanted)[:n], err_msg=name)


def test_staged_pages_that_do_not_fit_are_refused():
    _, described, *_ = batch(np.random.default_rng(0), [1], [], SEQUENCES)
    q, kv = jnp.ones((SEQUENCES, 4, HEAD_DIM)), jnp.ones((1, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM))
    with pytest.raises(ValueError, match=r"staged_pages: found float32 \(4, 4, 32\) a page"):
        paged_attention(q, kv, 0, described, scale=1.0, staged_pages=jnp.ones((3, PAGE, 2 * KV_HEADS, 32)))
    none = paged_attention(q, kv, 0, described, scale=1.0, staged_pages=kv[0, :0], implementation="xla")
    np.testing.assert_array_equal(none, paged_attention(q, kv, 0, described, scale=1.0, implementation="xla"))
