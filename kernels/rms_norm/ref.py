"""The oracle, and what XLA runs."""

import jax
import jax.numpy as jnp


def rms_norm(x, weight, *, eps, offset, center):
    wide = x.astype(jnp.float32)
    if center:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if offset:
        return (wide * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    if center:
        return (wide * weight.astype(jnp.float32)).astype(x.dtype)
    return weight.astype(x.dtype) * wide.astype(x.dtype)
