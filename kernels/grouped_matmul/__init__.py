"""`grouped_matmul(x, w, group_sizes)`: each row times the matrix of its group: the experts of a mixture.

Rows lie sorted by group. `work_items` cuts them into blocks of one group each; the fast forms loop over those:

    ref.py: every matrix for every row, then a choice        xla.py: a loop over blocks (CPU), `ragged_dot` elsewhere
    pallas_gpu.py: one program a block                       pallas_tpu.py: aligned tiles, each once a group it touches
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.grouped_matmul import gradient, ref
from kernels.platforms import implementation_for

__all__ = ["Implementation", "grouped_matmul"]

Implementation = Literal["ref", "xla", "pallas_gpu", "pallas_tpu", "interpret"]
_FORMS = ("ref", "xla", "pallas_gpu", "pallas_tpu", "interpret")


def grouped_matmul(
    x: Float[Array, "rows K"],
    w: Float[Array, "*L E K N"],
    group_sizes: Int[Array, " E"],
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows N"]:
    """Row by row `x @ w[e]` (`x @ w[layer, e]` of a stack), where group e owns the `group_sizes[e]` rows after those of
    the groups before it.

    Rows past the last group give zeros. Sums are float32, the result has x's dtype. Differentiable in x and w by
    reverse mode. A stack is indexed where it lies, no layer of it is copied; but the gradient of a stack is a whole
    stack, so training should pass `w` of one layer (the scanned slice).

    Args:
      layer: which matrices of a stack; required with four axes, refused with three.
      implementation: "ref" (the oracle), "xla", "pallas_gpu", "pallas_tpu", or "interpret" (the Pallas kernel in
        Pallas's interpreter). None picks the fastest that can run here.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      RuntimeError: the implementation asked for cannot run here.
    """
    _check(x, w, group_sizes, layer)
    form = implementation_for("grouped_matmul", implementation, _FORMS)
    group_sizes = group_sizes.astype(jnp.int32)
    stack = w if w.ndim == 4 else w[None]
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    if 0 in x.shape or 0 in w.shape:
        return jnp.zeros((x.shape[0], w.shape[-1]), x.dtype)
    if form == "ref":
        return ref.grouped_matmul(x, stack, group_sizes, layer)
    return gradient.grouped_matmul(form, x, stack, group_sizes, layer)


def _check(x, w, group_sizes, layer):
    if w.ndim not in (3, 4) or (w.ndim == 4) != (layer is not None):
        given = "no layer" if layer is None else "a layer"
        raise ValueError(
            f"grouped_matmul: expected w [E, K, N], or [L, E, K, N] with layer=; found shape {w.shape}, {given}"
        )
    if x.ndim != 2 or x.shape[1] != w.shape[-2]:
        raise ValueError(f"grouped_matmul: x of shape {x.shape} does not fit matrices of shape {w.shape[-2:]}")
    if group_sizes.shape != w.shape[-3:-2]:
        raise ValueError(f"grouped_matmul: found group_sizes of shape {group_sizes.shape}, expected ({w.shape[-3]},)")
