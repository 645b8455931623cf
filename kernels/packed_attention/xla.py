"""XLA's own form: queries in a few blocks, each against the keys up to its own end, which saves part of the square.

How many blocks there are and which keys they meet is part of the program; documents shorter than that are masked.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Finite: a sum over masked scores stays a number. exp() of it is exactly 0 beside any real score.
_MASKED = -1e30


def forward(q, k, v, first, softcap, longest):
    """Output and the log of each query's softmax denominator; arguments are the package's."""
    q, k, v = _by_heads(q, k, v)
    outs, logs = [], []
    for block in _blocks(q.shape[3], longest):
        scores = _scores(q, k, first, softcap, block)
        peak = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - peak[..., None])
        total = jnp.sum(weights, axis=-1)
        mixed = jnp.einsum(
            "rkgqs,rksd->rkgqd", weights.astype(v.dtype), v[:, :, block.keys], preferred_element_type=jnp.float32
        )
        outs.append((mixed / total[..., None]).astype(q.dtype))
        logs.append(peak + jnp.log(total))
    out, log_total = jnp.concatenate(outs, axis=3), jnp.concatenate(logs, axis=3)
    return _by_tokens(out), log_total.transpose(0, 3, 1, 2).reshape(*first.shape, -1)


def backward(q, k, v, first, out, log_total, d_out, softcap, longest):
    """Gradients of q, k and v from those of the output."""
    # d(softmax) needs sum_s p_s dp_s, which is the product of the output with its gradient.
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    q, k, v = _by_heads(q, k, v)
    rows, kv_heads, group, length, head_dim = q.shape
    d_out = d_out.reshape(rows, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    inner, log_total = (x.reshape(rows, length, kv_heads, group).transpose(0, 2, 3, 1) for x in (inner, log_total))
    d_q = []
    d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _blocks(length, longest):
        queries, d_block = q[:, :, :, block.queries], d_out[:, :, :, block.queries]
        scores = _scores(q, k, first, softcap, block)
        p = jnp.exp(scores - log_total[:, :, :, block.queries, None])
        d_p = jnp.einsum("rkgqd,rksd->rkgqs", d_block, v[:, :, block.keys], preferred_element_type=jnp.float32)
        d_s = p * (d_p - inner[:, :, :, block.queries, None])
        if softcap is not None:  # the slope of the cap; a masked score lies far outside its range
            d_s *= 1 - (jnp.maximum(scores, -softcap) / softcap) ** 2
        d_s = d_s.astype(q.dtype)
        p = p.astype(q.dtype)
        d_q.append(jnp.einsum("rkgqs,rksd->rkgqd", d_s, k[:, :, block.keys]))
        d_k = d_k.at[:, :, block.keys].add(_sum_over_queries(queries, d_s))
        d_v = d_v.at[:, :, block.keys].add(_sum_over_queries(d_block, p))
    d_k, d_v = (x.swapaxes(1, 2).astype(k.dtype) for x in (d_k, d_v))
    return _by_tokens(jnp.concatenate(d_q, axis=3)), d_k, d_v


def _by_heads(q, k, v):
    """Queries [rows, KV, G, T, hd], keys and values [rows, KV, T, hd]."""
    rows, length, kv_heads, head_dim = k.shape
    grouped = q.reshape(rows, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return grouped, k.swapaxes(1, 2), v.swapaxes(1, 2)


def _by_tokens(x: Float[Array, "rows KV G T hd"]) -> Float[Array, "rows T H hd"]:
    rows, _, _, length, head_dim = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, length, -1, head_dim)


class _Block(NamedTuple):
    """Queries [start, stop) of a row and the keys [low, stop) that any of them may see."""

    start: int
    stop: int
    low: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        return slice(self.low, self.stop)


def _blocks(length: int, longest: int) -> tuple[_Block, ...]:
    """Two blocks save a quarter of the square, more of them little more, and each costs compile time; where documents
    are shorter than rows, smaller blocks see fewer keys.
    """
    count = 1 if length < 128 else 2 if length <= 1024 else min(16, -(-length // 512))
    if longest < length:
        count = max(count, min(4, length // 64), min(16, length // max(128, longest)))
    size = -(-length // count)
    return tuple(
        _Block(start, min(start + size, length), max(0, start - longest + 1)) for start in range(0, length, size)
    )


def _scores(
    q: Float[Array, "rows KV G T hd"],
    k: Float[Array, "rows KV T hd"],
    first: Int[Array, "rows T"],
    softcap: float | None,
    block: _Block,
) -> Float[Array, "rows KV G Q S"]:
    """Scores of a block's queries with its keys, invisible ones at -1e30."""
    key, query = (jnp.arange(s.start, s.stop, dtype=jnp.int32) for s in (block.keys, block.queries))
    visible = (key >= first[:, block.queries, None]) & (key <= query[:, None])
    scores = jnp.einsum(
        "rkgqd,rksd->rkgqs", q[:, :, :, block.queries], k[:, :, block.keys], preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(visible[:, None, None], scores, _MASKED)


def _sum_over_queries(
    x: Float[Array, "rows KV G Q hd"], weights: Float[Array, "rows KV G Q S"]
) -> Float[Array, "rows KV S hd"]:
    """`weights^T x`, written as `(x^T weights)^T`: the small array is the one that gets transposed."""
    rows, kv_heads, groups, queries, head_dim = x.shape
    columns = x.reshape(rows, kv_heads, groups * queries, head_dim).swapaxes(2, 3)
    flat = weights.reshape(rows, kv_heads, groups * queries, weights.shape[-1])
    return jnp.einsum("rkdq,rkqs->rkds", columns, flat, preferred_element_type=jnp.float32).swapaxes(2, 3)
