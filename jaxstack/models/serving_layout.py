"""Weights rearranged for inference: fewer, larger products, and matrices in the order the CPU reads them.

The same functions of the same numbers: a served decoder gives the logits of the one it was made from, up to rounding.
"""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxstack.models.decoder import Decoder, LayerNorm, RMSNorm
from jaxstack.models.linear import Linear, LoraParam
from jaxstack.models.moe import Experts, Moe
from jaxstack.runtime.errors import UserError
from kernels import matmul


def fuse_for_serving(decoder: Decoder, *, pack: bool, dtype: DTypeLike = jnp.float32, consume: bool = False) -> Decoder:
    """A decoder whose q, k, v projections are one `qkv_proj` and whose gate and up projections are one `gate_up_proj`,
    those of experts too. The matrices of all layers are a `kernels.matmul.StackedWeight`, which a step indexes where it
    lies.

    What is not rearranged (embedding, norms, without `pack` the output matrix) is shared with `decoder`.

    Args:
      decoder: as loaded or trained.
      pack: store every matrix of the layers, except experts, and the output matrix as a `PackedWeight` instead; a tied
        output matrix then exists a second time, packed. Norms take their compiled form, so that all that a token's
        numbers go through has the same bits in every batch.
      dtype: of the matrices, float32 or bfloat16.
      consume: rearrange `decoder` itself, freeing each stack of weights once it has been replaced (peak memory: the
        model and one such stack) instead of leaving it usable.

    Raises:
      UserError: the decoder carries LoRA adapters, or is rearranged already.
    """
    if jax.tree.leaves(nnx.state(decoder, LoraParam)):
        raise UserError("a decoder that carries LoRA adapters cannot be fused for serving; merge them into it first")
    if decoder.layers.self_attn.qkv_proj is not None:
        raise UserError("the decoder is rearranged for serving already")
    if not consume:
        decoder = nnx.merge(*nnx.split(decoder))

    attention, mlp, moe = decoder.layers.self_attn, decoder.layers.mlp, decoder.layers.moe
    attention.qkv_proj = _side_by_side((attention.q_proj, attention.k_proj, attention.v_proj))
    attention.q_proj = attention.k_proj = attention.v_proj = nnx.data(None)
    arrange = _pack_kernel if pack else _stack_kernel
    arrange(attention.qkv_proj, dtype)
    arrange(attention.o_proj, dtype)
    if mlp is not None:
        mlp.gate_up_proj = _side_by_side((mlp.gate_proj, mlp.up_proj))
        mlp.gate_proj = mlp.up_proj = nnx.data(None)
        arrange(mlp.gate_up_proj, dtype)
        arrange(mlp.down_proj, dtype)
    if moe is not None:
        if moe.down_proj is not None:  # they may be kept elsewhere, in pages
            _stack_experts(moe, dtype)
        if pack:
            _pack_kernel(moe.router, dtype)
    if pack:
        _pack_head(decoder, dtype)
        for _, module in nnx.iter_modules(decoder):
            if isinstance(module, RMSNorm | LayerNorm):
                module.implementation = None
    return decoder


def count_rows(module: nnx.Module | None, rows: Int[Array, ""]) -> None:
    """Tells the packed matrices of a part of a decoder, inside a jitted step, that only the first `rows` of the rows
    they meet count, the others being padding. Other matrices multiply all; None has none.
    """
    is_packed = lambda leaf: isinstance(leaf, matmul.PackedWeight)  # noqa: E731
    counted = lambda leaf: leaf.for_rows(rows) if is_packed(leaf) else leaf  # noqa: E731
    if module is not None:
        nnx.update(module, jax.tree.map(counted, nnx.state(module), is_leaf=is_packed))


def _stack_experts(moe: Moe, dtype: DTypeLike) -> None:
    """One projection to gate and up for every expert, and stacks that a step indexes instead of cutting them up."""
    if moe.gate_proj is None or moe.up_proj is None or moe.down_proj is None:
        raise UserError("the decoder is rearranged for serving already")
    fused = moe.gate_proj
    both = [part.kernel.get_value() for part in (moe.gate_proj, moe.up_proj)]
    fused.kernel = nnx.Param(jnp.concatenate(both, axis=-1))
    moe.gate_proj = moe.up_proj = nnx.data(None)
    moe.gate_up_proj = fused
    _stack_kernel(moe.gate_up_proj, dtype)
    _stack_kernel(moe.down_proj, dtype)


def _side_by_side(parts: Sequence[Linear | None]) -> Linear:
    """One Linear with the parts' kernels and biases concatenated on the output axis; the first part becomes it."""
    linears = [part for part in parts if part is not None]
    biases = [part.bias.get_value() for part in linears if part.bias is not None]
    fused = linears[0]
    # New Params, not new values in the old ones: those may belong to the decoder this one was copied from, too.
    fused.kernel = nnx.Param(jnp.concatenate([part.kernel.get_value() for part in linears], axis=-1))
    fused.bias = nnx.Param(jnp.concatenate(biases, axis=-1)) if biases else nnx.data(None)
    return fused


def _stack_kernel(linear: Linear | Experts, dtype: DTypeLike) -> None:
    linear.kernel = _param(matmul.StackedWeight(linear.kernel.get_value().astype(dtype)))


def _pack_kernel(linear: Linear, dtype: DTypeLike) -> None:
    linear.kernel = _param(matmul.pack(linear.kernel.get_value(), dtype))


def _pack_head(decoder: Decoder, dtype: DTypeLike) -> None:
    if decoder.lm_head is not None:
        _pack_kernel(decoder.lm_head, dtype)
        return
    config = decoder.config
    head = nnx.eval_shape(lambda: Linear(config.hidden_size, config.vocab_size, rngs=nnx.Rngs(0)))
    head.kernel = _param(matmul.pack_transposed(decoder.embed.embedding.get_value(), dtype))
    decoder.lm_head = head


def _param(weight: matmul.PackedWeight | matmul.StackedWeight) -> nnx.Param:
    return nnx.Param(cast(jax.Array, weight))  # any pytree may be a Param's value; its annotation says Array
