"""The oracle: every matrix times every row, then each row takes its own group's result."""

import jax
import jax.numpy as jnp


def grouped_matmul(x, stack, group_sizes, layer):
    rows = jnp.arange(x.shape[0])
    ends = jnp.cumsum(group_sizes)
    owner = jnp.searchsorted(ends, rows, side="right")
    every = jnp.einsum(
        "rk,ekn->ern", x, stack[layer], precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    own = every[jnp.minimum(owner, len(group_sizes) - 1), rows]
    return jnp.where((rows < ends[-1])[:, None], own, 0).astype(x.dtype)
