"""`lora_matmul(x, a, b, scale, adapter_of_row)`: what many low-rank adapters add to one batch (Hu et al. 2021; several
adapters in one product as in Punica, Chen et al. 2023).

    ref.py: gathers each row's factors        xla.py: a loop over blocks of rows and the adapters met in each
    pallas_gpu.py, pallas_tpu.py: the same blocks (blocks.py), down to the rank and up again
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.lora_matmul import gradient, ref
from kernels.platforms import implementation_for

__all__ = ["Implementation", "lora_matmul"]

Implementation = Literal["ref", "xla", "pallas_gpu", "pallas_tpu", "interpret"]
_FORMS = ("ref", "xla", "pallas_gpu", "pallas_tpu", "interpret")


def lora_matmul(
    x: Float[Array, "rows in"],
    a: Float[Array, "*L n in r"],
    b: Float[Array, "*L n r out"],
    scale: Float[Array, "*L n"],
    adapter_of_row: Int[Array, " rows"],
    *,
    layer: Int[Array, ""] | int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "rows out"]:
    """Row by row `scale[i] * (x @ a[i]) @ b[i]` with i the row's adapter; of a stack, the layer's.

    Adapter 0 is "none": zeros, whatever `a[0]` and `b[0]` hold. If no row has an adapter, no work is done. Rows
    may come in any order; those of one adapter side by side are quickest. Sums are float32, the result has x's dtype
    and a row of it does not depend on the rows beside it. Differentiable in x, a, b and scale by reverse mode.

    Args:
      layer: which factors of stacks with a leading layer axis; nothing of other layers is touched.
      implementation: "ref" (the oracle), "xla", "pallas_gpu", "pallas_tpu", or "interpret" (the Pallas kernel in
        Pallas's interpreter). None picks the fastest that can run here.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
      RuntimeError: the implementation asked for cannot run here.
    """
    _check(x, a, b, scale, adapter_of_row, layer)
    form = implementation_for("lora_matmul", implementation, _FORMS)
    if layer is None:
        a, b, scale = a[None], b[None], scale[None]
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    if 0 in x.shape or 0 in a.shape or 0 in b.shape:
        return jnp.zeros((x.shape[0], b.shape[-1]), x.dtype)
    adapter_of_row = jnp.clip(adapter_of_row.astype(jnp.int32), 0, a.shape[1] - 1)
    if form == "ref":
        return ref.lora_matmul(x, a, b, scale, adapter_of_row, layer)
    return gradient.lora_matmul(form, x, a, b, scale, adapter_of_row, layer)


def _check(x, a, b, scale, adapter_of_row, layer):
    axes = 3 if layer is None else 4
    if a.ndim != axes or b.ndim != axes or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        wanted = "[n, in, r] and [n, r, out]" if layer is None else "[L, n, in, r] and [L, n, r, out]"
        raise ValueError(f"lora_matmul: found a {a.shape} and b {b.shape}, expected {wanted}")
    if scale.shape != a.shape[:-2]:
        raise ValueError(f"lora_matmul: found scale of shape {scale.shape}, expected {a.shape[:-2]}")
    if x.ndim != 2 or x.shape[1] != a.shape[-2]:
        raise ValueError(f"lora_matmul: x of shape {x.shape} does not fit a of shape {a.shape}")
    if adapter_of_row.shape != x.shape[:1]:
        raise ValueError(f"lora_matmul: found adapter_of_row of shape {adapter_of_row.shape}, expected {x.shape[:1]}")
