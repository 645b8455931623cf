"""The GPU form: one Triton program for a block of rows of one head, query heads first, then key heads."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without Triton: `kernels.platforms` keeps callers out
    plt = None  # type: ignore[assignment]

_ROWS = 8


def rms_norm_rope(q, k, cos, sin, q_weight, k_weight, *, eps, offset, interpret=False):
    """Of `[rows, heads, head_dim]`; see the package."""
    weights = () if q_weight is None else (q_weight, k_weight)
    rows = min(_ROWS, pl.next_power_of_2(q.shape[0]))
    return pl.pallas_call(
        functools.partial(_kernel, rows=rows, eps=eps, offset=offset),
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype)),
        grid=(pl.cdiv(q.shape[0], rows), q.shape[1] + k.shape[1]),
        compiler_params=None if interpret else plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="rms_norm_rope",
    )(q, k, cos, sin, *weights)


def _kernel(q_ref, k_ref, cos_ref, sin_ref, *rest, rows, eps, offset):
    *weight_refs, out_q_ref, out_k_ref = rest
    q_weight_ref, k_weight_ref = weight_refs or (None, None)
    first, head, heads = pl.program_id(0) * rows, pl.program_id(1), q_ref.shape[1]

    @pl.when(head < heads)
    def _():
        _one_head(q_ref, head, cos_ref, sin_ref, q_weight_ref, out_q_ref, first, rows, eps, offset)

    @pl.when(head >= heads)
    def _():
        _one_head(k_ref, head - heads, cos_ref, sin_ref, k_weight_ref, out_k_ref, first, rows, eps, offset)


def _one_head(x_ref, head, cos_ref, sin_ref, weight_ref, out_ref, first, rows, eps, offset):
    head_dim, half = x_ref.shape[2], cos_ref.shape[1]
    here = pl.ds(first, rows)
    within = (first + jnp.arange(rows) < x_ref.shape[0])[:, None]
    # Both halves of the rotated features, and what lies beyond them: (start, length).
    parts = [(0, half), (half, half)] + ([(2 * half, head_dim - 2 * half)] if 2 * half < head_dim else [])
    # A start known beforehand would be refused where the power of two reaches past the head; the mask keeps it in.
    unknown = first * 0
    columns = [
        (pl.ds(unknown + start, wide := pl.next_power_of_2(size)), jnp.arange(wide) < size) for start, size in parts
    ]

    def loaded(ref, *index, mask):
        return plt.load(ref.at[index], mask=mask, other=0.0).astype(jnp.float32)

    x = [loaded(x_ref, here, head, at, mask=within & valid) for at, valid in columns]
    if weight_ref is not None:
        total = sum(jnp.sum(part * part, axis=-1, keepdims=True) for part in x)
        inverse = jax.lax.rsqrt(total / head_dim + eps)
        weights = [loaded(weight_ref, at, mask=valid) for at, valid in columns]
        dtype = x_ref.dtype
        if offset:
            x = [(part * inverse * (1 + weight)).astype(dtype) for part, weight in zip(x, weights)]
        else:
            x = [weight.astype(dtype) * (part * inverse).astype(dtype) for part, weight in zip(x, weights)]
        x = [part.astype(jnp.float32) for part in x]
    angle, valid = pl.ds(unknown, pl.next_power_of_2(half)), columns[0][1]
    cos, sin = (loaded(ref, here, angle, mask=within & valid) for ref in (cos_ref, sin_ref))
    turned = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin, *x[2:]]
    for part, (at, valid) in zip(turned, columns):
        plt.store(out_ref.at[here, head, at], part.astype(out_ref.dtype), mask=within & valid)
