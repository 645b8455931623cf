"""The result of `sample_threshold`, and float32 as integers of the same order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# The orders of -inf and of +inf.
LOWEST, HIGHEST = -0x7F800000, 0x7F800000


class Threshold(NamedTuple):
    """Token i of a row survives if `scaled[i] > value`, or if they are equal and i is among the first `ties` such ids.

    `value` is -inf, with no ties, where every finite token survives. `end` is the id before which the surviving equal
    ones lie, where an implementation knows it; None leaves it to be found.
    """

    value: Float[Array, " rows"]
    ties: Int[Array, " rows"]
    end: Int[Array, " rows"] | None = None


def order_of(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """int32 in the order of the float32 `x` (sign-magnitude bits to two's complement); equal for 0 and -0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def of_order(order: Int[Array, "..."]) -> Float[Array, "..."]:
    """The float32 that `order_of` maps to `order`."""
    bits = jnp.where(order < 0, jnp.int32(-(2**31)) - order, order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
