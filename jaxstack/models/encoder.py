"""The encoder-only transformer of BERT (Devlin et al. 2018): every token sees all others of its text.

Tokens, positions and segments are embedded, added and normalised; `num_layers` layers follow, each attention and an
MLP, both added back before their norm; `pooled` makes one vector of a text. All layers are one `EncoderLayer` whose
parameters carry a leading layer axis, run by one `jax.lax.scan`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxstack.models.linear import Linear
from jaxstack.runtime.errors import UserError

EncoderActivation = Literal["gelu", "gelu_tanh", "relu", "silu"]
Pooling = Literal["mean", "cls"]

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": partial(nnx.gelu, approximate=False),
    "gelu_tanh": partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
    "silu": nnx.silu,
}
_MASKED = -1e30


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of an encoder.

    Attributes:
      max_positions: tokens of the longest text.
      segments: kinds of token (sentence A, sentence B).
      activation: of the MLP.
      norm_eps: added to variances.

    Raises:
      UserError: one line naming the field, what was found and what was expected.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    segments: int = 2
    activation: EncoderActivation = "gelu"
    norm_eps: float = 1e-12

    def __post_init__(self):
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_positions")
        for name in (*names, "segments"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected an integer > 0")
        if self.hidden_size % self.num_heads:
            raise UserError(f"num_heads: found {self.num_heads}, expected a divisor of hidden_size {self.hidden_size}")
        if self.activation not in get_args(EncoderActivation):
            raise UserError(
                f"activation: found {self.activation!r}, expected one of {', '.join(get_args(EncoderActivation))}"
            )
        if not self.norm_eps > 0:
            raise UserError(f"norm_eps: found {self.norm_eps}, expected a number > 0")


class Encoder(nnx.Module):
    """The whole network.

    Attributes:
      config: its `EncoderConfig`.
      words, positions, segments: Params `[V, D]`, `[max_positions, D]`, `[segments, D]`.
      embedding_norm: `BiasedLayerNorm`.
      layers: one `EncoderLayer` whose every Param has a leading axis of layers.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype = jnp.float32):
        self.config = config
        init = nnx.initializers.normal(0.02)
        make = lambda rows: nnx.Param(init(rngs.params(), (rows, config.hidden_size), param_dtype))  # noqa: E731
        self.words, self.positions = make(config.vocab_size), make(config.max_positions)
        self.segments = make(config.segments)
        self.embedding_norm = BiasedLayerNorm(config.hidden_size, config.norm_eps, param_dtype)
        stack = nnx.vmap(lambda rngs: EncoderLayer(config, rngs=rngs, param_dtype=param_dtype))
        self.layers: EncoderLayer = nnx.split_rngs(splits=config.num_layers)(stack)(rngs)

    @classmethod
    def abstract(cls, config: EncoderConfig, *, param_dtype: jnp.dtype = jnp.float32) -> "Encoder":
        """The same module with `jax.ShapeDtypeStruct`s for parameters: no memory, no random numbers."""
        return nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), param_dtype=param_dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The last layer's outputs.

        Args:
          mask: which tokens are there; others are seen by none, and their own outputs mean nothing.
          segment_ids: below `segments`; None for 0 everywhere.
        """
        segment_ids = jnp.zeros_like(tokens) if segment_ids is None else segment_ids
        x = self.words.get_value()[tokens] + self.segments.get_value()[segment_ids]
        x = self.embedding_norm(x + self.positions.get_value()[: tokens.shape[1]])
        graphdef, state = nnx.split(self.layers)

        def body(x, weights):
            return nnx.merge(graphdef, weights)(x, mask), None

        return jax.lax.scan(body, x, state)[0]

    def pooled(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        pooling: Pooling = "mean",
    ) -> Float[Array, "B D"]:
        """A unit vector of each text, float32: the mean of its tokens' outputs, or the first token's."""
        hidden = self(tokens, mask, segment_ids).astype(jnp.float32)
        if pooling == "cls":
            vectors = hidden[:, 0]
        else:
            there = mask[..., None].astype(jnp.float32)
            vectors = jnp.sum(hidden * there, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1.0)
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class EncoderLayer(nnx.Module):
    """`x = norm(x + attention(x)); x = norm(x + mlp(x))`."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.heads, self.activation = config.num_heads, config.activation
        width = config.hidden_size
        linear = partial(Linear, use_bias=True, rngs=rngs, param_dtype=param_dtype)
        norm = partial(BiasedLayerNorm, width, config.norm_eps, param_dtype)
        self.query, self.key, self.value = linear(width, width), linear(width, width), linear(width, width)
        self.attention_out, self.attention_norm = linear(width, width), norm()
        self.up, self.down = linear(width, config.intermediate_size), linear(config.intermediate_size, width)
        self.mlp_norm = norm()

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        cut = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)  # noqa: E731
        q, k, v = cut(self.query(x)), cut(self.key(x)), cut(self.value(x))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None, :], scores, _MASKED), axis=-1).astype(v.dtype)
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = self.attention_norm(x + self.attention_out(seen))
        return self.mlp_norm(x + self.down(_ACTIVATIONS[self.activation](self.up(x))))


class BiasedLayerNorm(nnx.Module):
    """`weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`, in float32, then cast."""

    def __init__(self, features: int, eps: float, param_dtype: jnp.dtype):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones((features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        exact = x.astype(jnp.float32)
        centred = exact - jnp.mean(exact, axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (scaled * self.weight.get_value() + self.bias.get_value()).astype(x.dtype)
