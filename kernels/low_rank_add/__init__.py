"""`low_rank_add(base, low, b)`: `base + low @ b` with few columns in `low`, as an adapter adds to a wide product.

ref.py: plain jax.numpy, the oracle and what XLA runs; has gradients
cpu.py -> low_rank_add.cc: compiled, one pass over `base`, in place where nobody else reads it
"""

from typing import Literal

from jaxtyping import Array, Float

from kernels.low_rank_add import cpu, ref
from kernels.platforms import implementation_for

__all__ = ["Implementation", "low_rank_add"]

Implementation = Literal["ref", "xla", "cpu"]
_FORMS = {"ref": ref.low_rank_add, "xla": ref.low_rank_add, "cpu": cpu.low_rank_add}


def low_rank_add(
    base: Float[Array, "rows N"],
    low: Float[Array, "rows r"],
    b: Float[Array, "r N"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "rows N"]:
    """`base + low @ b`.

    Args:
      implementation: "ref" or "xla" (the same form, differentiable), or "cpu" (compiled C++: float32, N a multiple of
        16, no gradient). None picks "cpu" where it can run, else "xla".

    Raises:
      ValueError: shapes that do not fit, or a form that cannot take these arrays.
      RuntimeError: the implementation asked for cannot run here.
    """
    if base.shape != (*low.shape[:1], *b.shape[1:]) or low.shape[1:] != b.shape[:1]:
        raise ValueError(f"low_rank_add: base {base.shape}, low {low.shape} and b {b.shape} do not fit")
    form = implementation_for(
        "low_rank_add", implementation, _FORMS, lambda f: cpu.refuses(base, low, b) if f == "cpu" else ""
    )
    return _FORMS[form](base, low, b)
