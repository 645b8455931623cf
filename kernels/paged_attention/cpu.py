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


def refuses(q, kv) -> str:
    """Why the compiled kernel cannot take these arrays, in one line; empty if it can."""
    if (q.dtype, kv.dtype) not in ((jnp.float32,) * 2, (jnp.bfloat16,) * 2, (jnp.float32, jnp.bfloat16)):
        return f"found {q.dtype} over a cache of {kv.dtype}, expected float32, or bfloat16 over bfloat16"
    if q.shape[-1] % _LANES:
        return f"found head_dim {q.shape[-1]}, expected a multiple of {_LANES}"
    return why_not()


def paged_attention(q, kv, layer, batch, *, scale, window, softcap=None, sinks=None, staged=None):
    call = jax.ffi.ffi_call(kernel.target, jax.ShapeDtypeStruct(q.shape, q.dtype))
    sinks = jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    staged = jnp.zeros((0, *kv.shape[2:]), kv.dtype) if staged is None else staged
    arrays = (q, kv, layer, window, batch.block_tables, batch.kv_lens, batch.query_starts, sinks, staged)
    return call(*arrays, scale=np.float32(scale), softcap=np.float32(softcap or 0.0))
