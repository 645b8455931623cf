"""Logprobs of given tokens (those of a prompt), inside a jitted program of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows whose logits exist at once: [512, vocab] would be hundreds of megabytes.
BLOCK = 64


class Scores(NamedTuple):
    """Per token row: its target's logprob, and the likeliest tokens with theirs. Meaningless without a target."""

    logprob: Float[Array, " rows"]
    ids: Int[Array, "rows alternatives"]
    values: Float[Array, "rows alternatives"]


def score(
    logits_of: Callable[[Float[Array, "block D"]], Float[Array, "block vocab"]],
    hidden: Float[Array, "rows D"],
    targets: Int[Array, " rows"],
    alternatives: int,
) -> Scores:
    """Scores `targets` by the distributions that follow from `hidden`; -1 is no target.

    The output matrix is applied to `BLOCK` rows at a time, and left alone where a block has no target.
    """
    rows = hidden.shape[0]
    blocks = -(-rows // BLOCK)
    surplus = blocks * BLOCK - rows
    hidden = jnp.pad(hidden, ((0, surplus), (0, 0)))
    targets = jnp.pad(targets, (0, surplus), constant_values=-1)
    start = Scores(
        jnp.zeros(blocks * BLOCK, jnp.float32),
        jnp.zeros((blocks * BLOCK, alternatives), jnp.int32),
        jnp.zeros((blocks * BLOCK, alternatives), jnp.float32),
    )

    def block(i: Int[Array, ""], out: Scores) -> Scores:
        target = jax.lax.dynamic_slice_in_dim(targets, i * BLOCK, BLOCK)

        def scored() -> Scores:
            logits = logits_of(jax.lax.dynamic_slice_in_dim(hidden, i * BLOCK, BLOCK))
            values, ids = jax.lax.top_k(logits, alternatives)
            norm = jax.nn.logsumexp(logits, axis=-1)
            chosen = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
            found = Scores(chosen - norm, ids, values - norm[:, None])
            placed = (jax.lax.dynamic_update_slice_in_dim(a, b, i * BLOCK, 0) for a, b in zip(out, found))
            return Scores(*placed)

        return jax.lax.cond((target >= 0).any(), scored, lambda: out)

    every = jax.lax.fori_loop(0, blocks, block, start)
    return Scores(*(array[:rows] for array in every))
