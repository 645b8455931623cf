"""The CPU form: an XLA custom call into paged_attention.cc, compiled on first use."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels.native import NativeKernel

_LANES = 16  # `kLanes` of paged_attention.cc

kernel = NativeKernel(
    Path(__file__).with_name("paged_attention.cc"), symbol="JaxstackPagedAttention", target="jaxstack_paged_attention"
)
why_not = kernel.why_not


def handles(q, kv) -> bool:
    """Whether the compiled kernel was written for these arrays."""
    return q.dtype == kv.dtype == jnp.float32 and q.shape[-1] % _LANES == 0


def paged_attention(q, kv, layer, batch, *, scale, window):
    if not handles(q, kv):
        raise ValueError(
            f"implementation='cpu': found {q.dtype}, head_dim {q.shape[-1]}; expected float32, a multiple of {_LANES}"
        )
    if reason := why_not():
        raise RuntimeError(f"paged_attention: implementation='cpu' is not available: {reason}")
    call = jax.ffi.ffi_call(kernel.target, jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(q, kv, layer, window, batch.block_tables, batch.kv_lens, batch.query_starts, scale=np.float32(scale))
