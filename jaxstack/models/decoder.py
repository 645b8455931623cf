"""The decoder-only transformer of the Llama, Qwen2, Qwen3 and Mistral families, in one file.

Tokens are embedded, pass `num_layers` equal layers (attention and a gated MLP, each after an RMSNorm and added back), a
last RMSNorm, and become float32 logits. Differences between families are fields of `DecoderConfig`; differences between
layers are data. All layers are one `DecoderLayer` whose parameters carry a leading layer axis, run by one
`jax.lax.scan`.

Leading dimensions are free: a trainer passes `[B, T]` tokens, an engine one flat `[T]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxstack.models.attention import FULL_WINDOW, Attend, LayerContext
from jaxstack.models.linear import AdapterStack, Linear
from jaxstack.models.rope import RopeConfig, rotate, rotation
from jaxstack.runtime.errors import UserError
from kernels.matmul import PackedWeight

Remat = Literal["none", "dots", "full"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that shapes a decoder. Sizes are counts of features, heads, layers or tokens.

    Attributes:
      architecture: the Hugging Face class that a saved folder names, such as "Qwen3ForCausalLM".
      head_dim: features per head; need not be hidden_size / num_heads.
      tie_word_embeddings: the embedding matrix is also the output matrix.
      qkv_bias, attention_out_bias, mlp_bias: which projections carry a bias.
      qk_norm: RMSNorm of every query and key head before the rotation.
      layer_windows: one entry a layer, the sliding window in tokens or None for full attention; () for full everywhere.
      eos_token_ids: any of them ends a generation.
      initializer_range: standard deviation of a fresh model's matrices.

    Raises:
      UserError: one line naming the field, what was found and what was expected.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            _require_positive_integer(name, getattr(self, name))
        _require_positive_integer("max_position_embeddings", self.max_position_embeddings)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads: found {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: found {self.head_dim}, expected an even number (heads are rotated in halves)")
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise UserError(f"{name}: found {value!r}, expected a positive number")
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if len(self.layer_windows) != self.num_layers:
            raise UserError(
                f"layer_windows: found {len(self.layer_windows)} entries, expected one a layer, {self.num_layers}"
            )
        for window in self.layer_windows:
            if window is not None:
                _require_positive_integer("layer_windows", window)
        ids = {
            "bos_token_id": (self.bos_token_id,),
            "pad_token_id": (self.pad_token_id,),
            "eos_token_ids": self.eos_token_ids,
        }
        for name, values in ids.items():
            for value in values:
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                    raise UserError(f"{name}: found {value!r}, expected token ids >= 0")


def _require_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise UserError(f"{name}: found {value!r}, expected a positive integer below 2^31")


class Decoder(nnx.Module):
    """The whole network.

    Attributes:
      config: its `DecoderConfig`.
      embed: `Embedding`, `embed.embedding` is a Param `[V, D]`.
      layers: one `DecoderLayer` whose every Param has a leading `[num_layers]` axis.
      final_norm: `RMSNorm`.
      lm_head: `Linear` D -> V, or None where the embedding serves as output matrix.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.embed = Embedding(config, rngs=rngs, param_dtype=param_dtype)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs, param_dtype=param_dtype)

        self.layers = stacked_layers(rngs)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        make = partial(_linear, config, rngs, param_dtype)
        self.lm_head: Linear | None = nnx.data(
            None if config.tie_word_embeddings else make(config.hidden_size, config.vocab_size)
        )

    @classmethod
    def abstract(cls, config: DecoderConfig, *, param_dtype: jnp.dtype = jnp.float32) -> "Decoder":
        """The same module with `jax.ShapeDtypeStruct`s for parameters: no memory, no random numbers."""
        return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), param_dtype=param_dtype))

    def __call__(
        self,
        tokens: Int[Array, "... T"],
        positions: Int[Array, "... T"],
        attend: Attend,
        cache: Any = None,
        **options: Any,
    ) -> tuple[Float[Array, "... T V"], Any]:
        """Logits of every token, and the cache as `attend` left it. `options` are those of `hidden`."""
        hidden, cache = self.hidden(tokens, positions, attend, cache, **options)
        return self.logits(hidden), cache

    def hidden(
        self,
        tokens: Int[Array, "... T"],
        positions: Int[Array, "... T"],
        attend: Attend,
        cache: Any = None,
        *,
        adapter_ids: Int[Array, "... T"] | None = None,
        input_embeddings: Float[Array, "... T D"] | None = None,
        use_embeddings: Bool[Array, "... T"] | None = None,
        remat: Remat = "none",
        compute_dtype: jnp.dtype | None = None,
    ) -> tuple[Float[Array, "... T D"], Any]:
        """Everything up to and including the final norm.

        Args:
          tokens: ids below vocab_size.
          positions: each token's position in its own document or request.
          attend: how queries meet keys; see `jaxstack.models.attention`.
          cache: handed from layer to layer through `attend`; any pytree.
          adapter_ids: the LoRA adapter of each token; None for adapter 1 everywhere. Ignored without adapters.
          input_embeddings: vectors as they enter the first layer, in place of the embeddings of `tokens`.
          use_embeddings: where they replace them; None for everywhere.
          remat: what a backward pass recomputes in each layer: nothing, all but the weight products ("dots"), or
            everything.
          compute_dtype: dtype of activations; None for the embedding's.
        """
        x = self.embed(tokens)
        if compute_dtype is not None:
            x = x.astype(compute_dtype)
        if input_embeddings is not None:
            given = input_embeddings.astype(x.dtype)
            x = given if use_embeddings is None else jnp.where(use_embeddings[..., None], given, x)
        cos, sin = rotation(positions, self.config.rope, self.config.head_dim)

        scanned, layer_of = _per_layer(self.layers)
        windows = jnp.array([w or FULL_WINDOW for w in self.config.layer_windows], jnp.int32)

        # The cache travels in the carry: as xs and ys of the scan it would be copied whole at every step.
        def body(carry, xs):
            x, cache = carry
            weights, window, index = xs
            layer = layer_of(weights, index)
            return layer(x, cos, sin, attend, LayerContext(index, window), cache, adapter_ids), None

        if remat == "full":
            body = jax.checkpoint(body, prevent_cse=False)
        elif remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        elif remat != "none":
            raise UserError(f"remat: found {remat!r}, expected none, dots or full")

        indices = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, cache), _ = jax.lax.scan(body, (x, cache), (scanned, windows, indices))
        return self.final_norm(x), cache

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Output scores in float32."""
        if self.lm_head is not None:
            return self.lm_head(hidden, out_dtype=jnp.float32)
        return self.embed.attend(hidden)


def _per_layer(layers: "DecoderLayer"):
    """Splits stacked layers for a scan: the arrays to scan over, and a function that rebuilds one layer inside the
    body.

    Packed kernels and a server's adapters are not scanned, since that would copy every layer's numbers out of the
    stack; the body points into the stack.
    """
    graphdef, state = nnx.split(layers)
    leaves = dict(nnx.to_flat_state(state))
    in_place = {
        path: leaf for path, leaf in leaves.items() if isinstance(leaf.get_value(), PackedWeight | AdapterStack)
    }
    scanned = {path: leaf.get_value() for path, leaf in leaves.items() if path not in in_place}

    def layer_of(weights: dict, index: Int[Array, ""]) -> DecoderLayer:
        flat = {path: leaves[path].replace(value) for path, value in weights.items()}
        flat |= {path: leaf.replace(leaf.get_value().at_layer(index)) for path, leaf in in_place.items()}
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    return scanned, layer_of


class Embedding(nnx.Module):
    """Token ids to vectors, and, where the output matrix is tied, vectors to scores."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype))

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
        return self.embedding.get_value()[tokens]

    def attend(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`hidden @ embedding.T` in float32."""
        table = self.embedding.get_value().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


class DecoderLayer(nnx.Module):
    """`x + self_attn(input_layernorm(x))`, then `x + mlp(post_attention_layernorm(x))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.self_attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        self.mlp = MLP(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "... T D"],
        cos: Float[Array, "... T half"],
        sin: Float[Array, "... T half"],
        attend: Attend,
        layer: LayerContext,
        cache: Any,
        adapter_ids: Int[Array, "... T"] | None,
    ) -> tuple[Float[Array, "... T D"], Any]:
        out, cache = self.self_attn(self.input_layernorm(x), cos, sin, attend, layer, cache, adapter_ids)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x), adapter_ids)
        return x, cache


class RMSNorm(nnx.Module):
    """`weight * cast(x / sqrt(mean(x^2) + eps))`: statistics in float32, cast, then multiplied: Llama's order."""

    def __init__(self, features: int, eps: float, param_dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(x.dtype) * wide.astype(x.dtype)


class Attention(nnx.Module):
    """Projections to heads, optional head norms, rotation, `attend`, and the projection back.

    Holds `q_proj`, `k_proj`, `v_proj`; or, in a serving decoder, one `qkv_proj` with their kernels side by side and the
    three None.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        make = partial(_linear, config, rngs, param_dtype)
        self.q_proj: Linear | None = nnx.data(make(config.hidden_size, queries, use_bias=config.qkv_bias))
        self.k_proj: Linear | None = nnx.data(make(config.hidden_size, keys, use_bias=config.qkv_bias))
        self.v_proj: Linear | None = nnx.data(make(config.hidden_size, keys, use_bias=config.qkv_bias))
        self.qkv_proj: Linear | None = nnx.data(None)
        self.q_norm = nnx.data(RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype) if config.qk_norm else None)
        self.k_norm = nnx.data(RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype) if config.qk_norm else None)
        self.o_proj = make(queries, config.hidden_size, use_bias=config.attention_out_bias)

    def __call__(
        self,
        x: Float[Array, "... T D"],
        cos: Float[Array, "... T half"],
        sin: Float[Array, "... T half"],
        attend: Attend,
        layer: LayerContext,
        cache: Any,
        adapter_ids: Int[Array, "... T"] | None,
    ) -> tuple[Float[Array, "... T D"], Any]:
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        flat = _projected(
            x, self.qkv_proj, (self.q_proj, self.k_proj, self.v_proj), [n * self.head_dim for n in heads], adapter_ids
        )
        q, k, v = (part.reshape(*x.shape[:-1], n, self.head_dim) for part, n in zip(flat, heads))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, cache = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, layer, cache)
        return self.o_proj(out.reshape(*x.shape[:-1], self.num_heads * self.head_dim), adapter_ids), cache


class MLP(nnx.Module):
    """`down_proj(silu(gate_proj(x)) * up_proj(x))`; a serving decoder holds one `gate_up_proj` for the first two."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.intermediate_size = config.intermediate_size
        make = partial(_linear, config, rngs, param_dtype, use_bias=config.mlp_bias)
        self.gate_proj: Linear | None = nnx.data(make(config.hidden_size, config.intermediate_size))
        self.up_proj: Linear | None = nnx.data(make(config.hidden_size, config.intermediate_size))
        self.gate_up_proj: Linear | None = nnx.data(None)
        self.down_proj = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "... D"], adapter_ids: Int[Array, "..."] | None = None) -> Float[Array, "... D"]:
        widths = [self.intermediate_size] * 2
        gate, up = _projected(x, self.gate_up_proj, (self.gate_proj, self.up_proj), widths, adapter_ids)
        return self.down_proj(nnx.silu(gate) * up, adapter_ids)


def _projected(
    x: Float[Array, "... D"],
    fused: Linear | None,
    parts: Sequence[Linear | None],
    widths: Sequence[int],
    adapter_ids: Int[Array, "..."] | None,
) -> list[Float[Array, "... _"]]:
    """The outputs of several projections of one input: each by itself, or one product cut into `widths`."""
    if fused is None:
        return [part(x, adapter_ids) for part in parts if part is not None]
    cuts = [sum(widths[:i]) for i in range(1, len(widths))]
    return jnp.split(fused(x, adapter_ids), cuts, axis=-1)


def _linear(
    config: DecoderConfig,
    rngs: nnx.Rngs,
    param_dtype: jnp.dtype,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = False,
) -> Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return Linear(in_features, out_features, use_bias=use_bias, kernel_init=init, rngs=rngs, param_dtype=param_dtype)
