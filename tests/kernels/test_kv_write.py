"""Writing new keys and values: every form against plain numpy, and in place where the cache is given away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import GPUS, TPU, TPUS, TRITON, lowered_text

from kernels.kv_write import cpu, kv_write, pallas_tpu

LAYERS, PAGES, PAGE, KV_HEADS, HEAD_DIM = 3, 9, 4, 2, 16
FORMS = {
    name: functools.partial(kv_write, implementation=name) for name in ("ref", "xla", "cpu", "interpret", None)
} | {"pallas_tpu": functools.partial(pallas_tpu.kv_write, interpret=True)}
COMPILED = pytest.mark.skipif(bool(cpu.why_not()), reason=f"the compiled kernel: {cpu.why_not()}")


def fresh(rng, rows, dtype=np.float32):
    k, v = (jnp.asarray(rng.normal(size=(rows, KV_HEADS, HEAD_DIM)), dtype) for _ in range(2))
    return k, v


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", [pytest.param(name, marks=COMPILED) if name == "cpu" else name for name in FORMS])
def test_every_form_equals_numpy(form, dtype):
    rows_of_padding = 9
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.normal(size=(LAYERS, PAGES, PAGE, 2 * KV_HEADS, HEAD_DIM)), dtype)
    # The first and last slots of pages, all of one page, and three rows of padding in the scrap page.
    scrap = (PAGES - 1) * PAGE
    slots = np.array([*range(16, 35), 0, 3, 15, 8, *range(4, 8), 13, *[scrap] * rows_of_padding])
    k, v = fresh(rng, len(slots))
    wanted = np.array(cache, np.float32)
    for row, slot in enumerate(slots):
        for head in range(KV_HEADS):
            wanted[1, slot // PAGE, slot % PAGE, 2 * head] = k[row, head].astype(dtype)
            wanted[1, slot // PAGE, slot % PAGE, 2 * head + 1] = v[row, head].astype(dtype)
    found = jax.jit(FORMS[form])(cache, k, v, jnp.int32(1), jnp.asarray(slots, jnp.int32))
    assert found.dtype == dtype
    found = np.array(found, np.float32)
    found[1, PAGES - 1, 0] = wanted[1, PAGES - 1, 0]  # the scrap slot may hold any of its rows
    np.testing.assert_array_equal(found, wanted)


@COMPILED
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_loop_over_layers_writes_in_place(dtype):
    cache = jnp.zeros((LAYERS, 4096, PAGE, 2 * KV_HEADS, HEAD_DIM), dtype)
    k, v = fresh(np.random.default_rng(0), 8)

    def step(cache, k, v, slots):
        return jax.lax.fori_loop(0, LAYERS, lambda layer, cache: kv_write(cache, k, v, layer, slots), cache)

    compiled = jax.jit(step, donate_argnums=0).lower(cache, k, v, jnp.arange(8)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < cache.nbytes / 100
    assert memory.alias_size_in_bytes >= cache.nbytes


def test_what_does_not_fit_is_refused():
    cache = jnp.zeros((1, 2, PAGE, 2 * KV_HEADS, HEAD_DIM))
    k, v = fresh(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match=r"slots \(2,\) do not fit"):
        kv_write(cache, k, v, 0, jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"found implementation='fast', expected None or one of ref, xla"):
        kv_write(cache, k, v, 0, jnp.zeros(3, jnp.int32), implementation="fast")


@pytest.mark.parametrize("device", [*GPUS, *TPUS])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_lowers_for_accelerators(device, dtype, head_dim):
    """A program for the device, chosen by None; TPUs copy whole rows of lanes or leave it to XLA."""
    cache = jax.ShapeDtypeStruct((LAYERS, PAGES, 16, 8, head_dim), dtype)
    fresh, slots = jax.ShapeDtypeStruct((32, 4, head_dim), dtype), jax.ShapeDtypeStruct((32,), jnp.int32)
    text = lowered_text(lambda *args: kv_write(*args[:3], 1, args[3]), cache, fresh, fresh, slots, device=device)
    assert (TRITON in text) == (device in GPUS)
    assert (TPU in text) == (device in TPUS and head_dim == 128)
