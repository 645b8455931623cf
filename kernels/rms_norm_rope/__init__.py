"""`rms_norm_rope(q, k, cos, sin, q_weight, k_weight)`: the norms of query and key heads and their rotation, in one go.

What attention does to its heads between the projections and the cache: RMSNorm of each head (Qwen3, Gemma 3; others
have none), then the rotary embedding (Su et al. 2021) of its halves.

    ref.py: step by step        xla.py: heads as two halves, so that XLA writes each result once
    pallas_gpu.py, pallas_tpu.py: one kernel, queries and keys together; one read and one write

On two AVX-512 cores the "xla" form takes half the time of the steps in turn at 32 rows of 24 heads of 128 (75 against
150 us, what a copy takes) and as long at 512 (1.4 ms); it is what None means on a CPU.
"""

from typing import Literal

from jaxtyping import Array, Float

from kernels.platforms import implementation_for
from kernels.rms_norm_rope import gradient, ref, xla

__all__ = ["Implementation", "rms_norm_rope"]

Implementation = Literal["ref", "xla", "pallas_gpu", "pallas_tpu", "interpret"]
_FORMS = ("ref", "xla", "pallas_gpu", "pallas_tpu", "interpret")


def rms_norm_rope(
    q: Float[Array, "... heads head_dim"],
    k: Float[Array, "... kv_heads head_dim"],
    cos: Float[Array, "... half"],
    sin: Float[Array, "... half"],
    q_weight: Float[Array, " head_dim"] | None = None,
    k_weight: Float[Array, " head_dim"] | None = None,
    *,
    eps: float = 1e-6,
    offset: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "... heads head_dim"], Float[Array, "... kv_heads head_dim"]]:
    """Each head x becomes `n = weight * x / sqrt(mean(x^2) + eps)`, then `(n1 cos - n2 sin, n2 cos + n1 sin)` with n1,
    n2 the two halves of its first `2 * half` features; those beyond stay as the norm left them.

    Statistics and rotation are float32, results have the dtypes of q and k. Differentiable by reverse mode.

    Args:
      cos, sin: of every row's position, `half` at most head_dim / 2.
      q_weight, k_weight: None for no norm; both or neither.
      offset: Gemma's norm, `(1 + weight) * n` in float32; else Llama's, which rounds n to the heads' dtype first.
      implementation: "ref" (the oracle), "xla", "pallas_gpu", "pallas_tpu" (all features rotated, head_dim a multiple
        of 128), or "interpret" (the Pallas kernel in Pallas's interpreter). None picks the fastest that can run here.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not exist or cannot take them.
      RuntimeError: the implementation asked for cannot run here.
    """
    head_dim, half = q.shape[-1], cos.shape[-1]
    if q.ndim < 2 or k.shape[-1] != head_dim or k.shape[:-2] != q.shape[:-2]:
        raise ValueError(f"rms_norm_rope: q of shape {q.shape} and k of shape {k.shape} do not fit each other")
    if cos.shape != sin.shape or cos.shape[:-1] != q.shape[:-2] or not 1 <= half <= head_dim // 2:
        raise ValueError(
            f"rms_norm_rope: found cos {cos.shape} and sin {sin.shape}, expected {q.shape[:-2]} and at most "
            f"{head_dim // 2} features"
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("rms_norm_rope: found one of q_weight and k_weight, expected both or neither")
    for name, weight in {"q_weight": q_weight, "k_weight": k_weight}.items():
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"rms_norm_rope: found {name} of shape {weight.shape}, expected ({head_dim},)")
    form = implementation_for("rms_norm_rope", implementation, _FORMS, lambda form: _refuses(form, head_dim, half))
    arguments = (q, k, cos, sin, q_weight, k_weight)
    if form == "ref":
        return ref.rms_norm_rope(*arguments, eps=eps, offset=offset)
    if form == "xla" or 0 in q.shape or 0 in k.shape:
        return xla.rms_norm_rope(*arguments, eps=eps, offset=offset)
    return gradient.rms_norm_rope(form, eps, offset, *arguments)


def _refuses(form: str, head_dim: int, half: int) -> str:
    if form == "pallas_tpu" and (head_dim % 128 or 2 * half != head_dim):
        return f"found head_dim {head_dim}, {2 * half} of it rotated; expected a multiple of 128, all of it"
    return ""
