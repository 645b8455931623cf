"""What a decoder asks of its attention, and the dense form: the whole sequence at once, no cache.

The decoder never decides how queries meet keys; it calls an `Attend`. Training and reference loops pass
`dense_attention`, the engine passes its paged one, so all of them run the same decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

FULL_WINDOW = 2**30
"""The window of a layer that sees everything before it: larger than any position."""

# Low enough that exp() gives exactly 0 beside any real score, finite so that a row with every key masked (padding)
# averages instead of dividing 0 by 0, which would put NaN into the gradients.
_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerContext:
    """Which layer is asking.

    Attributes:
      index: int32 scalar, the layer's number from 0.
      window: int32 scalar; query i sees key j only if `i - window < j <= i`. `FULL_WINDOW` for all.
    """

    index: Int[Array, ""]
    window: Int[Array, ""]


Attend = Callable[
    [Float[Array, "... T H hd"], Float[Array, "... T KV hd"], Float[Array, "... T KV hd"], LayerContext, Any],
    tuple[Float[Array, "... T H hd"], Any],
]
"""`attend(q, k, v, layer, cache) -> (out, cache)`: q and k come rotated; scaling by head_dim**-0.5 happens inside."""


def dense_attention(
    segment_ids: Int[Array, "... T"] | None = None,
    positions: Int[Array, "... T"] | None = None,
    *,
    scale: float | None = None,
    block_size: int = 512,
) -> Attend:
    """Causal attention over whole sequences, with packed documents and sliding windows; leaves the cache untouched.

    A query sees the keys at or before it in the sequence, of its own segment, less than `window` positions back.
    Softmax is in float32. Keys and values are not repeated for grouped queries. Sequences longer than `block_size` are
    done in blocks of queries, each against the keys up to its own end and recomputed in the backward pass, so no [T, T]
    array exists.

    Args:
      segment_ids: the document each token belongs to, 0 for padding (finite, meaningless output); None for one
        document.
      positions: token positions within their document, for the windows; None for 0..T-1. Must rise by 1 along a
        document.
      scale: multiplies the scores; None for head_dim**-0.5.
      block_size: queries per block.
    """

    def attend(q, k, v, layer, cache):
        length, heads, head_dim = q.shape[-3:]
        kv_heads = k.shape[-2]
        grouped = q.reshape(*q.shape[:-2], kv_heads, heads // kv_heads, head_dim)
        factor = head_dim**-0.5 if scale is None else scale
        where = jnp.arange(length) if positions is None else positions
        # One program per block, so a very long sequence takes longer blocks rather than a longer program.
        block = length if length <= block_size else max(block_size, -(-length // 16))
        # A single block is left to the caller's own remat policy.
        one_block = _attend_block if length <= block_size else jax.checkpoint(_attend_block)

        outs = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            visible = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
            visible &= where[..., start:stop, None] - where[..., None, :stop] < layer.window
            if segment_ids is not None:
                visible &= segment_ids[..., start:stop, None] == segment_ids[..., None, :stop]
            queries = grouped[..., start:stop, :, :, :]
            outs.append(one_block(queries, k[..., :stop, :, :], v[..., :stop, :, :], visible, factor))
        out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=-4)
        return out.reshape(q.shape), cache

    return attend


def _attend_block(
    q: Float[Array, "... Q KV G hd"],
    k: Float[Array, "... S KV hd"],
    v: Float[Array, "... S KV hd"],
    visible: Bool[Array, "... Q S"],
    scale: float,
) -> Float[Array, "... Q KV G hd"]:
    scores = jnp.einsum("...qkgd,...skd->...kgqs", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible[..., None, None, :, :], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...kgqs,...skd->...qkgd", weights, v)
