"""The GPU form: one Triton program a row, which narrows each threshold from two bits of it to the next.

A row of logits is longer than registers hold, so every turn reads it again, from the second-level cache. To read it
half as often as bisection would, a turn tries three thresholds at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.sample_threshold.threshold import HIGHEST, LOWEST, Threshold, of_order, order_of

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a JAX without Triton: `kernels.platforms` keeps callers out
    plt = None  # type: ignore[assignment]

_BLOCK = 4096


def sample_threshold(scaled, top_k, top_p, min_p, *, interpret=False):
    """See the package."""
    rows, vocab = scaled.shape
    one_a_row = lambda dtype: jax.ShapeDtypeStruct((rows,), dtype)  # noqa: E731
    value, ties, end = pl.pallas_call(
        functools.partial(_kernel, block=min(_BLOCK, pl.next_power_of_2(vocab))),
        out_shape=(one_a_row(jnp.float32), one_a_row(jnp.int32), one_a_row(jnp.int32)),
        grid=(rows,),
        compiler_params=None if interpret else plt.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="sample_threshold",
    )(scaled, top_k, top_p, min_p)
    return Threshold(value, ties, end)


def _kernel(scaled_ref, top_k_ref, top_p_ref, min_p_ref, value_ref, ties_ref, end_ref, *, block):
    row = pl.program_id(0)
    vocab = scaled_ref.shape[1]
    top_k, top_p, min_p = top_k_ref[row], top_p_ref[row], min_p_ref[row]

    def over_row(fold, start):
        """`fold(state, logits, column)` over the row's blocks; columns past its end are -inf."""

        def turn(i, state):
            column = i * block + jnp.arange(block)
            at = scaled_ref.at[row, pl.ds(i * block, block)]
            return fold(state, plt.load(at, mask=column < vocab, other=-jnp.inf), column)

        return jax.lax.fori_loop(0, pl.cdiv(vocab, block), turn, start)

    highest = over_row(lambda state, logits, _: jnp.maximum(state, jnp.max(logits)), jnp.float32(-jnp.inf))
    base = jnp.where(highest > -jnp.inf, highest, 0.0)
    top = order_of(highest)

    def counts(orders, *, mass):
        """For each threshold the number of logits at or above it, or their weight."""

        def fold(state, logits, _):
            order = order_of(logits)
            each = jnp.exp(logits - base) if mass else jnp.ones(logits.shape, jnp.int32)
            return tuple(total + jnp.sum(jnp.where(order >= t, each, 0)) for total, t in zip(state, orders))

        zero = jnp.float32(0) if mass else jnp.int32(0)
        return over_row(fold, tuple(zero for _ in orders))

    def narrowed(holds, low, needed):
        """The largest threshold from `low` to `top` at which `holds`, which is taken to hold at `low`."""

        def turn(state):
            low, high = state
            # In halves, so that the distance does not overflow: a quarter of it, then three points so far apart.
            step = jnp.maximum(((high >> 1) - (low >> 1)) >> 1, 1)
            points = [jnp.minimum(point, high) for point in (low + step, low + step + step, low + step + step + step)]
            good = holds(points)
            for point, ok in zip(points, good):
                low = jnp.where(ok, jnp.maximum(low, point), low)
            for point, ok in zip(reversed(points), reversed(good)):
                high = jnp.where(ok, high, jnp.minimum(high, point - 1))
            return low, high

        high = jnp.where(needed, top, low)
        return jax.lax.while_loop(lambda state: state[0] < state[1], turn, (low, high))[0]

    lowest = jnp.int32(LOWEST)
    ranked = (top_k > 0) & (top_k < vocab)
    at = narrowed(lambda points: [n >= top_k for n in counts(points, mass=False)], lowest, ranked)
    at = jnp.where(ranked, at, lowest)
    (over,) = counts([at + 1], mass=False)
    ties = jnp.where(at > lowest, top_k - over, 0)

    massed = top_p < 1.0
    (above,) = counts([at + 1], mass=True)
    each = jnp.where(at > lowest, jnp.exp(of_order(at) - base), 0.0)
    limit = jnp.maximum(top_p * (above + ties * each), jnp.finfo(jnp.float32).tiny)
    cut = narrowed(lambda points: [n >= limit for n in counts(points, mass=True)], at, massed)
    higher = cut > at
    (over_cut,) = counts([cut + 1], mass=True)
    from_cut, beyond_cut = counts([cut, cut + 1], mass=False)
    above = jnp.where(higher, over_cut, above)
    each = jnp.where(higher, jnp.exp(of_order(cut) - base), each)
    most = jnp.where(higher, from_cut - beyond_cut, ties)
    needed = jnp.ceil((limit - above) / jnp.maximum(each, 1e-37))
    needed = jnp.clip(needed, 1.0, most.astype(jnp.float32)).astype(jnp.int32)
    at, ties = jnp.where(massed, cut, at), jnp.where(massed, needed, ties)

    def least_likely_enough(state, logits, _):
        weights = jnp.exp(logits - base)
        enough = (weights >= jnp.minimum(min_p, 1.0)) & (weights > 0)
        return jnp.minimum(state, jnp.min(jnp.where(enough, order_of(logits), HIGHEST)))

    least = over_row(least_likely_enough, jnp.int32(HIGHEST))
    from_least, beyond_least = counts([least, least + 1], mass=False)
    higher = (min_p > 0) & (least > at) & (least < HIGHEST)
    at, ties = jnp.where(higher, least, at), jnp.where(higher, from_least - beyond_least, ties)

    finite, from_at, over = counts([lowest + 1, at, at + 1], mass=False)
    everything = (at <= lowest) | (over + ties == finite)
    ties = jnp.where(everything, 0, ties)
    value_ref[row] = jnp.where(everything, -jnp.inf, of_order(at))
    ties_ref[row] = ties
    end_ref[row] = _end_of_ties(over_row, at, ties, from_at - over, vocab)


def _end_of_ties(over_row, at, ties, equal, vocab):
    """The column before which the first `ties` of the `equal` logits of order `at` lie."""

    def turn(state):
        low, high = state  # of the columns before `low` no more than `ties` count, of those before `high` + 1 more do
        middle = low + ((high - low + 1) >> 1)

        def fold(total, logits, column):
            return total + jnp.sum(jnp.where((order_of(logits) == at) & (column < middle), jnp.int32(1), jnp.int32(0)))

        few = over_row(fold, jnp.int32(0)) <= ties
        return jnp.where(few, middle, low), jnp.where(few, high, middle - 1)

    # Mostly all or none of them stay, and there is nothing to search.
    high = jnp.where(ties > 0, jnp.int32(vocab), jnp.int32(0))
    low = jnp.where(ties < equal, jnp.int32(0), high)
    return jax.lax.while_loop(lambda state: state[0] < state[1], turn, (low, high))[0]
