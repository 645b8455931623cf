"""Writing the keys and values of new tokens into a paged KV cache, in place.

The cache has the layout of `kernels.paged_attention`: `[layers, pages, page_size, 2 * kv_heads, head_dim]`, keys and
values interleaved on the head axis. A token's slot is `page * page_size + offset`.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.kv_write import ref, xla
from kernels.platforms import implementation_for

Implementation = Literal["ref", "xla"]


def kv_write(
    cache: Float[Array, "layers pages page_size kv_heads_2 head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    layer: Int[Array, ""],
    slots: Int[Array, " rows"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "layers pages page_size kv_heads_2 head_dim"]:
    """The cache with row r of k and v at slot `slots[r]` of `layer`, in the cache's dtype.

    Every slot must lie in the cache. Rows may share a slot that nobody reads (padding goes to a scrap page): which of
    them stays there is not defined. Give the cache away (donate it, or carry it through a loop), or XLA copies it.

    Args:
      implementation: "ref" (row by row, the oracle) or "xla" (one scatter). None picks by platform.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    rows, kv_heads, head_dim = k.shape
    if k.shape != v.shape or cache.shape[3:] != (2 * kv_heads, head_dim) or slots.shape != (rows,):
        raise ValueError(f"kv_write: k {k.shape}, v {v.shape} and slots {slots.shape} do not fit cache {cache.shape}")
    form = implementation_for("kv_write", implementation, _FORMS)
    return _FORMS[form](cache, k, v, jnp.asarray(layer, jnp.int32), slots.astype(jnp.int32))


_FORMS = {"ref": ref.kv_write, "xla": xla.kv_write}


__all__ = ["Implementation", "kv_write"]
