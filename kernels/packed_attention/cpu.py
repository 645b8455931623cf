"""The CPU form: XLA custom calls into packed_attention.cc, compiled on first use."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels.native import NativeKernel

_LANES = 16  # `kLanes` of simd.h
_SOURCE = Path(__file__).with_name("packed_attention.cc")
_forward, _backward = (
    NativeKernel(_SOURCE, symbol=f"JaxstackPackedAttention{name}", target=f"jaxstack_packed_attention_{name.lower()}")
    for name in ("Forward", "Backward")
)


def refuses(q) -> str:
    """Why the compiled kernel cannot take these queries, in one line; empty if it can."""
    if q.shape[-1] % _LANES:
        return f"found head_dim {q.shape[-1]}, expected a multiple of {_LANES}"
    return _forward.why_not() or _backward.why_not()


def forward(q, k, v, first, softcap):
    """Output and the log of each query's softmax denominator; arguments are the package's."""
    results = (jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32))
    call = jax.ffi.ffi_call(_forward.target, results)
    out, log_total = call(*_in_float32(q, k, v), first, softcap=np.float32(softcap or 0.0))
    return out.astype(q.dtype), log_total


def backward(q, k, v, first, out, log_total, d_out, softcap):
    """Gradients of q, k and v from those of the output."""
    call = jax.ffi.ffi_call(_backward.target, [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k, v)])
    out, d_out = _in_float32(out, d_out)
    d = call(*_in_float32(q, k, v), first, out, log_total, d_out, softcap=np.float32(softcap or 0.0))
    return tuple(d_x.astype(x.dtype) for d_x, x in zip(d, (q, k, v)))


def _in_float32(*arrays):
    return tuple(x.astype(jnp.float32) for x in arrays)
