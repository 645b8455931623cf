"""Drawing tokens from logits, inside the jitted step.

No sort, no noise over the vocabulary. Every filter is a property of the row: what top-k, top-p and min-p leave is
settled among the 64 largest logits where it ends there; the rest finds its threshold in the whole row, exactly; and one
uniform number per (seed, choice, position) picks the token by its place in the cumulative distribution. So a row's
token depends on its logits and its own parameters alone, never on its batch.

Order: the rules of `logit_rules` (bias, masks, penalties), temperature, top-k, top-p of the mass that top-k left (a
token stays if the mass strictly before it is below p), min-p (a token stays if it is at least that share of the
likeliest). Equal logits count in order of token id. What no row asks for is skipped, and costs a comparison.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxstack.engine.logit_rules import PROCESSED, RowParams, SlotState, apply_rules, touched
from jaxstack.engine.request import MAX_LOGPROBS
from kernels.platforms import platform
from kernels.sample_threshold import kept, sample_threshold

# What the rows of a step ask for: each its likeliest token; no rule and no log probability; or anything.
Kind = Literal["greedy", "plain", "any"]
# Candidates looked at before the whole vocabulary is.
WINDOW = 64
# Columns summed as one in the search for the drawn token, if the vocabulary is a multiple of none of these.
_BLOCKS = (512, 256, 128)
# Below this temperature a row takes its likeliest token.
GREEDY = 1e-5
# What a token that cannot be drawn is reported with: JSON has no infinity.
_NEVER = -9999.0


class Sampled(NamedTuple):
    """`token` is -1 where the logits were not finite, -2 where the rules left nothing to draw.

    Log probabilities are of the unmodified distribution, or of the one drawn from where the row asks for that (flag
    `PROCESSED`): after the rules, temperature and filters; a greedy row has only the rules. Zeros if not wanted, at
    least -9999.
    """

    token: Int[Array, " rows"]
    logprob: Float[Array, " rows"]
    top_tokens: Int[Array, "rows alternatives"]
    top_logprobs: Float[Array, "rows alternatives"]


def sample(
    logits: Float[Array, "rows vocab"],
    params: RowParams,
    state: SlotState,
    grammar: Int[Array, "rows words"],
    kind: Kind = "any",
) -> Sampled:
    """Draws one token a row.

    Args:
      logits: float32, -inf where a token cannot be.
      state: what `logit_rules` keeps of the rows' sequences.
      grammar: bits of the tokens that guided rows may draw; other rows' bits are not read.
      kind: what is known of all rows beforehand. The same tokens come of "any", which finds out: where that keeps the
        host waiting for the device, as on a GPU, it is better to know.
    """
    vocab = logits.shape[1]
    top, first = jax.lax.top_k(logits, 1)  # the quickest arg max on CPU, and ties go to the lowest id
    random = params.temperature >= GREEDY
    finite = jnp.isfinite(top[:, 0])  # NaN compares as the largest in top_k, so this tells of any in the row
    if kind != "any":
        token = first[:, 0]
        if kind == "plain":
            divisor = jnp.where(random, params.temperature, 1.0)[:, None]
            token = jnp.where(random, _draw(logits / divisor, params, random), token)
        return Sampled(jnp.where(finite, token, -1), *_unreported(logits.shape[0], min(MAX_LOGPROBS, vocab)))
    ruled = touched(params).any()

    def scaled():
        divisor = jnp.where(random, params.temperature, 1.0)[:, None]
        return jax.lax.cond(
            ruled, lambda: apply_rules(logits, params, state, grammar) / divisor, lambda: logits / divisor
        )

    def other_than_greedy():
        return _draw(scaled(), params, random)

    token = jax.lax.cond(random.any() | ruled, other_than_greedy, lambda: first[:, 0])
    logprobs = jax.lax.cond(
        params.wants_logprobs > 0,
        lambda: _reported(logits, scaled, token, params, random),
        lambda: _unreported(logits.shape[0], min(MAX_LOGPROBS, vocab)),
    )
    return Sampled(jnp.where(finite, token, -1), *logprobs)


def _draw(scaled, params, random):
    """A token of every row; -2 where every logit is -inf."""
    if platform() == "gpu":
        return _draw_without_branches(scaled, params, random)
    values, ids = jax.lax.top_k(scaled, min(WINDOW, scaled.shape[1]))
    # Reductions, no slices: XLA folds a slice into its own form of top-k, does not recognise that any more and sorts
    # the whole row, on CPU 800 ms instead of 6 for 32 rows of 151,936.
    highest = values.max(-1, keepdims=True)
    likeliest = jnp.where(jnp.arange(values.shape[1]) == 0, ids, 0).sum(-1)
    possible = highest[:, 0] > -jnp.inf
    # A row without hope must not make NaN of its differences.
    base = jnp.where(possible[:, None], highest, 0.0)

    def by_chance():
        uniform = jax.vmap(_uniform)(params.seed, params.choice, params.position)
        return jnp.where(random, _draw_at(scaled, values, ids, base, uniform, random, params), likeliest)

    token = jax.lax.cond(random.any(), by_chance, lambda: likeliest)
    return jnp.where(possible, token, -2)


def _draw_without_branches(scaled, params, random):
    """`_draw`, always by the threshold in the whole row: a GPU finds that sooner than it tells the host which branch to
    take."""
    highest, likeliest = scaled.max(-1, keepdims=True), jnp.argmax(scaled, -1)
    possible = highest[:, 0] > -jnp.inf
    base = jnp.where(possible[:, None], highest, 0.0)
    weights = jnp.where(_kept(scaled, params, random), jnp.exp(scaled - base), 0.0)
    uniform = jax.vmap(_uniform)(params.seed, params.choice, params.position)
    token = jnp.where(random, _inverse_cdf(weights, uniform), likeliest)
    return jnp.where(possible, token, -2)


def _draw_at(scaled, values, ids, highest, uniform, random, params):
    """The token at `uniform` of each row's filtered distribution; greedy rows are thrown away by the caller."""
    width, vocab = values.shape[1], scaled.shape[1]

    # Inside the window, in order of rank.
    weights = jnp.exp(values - highest)
    total = jnp.exp(scaled - highest).sum(-1)
    by_rank = params.top_k > 0
    ends_by_rank = by_rank & (params.top_k <= width)
    rank = jnp.arange(width)
    weights = jnp.where(by_rank[:, None] & (rank >= params.top_k[:, None]), 0.0, weights)
    mass = jnp.where(ends_by_rank, weights.sum(-1), total)
    limit = params.top_p * mass
    before = _running_sum(weights) - weights
    whole = params.top_p >= 1.0
    kept = (whole[:, None] | (before < limit[:, None])) & (weights > 0) & (weights >= params.min_p[:, None])
    kept = jnp.where(kept, weights, 0.0)
    cumulative = _running_sum(kept)
    target = uniform * cumulative[:, -1]
    place = jnp.minimum((cumulative <= target[:, None]).sum(-1), (kept > 0).sum(-1) - 1)
    inside = jnp.take_along_axis(ids, jnp.maximum(place, 0)[:, None], axis=-1)[:, 0]

    # Settled there if a filter ends in the window, provided that top-p's base is known: all, or what top-k left.
    known = ~by_rank | ends_by_rank
    ends_by_mass = ~by_rank & ~whole & (before[:, -1] + weights[:, -1] >= limit)
    ends_by_share = (known | whole) & (weights[:, -1] < params.min_p)
    settled = ends_by_rank | ends_by_mass | ends_by_share | ~random | (width == vocab)

    def everywhere():
        unfiltered = ~by_rank & whole & (params.min_p <= 0.0)
        weights = jax.lax.cond(
            (settled | unfiltered).all(),
            lambda: jnp.exp(scaled - highest),
            lambda: jnp.where(
                unfiltered[:, None] | _kept(scaled, params, ~settled & ~unfiltered), jnp.exp(scaled - highest), 0.0
            ),
        )
        return jnp.where(settled, inside, _inverse_cdf(weights, uniform))

    return jax.lax.cond(settled.all(), lambda: inside, everywhere)


def _reported(logits, scaled, token, params, random):
    """(of the token, ids of the likeliest, theirs) in natural logarithms, each row of the distribution it asks for."""
    processed = (params.flags & PROCESSED) != 0
    raw = _log_probabilities(logits, token)

    def with_processed():
        z = scaled()
        own = _log_probabilities(jnp.where(~random[:, None] | _kept(z, params, random & processed), z, -jnp.inf), token)
        return tuple(jnp.where(processed.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(own, raw))

    return jax.lax.cond(processed.any(), with_processed, lambda: raw)


def _log_probabilities(z, token):
    values, ids = jax.lax.top_k(z, min(MAX_LOGPROBS, z.shape[1]))
    norm = jax.nn.logsumexp(z, axis=-1)
    chosen = jnp.take_along_axis(z, jnp.maximum(token, 0)[:, None], axis=-1)[:, 0]
    return jnp.maximum(chosen - norm, _NEVER), ids, jnp.maximum(values - norm[:, None], _NEVER)


def _unreported(rows, alternatives):
    shape = (rows, alternatives)
    return jnp.zeros((rows,), jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def _kept(scaled, params, asked):
    """What top-k, top-p and min-p leave of each row for which they are `asked`; the others keep everything."""
    threshold = sample_threshold(
        scaled,
        jnp.where(asked, params.top_k, 0),
        jnp.where(asked, params.top_p, 1.0),
        jnp.where(asked, params.min_p, 0.0),
    )
    return kept(scaled, threshold)


def _uniform(seed, choice, position):
    """One number in [0, 1) that belongs to this place of this answer."""
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, choice), position), (), jnp.float32)


def _running_sum(weights):
    """Inclusive sums along short rows, each in an order of its own that no other row influences."""
    rank = jnp.arange(weights.shape[1])
    return jnp.where(rank[:, None] >= rank, weights[:, None, :], 0.0).sum(-1)


def _inverse_cdf(weights, uniform):
    """The column where a row's running sum passes `uniform` of its total: by blocks, then inside one."""
    rows, vocab = weights.shape
    width = next((w for w in _BLOCKS if vocab % w == 0), _BLOCKS[0])
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    # Summed once: fused into the search below, the exponentials would be computed anew at every look.
    sums = jax.lax.optimization_barrier(blocks.sum(-1))
    target = uniform * sums.sum(-1)
    block, before = _passing(sums, target)
    inner = jax.lax.optimization_barrier(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0])
    column, _ = _passing(inner, target - before)
    return block * width + column


def _passing(weights, target):
    """The first column whose inclusive running sum exceeds `target`, and the sum before it.

    Rounding may leave none; then it is the last column with any weight.
    """
    column = jnp.arange(weights.shape[1])
    if platform() == "gpu":
        # One pass over all pairs of columns, where a search would be a dozen kernels.
        total = _running_sum(weights)
        last = jnp.where(weights > 0, column, 0).max(-1)
        more = total > target[:, None]
        found = jnp.where(more.any(-1), jnp.argmax(more, -1), last)
        return found, jnp.where(column == found[:, None] - 1, total, 0.0).sum(-1)
    up_to = lambda t: jnp.where(column <= t[:, None], weights, 0.0).sum(-1)  # noqa: E731

    def narrow(_, bounds):
        low, high = bounds  # the sum up to `low` does not exceed the target, the one up to `high` is taken to
        middle = (low + high) >> 1
        more = up_to(middle) <= target
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    none, last = jnp.full(weights.shape[:1], -1), jnp.where(weights > 0, column, 0).max(-1)
    turns = (weights.shape[1]).bit_length()
    # Weightless columns cannot be the first to exceed, so the column found has weight unless it is the last.
    _, found = jax.lax.fori_loop(0, turns, narrow, (none, last))
    return found, up_to(found - 1)
