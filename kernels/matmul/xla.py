"""The forms XLA compiles itself: its dot for plain arrays; an einsum over panels for packed ones, slow but anywhere."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.matmul.packed import PackedWeight


def matmul(
    x: Float[Array, "... K"], w: Float[Array, "K N"] | PackedWeight, out_dtype: DTypeLike | None = None
) -> Float[Array, "... N"]:
    """`x @ w`; float32 for a packed weight."""
    if not isinstance(w, PackedWeight):
        return jnp.matmul(x, w, preferred_element_type=out_dtype)
    panels = w.panels if w.layer is None else jax.lax.dynamic_index_in_dim(w.panels, w.layer, keepdims=False)
    if w.dtype == jnp.bfloat16:
        pairs = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, w.in_features % 2)])
        pairs = pairs.reshape(*x.shape[:-1], -1, 2)
        tiles = jnp.einsum("...kj,pknj->...pn", pairs, panels, preferred_element_type=jnp.float32)
    else:
        tiles = jnp.einsum("...k,pkn->...pn", x, panels)
    return tiles.reshape(*x.shape[:-1], -1)[..., : w.out_features]
