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
    dtypes = (q.dtype, kv.dtype) in ((jnp.float32,) * 2, (jnp.bfloat16,) * 2, (jnp.float32, jnp.bfloat16))
    return dtypes and q.shape[-1] % _LANES == 0


def paged_attention(q, kv, layer, batch, *, scale, window, softcap=None, sinks=None):
    if not handles(q, kv):
        raise ValueError(
            f"implementation='cpu': found {q.dtype} over a {kv.dtype} cache, head_dim {q.shape[-1]}; "
            f"expected float32, or bfloat16 over a bfloat16 cache, a multiple of {_LANES}"
        )
    if reason := why_not():
        raise RuntimeError(f"paged_attention: implementation='cpu' is not available: {reason}")
    call = jax.ffi.ffi_call(kernel.target, jax.ShapeDtypeStruct(q.shape, q.dtype))
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    arrays = (q, kv, layer, window, batch.block_tables, batch.kv_lens, batch.query_starts, sinks)
    return call(*arrays, scale=np.float32(scale), softcap=np.float32(softcap or 0.0))
