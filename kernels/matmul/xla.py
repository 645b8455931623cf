"""The forms XLA compiles itself: its dot for plain arrays; an einsum over panels for packed ones, slow but anywhere."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.matmul.packed import PackedWeight


def matmul(x: Float[Array, "... K"], w: Float[Array, "K N"] | PackedWeight) -> Float[Array, "... N"]:
    """`x @ w`."""
    if not isinstance(w, PackedWeight):
        return x @ w
    panels = w.chosen_panels()
    tiles = jnp.einsum("...k,pkn->...pn", x, panels)
    return tiles.reshape(*x.shape[:-1], -1)[..., : w.out_features]
