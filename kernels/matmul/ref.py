"""The oracle: `x @ w` in plain `jax.numpy`, at full float32 precision."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.matmul.packed import PackedWeight


def matmul(
    x: Float[Array, "... K"], w: Float[Array, "K N"] | PackedWeight, out_dtype: DTypeLike | None = None
) -> Float[Array, "... N"]:
    """`x @ w`; a packed weight is unpacked first, and the sum over K is float32."""
    if not isinstance(w, PackedWeight):
        return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=out_dtype)
    wide = x.astype(jnp.float32), w.unpack().astype(jnp.float32)
    return jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)
