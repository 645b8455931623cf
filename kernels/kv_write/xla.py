"""One scatter, which XLA does in place where the cache is donated or a loop's carry."""

import jax.numpy as jnp


def kv_write(cache, k, v, layer, slots):
    page_size = cache.shape[2]
    fresh = jnp.stack([k, v], axis=2).reshape(k.shape[0], *cache.shape[3:]).astype(cache.dtype)
    return cache.at[layer, slots // page_size, slots % page_size].set(fresh, mode="promise_in_bounds")
