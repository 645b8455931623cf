"""`rms_norm(x, weight)`: the norm of every row; Llama's, Gemma's, or with `center` a layer norm without bias.

    ref.py: plain jax.numpy, the oracle and what XLA runs; has gradients
    cpu.py -> rms_norm.cc: compiled, for serving

A row's result in the "cpu" form does not depend on the rows beside it. XLA's does on CPUs: it sums a row in one order
where there are few rows and in another where there are many.
"""

from typing import Literal

from jaxtyping import Array, Float

from kernels.platforms import implementation_for
from kernels.rms_norm import cpu, ref

__all__ = ["Implementation", "rms_norm"]

Implementation = Literal["ref", "xla", "cpu"]
_FORMS = {"ref": ref.rms_norm, "xla": ref.rms_norm, "cpu": cpu.rms_norm}


def rms_norm(
    x: Float[Array, "... D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    offset: bool = False,
    center: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "... D"]:
    """`weight * cast(n)` with `n = x / sqrt(mean(x^2) + eps)`; statistics are float32, the result has x's dtype.

    Args:
      offset: Gemma's `cast((1 + weight) * n)`, multiplied in float32.
      center: layer norm: the mean is taken away first; `cast(weight * n)`, multiplied in float32.
      implementation: "ref" or "xla" (the same form, differentiable), or "cpu" (compiled C++: float32 and bfloat16, D a
        multiple of 16, no gradient). None picks "cpu" where it can run, else "xla".

    Raises:
      ValueError: shapes that do not fit, both `offset` and `center`, or a form that cannot take these arrays.
      RuntimeError: the implementation asked for cannot run here.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: x of shape {x.shape} and weight of shape {weight.shape} do not fit")
    if offset and center:
        raise ValueError("rms_norm: offset and center exclude each other")
    form = implementation_for(
        "rms_norm", implementation, _FORMS, lambda f: cpu.refuses(x, weight) if f == "cpu" else ""
    )
    return _FORMS[form](x, weight, eps=eps, offset=offset, center=center)
