"""The TPU form: row tiles at fixed places, each visited once for every group that has rows in it.

A tile of VMEM starts at a multiple of its rows, and groups do not. So a tile shared by several groups is computed once
for each of them, and each writes its own rows (as in MegaBlocks' grouped product). Visits of one tile follow each
other, so it stays on chip between them. Which group and tile a grid step means is known before the step starts (scalar
prefetch), so the next matrix is on its way while this one multiplies.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.work_items import tile_items, with_rest


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int


def tile_for(rows: int, columns: int, depth: int) -> Tile:
    """At most 128 rows and 1 MiB (bfloat16) of a matrix at a time: enough to hide the memory's latency."""
    return Tile(min(128, -(-rows // 16) * 16), min(512, columns), min(1024, depth))


def vmem_bytes(tile: Tile, x_dtype, w_dtype) -> int:
    """What a step occupies: every block twice, for the one in use and the one on its way, and the sum."""
    x, w, out = tile.rows * tile.depth, tile.depth * tile.columns, tile.rows * tile.columns
    return 2 * (x + out) * jnp.dtype(x_dtype).itemsize + 2 * w * jnp.dtype(w_dtype).itemsize + 4 * out


def grouped_matmul(x, stack, group_sizes, layer, *, transposed=False, interpret=False):
    """`x @ w`, or with `transposed` `x @ w.T`, of each row's group."""
    rows, depth = x.shape
    groups = stack.shape[1]
    columns = stack.shape[2 if transposed else 3]
    tile = tile_for(rows, columns, depth)
    items = tile_items(with_rest(group_sizes, rows), rows, tile.rows)
    turns = pl.cdiv(depth, tile.depth)

    # A step past the items names the blocks of the last one, which are there already.
    def x_block(column, item, turn, group, tiles, starts, scalars):
        return tiles[item], jnp.where(item < scalars[0], turn, turns - 1)

    def w_block(column, item, turn, group, tiles, starts, scalars):
        turn = jnp.where(item < scalars[0], turn, turns - 1)
        place = (column, turn) if transposed else (turn, column)
        return scalars[1], jnp.minimum(group[item], groups - 1), *place

    def out_block(column, item, turn, group, tiles, starts, scalars):
        return tiles[item], column

    w_shape = (tile.columns, tile.depth) if transposed else (tile.depth, tile.columns)
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, groups=groups, depth=depth, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(columns, tile.columns), items.group.shape[0], turns),
            in_specs=[
                pl.BlockSpec((tile.rows, tile.depth), x_block),
                pl.BlockSpec((None, None, *w_shape), w_block),
            ],
            out_specs=pl.BlockSpec((tile.rows, tile.columns), out_block),
            scratch_shapes=[pltpu.VMEM((tile.rows, tile.columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="grouped_matmul",
    )(items.group, items.tile, items.starts, jnp.stack([items.total, layer]), x, stack)


def _kernel(
    group_ref, tile_ref, starts_ref, scalars_ref, x_ref, w_ref, out_ref, sum_ref, *, tile, groups, depth, transposed
):
    item, turn, turns = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    common = jnp.promote_types(x_ref.dtype, w_ref.dtype)
    precision = jax.lax.Precision.HIGHEST if common == jnp.float32 else None

    @pl.when(item < scalars_ref[0])
    def _():
        @pl.when(turn == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        some, w = x_ref[...], w_ref[...]
        if depth % tile.depth:
            # Past the edge lies anything at all, also NaN, so both sides are cleared.
            left = depth - turn * tile.depth
            some = jnp.where(jax.lax.broadcasted_iota(jnp.int32, some.shape, 1) < left, some, 0)
            w = jnp.where(jax.lax.broadcasted_iota(jnp.int32, w.shape, 1 if transposed else 0) < left, w, 0)
        contracted = (((1,), (1 if transposed else 0,)), ((), ()))
        sum_ref[...] += jax.lax.dot_general(
            some.astype(common), w.astype(common), contracted, precision=precision, preferred_element_type=jnp.float32
        )

        @pl.when(turn == turns - 1)
        def _():
            group = group_ref[item]
            row = tile_ref[item] * tile.rows + jax.lax.broadcasted_iota(jnp.int32, out_ref.shape, 0)
            own = (row >= starts_ref[group]) & (row < starts_ref[group + 1]) & (group < groups)
            fresh = (item == 0) | (tile_ref[item] != tile_ref[jnp.maximum(item - 1, 0)])
            before = jnp.where(fresh, jnp.zeros_like(out_ref), out_ref[...])
            out_ref[...] = jnp.where(own, sum_ref[...].astype(out_ref.dtype), before)
