"""The GPU form: one Triton program for each block of a group's rows and each tile of columns.

Written for Triton (Ampere and later). Rows of a group are neighbours, so a block is one strided load wherever it
starts; no row is moved or padded in memory. Rows of no group are one more group, whose programs write zeros.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.grouped_matmul.work_items import with_rest, work_items

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without Triton: `kernels.platforms` keeps callers out
    plt = None  # type: ignore[assignment]


class Tile(NamedTuple):
    """Rows, columns and depth of one product, and how it runs. Powers of two, at least 16 for the tensor cores."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By the rows an average group has, at most. Few rows: bound by reading weights, so long tiles and many loads in flight.
_TILES = (
    (16, Tile(16, 64, 128, 4, 4)),
    (32, Tile(32, 64, 128, 4, 4)),
    (64, Tile(64, 128, 64, 4, 4)),
    (None, Tile(128, 128, 32, 8, 3)),
)


def tile_for(rows: int, groups: int) -> Tile:
    average = -(-rows // groups)
    return next(tile for most, tile in _TILES if most is None or average <= most)


def grouped_matmul(x, stack, group_sizes, layer, *, transposed=False, interpret=False):
    """`x @ w`, or with `transposed` `x @ w.T`, of each row's group."""
    rows = x.shape[0]
    groups = stack.shape[1]
    columns = stack.shape[2 if transposed else 3]
    tile = tile_for(rows, groups)
    items = work_items(with_rest(group_sizes, rows), rows, tile.rows)
    kernel = functools.partial(_kernel, tile=tile, groups=groups, transposed=transposed)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid=(items.group.shape[0], pl.cdiv(columns, tile.columns)),
        compiler_params=None if interpret else plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="grouped_matmul",
    )(items.group, items.first, items.end, layer[None], x, stack)


def _kernel(group_ref, first_ref, end_ref, layer_ref, x_ref, stack_ref, out_ref, *, tile, groups, transposed):
    item = pl.program_id(0)
    group, first, end = group_ref[item], first_ref[item], end_ref[item]
    layer = layer_ref[0]
    depth, columns = x_ref.shape[1], out_ref.shape[1]
    start = pl.program_id(1) * tile.columns
    own = first + jnp.arange(tile.rows) < end
    within = start + jnp.arange(tile.columns) < columns
    matrix = jnp.minimum(group, groups - 1)
    common = jnp.promote_types(x_ref.dtype, stack_ref.dtype)
    # Float32 keeps its precision; narrower types lose none on the tensor cores.
    precision = jax.lax.Precision.HIGHEST if common == jnp.float32 else None

    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def turn(k, total):
        inner = k * tile.depth + jnp.arange(tile.depth) < depth
        deep = pl.ds(k * tile.depth, tile.depth)
        some = plt.load(x_ref.at[pl.ds(first, tile.rows), deep], mask=own[:, None] & inner, other=0.0)
        if transposed:
            at = stack_ref.at[layer, matrix, pl.ds(start, tile.columns), deep]
            w = plt.load(at, mask=within[:, None] & inner, other=0.0)
        else:
            at = stack_ref.at[layer, matrix, deep, pl.ds(start, tile.columns)]
            w = plt.load(at, mask=inner[:, None] & within, other=0.0)
        return total + jax.lax.dot_general(
            some.astype(common), w.astype(common), contracted, precision=precision, preferred_element_type=jnp.float32
        )

    # With a type each: of two plain numbers Triton's lowering makes a truth value.
    turns = jnp.where((first < end) & (group < groups), jnp.int32(pl.cdiv(depth, tile.depth)), jnp.int32(0))
    total = jax.lax.fori_loop(0, turns, turn, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    to = out_ref.at[pl.ds(first, tile.rows), pl.ds(start, tile.columns)]
    plt.store(to, total.astype(out_ref.dtype), mask=own[:, None] & within)
