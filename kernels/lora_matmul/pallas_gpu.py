"""The GPU form, two Triton kernels: rows down to the rank, and the rank up to the output.

A block of rows loops over the adapters met in it, found beforehand (`blocks.py`); for each it multiplies all its rows
and keeps those of the adapter. Between the kernels go `[rows, r]` numbers in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.lora_matmul.blocks import adapters_of_blocks

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without Triton: `kernels.platforms` keeps callers out
    plt = None  # type: ignore[assignment]

# Rows of a block: the least that tensor cores take, since a batch of many adapters has few rows of each.
BLOCK = 16
_DEPTH, _COLUMNS = 128, 128


def lora_matmul(x, a, b, scale, adapter_of_row, layer, *, interpret=False):
    """The sum of the two kernels; see the package."""
    rows, out_features, rank = x.shape[0], b.shape[-1], a.shape[-1]
    met = adapters_of_blocks(adapter_of_row, BLOCK, a.shape[1])
    blocks = met.adapter.shape[0]
    wide = max(16, pl.next_power_of_2(rank))
    parameters = None if interpret else plt.CompilerParams(num_warps=4, num_stages=3)
    low = pl.pallas_call(
        functools.partial(_down, wide=wide),
        out_shape=jax.ShapeDtypeStruct((rows, rank), jnp.float32),
        grid=(blocks,),
        compiler_params=parameters,
        interpret=interpret,
        name="lora_down",
    )(met.adapter, met.filled, adapter_of_row, layer[None], x, a, scale)
    return pl.pallas_call(
        functools.partial(_up, wide=wide),
        out_shape=jax.ShapeDtypeStruct((rows, out_features), x.dtype),
        grid=(blocks, pl.cdiv(out_features, _COLUMNS)),
        compiler_params=parameters,
        interpret=interpret,
        name="lora_up",
    )(met.adapter, met.filled, adapter_of_row, layer[None], low, b)


def _down(adapter_ref, count_ref, of_row_ref, layer_ref, x_ref, a_ref, scale_ref, low_ref, *, wide):
    block, layer = pl.program_id(0), layer_ref[0]
    rows, depth = x_ref.shape
    rank = low_ref.shape[1]
    here = pl.ds(block * BLOCK, BLOCK)
    within = block * BLOCK + jnp.arange(BLOCK) < rows
    ranks = jnp.arange(wide) < rank
    # From a start that is not known beforehand, since 16 may reach past the rank; the mask keeps it in.
    across_ranks = pl.ds(block * 0, wide)
    of_row = plt.load(of_row_ref.at[here], mask=within, other=0)
    common, precision = _types(x_ref, a_ref)

    def one_adapter(i, low):
        adapter = adapter_ref[block, i]

        def turn(k, total):
            inner = k * _DEPTH + jnp.arange(_DEPTH) < depth
            deep = pl.ds(k * _DEPTH, _DEPTH)
            some = plt.load(x_ref.at[here, deep], mask=within[:, None] & inner, other=0.0)
            factor = plt.load(a_ref.at[layer, adapter, deep, across_ranks], mask=inner[:, None] & ranks, other=0.0)
            return total + _dot(some.astype(common), factor.astype(common), precision)

        nothing = jnp.zeros((BLOCK, wide), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(depth, _DEPTH), turn, nothing) * scale_ref[layer, adapter]
        return jnp.where((of_row == adapter)[:, None], total, low)

    low = jax.lax.fori_loop(0, count_ref[block], one_adapter, jnp.zeros((BLOCK, wide), jnp.float32))
    plt.store(low_ref.at[here, across_ranks], low, mask=within[:, None] & ranks)


def _up(adapter_ref, count_ref, of_row_ref, layer_ref, low_ref, b_ref, out_ref, *, wide):
    block, layer = pl.program_id(0), layer_ref[0]
    rows, rank = low_ref.shape
    start = pl.program_id(1) * _COLUMNS
    here, across = pl.ds(block * BLOCK, BLOCK), pl.ds(start, _COLUMNS)
    within = block * BLOCK + jnp.arange(BLOCK) < rows
    columns = start + jnp.arange(_COLUMNS) < out_ref.shape[1]
    ranks = jnp.arange(wide) < rank
    across_ranks = pl.ds(block * 0, wide)
    of_row = plt.load(of_row_ref.at[here], mask=within, other=0)
    low = plt.load(low_ref.at[here, across_ranks], mask=within[:, None] & ranks, other=0.0)
    common, precision = _types(out_ref, b_ref)

    def one_adapter(i, total):
        adapter = adapter_ref[block, i]
        factor = plt.load(b_ref.at[layer, adapter, across_ranks, across], mask=ranks[:, None] & columns, other=0.0)
        product = _dot(low.astype(common), factor.astype(common), precision)
        return jnp.where((of_row == adapter)[:, None], product, total)

    total = jax.lax.fori_loop(0, count_ref[block], one_adapter, jnp.zeros((BLOCK, _COLUMNS), jnp.float32))
    plt.store(out_ref.at[here, across], total.astype(out_ref.dtype), mask=within[:, None] & columns)


def _types(x_ref, factor_ref):
    common = jnp.promote_types(x_ref.dtype, factor_ref.dtype)
    return common, jax.lax.Precision.HIGHEST if common == jnp.float32 else None


def _dot(x, y, precision):
    return jax.lax.dot_general(x, y, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
