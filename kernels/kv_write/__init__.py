"""Writing the keys and values of new tokens into a paged KV cache, in place.

The cache has the layout of `kernels.paged_attention`: `[layers, pages, page_size, 2 * kv_heads, head_dim]`, keys and
values interleaved on the head axis. A token's slot is `page * page_size + offset`.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.kv_write import cpu, ref, xla
from kernels.platforms import implementation_for

Implementation = Literal["ref", "xla", "cpu", "pallas_gpu", "pallas_tpu", "interpret"]


def kv_write(
    cache: Float[Array, "layers pages page_size kv_heads_2 head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    layer: Int[Array, ""],
    slots: Int[Array, " rows"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "layers pages page_size kv_heads_2 head_dim"]:
    """The cache with row r of k and v at slot `slots[r]` of `layer`, in the cache's dtype.

    Every slot must lie in the cache. Rows may share a slot that nobody reads (padding goes to a scrap page): which of
    them stays there is not defined. Give the cache away (donate it, or carry it through a loop), or XLA copies it.

    Args:
      implementation: "ref" (row by row, the oracle), "xla" (one scatter), "cpu" (compiled C++), "pallas_gpu" (NVIDIA
        GPUs), "pallas_tpu" or "interpret" (the GPU form, run by JAX's interpreter on any platform, slowly). None picks
        the platform's own form where it can, else "xla".

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot take them.
      RuntimeError: an implementation was asked for that cannot run on this platform.
    """
    rows, kv_heads, head_dim = k.shape
    if k.shape != v.shape or cache.shape[3:] != (2 * kv_heads, head_dim) or slots.shape != (rows,):
        raise ValueError(f"kv_write: k {k.shape}, v {v.shape} and slots {slots.shape} do not fit cache {cache.shape}")
    form = implementation_for("kv_write", implementation, _FORMS, lambda form: _refuses(form, cache))
    return _FORMS[form](cache, k, v, jnp.asarray(layer, jnp.int32), slots.astype(jnp.int32))


def _refuses(form: str, cache) -> str:
    """Why `form` cannot take this cache, in one line; empty if it can."""
    if form == "cpu":
        return cpu.why_not()
    if form == "pallas_tpu" and cache.shape[-1] % 128:
        return f"found head_dim {cache.shape[-1]}, expected a multiple of 128"
    return ""


# Pallas is imported where it is used: it takes a while, and on a CPU nobody needs it.
def _pallas_gpu(*arrays, **options):
    from kernels.kv_write import pallas_gpu

    return pallas_gpu.kv_write(*arrays, **options)


def _pallas_tpu(*arrays, **options):
    from kernels.kv_write import pallas_tpu

    return pallas_tpu.kv_write(*arrays, **options)


_FORMS: dict[str, Callable] = {
    "ref": ref.kv_write,
    "xla": xla.kv_write,
    "cpu": cpu.kv_write,
    "pallas_gpu": _pallas_gpu,
    "pallas_tpu": _pallas_tpu,
    "interpret": functools.partial(_pallas_gpu, interpret=True),
}


__all__ = ["Implementation", "kv_write"]
