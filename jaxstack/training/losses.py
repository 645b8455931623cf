"""Losses as numerators and denominators.

A loss is `num / den`, each summed over everything a step sees (microbatches, devices) before the one division: every
target token weighs the same however the batch was cut. A mean of microbatch means does not have that property.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Batch = dict[str, Array]
"""token_ids, segment_ids (0 = padding), positions: int32 [..., T]; loss_mask: float32 [..., T], 1 where the token is a
target. Optional: adapter_ids int32 [..., T]; any other per-token array that a loss wants, given at the token it is
about."""

Targets = dict[str, Array]
"""What the logits at position t are compared with, all [..., T]: token_ids (the next token), weights float32, and the
batch's further per-token arrays, moved to the same place."""


class LossParts(NamedTuple):
    """Sums over tokens.

    Attributes:
      num: float32 scalar, differentiated.
      den: float32 scalar, not a function of the parameters.
      aux: name -> (num, den) of further means to log.
    """

    num: Float[Array, ""]
    den: Float[Array, ""]
    aux: dict[str, tuple[Float[Array, ""], Float[Array, ""]]]


LossFn = Callable[[Float[Array, "... T V"], Targets], LossParts]
"""A sum over tokens: the parts of two pieces of a batch add up to those of the whole, so a step may cut it anywhere,
and leave out tokens of weight 0."""

_NOT_SHIFTED = ("positions", "adapter_ids")


def shift_targets(batch: Batch) -> Targets:
    """Aligns a batch with its logits: position t is about token t + 1 of the same document.

    weights[t] = loss_mask[t+1] * (segment_ids[t+1] == segment_ids[t]) * (segment_ids[t] != 0); the last position weighs
    0. Without the segment test the last token of a document would be trained to predict the first of the next.
    """

    def left(x: Array) -> Array:
        return jnp.concatenate([x[..., 1:], jnp.zeros_like(x[..., :1])], axis=-1)

    segments = batch["segment_ids"]
    same_document = (left(segments) == segments) & (segments != 0)
    # Where segment 0 was appended behind the last position, `same_document` is false: real segments are not 0.
    targets = {k: left(v) for k, v in batch.items() if k not in (*_NOT_SHIFTED, "segment_ids", "loss_mask")}
    targets["weights"] = jnp.where(same_document, left(batch["loss_mask"]), 0.0).astype(jnp.float32)
    return targets


def token_log_probs(logits: Float[Array, "... V"], token_ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """log softmax(logits)[token_ids] in float32."""
    logits = logits.astype(jnp.float32)
    return _picked(logits, token_ids) - jax.nn.logsumexp(logits, axis=-1)


def _picked(logits: Float[Array, "... V"], token_ids: Int[Array, "..."]) -> Float[Array, "..."]:
    """logits[token_ids]; out of range clips."""
    return _gathered(logits.shape[-1], logits, token_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(size: int, logits: Array, token_ids: Array) -> Array:
    return jnp.take_along_axis(logits, token_ids[..., None], axis=-1, mode="clip")[..., 0]


def _gathered_forward(size, logits, token_ids):
    return _gathered(size, logits, token_ids), token_ids


def _gathered_backward(size, token_ids, d_out):
    # A comparison with an iota fuses with the softmax's own gradient; a gather's transpose is a scatter.
    chosen = jnp.clip(token_ids, 0, size - 1)[..., None] == jnp.arange(size, dtype=token_ids.dtype)
    return jnp.where(chosen, d_out[..., None], 0), None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def cross_entropy(logits: Float[Array, "... T V"], targets: Targets) -> LossParts:
    """Next-token cross-entropy in nats, averaged over target tokens (not over sequences).

    num = sum_t w[t] * (logsumexp(logits[t]) - logits[t, target[t]]), den = sum_t w[t]. Also logs `accuracy`, the part
    of the targets that are the most likely token.
    """
    weights = targets["weights"]
    logits = logits.astype(jnp.float32)
    picked, peak = _picked(logits, targets["token_ids"]), jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    # A zero weight alone would turn an infinite term into NaN.
    num = jnp.sum(jnp.where(weights != 0, weights * nll, 0.0))
    den = jnp.sum(weights)
    # The largest number, which the softmax has anyway, says as much as its place and is found far sooner.
    correct = jnp.sum(jnp.where(picked >= peak, weights, 0.0))
    return LossParts(num, den, {"accuracy": (jax.lax.stop_gradient(correct), den)})


def targets_only(
    hidden: Float[Array, "tokens D"], targets: Targets, most: int
) -> tuple[Float[Array, "most D"], Targets]:
    """What the output matrix must see: the tokens with a weight, in order, then zeros of weight 0 up to `most` tokens.

    Prompts and padding are often half of a batch, and the output matrix is the largest of a small model.

    Args:
      most: at least as many as have a weight; what is beyond would be lost.
    """
    weights = targets["weights"]
    places = jnp.nonzero(weights != 0, size=most, fill_value=weights.shape[0])[0]

    def chosen(x: Array) -> Array:
        return x.at[places].get(mode="fill", fill_value=0, indices_are_sorted=True)

    return chosen(hidden), {name: chosen(x) for name, x in targets.items()}


def chunked(
    loss_fn: LossFn,
    logits_fn: Callable[[Float[Array, "... D"]], Float[Array, "... V"]],
    hidden: Float[Array, "... T D"],
    targets: Targets,
    chunk_tokens: int,
) -> LossParts:
    """`loss_fn(logits_fn(hidden), targets)` for `chunk_tokens` tokens at a time, logits recomputed in the backward
    pass.

    For vocabularies whose [B, T, V] float32 logits would not fit. The last chunk is padded with weight 0.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = {k: v.reshape(-1) for k, v in targets.items()}
    pad = -flat.shape[0] % chunk_tokens
    flat = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, chunk_tokens, flat.shape[-1])
    pieces = {k: jnp.pad(v, (0, pad)).reshape(-1, chunk_tokens) for k, v in flat_targets.items()}

    @jax.checkpoint
    def one(piece):
        piece_hidden, piece_targets = piece
        return loss_fn(logits_fn(piece_hidden), piece_targets)

    def body(total, piece):
        return jax.tree.map(jnp.add, total, one(piece)), None

    first = jax.tree.map(lambda x: x[0], (flat, pieces))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    total, _ = jax.lax.scan(body, zero, (flat, pieces))
    return total
