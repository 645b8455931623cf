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

    row = 0
    for s, (length, count) in enumerate(zip(total, new)):
        cached = kv[1, np.asarray(tables)[s]].reshape(-1, 2 * KV_HEADS, HEAD_DIM).astype(np.float64)
        for i in range(count):
            position = length - count + i
            seen = slice(max(0, position - window + 1), position + 1)
            for h in range(KV_HEADS * group):
                keys, values = cached[seen, 2 * (h // group)], cached[seen, 2 * (h // group) + 1]
                weights = np.exp(keys @ q[row, h] * 0.3 - (keys @ q[row, h] * 0.3).max())
                exact = weights @ values / weights.sum()
                np.testing.assert_allclose(forms["ref"][row, h], exact, atol=2e-6)
            row += 1


attention = jax.jit(
    lambda q, kv, layer, described, window, name: paged_attention(
        q, kv, layer, described, scale=0.3, window=window, implementation=name
    ),
    static_argnums=5,
)


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
def test_the_compiled_form_gives_a_query_the_same_bits_in_every_batch():
    """Alone as a decode row, or as part of a chunk of any size that ends anywhere: the very same numbers."""
    rng = np.random.default_rng(1)
    length = 150
    tables, *_ = batch(rng, [], [], 256)
    kv = jnp.asarray(rng.normal(size=(2, PAGES + 1, PAGE, 2 * KV_HEADS, HEAD_DIM)), jnp.float32)
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
        return np.asarray(attention(jnp.asarray(q), kv, 1, described, 70, "cpu"))[: end - first]

    whole = run(0, length)
    for first, end in [(0, 64), (10, 90), (63, 65), (64, 128), (149, 150), (5, 6), (70, 71), (100, 150)]:
        np.testing.assert_array_equal(run(first, end), whole[first:end])
