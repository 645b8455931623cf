"""Sorted rows cut into blocks that belong to one group each."""

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
