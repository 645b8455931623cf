"""In plain XLA, with a head's halves on an axis of their own: stacking two halves is one loop, where joining them end
to end is a branch for every number.
"""

import jax
import jax.numpy as jnp

from kernels.rms_norm_rope import ref


def rms_norm_rope(q, k, cos, sin, q_weight, k_weight, *, eps, offset):
    if 2 * cos.shape[-1] != q.shape[-1]:
        return ref.rms_norm_rope(q, k, cos, sin, q_weight, k_weight, eps=eps, offset=offset)
    return _one(q, cos, sin, q_weight, eps, offset), _one(k, cos, sin, k_weight, eps, offset)


def _one(x, cos, sin, weight, eps, offset):
    halves = x.reshape(*x.shape[:-1], 2, -1).astype(jnp.float32)
    if weight is not None:
        halves = halves * jax.lax.rsqrt(jnp.mean(halves * halves, axis=(-2, -1), keepdims=True) + eps)
        weight = weight.reshape(2, -1)
        if offset:
            halves = (halves * (1 + weight.astype(jnp.float32))).astype(x.dtype)
        else:
            halves = weight.astype(x.dtype) * halves.astype(x.dtype)
        halves = halves.astype(jnp.float32)
    first, second = halves[..., 0, :], halves[..., 1, :]
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-2)
    return turned.reshape(x.shape).astype(x.dtype)
