"""Which rows of a batch belong to which sequence, and how they are cut into work items."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

# Query rows that share one pass over a sequence's keys.
QUERY_BLOCK = 64


class Ragged(NamedTuple):
    """Which query rows belong to which sequence. Build it once a step with `ragged`; every layer reads it."""

    block_tables: Int[Array, "sequences pages"]
    kv_lens: Int[Array, " sequences"]
    query_starts: Int[Array, " sequences_plus_1"]
    num_decodes: Int[Array, ""]
    # Work items of the rows that are not decodes: QUERY_BLOCK rows of one sequence each. Empty if all rows are decodes.
    item_sequence: Int[Array, " items"]
    item_row: Int[Array, " items"]
    num_items: Int[Array, ""]


def ragged(
    block_tables: Int[Array, "sequences pages"],
    kv_lens: Int[Array, " sequences"],
    query_starts: Int[Array, " sequences_plus_1"],
    num_decodes: Int[Array, ""],
    *,
    rows: int,
) -> Ragged:
    """Describes a batch of `rows` query rows (a static bound). With `rows == sequences` every row must be a decode."""
    sequences = kv_lens.shape[0]
    lengths = query_starts[1:] - query_starts[:-1]
    if rows == sequences:
        nothing = jnp.zeros((0,), jnp.int32)
        return Ragged(block_tables, kv_lens, query_starts, num_decodes, nothing, nothing, jnp.int32(0))
    chunk = jnp.arange(sequences) >= num_decodes
    blocks = jnp.where(chunk, -(-lengths // QUERY_BLOCK), 0)
    ends = jnp.cumsum(blocks)
    item = jnp.arange(rows // QUERY_BLOCK + sequences)
    owner = jnp.minimum(jnp.searchsorted(ends, item, side="right"), sequences - 1).astype(jnp.int32)
    within = item - (ends - blocks)[owner]
    row = query_starts[owner] + within * QUERY_BLOCK
    return Ragged(block_tables, kv_lens, query_starts, num_decodes, owner, row.astype(jnp.int32), ends[-1])
