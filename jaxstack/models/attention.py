"""What a decoder asks of its attention, and the dense form: the whole sequence at once, no cache.

The decoder never decides how queries meet keys; it calls an `Attend`. Training and reference loops pass
`dense_attention`, the engine passes its paged one, so all of them run the same decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
    """Which layer is asking, and how its model weighs scores.

    Attributes:
      index: int32 scalar, the layer's number from 0.
      window: int32 scalar; query i sees key j only if `i - window < j <= i`. `FULL_WINDOW` for all.
      scale: multiplies the scores; None for head_dim**-0.5. Static, the same in every layer.
      softcap: scaled scores s become `softcap * tanh(s / softcap)` before the softmax; None for as they are. Static.
    """

    index: Int[Array, ""]
    window: Int[Array, ""]
    scale: float | None = field(default=None, metadata={"static": True})
    softcap: float | None = field(default=None, metadata={"static": True})


Attend = Callable[
    [Float[Array, "... T H hd"], Float[Array, "... T KV hd"], Float[Array, "... T KV hd"], LayerContext, Any],
    tuple[Float[Array, "... T H hd"], Any],
]
"""`attend(q, k, v, layer, cache) -> (out, cache)`: q and k come rotated; scaling by `layer.scale`, and the
softcap, happen inside."""


def dense_attention(
    segment_ids: Int[Array, "... T"] | None = None,
    positions: Int[Array, "... T"] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block_size: int | None = None,
) -> Attend:
    """Causal attention over whole sequences, with packed documents and sliding windows; leaves the cache untouched.

    A query sees the keys at or before it in the sequence, of its own segment, less than `window` positions back.
    Softmax is in float32. Keys and values are not repeated for grouped queries. Sequences longer than `block_size` are
    done in tiles of queries and keys, forward and backward, so that no [T, T] array exists and tiles wholly in the
    future or before the window cost nothing (FlashAttention, Dao et al. 2022, algorithms 1 and 4).

    Args:
      segment_ids: the document each token belongs to, 0 for padding (finite, meaningless output); None for one
        document.
      positions: token positions, for the windows, rising along each document; None for 0..T-1.
      scale: multiplies the scores; None for the layer's own.
      softcap: bounds the scaled scores by `softcap * tanh(s / softcap)`; None for the layer's own, if any.
      block_size: queries, and keys, of a tile; None for what suits the platform.
    """

    def attend(q, k, v, layer, cache):
        *batch, length, heads, head_dim = q.shape
        kv_heads = k.shape[-2]
        factor = scale or layer.scale or head_dim**-0.5
        cap = softcap or layer.softcap
        # On CPU a tile should stay in the cache (128 against 512: half the time); elsewhere fewer, larger steps.
        block = block_size or (128 if jax.default_backend() == "cpu" else 512)
        where = jnp.arange(length) if positions is None else positions
        segments = jnp.ones(length, jnp.int32) if segment_ids is None else segment_ids

        # [batch, KV, group, T, hd] and [batch, KV, T, hd]: every product below is then a batched matrix product as it
        # is.
        q = jnp.moveaxis(q.reshape(-1, length, kv_heads, heads // kv_heads, head_dim), 1, 3)
        k, v = (jnp.moveaxis(x.reshape(-1, length, kv_heads, head_dim), 1, 2) for x in (k, v))
        segments, where = (jnp.broadcast_to(x, (*batch, length)).reshape(-1, length) for x in (segments, where))
        if length <= block:
            out = _whole(q, k, v, layer.window, segments, where, factor, cap)
        else:
            padding = -length % block  # the padded keys lie in every real query's future
            q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)]) for x in (q, k, v))
            segments, where = (jnp.pad(x, ((0, 0), (0, padding))) for x in (segments, where))
            out = _tiled(q, k, v, layer.window, segments, where, factor, cap, block)[..., :length, :]
        return jnp.moveaxis(out, 3, 1).reshape(*batch, length, heads, head_dim), cache

    return attend


def _visible(query_index, key_index, query_row, key_row, window) -> Bool[Array, "B 1 1 Q K"]:
    """Which keys each query sees, given both sides' indices and (segments, positions)."""
    (query_segments, query_positions), (key_segments, key_positions) = query_row, key_row
    causal = query_index[:, None] >= key_index[None, :]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    near = query_positions[:, :, None] - key_positions[:, None, :] < window
    return (causal & same & near)[:, None, None]


def _scores(q, k, visible, scale: float, softcap: float | None) -> Float[Array, "B KV G Q K"]:
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(visible, scores, _MASKED)


def _whole(
    q: Float[Array, "B KV G T hd"],
    k: Float[Array, "B KV T hd"],
    v: Float[Array, "B KV T hd"],
    window: Int[Array, ""],
    segments: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B KV G T hd"]:
    index, row = jnp.arange(q.shape[-2]), (segments, positions)
    scores = _scores(q, k, _visible(index, index, row, row, window), scale, softcap)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgqs,bksd->bkgqd", weights, v)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _tiled(q, k, v, window, segments, positions, scale: float, softcap: float | None, block: int):
    """`_whole` in tiles of `block` queries by `block` keys; T is a multiple of `block`."""
    return _tiled_forward(q, k, v, window, segments, positions, scale, softcap, block)[0]


class _Tiles:
    """Cuts the arrays of one attention into blocks of the sequence and says which tiles hold anything visible."""

    def __init__(self, window, segments, positions, block: int):
        self.window, self.segments, self.positions, self.block = window, segments, positions, block

    def cut(self, x: Array, i: Int[Array, ""], axis: int = -2) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.block, self.block, axis)

    def visible(self, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "B 1 1 Q K"]:
        queries, keys = ((self.cut(self.segments, n, -1), self.cut(self.positions, n, -1)) for n in (i, j))
        offsets = jnp.arange(self.block)
        return _visible(i * self.block + offsets, j * self.block + offsets, queries, keys, self.window)

    def first_key_block(self, i: Int[Array, ""]) -> Int[Array, ""]:
        """The block of the first query's oldest key: positions rise along a document, so its index is no older."""
        return jnp.maximum(0, i * self.block - self.window + 1) // self.block


def _tiled_forward(q, k, v, window, segments, positions, scale, softcap, block):
    tiles = _Tiles(window, segments, positions, block)

    def query_block(i):
        queries = tiles.cut(q, i)

        def key_block(j, carry):
            total, top, out = carry
            scores = _scores(queries, tiles.cut(k, j), tiles.visible(i, j), scale, softcap)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            values = jnp.einsum(
                "bkgqs,bksd->bkgqd", weights.astype(v.dtype), tiles.cut(v, j), preferred_element_type=jnp.float32
            )
            return total * shrink + weights.sum(axis=-1), new_top, out * shrink[..., None] + values

        # A row may see nothing in its first tiles and then sums garbage; its own tile, the last, shrinks that to zero.
        empty = jnp.zeros(queries.shape[:-1], jnp.float32)
        start = (empty, empty + _MASKED, jnp.zeros(queries.shape, jnp.float32))
        total, top, out = jax.lax.fori_loop(tiles.first_key_block(i), i + 1, key_block, start)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    blocks = jax.lax.map(query_block, jnp.arange(q.shape[-2] // block))
    out, log_total = (_joined(x, 3) for x in blocks)
    return out, (q, k, v, window, segments, positions, out, log_total)


def _tiled_backward(scale, softcap, block, saved, out_gradient):
    q, k, v, window, segments, positions, out, log_total = saved
    tiles = _Tiles(window, segments, positions, block)
    # d(softmax) needs each row's sum of weight * gradient, which is out . out_gradient.
    inner = jnp.sum(out.astype(jnp.float32) * out_gradient.astype(jnp.float32), axis=-1)

    def query_block(sums, i):
        queries, gradient = tiles.cut(q, i), tiles.cut(out_gradient, i)
        row_log_total, row_inner = tiles.cut(log_total, i, -1), tiles.cut(inner, i, -1)

        def key_block(j, carry):
            dq, dk, dv = carry
            keys, values = tiles.cut(k, j), tiles.cut(v, j)
            scores = _scores(queries, keys, tiles.visible(i, j), scale, softcap)
            weights = jnp.exp(scores - row_log_total[..., None])
            dweights = jnp.einsum("bkgqd,bksd->bkgqs", gradient, values, preferred_element_type=jnp.float32)
            dscores = weights * (dweights - row_inner[..., None]) * scale
            if softcap is not None:  # the slope of the cap; a masked score lies far outside its range
                dscores *= 1 - (jnp.maximum(scores, -softcap) / softcap) ** 2
            dscores = dscores.astype(q.dtype)
            dq += jnp.einsum("bkgqs,bksd->bkgqd", dscores, keys, preferred_element_type=jnp.float32)
            dk = added(dk, j, jnp.einsum("bkgqs,bkgqd->bksd", dscores, queries, preferred_element_type=jnp.float32))
            weights = weights.astype(v.dtype)
            dv = added(dv, j, jnp.einsum("bkgqs,bkgqd->bksd", weights, gradient, preferred_element_type=jnp.float32))
            return dq, dk, dv

        def added(x, j, block_of_x):
            return jax.lax.dynamic_update_slice_in_dim(x, tiles.cut(x, j) + block_of_x, j * block, -2)

        start = (jnp.zeros(queries.shape, jnp.float32), *sums)
        dq, *sums = jax.lax.fori_loop(tiles.first_key_block(i), i + 1, key_block, start)
        return tuple(sums), dq

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = jax.lax.scan(query_block, zeros, jnp.arange(q.shape[-2] // block))
    return _joined(dq, 3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


def _joined(blocks: Array, axis: int) -> Array:
    """`[n, ..., block, ...]` with the blocks put one after another along `axis` of the rest."""
    blocks = jnp.moveaxis(blocks, 0, axis)
    return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])


_tiled.defvjp(_tiled_forward, _tiled_backward)
