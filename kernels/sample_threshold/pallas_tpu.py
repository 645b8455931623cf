"""The TPU form: eight rows at a time in VMEM, where bisection passes over them as often as it must.

Bits and weights of the logits are made once and kept on chip; memory is read a single time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.sample_threshold.threshold import HIGHEST, LOWEST, Threshold, of_order, order_of

ROWS = 8
# Columns of one turn of a loop over the row.
_BLOCK = 2048


def vmem_bytes(vocab: int) -> int:
    """What a step occupies: the logits twice (one block on its way), their order, their weights."""
    return 4 * ROWS * (-(-vocab // _BLOCK) * _BLOCK) * 4


def sample_threshold(scaled, top_k, top_p, min_p, *, interpret=False):
    """See the package."""
    rows, vocab = scaled.shape
    padded = pl.cdiv(vocab, _BLOCK) * _BLOCK
    row_block = pl.BlockSpec((ROWS, 1), lambda i: (i, 0))
    value, ties = pl.pallas_call(
        functools.partial(_kernel, vocab=vocab),
        out_shape=(jax.ShapeDtypeStruct((rows, 1), jnp.float32), jax.ShapeDtypeStruct((rows, 1), jnp.int32)),
        grid=(pl.cdiv(rows, ROWS),),
        in_specs=[pl.BlockSpec((ROWS, padded), lambda i: (i, 0)), row_block, row_block, row_block],
        out_specs=(row_block, row_block),
        scratch_shapes=[pltpu.VMEM((ROWS, padded), jnp.int32), pltpu.VMEM((ROWS, padded), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes(vocab) + (4 << 20)
        ),
        interpret=interpret,
        name="sample_threshold",
    )(scaled, top_k[:, None], top_p[:, None], min_p[:, None])
    return Threshold(value[:, 0], ties[:, 0])


def _kernel(scaled_ref, top_k_ref, top_p_ref, min_p_ref, value_ref, ties_ref, order_ref, weights_ref, *, vocab):
    top_k, top_p, min_p = top_k_ref[...], top_p_ref[...], min_p_ref[...]  # [ROWS, 1], as all below
    turns = order_ref.shape[1] // _BLOCK

    def over_row(fold, start):
        """`fold(state, columns)` over the row's blocks of columns."""
        return jax.lax.fori_loop(0, turns, lambda i, state: fold(state, pl.ds(i * _BLOCK, _BLOCK), i), start)

    def column_of(i):
        return i * _BLOCK + jax.lax.broadcasted_iota(jnp.int32, (ROWS, _BLOCK), 1)

    def first_pass(highest, columns, i):
        # Past the vocabulary lies anything at all.
        logits = jnp.where(column_of(i) < vocab, scaled_ref[:, columns], -jnp.inf)
        order_ref[:, columns] = order_of(logits)
        return jnp.maximum(highest, logits.max(-1, keepdims=True))

    highest = over_row(first_pass, jnp.full((ROWS, 1), -jnp.inf, jnp.float32))
    base = jnp.where(highest > -jnp.inf, highest, 0.0)

    def second_pass(nothing, columns, i):
        weights_ref[:, columns] = jnp.exp(of_order(order_ref[:, columns]) - base)
        return nothing

    over_row(second_pass, jnp.int32(0))

    def count_from(t):
        fold = lambda n, columns, _: n + (order_ref[:, columns] >= t).astype(jnp.int32).sum(-1, keepdims=True)  # noqa: E731
        return over_row(fold, jnp.zeros((ROWS, 1), jnp.int32))

    def mass_from(t):
        def fold(total, columns, _):
            return total + jnp.where(order_ref[:, columns] >= t, weights_ref[:, columns], 0.0).sum(-1, keepdims=True)

        return over_row(fold, jnp.zeros((ROWS, 1), jnp.float32))

    def bisect(holds, low, needed):
        def narrow(_, state):
            low, high = state
            middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the mean, rounded up, without overflow
            ok = holds(middle)
            return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

        high = jnp.where(needed, order_of(highest), low)
        turns = jnp.where(needed.astype(jnp.int32).max() > 0, 32, 0)
        return jax.lax.fori_loop(0, turns, narrow, (low, high))[0]

    lowest = jnp.full((ROWS, 1), LOWEST, jnp.int32)
    ranked = (top_k > 0) & (top_k < vocab)
    at = bisect(lambda t: count_from(t) >= top_k, lowest, ranked)
    ties = jnp.where(at > LOWEST, top_k - count_from(at + 1), 0)

    massed = top_p < 1.0
    above = mass_from(at + 1)
    each = jnp.where(at > LOWEST, jnp.exp(of_order(at) - base), 0.0)
    limit = jnp.maximum(top_p * (above + ties.astype(jnp.float32) * each), jnp.finfo(jnp.float32).tiny)
    cut = bisect(lambda t: mass_from(t) >= limit, at, massed)
    higher = cut > at
    above = jnp.where(higher, mass_from(cut + 1), above)
    each = jnp.where(higher, jnp.exp(of_order(cut) - base), each)
    most = jnp.where(higher, count_from(cut) - count_from(cut + 1), ties)
    needed = jnp.ceil((limit - above) / jnp.maximum(each, 1e-37))
    needed = jnp.minimum(jnp.maximum(needed, 1.0), most.astype(jnp.float32)).astype(jnp.int32)
    at, ties = jnp.where(massed, cut, at), jnp.where(massed, needed, ties)

    def least_likely_enough(least, columns, _):
        weights = weights_ref[:, columns]
        enough = (weights >= jnp.minimum(min_p, 1.0)) & (weights > 0)
        return jnp.minimum(least, jnp.where(enough, order_ref[:, columns], HIGHEST).min(-1, keepdims=True))

    least = over_row(least_likely_enough, jnp.full((ROWS, 1), HIGHEST, jnp.int32))
    higher = (min_p > 0) & (least > at) & (least < HIGHEST)
    ties = jnp.where(higher, count_from(least) - count_from(least + 1), ties)
    at = jnp.where(higher, least, at)

    everything = (at <= LOWEST) | (count_from(at + 1) + ties == count_from(lowest + 1))
    value_ref[...] = jnp.where(everything, -jnp.inf, of_order(at))
    ties_ref[...] = jnp.where(everything, 0, ties)
