"""The oracle: norm, then rotation, one after the other."""

import jax.numpy as jnp


def rms_norm_rope(q, k, cos, sin, q_weight, k_weight, *, eps, offset):
    return tuple(
        _rotated(_normed(x, weight, eps, offset), cos, sin, x.dtype) for x, weight in ((q, q_weight), (k, k_weight))
    )


def _normed(x, weight, eps, offset):
    if weight is None:
        return x
    wide = x.astype(jnp.float32)
    wide = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    if offset:
        return (wide * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight.astype(x.dtype) * wide.astype(x.dtype)


def _rotated(x, cos, sin, dtype):
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(dtype)
