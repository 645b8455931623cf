"""The oracle: `x @ w` in plain `jax.numpy`, at full float32 precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.matmul.packed import PackedWeight


def matmul(x: Float[Array, "... K"], w: Float[Array, "K N"] | PackedWeight) -> Float[Array, "... N"]:
    """`x @ w`; a packed weight is unpacked first."""
    dense = w.unpack() if isinstance(w, PackedWeight) else w
    return jnp.matmul(x, dense, precision=jax.lax.Precision.HIGHEST)
