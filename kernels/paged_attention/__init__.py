"""Attention of new tokens over a paged KV cache: one ragged operation for prompt chunks and decode rows.

The cache is `[layers, pages, page_size, 2 * kv_heads, head_dim]`, keys and values interleaved on the head axis (2h is
key head h, 2h + 1 its value), so that one page of one layer is one contiguous block. Query rows of all sequences lie
one after another; sequence s owns rows `query_starts[s] .. query_starts[s + 1]`, the last tokens of its `kv_lens[s]`
tokens in the cache. The first `num_decodes` sequences have one row each.

A layer's pages may lie in two arrays: the cache, and pages that were fetched for this layer alone. Pages keep their
order in the block table, so sums run in the order in which they would without.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.paged_attention import cpu, ref, xla
from kernels.paged_attention.ragged import QUERY_BLOCK, Ragged, ragged
from kernels.platforms import implementation_for

Implementation = Literal["ref", "xla", "cpu", "pallas_gpu", "pallas_tpu", "interpret"]


def paged_attention(
    q: Float[Array, "rows heads head_dim"],
    kv: Float[Array, "layers pages page_size kv_heads_2 head_dim"],
    layer: Int[Array, ""],
    batch: Ragged,
    *,
    scale: float,
    window: Int[Array, ""] | int = 2**30,
    softcap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    staged_pages: Float[Array, "staged page_size kv_heads_2 head_dim"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows heads head_dim"]:
    """Softmax attention of every query row over its own sequence's cached tokens, causal, within `window`.

    Key j is visible to the query at position i if `i - window < j <= i`. Scores and softmax are float32; the result has
    q's dtype. Rows beyond `query_starts[-1]` are finite and meaningless.

    Args:
      softcap: c > 0 turns every score s into c * tanh(s / c) (Gemma 2); None leaves them.
      sinks: one logit a head that joins the softmax as a key without a value (gpt-oss); None for none.
      staged_pages: more pages of this layer: `pages + i` in a block table is `staged_pages[i]`. None for none.
      implementation: "ref" (dense, the oracle), "xla" (blocked, cost follows the real lengths), "cpu" (compiled C++:
        float32 or bfloat16 computed in float32, head_dim a multiple of 16; a row's result does not depend on the rows
        beside it), "pallas_gpu" (NVIDIA GPUs: head_dim up to 256), "pallas_tpu" (head_dim a multiple of 128) or
        "interpret" (the GPU form, run by JAX's interpreter on any platform, slowly). None picks the platform's own
        form where it can, else "xla".

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot take them.
      RuntimeError: an implementation was asked for that cannot run on this platform.
    """
    if q.shape[-1] != kv.shape[-1]:
        raise ValueError(f"head_dim of q is {q.shape[-1]}, of the cache {kv.shape[-1]}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: found {softcap}, expected a positive number or None")
    if sinks is not None and sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks: found shape {sinks.shape}, expected one logit a head, ({q.shape[1]},)")
    if staged_pages is not None and (staged_pages.shape[1:], staged_pages.dtype) != (kv.shape[2:], kv.dtype):
        raise ValueError(
            f"staged_pages: found {staged_pages.dtype} {staged_pages.shape[1:]} a page, expected {kv.dtype} "
            f"{kv.shape[2:]} as in the cache"
        )
    if staged_pages is not None and staged_pages.shape[0] == 0:
        staged_pages = None
    form = implementation_for("paged_attention", implementation, _FORMS, lambda form: _refuses(form, q, kv, batch))
    window = jnp.asarray(window, jnp.int32)
    arrays = (q, kv, jnp.asarray(layer, jnp.int32), batch)
    options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    return _FORMS[form](*arrays, **options, staged=staged_pages)


def _refuses(form: str, q, kv, batch) -> str:
    """Why `form` cannot take these arrays, in one line; empty if it can."""
    if form == "cpu":
        return cpu.refuses(q, kv)
    if form in ("pallas_gpu", "interpret"):
        from kernels.paged_attention import pallas_gpu

        return pallas_gpu.refuses(q, kv)
    if form == "pallas_tpu":
        from kernels.paged_attention import pallas_tpu

        return pallas_tpu.refuses(q, kv, batch)
    return ""


# Pallas is imported where it is used: it takes a while, and on a CPU nobody needs it.
def _pallas_gpu(*arrays, **options):
    from kernels.paged_attention import pallas_gpu

    return pallas_gpu.paged_attention(*arrays, **options)


def _pallas_tpu(*arrays, **options):
    from kernels.paged_attention import pallas_tpu

    return pallas_tpu.paged_attention(*arrays, **options)


_FORMS: dict[str, Callable] = {
    "ref": ref.paged_attention,
    "xla": xla.paged_attention,
    "cpu": cpu.paged_attention,
    "pallas_gpu": _pallas_gpu,
    "pallas_tpu": _pallas_tpu,
    "interpret": functools.partial(_pallas_gpu, interpret=True),
}


__all__ = ["QUERY_BLOCK", "Implementation", "Ragged", "paged_attention", "ragged"]
