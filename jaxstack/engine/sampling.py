"""Drawing tokens from logits, inside the jitted step.

No sort, no noise over the vocabulary. Every filter is a property of the row: top-k and top-p that end inside the 64
largest logits are settled there; the rest finds its threshold by bisection on the bits of the logits, which is exact;
and one uniform number per (seed, choice, position) picks the token by its place in the cumulative distribution. So a
row's token depends on its logits and its own parameters alone, never on its batch.

Order of the filters: temperature, top-k, top-p of the mass that top-k left (a token stays if the mass strictly before
it is below p). Equal logits count in order of token id.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxstack.engine.request import MAX_LOGPROBS

# Candidates looked at before the whole vocabulary is.
WINDOW = 64
# Columns summed as one in the search for the drawn token.
_BLOCK = 512


class RowParams(NamedTuple):
    """One entry per row. `top_k` 0 keeps all. `seed` is 64 bits in two words; `choice` and `position` count from 0."""

    temperature: Float[Array, " rows"]
    top_p: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    seed: UInt[Array, "rows 2"]
    choice: Int[Array, " rows"]
    position: Int[Array, " rows"]
    wants_logprobs: Int[Array, ""]


class Sampled(NamedTuple):
    """`token` is -1 where the logits were not finite.

    Log probabilities are of the unmodified distribution, zeros if not wanted.
    """

    token: Int[Array, " rows"]
    logprob: Float[Array, " rows"]
    top_tokens: Int[Array, "rows alternatives"]
    top_logprobs: Float[Array, "rows alternatives"]


def sample(logits: Float[Array, "rows vocab"], params: RowParams) -> Sampled:
    """Draws one token a row. `logits` are float32, -inf where a token cannot be."""
    rows, vocab = logits.shape
    top, first = jax.lax.top_k(logits, 1)  # the quickest arg max on CPU, and ties go to the lowest id
    greedy = first[:, 0]
    random = params.temperature >= 1e-5
    width = min(WINDOW, vocab)
    alternatives = min(MAX_LOGPROBS, width)

    token = jax.lax.cond(
        random.any(),
        lambda: jnp.where(random, _draw(logits, params, width), greedy),
        lambda: greedy,
    )

    def with_logprobs():
        values, ids = jax.lax.top_k(logits, alternatives)
        norm = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
        return chosen - norm, ids, values - norm[:, None]

    def without():
        shape = (rows, alternatives)
        return jnp.zeros((rows,), logits.dtype), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype)

    logprob, ids, values = jax.lax.cond(params.wants_logprobs > 0, with_logprobs, without)
    # NaN compares as the largest in top_k, so the first value tells of any in the row.
    return Sampled(jnp.where(jnp.isfinite(top[:, 0]), token, -1), logprob, ids, values)


def _draw(logits, params, width):
    """A token of every row as if it were random; greedy rows are thrown away by the caller."""
    vocab = logits.shape[1]
    scaled = logits / jnp.maximum(params.temperature, 1e-5)[:, None]
    values, ids = jax.lax.top_k(scaled, width)
    highest = values[:, :1]
    uniform = jax.vmap(_uniform)(params.seed, params.choice, params.position)

    # Inside the window, in order of rank.
    weights = jnp.exp(values - highest)
    total = jnp.exp(scaled - highest).sum(-1)
    by_rank = params.top_k > 0
    rank = jnp.arange(width)
    weights = jnp.where(by_rank[:, None] & (rank >= params.top_k[:, None]), 0.0, weights)
    mass = jnp.where(by_rank & (params.top_k <= width), weights.sum(-1), total)
    limit = params.top_p * mass
    before = _running_sum(weights) - weights
    kept = jnp.where((before < limit[:, None]) & (weights > 0), weights, 0.0)
    cumulative = _running_sum(kept)
    target = uniform * cumulative[:, -1]
    place = jnp.minimum((cumulative <= target[:, None]).sum(-1), (kept > 0).sum(-1) - 1)
    inside = jnp.take_along_axis(ids, jnp.maximum(place, 0)[:, None], axis=-1)[:, 0]

    # Settled there if top-k ends in the window, or top-p does with the whole vocabulary as its base.
    ends_by_rank = by_rank & (params.top_k <= width)
    ends_by_mass = ~by_rank & (params.top_p < 1.0) & (before[:, -1] + weights[:, -1] >= limit)
    settled = ends_by_rank | ends_by_mass | (width == vocab)

    def everywhere():
        unfiltered = ~by_rank & (params.top_p >= 1.0)
        weights = jax.lax.cond(
            (settled | unfiltered).all(),
            lambda: jnp.exp(scaled - highest),
            lambda: jnp.where(unfiltered[:, None], jnp.exp(scaled - highest), _filtered(scaled, highest, params)),
        )
        return jnp.where(settled, inside, _inverse_cdf(weights, uniform))

    return jax.lax.cond(settled.all(), lambda: inside, everywhere)


def _uniform(seed, choice, position):
    """One number in [0, 1) that belongs to this place of this answer."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, choice), position), (), jnp.float32)


def _filtered(scaled, highest, params):
    """exp(scaled - highest) with everything outside top-k, then top-p, set to zero; exact, ties by lowest id."""
    vocab = scaled.shape[1]
    weights = jnp.exp(scaled - highest)
    order = _sortable(scaled)

    # Top-k: the largest threshold with at least k logits at or above it; of those equal to it, the first ones.
    k = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab), vocab)
    threshold = _bisect(lambda t: (order >= t[:, None]).sum(-1) >= k, order)
    above = order > threshold[:, None]
    ties = order == threshold[:, None]
    weights = jnp.where(above | _first_of(ties, k - above.sum(-1)), weights, 0.0)

    # Top-p: the largest threshold with at least that mass at or above it; of those equal to it, the first ones: each
    # while the mass before it is below p.
    limit = params.top_p * weights.sum(-1)
    threshold = _bisect(lambda t: jnp.where(order >= t[:, None], weights, 0.0).sum(-1) >= limit, order)
    above = order > threshold[:, None]
    ties = (order == threshold[:, None]) & (weights > 0)
    each = jnp.where(ties, weights, 0.0).max(-1)
    missing = limit - jnp.where(above, weights, 0.0).sum(-1)
    count = jnp.ceil(missing / jnp.maximum(each, 1e-37)).astype(jnp.int32)
    kept = jnp.where(above | _first_of(ties, count), weights, 0.0)
    return jnp.where((params.top_p >= 1.0)[:, None], weights, kept)


def _sortable(x):
    """float32 to int32 with the same order (sign-magnitude bits to two's complement)."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _bisect(holds, values):
    """For each row of `values` the largest int32 t with `holds(t)`, which is monotone and holds for the smallest."""

    def narrow(_, bounds):
        low, high = bounds  # holds at low, not known to at anything above high
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up, without overflow
        ok = holds(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    low = jnp.full(values.shape[:1], -(2**31) + 1, jnp.int32)
    high = jnp.full(values.shape[:1], 2**31 - 1, jnp.int32)
    return jax.lax.fori_loop(0, 32, narrow, (low, high))[0]


def _first_of(flags, count):
    """The first `count` set flags of each row."""
    column = jnp.arange(flags.shape[1])
    last = _bisect(lambda t: (flags & (column <= t[:, None])).sum(-1) <= count, flags)
    return flags & (column <= last[:, None])


def _running_sum(weights):
    """Inclusive sums along short rows, each in an order of its own that no other row influences."""
    rank = jnp.arange(weights.shape[1])
    return jnp.where(rank[:, None] >= rank, weights[:, None, :], 0.0).sum(-1)


def _inverse_cdf(weights, uniform):
    """The column where a row's running sum passes `uniform` of its total: by blocks, then inside one."""
    rows, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = blocks.sum(-1)
    block, before = _passing(sums, uniform * sums.sum(-1))
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    column, _ = _passing(inner, uniform * sums.sum(-1) - before)
    return block * _BLOCK + column


def _passing(weights, target):
    """The first column whose inclusive running sum exceeds `target`, and the sum before it.

    Rounding may leave none; then it is the last column with any weight.
    """
    column = jnp.arange(weights.shape[1])
    up_to = lambda t: jnp.where(column <= t[:, None], weights, 0.0).sum(-1)  # noqa: E731
    found = jnp.minimum(_bisect(lambda t: up_to(t) <= target, weights), weights.shape[1] - 1) + 1
    last = jnp.where(weights > 0, column, 0).max(-1)
    # Weightless columns cannot be the first to exceed, so `found` has weight unless it ran past the end.
    found = jnp.clip(jnp.minimum(found, last), 0)
    return found, up_to(found - 1)
