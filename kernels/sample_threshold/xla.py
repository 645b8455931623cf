"""In plain XLA: bisection on the bits of the logits, up to 32 turns for top-k and for top-p, each if a row needs it."""

import jax
import jax.numpy as jnp

from kernels.platforms import platform
from kernels.sample_threshold.threshold import HIGHEST, LOWEST, Threshold, of_order, order_of

# Rows that go together on a CPU, so that what bisection passes over again and again stays in its caches: three to four
# times as fast as all of 32 rows of 152 k at once. Rows that filter nothing cost nothing if their whole block does not.
_BLOCK = 4


def sample_threshold(scaled, top_k, top_p, min_p):
    if platform() != "cpu":
        return _block(scaled, top_k, top_p, min_p)
    rows = scaled.shape[0]
    surplus = -rows % _BLOCK
    filters = (
        jnp.pad(top_k, (0, surplus)),
        jnp.pad(top_p, (0, surplus), constant_values=1.0),
        jnp.pad(min_p, (0, surplus)),
    )
    arrays = (jnp.pad(scaled, ((0, surplus), (0, 0))), *filters)
    blocks = [a.reshape(-1, _BLOCK, *a.shape[1:]) for a in arrays]
    found = jax.lax.map(lambda block: _block(*block), tuple(blocks))
    return jax.tree.map(lambda a: a.reshape(-1)[:rows], found)


def _block(scaled, top_k, top_p, min_p):
    vocab = scaled.shape[1]
    order = order_of(scaled)
    highest = scaled.max(-1)
    # A row of nothing but -inf has no weights; 0 stands in, so that none is NaN.
    weights = jnp.exp(scaled - jnp.where(highest > -jnp.inf, highest, 0.0)[:, None])
    lowest = jnp.full(scaled.shape[:1], LOWEST, jnp.int32)

    ranked = (top_k > 0) & (top_k < vocab)

    def by_rank():
        found = bisect(lambda t: (order >= t[:, None]).sum(-1) >= top_k, lowest, order.max(-1))
        return jnp.where(ranked, found, lowest)

    at = jax.lax.cond(ranked.any(), by_rank, lambda: lowest)
    ties = jnp.where(at > LOWEST, top_k - (order > at[:, None]).sum(-1), 0)

    massed = top_p < 1.0

    def by_mass():
        return within_mass(order, weights, highest, at, ties, top_p)

    cut, cut_ties = jax.lax.cond(massed.any(), by_mass, lambda: (at, ties))
    at, ties = jnp.where(massed, cut, at), jnp.where(massed, cut_ties, ties)

    def by_share():
        # The least logit that is likely enough: above the threshold so far all such logits stay, ties and all.
        share = jnp.where(min_p > 0, jnp.minimum(min_p, 1.0), 0.0)[:, None]
        least = jnp.where((weights >= share) & (weights > 0), order, HIGHEST).min(-1)
        higher = (min_p > 0) & (least > at)
        equal = (order == least[:, None]).sum(-1)
        return jnp.where(higher, least, at), jnp.where(higher, equal, ties)

    at, ties = jax.lax.cond((min_p > 0).any(), by_share, lambda: (at, ties))
    return _finished(order, at, ties)


def within_mass(order, weights, highest, at, ties, top_p):
    """The threshold of top-p after that of top-k, `(at, ties)`."""
    mass_from = lambda t: jnp.where(order >= t[:, None], weights, 0.0).sum(-1)  # noqa: E731
    above = mass_from(at + 1)
    each = jnp.where(at > LOWEST, jnp.exp(of_order(at) - highest), 0.0)
    limit = jnp.maximum(top_p * (above + ties * each), jnp.finfo(jnp.float32).tiny)
    cut = bisect(lambda t: mass_from(t) >= limit, at, order.max(-1))
    # At the threshold itself so many of the equal ones as are needed: each while the mass before it is below the limit.
    higher = cut > at
    above = jnp.where(higher, mass_from(cut + 1), above)
    each = jnp.where(higher, jnp.exp(of_order(cut) - highest), each)
    most = jnp.where(higher, (order == cut[:, None]).sum(-1), ties)
    needed = jnp.ceil((limit - above) / jnp.maximum(each, 1e-37))
    return cut, jnp.clip(needed, 1.0, most.astype(jnp.float32)).astype(jnp.int32)


def bisect(holds, low, high):
    """For each row the largest int32 t from `low` to `high` with `holds(t)`, monotone and taken to hold at `low`."""

    def narrow(state):
        low, high = state
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up, without overflow
        ok = holds(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    return jax.lax.while_loop(lambda state: (state[0] < state[1]).any(), narrow, (low, high))[0]


def kept(scaled, threshold):
    """Which tokens a threshold keeps."""
    value, ties = threshold.value[:, None], threshold.ties
    above = scaled > value
    equal = scaled == value
    column = jnp.arange(scaled.shape[1])
    if threshold.end is not None:
        return above | (equal & (column < threshold.end[:, None]))

    def cut_through():
        last = bisect(
            lambda t: (equal & (column < t[:, None])).sum(-1) <= ties,
            jnp.zeros_like(ties),
            jnp.full_like(ties, scaled.shape[1]),
        )
        return above | (equal & (column < last[:, None]))

    partly = (ties > 0) & (ties < equal.sum(-1))
    return jax.lax.cond(partly.any(), cut_through, lambda: above | (equal & (ties > 0)[:, None]))


def _finished(order, at, ties):
    """-inf wherever every finite token is kept."""
    finite = (order > LOWEST).sum(-1)
    count = (order > at[:, None]).sum(-1) + ties
    everything = (at <= LOWEST) | (count == finite)
    return Threshold(jnp.where(everything, -jnp.inf, of_order(at)), jnp.where(everything, 0, ties))
