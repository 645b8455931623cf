"""The TPU form: a block of rows with all their heads.

A head fills whole lines of lanes, and its halves are not cut apart: the other half comes by rotating lanes, and the
signs lie in the sines.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def rows_for(heads: int, head_dim: int) -> int:
    """Rows of a block: about 1 MiB of float32, so that some blocks are on their way while one is worked on."""
    return max(8, min(256, (1 << 18) // (heads * head_dim) // 8 * 8))


def rms_norm_rope(q, k, cos, sin, q_weight, k_weight, *, eps, offset, interpret=False):
    """Of `[rows, heads, head_dim]`; see the package."""
    (rows, heads, head_dim), kv_heads = q.shape, k.shape[1]
    block = min(rows_for(heads, head_dim), -(-rows // 8) * 8)
    cos, sin = (jnp.concatenate(pair, axis=-1).astype(jnp.float32) for pair in ((cos, cos), (-sin, sin)))
    weights = () if q_weight is None else (q_weight[None], k_weight[None])
    of_heads = lambda heads: pl.BlockSpec((block, heads, head_dim), lambda i: (i, 0, 0))  # noqa: E731
    of_rows = pl.BlockSpec((block, head_dim), lambda i: (i, 0))
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps, offset=offset),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)),
        grid=(pl.cdiv(rows, block),),
        in_specs=[
            of_heads(heads),
            of_heads(kv_heads),
            of_rows,
            of_rows,
            *[pl.BlockSpec((1, head_dim), lambda i: (0, 0)) for _ in weights],
        ],
        out_specs=(of_heads(heads), of_heads(kv_heads)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="rms_norm_rope",
    )(q, k, cos, sin, *weights)


def _kernel(q_ref, k_ref, cos_ref, sin_ref, *rest, eps, offset):
    *weight_refs, out_q_ref, out_k_ref = rest
    q_weight_ref, k_weight_ref = weight_refs or (None, None)
    cos, sin = cos_ref[...], sin_ref[...]
    heads_of = ((q_ref, q_weight_ref, out_q_ref), (k_ref, k_weight_ref, out_k_ref))
    for x_ref, weight_ref, out_ref in heads_of:
        for head in range(x_ref.shape[1]):
            x = x_ref[:, head, :].astype(jnp.float32)
            if weight_ref is not None:
                x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
                weight = weight_ref[...].astype(jnp.float32)
                # Llama rounds before it multiplies, Gemma after; either way the product is rounded.
                x = x * (1 + weight) if offset else x.astype(x_ref.dtype).astype(jnp.float32) * weight
                x = x.astype(x_ref.dtype).astype(jnp.float32)
            out_ref[:, head, :] = (x * cos + pltpu.roll(x, x.shape[-1] // 2, 1) * sin).astype(out_ref.dtype)
