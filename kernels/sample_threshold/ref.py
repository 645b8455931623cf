"""The oracle: sort each row and apply the filters in turn."""

import jax
import jax.numpy as jnp

from kernels.sample_threshold.threshold import Threshold


def sample_threshold(scaled, top_k, top_p, min_p):
    vocab = scaled.shape[1]
    rank = jnp.arange(vocab)
    falling = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(top_k > 0, top_k, vocab)[:, None]
    probabilities = jax.nn.softmax(jnp.where(rank < k, falling, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    keep = (rank < k) & (falling > -jnp.inf)
    keep &= (before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    keep &= probabilities >= min_p[:, None] * probabilities[:, :1]
    keep |= rank == 0
    # What is kept is the front of the row, so the threshold is its last.
    count = keep.sum(-1)
    value = jnp.take_along_axis(falling, count[:, None] - 1, axis=-1)[:, 0]
    ties = count - (falling > value[:, None]).sum(-1)
    everything = count == (falling > -jnp.inf).sum(-1)
    return Threshold(jnp.where(everything, -jnp.inf, value), jnp.where(everything, 0, ties).astype(jnp.int32))
