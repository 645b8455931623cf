"""The TPU form: for each tile of rows all the adapters met in it, first down to the rank, then up to the output.

The grid of a tile is one line of steps: for each place in the tile's list of adapters, the blocks of depth; then for
each block of output columns, the places again. The narrow results stay on chip between the two halves. Steps of places
that the list does not fill name blocks that are there already, and do nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.lora_matmul.blocks import adapters_of_blocks


def tile_for(rows: int, depth: int, columns: int) -> tuple[int, int, int]:
    """Rows, depth and output columns of the blocks."""
    return min(128, -(-rows // 16) * 16), min(1024, depth), min(1024, columns)


def lora_matmul(x, a, b, scale, adapter_of_row, layer, *, interpret=False):
    """See the package."""
    (rows, depth), columns, rank = x.shape, b.shape[-1], a.shape[-1]
    tile_rows, tile_depth, tile_columns = tile_for(rows, depth, columns)
    met = adapters_of_blocks(adapter_of_row, tile_rows, a.shape[1])
    tiles, places = met.adapter.shape
    turns = pl.cdiv(depth, tile_depth)
    down = places * turns

    def x_block(tile, step, adapter, count, scalars):
        busy = (step < down) & (step // turns < count[tile])
        return tile, jnp.where(busy, step % turns, turns - 1)

    def a_block(tile, step, adapter, count, scalars):
        busy = (step < down) & (step // turns < count[tile])
        place = jnp.where(step < down, step // turns, places - 1)
        return scalars[0], adapter[tile, place], jnp.where(busy, step % turns, turns - 1), 0

    def b_block(tile, step, adapter, count, scalars):
        place = jnp.where(step < down, 0, (step - down) % places)
        return scalars[0], adapter[tile, place], 0, jnp.where(step < down, 0, (step - down) // places)

    def out_block(tile, step, adapter, count, scalars):
        return tile, jnp.where(step < down, 0, (step - down) // places)

    return pl.pallas_call(
        functools.partial(_kernel, turns=turns, places=places, depth=depth, tile_depth=tile_depth),
        out_shape=jax.ShapeDtypeStruct((rows, columns), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles, down + places * pl.cdiv(columns, tile_columns)),
            in_specs=[
                pl.BlockSpec((tile_rows, 1), lambda tile, *_: (tile, 0)),
                pl.BlockSpec((tile_rows, 1), lambda tile, *_: (tile, 0)),
                pl.BlockSpec((tile_rows, tile_depth), x_block),
                pl.BlockSpec((None, None, tile_depth, rank), a_block),
                pl.BlockSpec((None, None, rank, tile_columns), b_block),
            ],
            out_specs=pl.BlockSpec((tile_rows, tile_columns), out_block),
            scratch_shapes=[
                pltpu.VMEM((places, tile_rows, rank), jnp.float32),
                pltpu.VMEM((tile_rows, tile_columns), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="lora_matmul",
    )(met.adapter, met.filled, layer[None], adapter_of_row[:, None], scale[layer][adapter_of_row][:, None], x, a, b)


def _kernel(
    adapter_ref, count_ref, layer_ref, of_row_ref, scale_ref, x_ref, a_ref, b_ref, out_ref, low_ref, sum_ref,
    *, turns, places, depth, tile_depth,
):  # fmt: skip
    tile, step = pl.program_id(0), pl.program_id(1)
    down = places * turns
    upwards = step >= down
    place = jnp.where(upwards, (step - down) % places, step // turns)
    filled = place < count_ref[tile]
    turn = step % turns

    @pl.when(jnp.logical_not(upwards) & filled)
    def _():
        some, factor = x_ref[...], a_ref[...]
        if depth % tile_depth:
            # Past the edge lies anything at all, also NaN, so both sides are cleared.
            left = depth - turn * tile_depth
            some = jnp.where(jax.lax.broadcasted_iota(jnp.int32, some.shape, 1) < left, some, 0)
            factor = jnp.where(jax.lax.broadcasted_iota(jnp.int32, factor.shape, 0) < left, factor, 0)
        product = _dot(some, factor)
        low_ref[place] = jnp.where(turn == 0, product, low_ref[place] + product)

    @pl.when(upwards & (place == 0))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(upwards & filled)
    def _():
        own = of_row_ref[...] == adapter_ref[tile, place]
        low = (low_ref[place] * scale_ref[...].astype(jnp.float32)).astype(b_ref.dtype)
        sum_ref[...] = jnp.where(own, _dot(low, b_ref[...]), sum_ref[...])

    @pl.when(upwards & (place == places - 1))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _dot(x, y):
    common = jnp.promote_types(x.dtype, y.dtype)
    precision = jax.lax.Precision.HIGHEST if common == jnp.float32 else None
    return jnp.dot(x.astype(common), y.astype(common), precision=precision, preferred_element_type=jnp.float32)
