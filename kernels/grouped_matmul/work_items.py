"""Sorted rows cut into blocks of one group each: freely, or along the tiles that a TPU's memory is read in."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class WorkItems(NamedTuple):
    """Item i covers rows `first[i] .. end[i]` (at most `block` of them), all of `group[i]`; items past `total` are
    empty and name the last group.
    """

    group: Int[Array, " items"]
    first: Int[Array, " items"]
    end: Int[Array, " items"]
    total: Int[Array, ""]


def work_items(group_sizes: Int[Array, " E"], rows: int, block: int) -> WorkItems:
    """The items of `rows` rows, in order. Their arrays are as long as the worst sizes need."""
    groups = group_sizes.shape[0]
    blocks = -(-group_sizes // block)
    ends = jnp.cumsum(blocks)
    item = jnp.arange(rows // block + min(groups, rows), dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(ends, item, side="right"), groups - 1).astype(jnp.int32)
    row_ends = jnp.cumsum(group_sizes)
    first = (row_ends - group_sizes)[group] + (item - (ends - blocks)[group]) * block
    end = jnp.minimum(first + block, row_ends[group])
    return WorkItems(group, first.astype(jnp.int32), end.astype(jnp.int32), ends[-1].astype(jnp.int32))


class TileItems(NamedTuple):
    """Item i is what `group[i]` has in row tile `tile[i]`, rows `starts[group] .. starts[group + 1]` of it.

    Tiles come in order, so all items of a tile are neighbours. Items past `total` repeat the last.
    """

    group: Int[Array, " items"]
    tile: Int[Array, " items"]
    starts: Int[Array, " E_plus_1"]
    total: Int[Array, ""]


def tile_items(group_sizes: Int[Array, " E"], rows: int, tile_rows: int) -> TileItems:
    """The items of `rows` rows, which must be all that the groups own."""
    groups = group_sizes.shape[0]
    row_ends = jnp.cumsum(group_sizes)
    row_starts = row_ends - group_sizes
    first_tile = row_starts // tile_rows
    tiles = jnp.where(group_sizes > 0, (row_ends - 1) // tile_rows - first_tile + 1, 0)
    ends = jnp.cumsum(tiles)
    item = jnp.minimum(jnp.arange(-(-rows // tile_rows) + groups - 1, dtype=jnp.int32), ends[-1] - 1)
    group = jnp.minimum(jnp.searchsorted(ends, item, side="right"), groups - 1).astype(jnp.int32)
    tile = first_tile[group] + item - (ends - tiles)[group]
    starts = jnp.concatenate([row_starts, row_ends[-1:]])
    return TileItems(group, tile.astype(jnp.int32), starts.astype(jnp.int32), ends[-1].astype(jnp.int32))


def with_rest(group_sizes: Int[Array, " E"], rows: int) -> Int[Array, " E_plus_1"]:
    """One more group for the rows that belong to none."""
    return jnp.concatenate([group_sizes, (rows - group_sizes.sum())[None]]).astype(jnp.int32)
