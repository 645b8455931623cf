"""`matmul(x, w)`: products with weights that are plain arrays, stacks of layers, or packed for the CPU.

A plain `w [K, N]` goes to XLA's dot on every platform, for training and for accelerators. A `StackedWeight` holds the
matrices of all layers; on a GPU, rows meet one of them in a kernel that reads it where it lies, elsewhere XLA's dot
gets a copy of it. `pack` stores weights once,
as float32 or bfloat16, in the order a CPU streams them from memory; `matmul` then runs a compiled kernel
(packed_matmul.cc), faster at the few rows of a decode step; in bfloat16 it is twice as fast again where the processor
multiplies bfloat16 itself (AVX512-BF16). A stack of layers stays one array: inside a scan, `packed.at_layer(index)`
names a layer and copies nothing.

    source packed_matmul.cc -> kernels/native.py (compile, cache) -> cpu.py (XLA custom call) <- packed.py (the layout)
    ref.py: the oracle       xla.py: what XLA compiles itself, also for packed weights where there is no compiler
    stacked.py: a stack of layers       pallas_gpu.py: its products on NVIDIA GPUs
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kernels.matmul import cpu, ref, xla
from kernels.matmul.cpu import available, why_not
from kernels.matmul.packed import PANEL_COLUMNS, PackedWeight, pack, pack_transposed
from kernels.matmul.stacked import StackedWeight
from kernels.platforms import implementation_for, pallas_module

__all__ = [
    "PANEL_COLUMNS",
    "Implementation",
    "PackedWeight",
    "StackedWeight",
    "available",
    "matmul",
    "pack",
    "pack_transposed",
    "why_not",
]

Implementation = Literal["ref", "xla", "cpu", "pallas_gpu", "interpret"]


def matmul(
    x: Float[Array, "... K"],
    w: Float[Array, "K N"] | PackedWeight | StackedWeight,
    bias: Float[Array, " N"] | None = None,
    *,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "... N"]:
    """`x @ w + bias`.

    Args:
      x: any leading axes.
      w: a plain matrix, a `StackedWeight` with `at_layer` chosen, or a `PackedWeight` (one matrix, or a stack with
        `at_layer` chosen). `x` is rounded to a packed
        weight's dtype and the sums are float32; by the "cpu" implementation a row is bit-identical whatever other rows
        are in the batch. Of one with `for_rows` chosen, the result's rows beyond those are zeros. (A processor's
        bfloat16 unit takes subnormal numbers, below 1e-38, for zero.)
      bias: added before the result is rounded to `out_dtype`; with a plain or stacked `w` afterwards.
      out_dtype: of the result; None is float32 for a packed weight, and what `x @ w` has for a plain one.
      implementation: "ref" (the oracle), "xla" (XLA's own), "cpu" (the compiled kernel, packed weights only),
        "pallas_gpu" (NVIDIA GPUs, stacked weights) or "interpret" (the same, run by JAX's interpreter on any platform,
        slowly). None is XLA's dot for a plain matrix; for others the platform's kernel where it can
        run, else the "xla" form.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or "cpu" with a plain matrix.
      TypeError: on differentiation or `jax.vmap` with a packed weight; a packed weight with an `x` that is not floating
        point.
      RuntimeError: implementation="cpu" where the kernel cannot be built.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"matmul: unknown implementation {implementation!r}; expected None or one of {known}")
    if isinstance(w, PackedWeight | StackedWeight) and w.ndim != 2:
        raise ValueError(f"matmul: the weight is a stack of shape {w.shape}; choose a matrix with at_layer(index)")
    if not isinstance(w, PackedWeight):
        if implementation == "cpu":
            raise ValueError("matmul: implementation='cpu' takes a PackedWeight; pack(w) makes one")
        out = (
            _stacked(implementation, x, w, out_dtype)
            if isinstance(w, StackedWeight)
            else _plain(implementation, x, w, out_dtype)
        )
        return out if bias is None else out + bias.astype(out.dtype)
    if x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x of shape {tuple(x.shape)} does not fit a weight of shape {w.shape}")
    if bias is not None and bias.shape != (w.out_features,):
        raise ValueError(f"matmul: bias of shape {tuple(bias.shape)} does not fit a weight of shape {w.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"matmul: a packed weight takes floating point rows, found {x.dtype}")
    dtype = jnp.dtype(jnp.float32 if out_dtype is None else out_dtype)
    if 0 in x.shape or 0 in w.shape:
        return _finished(jnp.zeros((*x.shape[:-1], w.out_features), jnp.float32), bias, dtype)
    return _serve_only(implementation, x.astype(w.dtype), w, bias, dtype)


def _plain(implementation: Implementation | None, x: Array, w: Array, out_dtype: DTypeLike | None) -> Array:
    if implementation in ("pallas_gpu", "interpret"):
        raise ValueError(f"matmul: implementation={implementation!r} takes a StackedWeight")
    return (ref.matmul if implementation == "ref" else xla.matmul)(x, w, out_dtype)


def _stacked(implementation: Implementation | None, x: Array, w: StackedWeight, out_dtype: DTypeLike | None) -> Array:
    if x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"matmul: x of shape {tuple(x.shape)} does not fit a weight of shape {w.shape}")

    def refuses(form: str) -> str:
        if form not in ("pallas_gpu", "interpret"):
            return ""
        from kernels.matmul import pallas_gpu

        return pallas_gpu.refuses(x, w)

    form = implementation_for("matmul", implementation, ("ref", "xla", "pallas_gpu", "interpret"), refuses)
    if form in ("ref", "xla"):
        return (ref.matmul if form == "ref" else xla.matmul)(x, w.cut(), out_dtype)
    module, _ = pallas_module("kernels.matmul", "pallas_gpu")
    return module.matmul(x, w, out_dtype, interpret=form == "interpret")


def _packed(
    implementation: Implementation | None, x: Array, w: PackedWeight, bias: Array | None, dtype: jnp.dtype
) -> Array:
    def compiled(x: Array, w: PackedWeight, bias: Array | None) -> Array:
        if dtype in (jnp.float32, jnp.bfloat16):
            return cpu.matmul(x, w, bias, dtype)
        return cpu.matmul(x, w, bias, jnp.dtype(jnp.float32)).astype(dtype)

    def by_xla(x: Array, w: PackedWeight, bias: Array | None) -> Array:
        return _finished(xla.matmul(x, w), bias, dtype, w.rows)

    if implementation == "ref":
        return _finished(ref.matmul(x, w), bias, dtype, w.rows)
    if implementation == "cpu":
        return compiled(x, w, bias)
    if implementation in ("pallas_gpu", "interpret"):
        raise ValueError(f"matmul: implementation={implementation!r} takes a StackedWeight")
    if implementation == "xla" or not available():
        return by_xla(x, w, bias)
    # By the platform the program is compiled for, not the one it is traced on.
    return jax.lax.platform_dependent(x, w, bias, cpu=compiled, default=by_xla)


def _finished(out: Array, bias: Array | None, dtype: jnp.dtype, rows: Array | None = None) -> Array:
    out = out if bias is None else out + bias.astype(out.dtype)
    if rows is not None:
        flat = out.reshape(-1, out.shape[-1])
        out = jnp.where(jnp.arange(flat.shape[0])[:, None] < rows, flat, 0).reshape(out.shape)
    return out.astype(dtype)


def _serve_only(
    implementation: Implementation | None, x: Array, w: PackedWeight, bias: Array | None, dtype: jnp.dtype
) -> Array:
    """The product, wrapped so that differentiation and vmap fail with a sentence that says what to do."""

    @jax.custom_batching.custom_vmap
    def product(x: Array, w: PackedWeight, bias: Array | None) -> Array:
        return _packed(implementation, x, w, bias, dtype)

    @product.def_vmap
    def _no_vmap(axis_size, in_batched, x, w, bias):
        raise TypeError("matmul: jax.vmap over a PackedWeight product is not supported; give x the extra axis instead")

    guarded = jax.custom_jvp(product)

    @guarded.defjvp
    def _no_gradient(primals, tangents):
        raise TypeError("matmul: a PackedWeight is for serving and has no gradient; use the plain matrix (w.unpack())")

    return guarded(x, w, bias)
