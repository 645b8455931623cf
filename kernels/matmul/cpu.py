"""The CPU form for packed weights: an XLA custom call into packed_matmul.cc, compiled on first use."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.matmul.packed import PackedWeight
from kernels.native import NativeKernel

_BLOCK = 128  # `kBlock` of packed_matmul.cc

kernel = NativeKernel(
    Path(__file__).with_name("packed_matmul.cc"), symbol="JaxstackPackedMatmul", target="jaxstack_packed_matmul"
)
why_not = kernel.why_not


def available() -> bool:
    """Whether the compiled kernel can be used in this process. Builds it on the first call."""
    return not why_not()


def matmul(
    x: Float[Array, "... K"], w: PackedWeight, bias: Float[Array, " N"] | None, out_dtype: jnp.dtype
) -> Float[Array, "... N"]:
    """`x @ w + bias` on the threads of XLA's CPU client; a row's result does not depend on the rows beside it.

    `x` has the weight's dtype, `out_dtype` is float32 or bfloat16; sums are float32 in any case.

    Raises:
      RuntimeError: the kernel is not available (see `why_not`).
    """
    if reason := why_not():
        raise RuntimeError(f"matmul: implementation='cpu' is not available: {reason}")
    rows = x.reshape(-1, w.in_features)
    # Panels of a single matrix are a stack of one; reshape of a buffer moves nothing.
    panels = w.panels if w.stacked else w.panels[None]
    layer = jnp.zeros((), jnp.int32) if w.layer is None else w.layer
    # x cut into blocks along K. A result that nobody reads, so that XLA places it in the program's own scratch memory,
    # where it is still warm from the product before.
    words = panels.shape[2]
    as_it_is = rows.shape[0] == 1 and w.in_features * w.dtype.itemsize == words * 4
    blocked = 0 if as_it_is else rows.shape[0] * -(-words // _BLOCK) * _BLOCK
    call = jax.ffi.ffi_call(
        kernel.target,
        (
            jax.ShapeDtypeStruct((rows.shape[0], w.out_features), out_dtype),
            jax.ShapeDtypeStruct((blocked,), jnp.float32),
        ),
    )
    used = jnp.full((), rows.shape[0], jnp.int32) if w.rows is None else w.rows
    out, _ = call(rows, panels, layer, used, jnp.zeros((0,), jnp.float32) if bias is None else bias.astype(jnp.float32))
    return out.reshape(*x.shape[:-1], w.out_features)
