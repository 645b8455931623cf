"""The oracle: gather every sequence's cache to full width and attend densely."""

import jax.numpy as jnp

_MASKED = -1e30


def paged_attention(q, kv, layer, batch, *, scale, window, softcap=None, sinks=None, staged=None):
    rows, heads, head_dim = q.shape
    page_size, kv_heads = kv.shape[2], kv.shape[3] // 2
    row = jnp.arange(rows)
    owner = jnp.clip(jnp.searchsorted(batch.query_starts, row, side="right") - 1, 0, batch.kv_lens.shape[0] - 1)
    position = batch.kv_lens[owner] - (batch.query_starts[owner + 1] - row)
    pages = kv[layer] if staged is None else jnp.concatenate([kv[layer], staged])
    cached = pages[batch.block_tables]  # [S, P, page_size, 2 * KV, hd]
    cached = cached.reshape(cached.shape[0], -1, kv_heads, 2, head_dim)
    keys, values = (jnp.repeat(cached[..., i, :], heads // kv_heads, axis=2)[owner] for i in (0, 1))
    scores = jnp.einsum("rhd,rthd->rht", q, keys, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    token = jnp.arange(page_size * batch.block_tables.shape[1])
    visible = (token <= position[:, None]) & (token > position[:, None] - window)
    scores = jnp.where(visible[:, None, :], scores, _MASKED)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32)[:, None]
        top = jnp.maximum(top, sink)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    weights = weights / total
    return jnp.einsum("rht,rthd->rhd", weights, values, preferred_element_type=jnp.float32).astype(q.dtype)
