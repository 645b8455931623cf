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


def matmul(x: Float[Array, "... K"], w: PackedWeight) -> Float[Array, "... N"]:
    """`x @ w`, float32, on the threads of XLA's CPU client; a row's result does not depend on the rows beside it.

    Raises:
      RuntimeError: the kernel is not available (see `why_not`).
    """
    if reason := why_not():
        raise RuntimeError(f"matmul: implementation='cpu' is not available: {reason}")
    depth = w.panels.shape[-2]
    rows = x.reshape(-1, depth).astype(jnp.float32)
    # Panels of a single matrix are a stack of one; reshape of a buffer moves nothing.
    panels = w.panels if w.panels.ndim == 4 else w.panels[None]
    layer = jnp.zeros((), jnp.int32) if w.layer is None else w.layer
    # x cut into blocks along K. A result that nobody reads, so that XLA places it in the program's own scratch memory,
    # where it is still warm from the product before.
    blocked = 0 if rows.shape[0] == 1 else rows.shape[0] * -(-depth // _BLOCK) * _BLOCK
    call = jax.ffi.ffi_call(
        kernel.target,
        (
            jax.ShapeDtypeStruct((rows.shape[0], w.out_features), jnp.float32),
            jax.ShapeDtypeStruct((blocked,), jnp.float32),
        ),
    )
    out, _ = call(rows, panels, layer)
    return out.reshape(*x.shape[:-1], w.out_features)
