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


def target_places(targets: Targets, most: int) -> Int[Array, "most"]:
    """Where the tokens with a weight are, in order, then the number of all tokens up to `most` places.

    Only they must be seen by the output matrix, the largest of a small model, and by what comes before it back to where
    tokens last meet; prompts and padding are often half of a batch.

    Args:
      targets: flat.
      most: at least as many as have a weight; what is beyond would be lost.
    """
    weights = targets["weights"]
    return jnp.nonzero(weights != 0, size=most, fill_value=weights.shape[0])[0]


def chunked(
    loss_fn: LossFn,
    logits_fn: Callable[[Float[Array, "... D"]], Float[Array, "... V"]],
    hidden: Float[Array, "... T D"],
    targets: Targets,
    chunk_tokens: int,
) -> LossParts:
    """`loss_fn(logits_fn(hidden), targets)` for `chunk_tokens` tokens at a time, of which alone there are logits.

    For vocabularies whose [B, T, V] float32 logits would not fit. The last chunk is padded with weight 0.

    Differentiated (by reverse mode), each chunk's gradient is taken while its logits are there, and scaled when the
    backward pass comes: no product with the output matrix is done twice. Only `num` has gradients, with respect to
    `hidden` and to what the two functions close over; targets are constants.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = {k: v.reshape(-1) for k, v in targets.items()}
    pad = -flat.shape[0] % chunk_tokens
    flat = jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, chunk_tokens, flat.shape[-1])
    pieces = {k: jnp.pad(v, (0, pad)).reshape(-1, chunk_tokens) for k, v in flat_targets.items()}
    first = jax.tree.map(lambda x: x[0], (flat, pieces))
    one, parameters = jax.closure_convert(lambda hidden, targets: loss_fn(logits_fn(hidden), targets), *first)
    return _summed(one, flat, parameters, pieces)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(one: Callable[..., LossParts], hidden: Array, parameters: list[Array], targets: Targets) -> LossParts:
    """The sum of `one(hidden[i], targets[i], *parameters)`."""

    def body(total, piece):
        return jax.tree.map(jnp.add, total, one(*piece, *parameters)), None

    total, _ = jax.lax.scan(body, _zeros_of(lambda: one(hidden[0], _at(targets, 0), *parameters)), (hidden, targets))
    return total


def _summed_forward(one, hidden, parameters, targets):
    # Of each argument we are told whether anyone asks for its gradient: of a frozen output matrix nobody does.
    hidden, targets = hidden.value, {name: x.value for name, x in targets.items()}
    wanted = [p.value for p in parameters if p.perturbed]

    def numerator(hidden, wanted, targets):
        given = iter(wanted)
        parts = one(hidden, targets, *(next(given) if p.perturbed else p.value for p in parameters))
        return parts.num, parts

    def body(total, piece):
        (_, parts), (d_hidden, d_wanted) = jax.value_and_grad(numerator, (0, 1), has_aux=True)(
            piece[0], wanted, piece[1]
        )
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (parts, d_wanted)), d_hidden

    zero = (
        _zeros_of(lambda: one(hidden[0], _at(targets, 0), *(p.value for p in parameters))),
        [jnp.zeros(p.shape, jnp.float32) for p in wanted],
    )
    (parts, d_wanted), d_hidden = jax.lax.scan(body, zero, (hidden, targets))
    slopes = iter(d_wanted)
    return parts, (d_hidden, [next(slopes).astype(p.value.dtype) if p.perturbed else None for p in parameters])


def _summed_backward(one, kept, d_parts):
    d_hidden, d_parameters = kept
    if isinstance(d_parts.num, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    return *jax.tree.map(lambda slope: (slope * d_parts.num).astype(slope.dtype), (d_hidden, d_parameters)), None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _at(tree, index: int):
    return jax.tree.map(lambda x: x[index], tree)


def _zeros_of(function: Callable[[], LossParts]) -> LossParts:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function))
