"""The CPU form: an XLA custom call into low_rank_add.cc, compiled on first use."""

from pathlib import Path

import jax
import jax.numpy as jnp

from kernels.native import NativeKernel

_LANES = 16  # `kLanes` of simd.h

kernel = NativeKernel(
    Path(__file__).with_name("low_rank_add.cc"), symbol="JaxstackLowRankAdd", target="jaxstack_low_rank_add"
)


def refuses(base, low, b) -> str:
    """Why these arrays cannot be taken, in one line; empty if they can."""
    if any(x.dtype != jnp.float32 for x in (base, low, b)) or base.shape[-1] % _LANES:
        found = f"{base.dtype} + {low.dtype} @ {b.dtype}, {base.shape[-1]} columns"
        return f"found {found}, expected float32, a multiple of {_LANES}"
    return kernel.why_not()


def low_rank_add(base, low, b):
    call = jax.ffi.ffi_call(kernel.target, jax.ShapeDtypeStruct(base.shape, base.dtype), input_output_aliases={0: 0})
    return call(base, low, b)
