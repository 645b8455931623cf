"""`packed_attention(q, k, v, first)`: causal attention within the documents of packed rows, for training.

The forward pass keeps the output and one number a query (the log of the softmax's denominator); the backward pass
computes the probabilities again (Dao et al. 2022, section 3.1), so no [T, T] array is kept.

    ref.py: the oracle        xla.py: blocks of a row, fixed when the program is compiled
    cpu.py: packed_attention.cc, which looks where documents begin and does no more than they need
"""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from kernels.packed_attention import cpu, ref, xla
from kernels.platforms import implementation_for

__all__ = ["Implementation", "packed_attention"]

Implementation = Literal["ref", "xla", "cpu"]
_FORMS = ("ref", "xla", "cpu")


def packed_attention(
    q: Float[Array, "rows T H hd"],
    k: Float[Array, "rows T KV hd"],
    v: Float[Array, "rows T KV hd"],
    first: Int[Array, "rows T"],
    *,
    longest: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows T H hd"]:
    """Softmax of `q . k` over the keys from `first` to the query itself, then the sum of values. Scale q beforehand.

    Scores and sums are float32, the result has q's dtype. Differentiable by reverse mode.

    Args:
      q, k, v: heads in groups of H / KV share a key head.
      first: int32, the first key that a query sees, as an index into its row: at most the query's own, and never
        less than the one before it in the row has.
      longest: no query sees more keys; None for T. The "xla" form does not even look at those further back.
      softcap: scores become `softcap * tanh(score / softcap)`.
      implementation: "ref" (the oracle), "xla", "cpu" (head_dim a multiple of 16). None picks the fastest that can run.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot take them.
      RuntimeError: the implementation asked for cannot run here.
    """
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if k.shape != v.shape or k.shape != (rows, length, kv_heads, head_dim) or heads % kv_heads:
        raise ValueError(f"packed_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    if first.shape != (rows, length):
        raise ValueError(f"packed_attention: found first of shape {first.shape}, expected {(rows, length)}")
    form = implementation_for(
        "packed_attention", implementation, _FORMS, lambda form: cpu.refuses(q) if form == "cpu" else ""
    )
    if form == "ref":
        return ref.packed_attention(q, k, v, first, softcap=softcap)
    return _attention(q, k, v, first, softcap, longest or length, form)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(q, k, v, first, softcap, longest, form):
    return _keep(q, k, v, first, softcap, longest, form)[0]


def _keep(q, k, v, first, softcap, longest, form):
    if form == "cpu":
        out, log_total = cpu.forward(q, k, v, first, softcap)
    else:
        out, log_total = xla.forward(q, k, v, first, softcap, longest)
    return out, (q, k, v, first, out, log_total)


def _pull_back(softcap, longest, form, kept, d_out):
    q, k, v, first, out, log_total = kept
    if form == "cpu":
        return *cpu.backward(q, k, v, first, out, log_total, d_out, softcap), None
    return *xla.backward(q, k, v, first, out, log_total, d_out, softcap, longest), None


_attention.defvjp(_keep, _pull_back)
