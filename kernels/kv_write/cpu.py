"""The CPU form: an XLA custom call into kv_write.cc that works on the cache's own memory, compiled on first use."""

from pathlib import Path

import jax

from kernels.native import NativeKernel

kernel = NativeKernel(Path(__file__).with_name("kv_write.cc"), symbol="JaxstackKvWrite", target="jaxstack_kv_write")
why_not = kernel.why_not


def kv_write(cache, k, v, layer, slots):
    call = jax.ffi.ffi_call(kernel.target, jax.ShapeDtypeStruct(cache.shape, cache.dtype), input_output_aliases={0: 0})
    return call(cache, k.astype(cache.dtype), v.astype(cache.dtype), layer, slots)
