"""The CPU form: an XLA custom call into rms_norm.cc, compiled on first use."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels.native import NativeKernel

_LANES = 16  # `kLanes` of rms_norm.cc
_DTYPES = (jnp.float32, jnp.bfloat16)

kernel = NativeKernel(Path(__file__).with_name("rms_norm.cc"), symbol="JaxstackRmsNorm", target="jaxstack_rms_norm")


def refuses(x, weight) -> str:
    """Why these arrays cannot be taken, in one line; empty if they can."""
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES or x.shape[-1] % _LANES or 0 in x.shape:
        found = f"{x.dtype} rows of {x.shape[-1]} with {weight.dtype} weights"
        return f"found {found}, expected float32 or bfloat16, a multiple of {_LANES}"
    return kernel.why_not()


def rms_norm(x, weight, *, eps, offset, center):
    call = jax.ffi.ffi_call(kernel.target, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, eps=np.float32(eps), offset=offset, center=center)
