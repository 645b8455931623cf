"""Which adapters the rows of each block use."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class BlockAdapters(NamedTuple):
    """The distinct adapters above 0 of each block, rising, in the first `filled`; the rest repeat the last of them."""

    adapter: Int[Array, "blocks most"]
    filled: Int[Array, " blocks"]


def adapters_of_blocks(adapter_of_row: Int[Array, " rows"], block: int, adapters: int) -> BlockAdapters:
    """For blocks of `block` rows; there are `adapters` adapters, 0 included."""
    rows = adapter_of_row.shape[0]
    padded = jnp.pad(adapter_of_row, (0, -rows % block)).reshape(-1, block)
    known = jnp.arange(1, adapters)
    met = (padded[:, :, None] == known).any(1)
    most = max(1, min(block, adapters - 1))
    # Those met come first, in order.
    place = jnp.where(met, jnp.cumsum(met, axis=1) - 1, most)
    count = met.sum(1)
    block_index = jnp.arange(padded.shape[0])[:, None]
    listed = jnp.zeros((padded.shape[0], most), jnp.int32).at[block_index, place].set(known, mode="drop")
    last = jnp.take_along_axis(listed, jnp.maximum(count - 1, 0)[:, None], axis=1)
    listed = jnp.where(jnp.arange(most) < count[:, None], listed, last)
    return BlockAdapters(listed.astype(jnp.int32), count.astype(jnp.int32))
