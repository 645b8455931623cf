"""A linear layer that can carry low-rank adapters, and whose kernel may be packed for serving."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxstack.runtime.errors import UserError
from kernels.lora_matmul import lora_matmul
from kernels.low_rank_add import low_rank_add
from kernels.matmul import PackedWeight, StackedWeight, matmul


class LoraParam(nnx.Param):
    """A trainable low-rank factor. A type of its own, so that filters tell adapters from the model."""


class LoraWeights(nnx.Module):
    """The adapters of one linear layer (Hu et al. 2021): adapter `n` adds `scale[n] * (x @ a[n]) @ b[n]`.

    Adapter 0 is "no adapter" and holds zeros; a fine-tuning run trains adapter 1; a server holds several.
    Inside a decoder every array has the layers as its leading axis.

    With a magnitude, an adapter may be a DoRA (Liu et al. 2024): the layer's product, adapters included but without the
    bias, is multiplied by `magnitude[n] / norm[n]`, the norms being those of the columns of `kernel + scale a b`.

    Attributes:
      a: `[n_adapters, in, r]`.
      b: `[n_adapters, r, out]`.
      scale: `[n_adapters]`, usually alpha / r.
      magnitude: `[n_adapters, out]`, or None where no adapter is a DoRA.
      dora: bool `[n_adapters]`, which ones are; None likewise.
    """

    def __init__(
        self,
        a: Float[Array, "*layers n_adapters in r"],
        b: Float[Array, "*layers n_adapters r out"],
        scale: Float[Array, "*layers n_adapters"],
        magnitude: Float[Array, "*layers n_adapters out"] | None = None,
        dora: Bool[Array, "*layers n_adapters"] | None = None,
    ):
        self.a = LoraParam(a)
        self.b = LoraParam(b)
        self.scale = nnx.Variable(scale)
        self.magnitude: LoraParam | None = nnx.data(None if magnitude is None else LoraParam(magnitude))
        self.dora: nnx.Variable | None = nnx.data(None if dora is None else nnx.Variable(dora))

    def column_factors(
        self, kernel: Float[Array, "*layers in out"], slots: slice = slice(None)
    ) -> Float[Array, "*layers slots out"] | None:
        """What adapters multiply the layer's outputs by, float32; 1 where one is no DoRA, None if none of all is.

        The norm is a constant in the gradient (section 4.3 of the paper). It takes no product of `a` and `b`:
        |w + s a b|^2 = |w|^2 + 2 s w.(a b) + s^2 |a b|^2 by columns, with w.(a b) = (w^T a) b and
        |a b|^2 = b^T (a^T a) b.
        """
        if self.magnitude is None or self.dora is None:
            return None
        a, b = (v.get_value()[..., slots, :, :] for v in (self.a, self.b))
        scale, dora = (v.get_value()[..., slots, None] for v in (self.scale, self.dora))
        w, a, b, scale = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (kernel, a, b, scale))
        with jax.default_matmul_precision("highest"):
            cross = jnp.einsum("...io,...nir->...nro", w, a)
            cross = jnp.sum(cross * b, axis=-2)
            gram = jnp.einsum("...nir,...nis->...nrs", a, a)
            square = jnp.sum(jnp.einsum("...nrs,...nso->...nro", gram, b) * b, axis=-2)
        norms = jnp.sum(w * w, axis=-2)[..., None, :] + 2 * scale * cross + scale * scale * square
        dora = dora & (norms > 0)
        magnitude = self.magnitude.get_value()[..., slots, :].astype(jnp.float32)
        return jnp.where(dora, magnitude * jax.lax.rsqrt(jnp.where(dora, norms, 1.0)), 1.0)

    def __call__(self, x: Float[Array, "... in"], adapter_ids: Int[Array, "..."] | None) -> Float[Array, "... out"]:
        """The adapters' addition to the output; `adapter_ids` names one adapter a row, None is adapter 1 for all."""
        a, b, scale = (v.get_value().astype(x.dtype) for v in (self.a, self.b, self.scale))
        if adapter_ids is None:
            return _low_rank(x.reshape(-1, x.shape[-1]), a[1], b[1], scale[1]).reshape(*x.shape[:-1], -1)
        # Every adapter's narrow product, then zeros wherever the row does not use it: no [rows, in, r] gather.
        low = jnp.einsum("...i,nir->...nr", x, a)
        used = adapter_ids[..., None] == jnp.arange(a.shape[0])
        low = jnp.where(used[..., None], low * scale[:, None], 0)
        return jnp.einsum("...nr,nro->...o", low, b)

    def with_product(
        self, x: Float[Array, "... in"], kernel: Float[Array, "in out"], bias: Float[Array, " out"] | None
    ) -> Float[Array, "... out"]:
        """`x @ kernel + bias` with adapter 1's addition, for one device."""
        a, b, scale = (v.get_value().astype(x.dtype) for v in (self.a, self.b, self.scale))
        out = _adapted(x.reshape(-1, x.shape[-1]), kernel, bias, a[1], b[1], scale[1], None)
        return out.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _low_rank(
    x: Float[Array, "rows in"], a: Float[Array, "in r"], b: Float[Array, "r out"], scale: Float[Array, ""]
) -> Float[Array, "rows out"]:
    """`scale * (x @ a) @ b`, of which only the narrow product is scaled, and its gradients' too."""
    return ((x @ a) * scale) @ b


def _low_rank_forward(x, a, b, scale):
    low = x @ a
    return (low * scale) @ b, (x, a, b, scale, low)


def _low_rank_backward(kept, d_out):
    x, a, b, scale, low = kept
    d_low, *d_factors = _factor_gradients(x, b, scale, low, d_out)
    return d_low @ a.T, *d_factors


def _factor_gradients(x, b, scale, low, d_out):
    """Of `low = x @ a`, then of a, b and scale."""
    d_scaled = d_out @ b.T
    d_low = d_scaled * scale
    # XLA's CPU backend takes twice as long for a product that reads its wide operand by columns: the narrow operand is
    # turned instead, and the barrier keeps the turning out of the product.
    low_turned, d_low_turned = jax.lax.optimization_barrier(((low * scale).T, d_low.T))
    return d_low, (d_low_turned @ x).T, low_turned @ d_out, jnp.sum(d_scaled * low).astype(scale.dtype)


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _adapted(
    x: Float[Array, "rows in"],
    kernel: Float[Array, "in out"],
    bias: Float[Array, " out"] | None,
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    scale: Float[Array, ""],
    implementation: Literal["xla"] | None,
) -> Float[Array, "rows out"]:
    """`x @ kernel + bias + scale * (x @ a) @ b` and its gradients, which pass over a wide product once to add to it."""
    return _adapted_forward(x, kernel, bias, a, b, scale, implementation)[0]


def _adapted_forward(x, kernel, bias, a, b, scale, implementation):
    low = x @ a
    narrow, wide = low * scale, b
    if bias is not None:  # one more row of the factor
        narrow = jnp.pad(narrow, ((0, 0), (0, 1)), constant_values=1)
        wide = jnp.concatenate([b, bias.astype(b.dtype)[None]])
    out = low_rank_add(matmul(x, kernel), narrow, wide, implementation=implementation)
    return out, (x, kernel, bias, a, b, scale, low)


def _adapted_backward(implementation, kept, d_out):
    x, kernel, bias, a, b, scale, low = kept
    d_low, *d_factors = _factor_gradients(x, b, scale, low, d_out)
    d_x = low_rank_add(matmul(d_out, kernel.T), d_low, a.T, implementation=implementation)
    # Of a frozen layer nobody asks for these, and they are not computed.
    d_bias = None if bias is None else jnp.sum(d_out, axis=0).astype(bias.dtype)
    return d_x, matmul(x.T, d_out).astype(kernel.dtype), d_bias, *d_factors


_adapted.defvjp(_adapted_forward, _adapted_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterStack:
    """The adapters that a server holds for one linear layer, or for a stack of `L` of them.

    Attributes:
      a: `[*L, n_adapters, in, r]`; adapter 0 is "no adapter" and holds zeros, as every empty slot does.
      b: `[*L, n_adapters, r, out]`.
      scale: `[*L, n_adapters]`.
      layer: which layer of a stack is meant; None for a single layer, or for a stack not indexed yet.
    """

    a: Float[Array, "*L n_adapters in r"]
    b: Float[Array, "*L n_adapters r out"]
    scale: Float[Array, "*L n_adapters"]
    layer: Int[Array, ""] | None = None

    def at_layer(self, index: Int[Array, ""]) -> "AdapterStack":
        """One layer of a stack. Nothing is copied: most steps read only a few adapters of it, or none."""
        return dataclasses.replace(self, layer=index)


class AdapterFactors(nnx.Variable):
    """Holds an `AdapterStack`. A type of its own, so that filters tell what a server may exchange while it runs."""


class LoraSlots(nnx.Module):
    """Adapters of one linear layer of a server: loaded and unloaded by writing a slot of `factors`.

    Attributes:
      factors: its value is an `AdapterStack`, which a scan over layers indexes instead of cutting it up.
    """

    def __init__(self, factors: AdapterStack):
        self.factors = AdapterFactors(factors)

    def __call__(self, x: Float[Array, "... in"], adapter_ids: Int[Array, "..."] | None) -> Float[Array, "... out"]:
        """The adapters' addition to the output; None for `adapter_ids` is no adapter anywhere."""
        factors = self.factors.get_value()
        if adapter_ids is None:
            return jnp.zeros((*x.shape[:-1], factors.b.shape[-1]), x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        ids = jnp.broadcast_to(adapter_ids, x.shape[:-1]).reshape(-1)
        out = lora_matmul(rows, factors.a, factors.b, factors.scale, ids, layer=factors.layer)
        return out.reshape(*x.shape[:-1], out.shape[-1])


class Linear(nnx.Module):
    """`x @ kernel (+ bias) (+ adapters)`.

    Attributes:
      kernel: `nnx.Param [in, out]`; in a serving decoder its value is a `PackedWeight` or a `StackedWeight` of
        `kernels.matmul`.
      bias: `nnx.Param [out]` or None.
      lora: `LoraWeights` in training, `LoraSlots` in a server, or None.
      sum_over: the mesh axis over which the inputs are cut, inside a `jax.shard_map`: products are summed over it.
      implementation: "xla" where XLA may spread the layer over devices, None for the fastest form on one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        kernel_init: Callable[..., Array] | None = None,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        kernel_init = kernel_init or nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias: nnx.Param | None = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else nnx.data(None)
        self.lora: LoraWeights | LoraSlots | None = nnx.data(None)
        self.sum_over: str | None = None
        self.implementation: Literal["xla"] | None = "xla"

    def __call__(
        self,
        x: Float[Array, "... in"],
        adapter_ids: Int[Array, "..."] | None = None,
        *,
        out_dtype: jnp.dtype | None = None,
    ) -> Float[Array, "... out"]:
        """Computes in `x`'s dtype, to which parameters of another are cast; with a packed kernel in that one's, with
        a stacked one in the wider of the two.

        Args:
          adapter_ids: one adapter for each row of `x` (its leading dimensions), or None for the only one
            (`LoraWeights`: adapter 1 everywhere; `LoraSlots`: none). Ignored by a layer that carries no adapters.
          out_dtype: of the result, with the products accumulated in it; None for `x`'s.
        """
        kernel = self.kernel.get_value()
        out_dtype = x.dtype if out_dtype is None else out_dtype
        if not isinstance(kernel, PackedWeight | StackedWeight):
            kernel = kernel.astype(x.dtype)
        bias = None if self.bias is None else self.bias.get_value()
        lora = self.lora
        if isinstance(lora, LoraWeights) and lora.magnitude is not None:
            return self._with_dora(lora, x, adapter_ids, kernel, out_dtype)
        if isinstance(lora, LoraWeights) and adapter_ids is None and self.implementation is None:
            assert self.sum_over is None and not isinstance(kernel, PackedWeight | StackedWeight)
            if out_dtype == x.dtype:
                return lora.with_product(x, kernel, bias)
        out = matmul(x, kernel, bias if self.sum_over is None else None, out_dtype=out_dtype)
        if lora is not None:
            out = out + lora(x, adapter_ids).astype(out_dtype)
        if self.sum_over is not None:
            out = jax.lax.psum(out, self.sum_over)
            out = out if bias is None else out + bias.astype(out_dtype)  # once, not on every device
        return out

    def _with_dora(self, lora: LoraWeights, x: Array, adapter_ids: Array | None, kernel: Any, out_dtype: Any) -> Array:
        stored = self.kernel.get_value()
        if self.sum_over is not None or isinstance(stored, PackedWeight | StackedWeight):
            raise UserError("a layer laid out for serving cannot carry a DoRA adapter (use_dora); merge it first")
        factors = lora.column_factors(stored, slice(1, 2) if adapter_ids is None else slice(None))
        assert factors is not None
        if adapter_ids is None:
            factor = factors[0]
        else:
            used = adapter_ids[..., None] == jnp.arange(factors.shape[0])
            factor = jnp.sum(jnp.where(used[..., None], factors, 0), axis=-2)
        out = matmul(x, kernel, None, out_dtype=out_dtype) + lora(x, adapter_ids).astype(out_dtype)
        out = out * factor.astype(out_dtype)
        return out if self.bias is None else out + self.bias.get_value().astype(out_dtype)
