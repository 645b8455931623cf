"""NVIDIA GPUs, in Pallas for its Triton back end: rows times one matrix of a stack, read where it lies.

Few rows are bound by reading the matrix: one program multiplies all of them by a tile of columns, with several tiles of
the matrix on their way at once. Where the columns alone give too few programs to keep the memory busy, K is cut into
pieces too, whose partial sums XLA adds up.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.matmul.stacked import StackedWeight

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # `kernels.platforms` says so to whoever asks for this form
    plt = None  # type: ignore[assignment]

# Multiprocessors of a large GPU (H100, H200), and the shared memory of one that its programs can have.
_PROCESSORS, _SHARED_BYTES = 132, 227 << 10


class Tile(NamedTuple):
    """What one program multiplies at a time, and how. Powers of two."""

    rows: int
    columns: int
    depth: int
    splits: int  # pieces of K
    warps: int
    stages: int  # tiles in flight

    def shared_bytes(self, itemsize: int) -> int:
        return self.stages * self.depth * (self.rows + self.columns) * itemsize


def tile_for(rows: int, depth: int, columns: int, itemsize: int) -> Tile:
    """For `[rows, depth] @ [depth, columns]`. Shapes of an 8B model in bfloat16 were measured on an H200."""
    many = columns >= 16384
    if rows <= 16:
        tile = Tile(16, 256, 64, 1, 8, 4) if many else Tile(16, 128, 128, 1, 8, 3)
    elif rows <= 64:
        tile = Tile(64, 256, 64, 1, 8, 4) if many else Tile(64, 128, 64, 1, 4, 6)
        if columns <= 4096:
            tile = Tile(64, 64, 128, 1, 4, 5)
    else:
        tile = Tile(128, 256, 64, 1, 8, 3)
        if 2 * pl.cdiv(rows, tile.rows) * pl.cdiv(columns, tile.columns) < _PROCESSORS:
            tile = Tile(128, 64, 64, 1, 4, 4)
    if itemsize > 2:
        tile = tile._replace(columns=min(128, tile.columns), depth=32, stages=3)
    # As many pieces of K as let all programs run at the same time: eight warps may need all of the registers.
    programs = pl.cdiv(rows, tile.rows) * pl.cdiv(columns, tile.columns)
    at_once = _PROCESSORS * min(_SHARED_BYTES // tile.shared_bytes(itemsize), 8 // tile.warps)
    splits = 1
    while 2 * splits * programs <= at_once and splits < 8 and depth >= 4 * splits * tile.depth:
        splits *= 2
    return tile._replace(splits=splits)


def refuses(x: jax.Array, w: StackedWeight) -> str:
    """Why the kernel cannot take these arrays, in one line; empty if it can."""
    if not {x.dtype, w.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"found {x.dtype} and weights of {w.dtype}, expected float32 or bfloat16"
    if 0 in (*x.shape, *w.shape):
        return f"found shapes {x.shape} and {w.shape}, expected numbers in both"
    return "" if plt is not None else "this version of JAX has no Triton form of Pallas"


def matmul(x, w: StackedWeight, out_dtype=None, *, interpret=False):
    leading, (depth, columns) = x.shape[:-1], w.shape
    out_dtype = jnp.promote_types(x.dtype, w.dtype) if out_dtype is None else jnp.dtype(out_dtype)
    x = x.reshape(-1, depth)
    tile = tile_for(x.shape[0], depth, columns, w.dtype.itemsize)
    grid = (pl.cdiv(x.shape[0], tile.rows), pl.cdiv(columns, tile.columns), tile.splits)
    partial = out_dtype if tile.splits == 1 else jnp.dtype(jnp.float32)
    out = pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        out_shape=jax.ShapeDtypeStruct((tile.splits, x.shape[0], columns), partial),
        grid=grid,
        compiler_params=None if interpret else plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="stacked_matmul",
    )(jnp.asarray(w.layer)[None], x, w.weights)
    out = out[0] if tile.splits == 1 else out.sum(0).astype(out_dtype)
    return out.reshape(*leading, columns)


def _kernel(layer_ref, x_ref, stack_ref, out_ref, *, tile: Tile):
    (rows, depth), columns = x_ref.shape, stack_ref.shape[2]
    layer, piece = layer_ref[0], pl.program_id(2)
    own = pl.ds(pl.program_id(0) * tile.rows, tile.rows)
    across = pl.ds(pl.program_id(1) * tile.columns, tile.columns)
    # Masks only where a tile reaches over an edge.
    in_rows = None if rows % tile.rows == 0 else pl.program_id(0) * tile.rows + jnp.arange(tile.rows) < rows
    in_columns = (
        None if columns % tile.columns == 0 else pl.program_id(1) * tile.columns + jnp.arange(tile.columns) < columns
    )
    common = jnp.promote_types(x_ref.dtype, stack_ref.dtype)
    # Float32 keeps its precision; narrower types lose none on the tensor cores.
    precision = jax.lax.Precision.HIGHEST if common == jnp.float32 else None

    def turn(k, total):
        deep = pl.ds(k * tile.depth, tile.depth)
        in_depth = None if depth % tile.depth == 0 else k * tile.depth + jnp.arange(tile.depth) < depth
        some = _load(x_ref.at[own, deep], in_rows, in_depth)
        matrix = _load(stack_ref.at[layer, deep, across], in_depth, in_columns)
        return total + jnp.dot(
            some.astype(common), matrix.astype(common), precision=precision, preferred_element_type=jnp.float32
        )

    turns = pl.cdiv(depth, tile.depth)
    each = pl.cdiv(turns, tile.splits)
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = jax.lax.fori_loop(piece * each, jnp.minimum((piece + 1) * each, turns), turn, total)
    plt.store(out_ref.at[piece, own, across], total.astype(out_ref.dtype), mask=_both(in_rows, in_columns))


def _load(ref, first, second):
    """A tile; zeros where one of the masks of its two axes, None for none, is false."""
    mask = _both(first, second)
    return plt.load(ref, mask=mask, other=None if mask is None else 0.0)


def _both(first, second):
    if first is None or second is None:
        return first[:, None] if first is not None else second if second is None else second[None, :]
    return first[:, None] & second[None, :]
