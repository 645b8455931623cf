"""NVIDIA GPUs, in Pallas for its Triton back end: one program a row, which writes nothing but that row."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:  # `kernels.platforms` says so to whoever asks for this form
    triton = None  # type: ignore[assignment]

_WARPS = 4


def kv_write(cache, k, v, layer, slots, *, interpret=False):
    rows, kv_heads, head_dim = k.shape
    slots_of_layer = cache.shape[1] * cache.shape[2]
    # Everything flat, so that an element lies at one number; both shapes are powers of two, as Triton wants them.
    size = kv_heads * head_dim
    width = pl.next_power_of_2(size)

    def kernel(layer, slots, k, v, _, out):
        row = pl.program_id(0)
        element = jnp.arange(width)
        real = element < size
        head, column = jax.lax.div(element, jnp.int32(head_dim)), jax.lax.rem(element, jnp.int32(head_dim))
        # Row number of key head `head` among the cache's rows of head_dim elements; its value is the next.
        place = (layer[0] * slots_of_layer + slots[row]) * (2 * kv_heads) + 2 * head
        for fresh, at in ((k, place), (v, place + 1)):
            value = triton.load(fresh.at[row, jnp.where(real, element, 0)], mask=real, other=0.0)
            triton.store(out.at[jnp.where(real, at, 0), column], value.astype(out.dtype), mask=real)

    flat = cache.reshape(-1, head_dim)
    out = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        input_output_aliases={4: 0},
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    )(layer[None], slots, k.reshape(rows, size), v.reshape(rows, size), flat)
    return out.reshape(cache.shape)
