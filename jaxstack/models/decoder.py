"""The decoder-only transformer of all the families in `hf_families`, in one file.

Tokens are embedded, pass `num_layers` layers (attention, then a gated MLP or a mixture of experts, each after a norm
and added back), a last norm, and become float32 logits. Differences between families are fields of `DecoderConfig`;
differences between layers (window, rotation) are data. All layers are one `DecoderLayer` whose parameters carry a
leading layer axis, run by one `jax.lax.scan`; only where plain MLPs and experts alternate is there one scan for each
run of equal layers.

Leading dimensions are free: a trainer passes `[B, T]` tokens, an engine one flat `[T]`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxstack.models.attention import FULL_WINDOW, Attend, LayerContext
from jaxstack.models.decoder_config import DecoderConfig, Segment
from jaxstack.models.linear import AdapterStack, Linear
from jaxstack.models.moe import Moe, RouterSums
from jaxstack.models.rope import RopeConfig, rotate, rotation
from jaxstack.runtime.errors import UserError
from kernels.gated import gated
from kernels.matmul import PackedWeight, StackedWeight
from kernels.rms_norm import rms_norm

__all__ = ["Decoder", "DecoderConfig", "DecoderLayer", "Remat"]

Remat = Literal["none", "dots", "full"]


class Decoder(nnx.Module):
    """The whole network.

    Attributes:
      config: its `DecoderConfig`.
      embed: `Embedding`, `embed.embedding` is a Param `[V, D]`.
      layers: one `DecoderLayer` whose every Param has a leading axis of layers: all `num_layers` of them, in its `mlp`
        those of `config.dense_layers`, in its `moe` those of `config.sparse_layers`.
      final_norm: `RMSNorm` or `LayerNorm`.
      lm_head: `Linear` D -> V, or None where the embedding serves as output matrix.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.embed = Embedding(config, rngs=rngs, param_dtype=param_dtype)

        def stack(module: Callable[..., Any], layers: int) -> Any:
            make = nnx.vmap(lambda rngs: module(config, rngs=rngs, param_dtype=param_dtype))
            return nnx.split_rngs(splits=layers)(make)(rngs)

        self.layers: DecoderLayer = stack(DecoderLayer, config.num_layers)
        if config.moe is not None:
            self.layers.moe = nnx.data(stack(Moe, len(config.sparse_layers)) if config.sparse_layers else None)
            self.layers.mlp = nnx.data(stack(MLP, len(config.dense_layers)) if config.dense_layers else None)
        self.final_norm = _norm(config, config.hidden_size, param_dtype)
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
        return self.logits(hidden, options.get("adapter_ids")), cache

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
        unroll: bool = False,
        compute_dtype: jnp.dtype | None = None,
        places: Int[Array, "chosen"] | None = None,
        pin: Callable[[Float[Array, "... T D"]], Float[Array, "... T D"]] = lambda x: x,
    ) -> tuple[Float[Array, "... D"], Any]:
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
          unroll: compile every layer by itself instead of one for all: no layer's weights are cut out of their stack
            then, which makes a CPU's training step a few percent quicker, and compiling takes longer with every layer.
          compute_dtype: dtype of activations; None for the embedding's.
          places: which of flat tokens `[T]` to return, `[chosen, D]`, as `rows_at` takes them; None for all. With
            `unroll` the last layer then does nothing for the others but their keys and values (it still projects
            queries of all, a small part, so that `attend` need not know).
          pin: called with the activations between layers: says where they lie on a mesh of devices.
        """
        hidden, cache, _ = self.hidden_and_routing(
            tokens,
            positions,
            attend,
            cache,
            None,
            adapter_ids=adapter_ids,
            input_embeddings=input_embeddings,
            use_embeddings=use_embeddings,
            remat=remat,
            unroll=unroll,
            compute_dtype=compute_dtype,
            places=places,
            pin=pin,
        )
        return hidden, cache

    def hidden_and_routing(
        self,
        tokens: Int[Array, "... T"],
        positions: Int[Array, "... T"],
        attend: Attend,
        cache: Any,
        counted: Bool[Array, "... T"] | None,
        *,
        adapter_ids: Int[Array, "... T"] | None = None,
        input_embeddings: Float[Array, "... T D"] | None = None,
        use_embeddings: Bool[Array, "... T"] | None = None,
        remat: Remat = "none",
        unroll: bool = False,
        compute_dtype: jnp.dtype | None = None,
        places: Int[Array, "chosen"] | None = None,
        pin: Callable[[Float[Array, "... T D"]], Float[Array, "... T D"]] = lambda x: x,
    ) -> tuple[Float[Array, "... D"], Any, RouterSums | None]:
        """`hidden`, and what the routers of all layers did with the tokens that are `counted`; None without `counted`
        or without experts.
        """
        config = self.config
        routing: list[RouterSums] = []
        x = self.embed(tokens, compute_dtype)
        if input_embeddings is not None:
            given = input_embeddings.astype(x.dtype)
            x = given if use_embeddings is None else jnp.where(use_embeddings[..., None], given, x)
        x = pin(x)
        windows = jnp.array([w or FULL_WINDOW for w in config.layer_windows], jnp.int32)
        rotation_of, rotations = _rotations(config, positions)
        indices = jnp.arange(config.num_layers, dtype=jnp.int32)

        for segment in config.segments():
            scanned, layer_of = _per_layer(self.layers, segment, config)

            # The cache travels in the carry: as xs and ys of the scan it would be copied whole at every step.
            def body(carry, xs, places=None, layer_of=layer_of):
                x, cache = carry
                weights, window, turn, index = xs
                context = LayerContext(index, window, config.attention_scale, config.attention_softcap)
                layer = layer_of(weights, index)
                x, cache, sums = layer.routed(
                    x, *rotation_of(turn), attend, context, cache, adapter_ids, counted, places
                )
                return (pin(x), cache), sums

            if remat == "full":
                body = jax.checkpoint(body, prevent_cse=False)
            elif remat == "dots":
                policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
                body = jax.checkpoint(body, prevent_cse=False, policy=policy)
            elif remat != "none":
                raise UserError(f"remat: found {remat!r}, expected none, dots or full")

            part = slice(segment.start, segment.stop)
            xs = (scanned, windows[part], rotations[part], indices[part])
            # Unrolled, since a loop would need a copy of the other layers' weights; and routers are counted everywhere.
            last_apart = unroll and places is not None and counted is None and segment.stop == config.num_layers
            if last_apart:
                leaves, tree = jax.tree.flatten(xs)
                cuts = (jnp.split(x, [len(x) - 1]) for x in leaves)
                xs, last = (jax.tree.unflatten(tree, part) for part in zip(*cuts))
            (x, cache), sums = jax.lax.scan(body, (x, cache), xs, unroll=unroll)
            if sums is not None:
                routing.append(jax.tree.map(lambda s: jnp.sum(s, axis=0), sums))
            if last_apart:
                (x, cache), _ = body((x, cache), jax.tree.map(lambda x: x[0], last), places)
                places = None
        if places is not None:
            x = rows_at(x, places)
        total = jax.tree.map(lambda *s: sum(s), *routing) if routing else None
        return self.final_norm(x), cache, total

    def logits(
        self, hidden: Float[Array, "... D"], adapter_ids: Int[Array, "..."] | None = None
    ) -> Float[Array, "... V"]:
        """Output scores in float32; `adapter_ids` as in `hidden`."""
        if self.lm_head is not None:
            scores = self.lm_head(hidden, adapter_ids, out_dtype=jnp.float32)
        else:
            scores = self.embed.attend(hidden)
        cap = self.config.logits_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)


def rows_at(x: Shaped[Array, "T *rest"], places: Int[Array, "chosen"]) -> Shaped[Array, "chosen *rest"]:
    """The rows of `x` at `places`, which ascend; zeros for a place of T or more."""
    return x.at[places].get(mode="fill", fill_value=0, indices_are_sorted=True)


def rotation_kinds(config: DecoderConfig) -> list[int]:
    """Which of `rotation_tables` each layer uses."""
    last = len(_ropes(config)) - 1
    return [last if window is not None else 0 for window in config.layer_windows]


def rotation_tables(
    config: DecoderConfig, positions: Int[Array, "... T"]
) -> list[tuple[Float[Array, "... T half"], Float[Array, "... T half"]]]:
    """cos and sin of every kind of rotation that the layers use: one kind, or that of layers with a window too."""
    return [rotation(positions, rope, config.head_dim) for rope in _ropes(config)]


def _ropes(config: DecoderConfig) -> list[RopeConfig]:
    kinds = [config.rope]
    if config.local_rope is not None and config.local_rope != config.rope:
        kinds.append(config.local_rope)
    return kinds


def _rotations(config: DecoderConfig, positions: Int[Array, "... T"]) -> tuple[Callable, Int[Array, "L"]]:
    """A function from a kind of rotation to cos and sin, and every layer's kind.

    They are computed here once for all layers; where there are two kinds, a layer picks its own.
    """
    tables = rotation_tables(config, positions)
    local = jnp.array(rotation_kinds(config), jnp.int32)
    if len(tables) == 1:
        return lambda _: tables[0], local
    cos, sin = (jnp.stack(both) for both in zip(*tables))
    return lambda kind: (cos[kind], sin[kind]), local


def layer_at(
    layers: "DecoderLayer", index: Int[Array, ""], within_kind: Int[Array, ""], *, sparse: bool
) -> "DecoderLayer":
    """One layer of the stack, for a program that is told at run time which one; nothing large is copied.

    Args:
      index: its number from 0.
      within_kind: how many layers before it have what it has, an MLP or experts (`sparse`).
    """
    if layers.mlp is not None and layers.moe is not None:  # take the other kind's part away, from a copy
        layers = nnx.merge(*nnx.split(layers))
        setattr(layers, "mlp" if sparse else "moe", nnx.data(None))
    graphdef, state = nnx.split(layers)

    def one(path: tuple, leaf: Any) -> Any:
        at, value = within_kind if path[0] in ("mlp", "moe") else index, leaf.get_value()
        if isinstance(value, PackedWeight | StackedWeight | AdapterStack):
            return leaf.replace(value.at_layer(at))
        return leaf.replace(jax.lax.dynamic_index_in_dim(value, at, keepdims=False))

    return nnx.merge(
        graphdef, nnx.from_flat_state([(path, one(path, leaf)) for path, leaf in nnx.to_flat_state(state)])
    )


def _per_layer(layers: "DecoderLayer", segment: Segment, config: DecoderConfig):
    """Splits a segment of stacked layers for a scan: the arrays to scan over, and a function that rebuilds one layer
    inside the body.

    Packed kernels, a server's experts and its adapters are not scanned, since that would copy every layer's numbers out
    of the stack; the body points into the stack.
    """
    if layers.mlp is not None and layers.moe is not None:  # take the other kind's part away, from a copy
        layers = nnx.merge(*nnx.split(layers))
        setattr(layers, "mlp" if segment.sparse else "moe", nnx.data(None))
    graphdef, state = nnx.split(layers)
    leaves = dict(nnx.to_flat_state(state))
    held = {path: leaf.get_value() for path, leaf in leaves.items()}
    in_place = {
        p: leaves[p] for p, value in held.items() if isinstance(value, PackedWeight | StackedWeight | AdapterStack)
    }

    def place(path: tuple, layer: Any) -> Any:
        """Where a layer stands on a parameter's leading axis."""
        return layer - segment.start + segment.first if path[0] in ("mlp", "moe") else layer

    whole = (segment.start, segment.stop) == (0, config.num_layers)
    scanned = {p: value for p, value in held.items() if p not in in_place}
    if not whole:
        scanned = {p: v[place(p, segment.start) : place(p, segment.stop)] for p, v in scanned.items()}

    def layer_of(weights: dict, index: Int[Array, ""]) -> DecoderLayer:
        flat = {path: leaves[path].replace(value) for path, value in weights.items()}
        flat |= {path: leaf.replace(leaf.get_value().at_layer(place(path, index))) for path, leaf in in_place.items()}
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    return scanned, layer_of


class Embedding(nnx.Module):
    """Token ids to vectors, and, where the output matrix is tied, vectors to scores."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        init = nnx.initializers.normal(config.initializer_range)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype))
        self.scale = config.hidden_size**0.5 if config.scale_embeddings else None
        self.sum_over: str | None = None  # the mesh axis over which the table is cut, inside a `jax.shard_map`

    def __call__(self, tokens: Int[Array, "..."], dtype: jnp.dtype | None = None) -> Float[Array, "... D"]:
        """The tokens' vectors in `dtype`, None for the table's, times `scale` rounded to it, if there is one."""
        table = self.embedding.get_value()
        if self.sum_over is None:
            vectors = table[tokens]
        else:
            here = tokens - jax.lax.axis_index(self.sum_over) * table.shape[0]
            found = (here >= 0) & (here < table.shape[0])
            vectors = jnp.where(found[..., None], table[jnp.where(found, here, 0)], 0)
            vectors = jax.lax.psum(vectors, self.sum_over)
        if dtype is not None:
            vectors = vectors.astype(dtype)
        return vectors if self.scale is None else vectors * jnp.asarray(self.scale, vectors.dtype)

    def attend(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`hidden @ embedding.T` in float32."""
        table = self.embedding.get_value().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


class DecoderLayer(nnx.Module):
    """`x + self_attn(input_layernorm(x))`, then `x + mlp(post_attention_layernorm(x))`.

    With `branch_norms` the MLP's norm is `pre_feedforward_layernorm`, and `post_attention_layernorm` and
    `post_feedforward_layernorm` are applied to what attention and MLP add. The names are the checkpoints'. A layer has
    either an `mlp` or a `moe`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        norm = partial(_norm, config, config.hidden_size, param_dtype)
        self.input_layernorm = norm()
        self.self_attn = Attention(config, rngs=rngs, param_dtype=param_dtype)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = nnx.data(norm() if config.branch_norms else None)
        self.post_feedforward_layernorm = nnx.data(norm() if config.branch_norms else None)
        # Layers with experts are fewer, or all: the decoder stacks them by themselves.
        dense = config.moe is None
        self.mlp: MLP | None = nnx.data(MLP(config, rngs=rngs, param_dtype=param_dtype) if dense else None)
        self.moe: Moe | None = nnx.data(None)

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
        return self.routed(x, cos, sin, attend, layer, cache, adapter_ids, None)[:2]

    def routed(
        self,
        x: Float[Array, "... T D"],
        cos: Float[Array, "... T half"],
        sin: Float[Array, "... T half"],
        attend: Attend,
        layer: LayerContext,
        cache: Any,
        adapter_ids: Int[Array, "... T"] | None,
        counted: Bool[Array, "... T"] | None,
        places: Int[Array, "chosen"] | None = None,
    ) -> tuple[Float[Array, "... D"], Any, RouterSums | None]:
        """The layer, and what its router did with the tokens that are `counted`, if it has one; with `places` the
        result of those tokens alone, without `counted`.
        """
        q, k, v = self.before_attention(x, cos, sin, adapter_ids)
        out, cache = attend(q, k, v, layer, cache)
        if places is not None:
            x, out = rows_at(x, places), rows_at(out, places)
            adapter_ids = None if adapter_ids is None else rows_at(adapter_ids, places)
        x, sums = self.after_attention(x, out, adapter_ids, lambda h: self._feed_forward(h, adapter_ids, counted))
        return x, cache, sums

    def before_attention(
        self,
        x: Float[Array, "... T D"],
        cos: Float[Array, "... T half"],
        sin: Float[Array, "... T half"],
        adapter_ids: Int[Array, "... T"] | None,
    ) -> tuple[Float[Array, "... T H hd"], Float[Array, "... T KV hd"], Float[Array, "... T KV hd"]]:
        """The first part of a layer: what `attend` is given, rotated."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin, adapter_ids)

    def after_attention(
        self,
        x: Float[Array, "... T D"],
        out: Float[Array, "... T H hd"],
        adapter_ids: Int[Array, "... T"] | None,
        feed_forward: Callable[[Float[Array, "... T D"]], tuple[Float[Array, "... T D"], Any]] | None = None,
    ) -> tuple[Float[Array, "... T D"], Any]:
        """The last part of a layer, and what `feed_forward` returns besides.

        Args:
          x: as the layer was given it.
          out: what `attend` returned.
          feed_forward: what stands for the layer's own MLP or experts, which then need not be there.
        """
        if feed_forward is None:
            feed_forward = lambda h: self._feed_forward(h, adapter_ids, None)  # noqa: E731
        out = self.self_attn.join(out, adapter_ids)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + out
            out, rest = feed_forward(self.post_attention_layernorm(x))
            return x + out, rest
        x = x + self.post_attention_layernorm(out)
        out, rest = feed_forward(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(out), rest

    def _feed_forward(
        self, x: Float[Array, "... D"], adapter_ids: Int[Array, "..."] | None, counted: Bool[Array, "..."] | None
    ) -> tuple[Float[Array, "... D"], RouterSums | None]:
        if self.moe is not None:
            return self.moe.routed(x, counted)
        assert self.mlp is not None
        return self.mlp(x, adapter_ids), None


def _norm(config: DecoderConfig, features: int, param_dtype: jnp.dtype) -> "RMSNorm | LayerNorm":
    if config.norm == "layer":
        return LayerNorm(features, config.rms_norm_eps, param_dtype)
    return RMSNorm(features, config.rms_norm_eps, param_dtype, offset=config.norm == "rms_offset")


class RMSNorm(nnx.Module):
    """`weight * cast(x / sqrt(mean(x^2) + eps))`: statistics in float32, cast, then multiplied: Llama's order.

    With `offset`, Gemma's: `cast((1 + weight) * x / sqrt(mean(x^2) + eps))`, multiplied in float32.

    Attributes:
      implementation: of `kernels.rms_norm`; "xla", which has gradients, unless a serving decoder asks for the fastest.
    """

    def __init__(self, features: int, eps: float, param_dtype: jnp.dtype, *, offset: bool = False):
        self.eps, self.offset = eps, offset
        self.implementation: Literal["xla"] | None = "xla"
        self.weight = nnx.Param((jnp.zeros if offset else jnp.ones)((features,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        weight = self.weight.get_value()
        return rms_norm(x, weight, eps=self.eps, offset=self.offset, implementation=self.implementation)


class LayerNorm(nnx.Module):
    """`weight * (x - mean(x)) / sqrt(var(x) + eps)` in float32, then cast; no bias. `implementation` as RMSNorm's."""

    def __init__(self, features: int, eps: float, param_dtype: jnp.dtype):
        self.eps = eps
        self.implementation: Literal["xla"] | None = "xla"
        self.weight = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        weight = self.weight.get_value()
        return rms_norm(x, weight, eps=self.eps, center=True, implementation=self.implementation)


class Attention(nnx.Module):
    """Projections to heads, optional clipping and head norms, rotation; and, after `attend`, the projection back.

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
        norm = partial(_norm, config, config.head_dim, param_dtype)
        self.q_norm = nnx.data(norm() if config.qk_norm else None)
        self.k_norm = nnx.data(norm() if config.qk_norm else None)
        self.clip = config.qkv_clip
        self.o_proj = make(queries, config.hidden_size, use_bias=config.attention_out_bias)

    def project(
        self,
        x: Float[Array, "... T D"],
        cos: Float[Array, "... T half"],
        sin: Float[Array, "... T half"],
        adapter_ids: Int[Array, "... T"] | None,
    ) -> tuple[Float[Array, "... T H hd"], Float[Array, "... T KV hd"], Float[Array, "... T KV hd"]]:
        """Queries, keys and values, rotated."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        flat = _projected(
            x, self.qkv_proj, (self.q_proj, self.k_proj, self.v_proj), [n * self.head_dim for n in heads], adapter_ids
        )
        if self.clip is not None:
            flat = [jnp.clip(part, -self.clip, self.clip) for part in flat]
        q, k, v = (part.reshape(*x.shape[:-1], n, self.head_dim) for part, n in zip(flat, heads))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def join(self, out: Float[Array, "... T H hd"], adapter_ids: Int[Array, "... T"] | None) -> Float[Array, "... T D"]:
        """The heads' results projected back."""
        return self.o_proj(out.reshape(*out.shape[:-2], self.num_heads * self.head_dim), adapter_ids)


class MLP(nnx.Module):
    """`down_proj(activation(gate_proj(x)) * up_proj(x))`.

    A serving decoder holds one `gate_up_proj` for the first two. `implementation` is that of `kernels.gated`: "xla",
    which a mesh of devices can share, or None for the fastest.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.intermediate_size, self.activation = config.intermediate_size, config.activation
        make = partial(_linear, config, rngs, param_dtype, use_bias=config.mlp_bias)
        self.gate_proj: Linear | None = nnx.data(make(config.hidden_size, config.intermediate_size))
        self.up_proj: Linear | None = nnx.data(make(config.hidden_size, config.intermediate_size))
        self.gate_up_proj: Linear | None = nnx.data(None)
        self.down_proj = make(config.intermediate_size, config.hidden_size)
        self.implementation: Literal["xla"] | None = "xla"

    def __call__(self, x: Float[Array, "... D"], adapter_ids: Int[Array, "..."] | None = None) -> Float[Array, "... D"]:
        widths = [self.intermediate_size] * 2
        gate, up = _projected(x, self.gate_up_proj, (self.gate_proj, self.up_proj), widths, adapter_ids)
        return self.down_proj(gated(gate, up, self.activation, implementation=self.implementation), adapter_ids)


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
