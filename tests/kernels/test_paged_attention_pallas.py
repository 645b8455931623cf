"""The GPU and TPU forms of paged attention: interpreted against the oracle, lowered for devices that are not here, and
the on-chip memory they declare."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import GPUS, TPU, TPUS, TRITON, lowered_text

from kernels.paged_attention import block_sizes, paged_attention, pallas_gpu, pallas_tpu, ragged
from kernels.paged_attention.block_sizes import LANES, decode_splits, gpu_blocks, tpu_memory

SEQUENCES, ROWS, TABLE_TOKENS = 4, 128, 160
FORMS = {"gpu": pallas_gpu.paged_attention, "tpu": pallas_tpu.paged_attention}
# head_dim, query heads of a group, key/value heads, page size, dtype, softcap, sinks
CONFIGS = [
    (64, 7, 1, 16, jnp.float32, None, False),
    (80, 1, 2, 8, jnp.float32, 2.0, False),
    (128, 8, 1, 16, jnp.bfloat16, None, True),
    (256, 3, 1, 32, jnp.float32, 30.0, True),
]
# Decode lengths and chunks of (new tokens, earlier tokens), in tokens around a page's and a block's edge, with windows.
CASES = [
    ([1, 150], [(65, 0), (2, 31)], 2**30),
    ([16, 17, 64], [(64, 64)], 16),
    ([], [(1, 0), (63, 97), (32, 1), (1, 127)], 33),
    ([65, 33, 32, 15], [], 64),
    ([], [], 5),
]


def example(rng, config, decodes, chunks):
    """Arguments of `paged_attention`, the number of rows in use, and the same cache with zeros for NaN: every slot that
    no sequence has written holds NaN."""
    head_dim, group, kv_heads, page_size, dtype, _, with_sinks = config
    new = [1] * len(decodes) + [n for n, _ in chunks]
    total = [*decodes, *(n + before for n, before in chunks)]
    pad = SEQUENCES - len(new)
    table_pages = TABLE_TOKENS // page_size
    pages = SEQUENCES * table_pages + 1
    tables = rng.permutation(pages)[: SEQUENCES * table_pages].reshape(SEQUENCES, table_pages)
    kv = np.full((2, pages, page_size, 2 * kv_heads, head_dim), np.nan, np.float32)
    for table, length in zip(tables, total):
        token = np.arange(length)
        kv[1, table[token // page_size], token % page_size] = rng.normal(size=(length, *kv.shape[3:]))
    q = rng.normal(size=(ROWS, kv_heads * group, head_dim))
    sinks = jnp.asarray(rng.normal(size=kv_heads * group), jnp.float32) if with_sinks else None
    starts = np.cumsum([0, *new, *[0] * pad])
    as32 = functools.partial(jnp.asarray, dtype=jnp.int32)
    described = ragged(as32(tables), as32([*total, *[0] * pad]), as32(starts), as32(len(decodes)), rows=ROWS)
    kv = jnp.asarray(kv, dtype)
    return (jnp.asarray(q, dtype), kv, as32(1), described), sinks, starts[-1], jnp.nan_to_num(kv)


def compiled(form, config):
    """The form at a configuration, one program for all cases."""

    def function(q, kv, layer, described, window, sinks):
        options = {"scale": 0.1, "window": window, "softcap": config[5], "sinks": sinks}
        if form == "ref":
            exact = (x.astype(jnp.float32) for x in (q, kv))
            return paged_attention(*exact, layer, described, **options, implementation="ref")
        return FORMS[form](q, kv, layer, described, **options, interpret=True)

    # What runs for a moment need not be compiled well.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", CONFIGS)
def test_interpreted_equals_ref(form, config, monkeypatch):
    monkeypatch.setattr(block_sizes, "_TPU_KEYS", 64)  # several blocks of keys in these short contexts
    rng = np.random.default_rng(0)
    run, ref = compiled(form, config), compiled("ref", config)
    for decodes, chunks, window in CASES:
        (q, kv, layer, described), sinks, n, clean = example(rng, config, decodes, chunks)
        found = np.asarray(run(q, kv, layer, described, jnp.int32(window), sinks), np.float32)
        wanted = ref(q, clean, layer, described, jnp.int32(window), sinks)
        tolerance = 6e-6 if q.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(found[:n], np.asarray(wanted)[:n], atol=tolerance, err_msg=f"{decodes} {chunks}")
        assert np.isfinite(found).all()
    assert run._cache_size() == 1


def test_interpret_runs_a_decode_step_alone():
    rng = np.random.default_rng(1)
    (q, kv, layer, described), _, n, clean = example(rng, CONFIGS[0], [1, 150, 64], [])
    q, described = q[:SEQUENCES], ragged(*described[:4], rows=SEQUENCES)
    wanted = paged_attention(q, clean, layer, described, scale=0.1, implementation="ref")
    found = paged_attention(q, kv, layer, described, scale=0.1, implementation="interpret")
    assert n == 3 and np.isfinite(np.asarray(found)).all()
    np.testing.assert_allclose(found[:n], wanted[:n], atol=2e-6)


@pytest.mark.parametrize("form, config", [("gpu", CONFIGS[0]), ("tpu", CONFIGS[0])])
def test_staged_pages_give_the_same_bits(form, config):
    rng = np.random.default_rng(2)
    (q, kv, layer, described), sinks, n, _ = example(rng, config, [17, 64], [(63, 97)])
    pages = kv.shape[1]
    moved = rng.permutation(pages)[: pages // 2]
    where = np.arange(pages)
    where[moved] = pages + np.arange(len(moved))
    spoilt, staged = kv.at[:, moved].set(jnp.nan), kv[1, moved]
    tables = jnp.asarray(where[np.asarray(described.block_tables)], jnp.int32)
    run = jax.jit(
        lambda kv, tables, staged: FORMS[form](
            q, kv, layer, described._replace(block_tables=tables), scale=0.1, window=jnp.int32(2**30), softcap=None,
            sinks=sinks, staged=staged, interpret=True,
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )  # fmt: skip
    found, wanted = run(spoilt, tables, staged), run(kv, described.block_tables, None)
    np.testing.assert_array_equal(np.asarray(found, np.float32)[:n], np.asarray(wanted, np.float32)[:n])


def shapes(head_dim, dtype, *, rows=512, sequences=16, heads=8, kv_heads=2, page_size=16, table_pages=64):
    """Shapes of q, the cache and a batch."""
    integers = [(sequences, table_pages), (sequences,), (sequences + 1,), ()]
    described = jax.eval_shape(
        functools.partial(ragged, rows=rows), *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in integers)
    )
    kv = jax.ShapeDtypeStruct((2, 4 * table_pages, page_size, 2 * kv_heads, head_dim), dtype)
    return jax.ShapeDtypeStruct((rows, heads, head_dim), dtype), kv, described


@pytest.mark.parametrize("device", [*GPUS, *TPUS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_lowers_for_accelerators(device, dtype, head_dim):
    """None chooses the device's own form, of two kernels; TPUs leave narrow heads to XLA."""
    q, kv, described = shapes(head_dim, dtype)
    sinks = jax.ShapeDtypeStruct((8,), jnp.float32)

    def function(q, kv, described, sinks):
        return paged_attention(q, kv, 1, described, scale=0.1, window=40, softcap=30.0, sinks=sinks)

    text = lowered_text(function, q, kv, described, sinks, device=device)
    assert text.count(TRITON) == (2 if device in GPUS else 0)
    assert text.count(TPU) == (2 if device in TPUS and head_dim % LANES == 0 else 0)


@pytest.mark.parametrize("device", [*GPUS, *TPUS])
def test_lowers_for_accelerators_with_staged_pages(device):
    q, kv, described = shapes(128, jnp.bfloat16)
    staged = jax.ShapeDtypeStruct((24, *kv.shape[2:]), kv.dtype)

    def function(q, kv, described, staged):
        return paged_attention(q, kv, 1, described, scale=0.1, staged_pages=staged)

    text = lowered_text(function, q, kv, described, staged, device=device)
    assert text.count(TRITON if device in GPUS else TPU) == 2


@pytest.mark.parametrize("name", ["pallas_gpu", "pallas_tpu"])
def test_a_form_that_cannot_run_here_says_so(name):
    q, kv, described = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), x) for x in shapes(64, jnp.float32))
    with pytest.raises(RuntimeError, match=rf"paged_attention: implementation='{name}' is not available: it needs"):
        paged_attention(q, kv, 0, described, scale=1.0, implementation=name)


def declared_bytes(function, *arguments):
    """Largest sum of the vector memory references of a Pallas kernel in `function`, in whole tiles; blocks that the
    grid moves count twice, for the next one is fetched meanwhile."""
    largest = 0
    for equation in jax.make_jaxpr(function)(*arguments).eqns:
        if equation.primitive.name != "pallas_call":
            continue
        sizes = []
        mapped = equation.params["grid_mapping"]
        blocks = mapped.num_inputs + mapped.num_outputs
        for i, reference in enumerate(equation.params["jaxpr"].invars[mapped.num_index_operands :]):
            aval = reference.aval
            space = str(aval.memory_space).lower()
            if any(other in space for other in ("smem", "any", "semaphore", "hbm")):
                continue
            *outer, rows, lanes = aval.shape
            tile = 8 * 4 // aval.dtype.itemsize
            padded = -(-rows // tile) * tile if rows > 1 else 1
            size = math.prod(outer) * padded * -(-lanes // LANES) * LANES * aval.dtype.itemsize
            sizes.append(size * (2 if i < blocks else 1))
        largest = max(largest, sum(sizes))
    return largest


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(32, 8, 128), (48, 8, 128), (16, 8, 256), (16, 16, 256)])
def test_the_tpu_form_fits_on_chip_memory(heads, kv_heads, head_dim):
    """Llama 8B, DBRX, Gemma 2 9B, Gemma 7B; 64 sequences of 32k tokens."""
    sizes = {"rows": 1024, "sequences": 64, "heads": heads, "kv_heads": kv_heads, "page_size": 64, "table_pages": 512}
    q, kv, described = shapes(head_dim, jnp.bfloat16, **sizes)
    sinks = jax.ShapeDtypeStruct((heads,), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def function(q, kv, layer, described, window, sinks):
        return pallas_tpu.paged_attention(q, kv, layer, described, scale=0.1, window=window, sinks=sinks)

    declared = declared_bytes(function, q, kv, scalar, described, scalar, sinks)
    memory = tpu_memory(q, kv, described)
    assert 1 << 20 < declared <= memory.vmem_bytes <= 16 << 20
    assert 4 * 64 * 512 < memory.smem_bytes <= 512 << 10
    assert not pallas_tpu.refuses(q, kv, described)


def test_what_does_not_fit_a_tpu_is_refused():
    q, kv, described = shapes(128, jnp.bfloat16, heads=128, kv_heads=128)
    assert "bytes of vector memory" in pallas_tpu.refuses(q, kv, described)
    q, kv, described = shapes(128, jnp.bfloat16, sequences=256, table_pages=2048)
    assert "bytes of scalar memory" in pallas_tpu.refuses(q, kv, described)
    q, kv, described = shapes(128, jnp.bfloat16, heads=12, kv_heads=12)
    assert "do not fill whole tiles" in pallas_tpu.refuses(q, kv, described)


@pytest.mark.parametrize("head_dim, itemsize", [(16, 4), (64, 2), (128, 2), (128, 4), (256, 2), (256, 4)])
def test_the_gpu_form_fits_shared_memory(head_dim, itemsize):
    """99 KiB a block: Ampere and Ada without a data centre's larger memory."""
    blocks = gpu_blocks(head_dim, itemsize)
    assert blocks.shared_bytes(head_dim, itemsize) <= 99 << 10
    assert all(n & (n - 1) == 0 and n >= 16 for n in (blocks.queries, blocks.keys))


def test_few_sequences_are_split_and_many_are_not():
    assert decode_splits(1, 8, 512) == 32
    assert decode_splits(64, 8, 512) == 2
    assert decode_splits(256, 8, 512) == 1
    assert decode_splits(1, 8, 3) == 2
