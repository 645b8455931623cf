"""Blocked attention in plain XLA: online softmax over blocks of keys, with loops whose trip counts follow the real
lengths.

Decode rows go together: one loop over key blocks, as long as the longest of them. Prompt chunks go by work items of
QUERY_BLOCK rows of one sequence, each with a loop over the key blocks it can see. Nothing is padded to the longest
context, and context length is no shape, so nothing is compiled again when contexts grow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.paged_attention.ragged import QUERY_BLOCK

_MASKED = -1e30

# Cached tokens read per turn of a loop.
KEY_BLOCK = 128


def paged_attention(q, kv, layer, batch, *, scale, window, softcap=None, sinks=None, staged=None):
    sequences = batch.kv_lens.shape[0]
    pages = _Pages(kv, layer, staged)
    decoded = _decode(q[:sequences], pages, batch, scale, window, softcap, sinks)
    if batch.item_sequence.shape[0] == 0:
        return decoded
    out = _chunks(q, pages, batch, scale, window, softcap, sinks)
    is_decode = (jnp.arange(sequences) < batch.num_decodes)[:, None, None]
    return out.at[:sequences].set(jnp.where(is_decode, decoded, out[:sequences]))


class _Pages(NamedTuple):
    """The pages of a layer: those of the cache, and behind them those that were fetched for it, if any."""

    kv: Array
    layer: Array
    staged: Array | None

    @property
    def page_size(self) -> int:
        return self.kv.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.kv.shape[3] // 2

    def take(self, table):
        """`[*table, page_size, 2 * kv_heads, head_dim]`."""
        if self.staged is None:
            return self.kv[self.layer, table]
        pages = self.kv.shape[1]
        there = (table >= pages)[..., None, None, None]
        return jnp.where(there, self.staged[jnp.maximum(table - pages, 0)], self.kv[self.layer, table])


def _pages_per_block(pages, batch):
    return max(1, min(KEY_BLOCK // pages.page_size, batch.block_tables.shape[1]))


def _padded_tables(batch, pages):
    """Block tables whose width is a multiple of `pages`, so that a block never runs over the edge."""
    surplus = -batch.block_tables.shape[1] % pages
    return jnp.pad(batch.block_tables, ((0, 0), (0, surplus)))


def _split(block, kv_heads):
    """[..., pages, page_size, 2 * KV, hd] -> keys and values [..., tokens, KV, hd]."""
    block = block.reshape(*block.shape[:-4], -1, kv_heads, 2, block.shape[-1])
    return block[..., 0, :], block[..., 1, :]


def _owned(values, written):
    """Values with zeros where the sequence has written nothing: what an earlier owner left there may not be finite."""
    return jnp.where(written[..., None, None], values, 0)


def _capped(scores, softcap):
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _start(shape, sinks):
    """Largest score, sum of weights and weighted sum of values before the first key: a sink counts as one key without
    a value."""
    if sinks is None:
        top, total = jnp.full(shape[:-1], _MASKED, jnp.float32), jnp.zeros(shape[:-1], jnp.float32)
    else:
        top = jnp.broadcast_to(sinks.astype(jnp.float32), shape[:-1])
        total = jnp.ones(shape[:-1], jnp.float32)
    return top, total, jnp.zeros(shape, jnp.float32)


def _decode(q, cache, batch, scale, window, softcap, sinks):
    sequences, heads, head_dim = q.shape
    kv_heads = cache.kv_heads
    pages = _pages_per_block(cache, batch)
    tokens = pages * cache.page_size
    tables = _padded_tables(batch, pages)
    length = jnp.where(jnp.arange(sequences) < batch.num_decodes, batch.kv_lens, 0)
    grouped = (q * scale).reshape(sequences, kv_heads, heads // kv_heads, head_dim)

    def block(i, carry):
        top, total, out = carry
        table = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        keys, values = _split(cache.take(table), kv_heads)  # [S, tokens, KV, hd]
        scores = jnp.einsum("skgd,stkd->skgt", grouped, keys, preferred_element_type=jnp.float32)
        scores = _capped(scores, softcap)
        token = i * tokens + jnp.arange(tokens)
        values = _owned(values, token < length[:, None])
        visible = (token < length[:, None]) & (token >= length[:, None] - window)
        scores = jnp.where(visible[:, None, None, :], scores, _MASKED)
        higher = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible[:, None, None, :], jnp.exp(scores - higher[..., None]), 0.0)
        scaled = jnp.exp(top - higher)
        out = out * scaled[..., None] + jnp.einsum(
            "skgt,stkd->skgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return higher, total * scaled + weights.sum(-1), out

    first = jnp.maximum(jnp.min(jnp.where(length > 0, length - window, 2**30)), 0) // tokens
    last = -(-jnp.max(length) // tokens)
    start = _start(grouped.shape, None if sinks is None else sinks.reshape(kv_heads, -1))
    _, total, out = jax.lax.fori_loop(first, last, block, start)
    return (out / jnp.maximum(total, 1e-30)[..., None]).reshape(q.shape).astype(q.dtype)


def _chunks(q, cache, batch, scale, window, softcap, sinks):
    rows, heads, head_dim = q.shape
    kv_heads = cache.kv_heads
    group = heads // kv_heads
    pages = _pages_per_block(cache, batch)
    tokens = pages * cache.page_size
    tables = _padded_tables(batch, pages)
    # An item may start near the end: room for a whole block of rows behind the last one.
    padded = jnp.pad(q * scale, ((0, QUERY_BLOCK), (0, 0), (0, 0)))

    def item(n, out):
        sequence, row = batch.item_sequence[n], batch.item_row[n]
        query = jax.lax.dynamic_slice_in_dim(padded, row, QUERY_BLOCK)
        query = (
            query.reshape(QUERY_BLOCK, kv_heads, group, head_dim).transpose(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        )
        end = batch.query_starts[sequence + 1]
        position = batch.kv_lens[sequence] - (end - row) + jnp.arange(QUERY_BLOCK)  # of each query row
        final = jnp.minimum(position[-1] + 1, batch.kv_lens[sequence])

        def block(i, carry):
            top, total, out = carry
            table = jax.lax.dynamic_slice(tables, (sequence, i * pages), (1, pages))[0]
            keys, values = _split(cache.take(table), kv_heads)  # [tokens, KV, hd]
            scores = jnp.einsum("kqd,tkd->kqt", query, keys, preferred_element_type=jnp.float32)
            scores = _capped(scores, softcap)
            token = i * tokens + jnp.arange(tokens)
            values = _owned(values, token < batch.kv_lens[sequence])
            visible = (token <= position[:, None]) & (token > position[:, None] - window)
            visible = jnp.tile(visible, (group, 1))[None]
            scores = jnp.where(visible, scores, _MASKED)
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(visible, jnp.exp(scores - higher[..., None]), 0.0)
            scaled = jnp.exp(top - higher)
            out = out * scaled[..., None] + jnp.einsum(
                "kqt,tkd->kqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
            )
            return higher, total * scaled + weights.sum(-1), out

        first = jnp.maximum(position[0] - window + 1, 0) // tokens
        start = _start(query.shape, None if sinks is None else jnp.repeat(sinks.reshape(kv_heads, -1), QUERY_BLOCK, 1))
        _, total, result = jax.lax.fori_loop(first, -(-final // tokens), block, start)
        result = result / jnp.maximum(total, 1e-30)[..., None]
        result = result.reshape(kv_heads, group, QUERY_BLOCK, head_dim).transpose(2, 0, 1, 3)
        result = result.reshape(QUERY_BLOCK, heads, head_dim).astype(q.dtype)
        # Rows past this item's end belong to the next item, which comes later and overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(out, result, row, axis=0)

    out = jnp.zeros((rows + QUERY_BLOCK, heads, head_dim), q.dtype)
    return jax.lax.fori_loop(0, batch.num_items, item, out)[:rows]
