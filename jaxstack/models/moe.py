"""A mixture of experts: every token through the few experts that its router finds likeliest.

Rows are sorted by expert, so that each expert multiplies its own rows in one piece and nothing is padded to a capacity
or dropped (MegaBlocks, Gale et al. 2022):

    router -> top-k -> sort rows by expert -> gate, up -> activation -> down -> back in order -> weighted sum
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxstack.models.activations import ACTIVATIONS
from jaxstack.models.decoder_config import DecoderConfig, MoeConfig
from jaxstack.models.linear import Linear
from kernels.grouped_matmul import grouped_matmul
from kernels.matmul import StackedWeight


class RouterSums(NamedTuple):
    """What routers did, summed over tokens (and layers): sums of two pieces add up.

    Attributes:
      chosen: float32 [E], how often each expert was chosen; not a function of the parameters.
      probability: float32 [E], of each expert.
      tokens: float32 scalar, how many tokens were routed, once for each layer.
    """

    chosen: Float[Array, "E"]
    probability: Float[Array, "E"]
    tokens: Float[Array, ""]


def load_balancing_loss(sums: RouterSums) -> Float[Array, ""]:
    """E * sum_e f_e P_e, f_e the part of tokens that chose expert e and P_e its mean probability (Fedus et al. 2021,
    equations 4-6), over the tokens of all layers together as Mixtral has it. With k experts a token it is k where the
    load is even, and at most E; 0 without tokens.
    """
    tokens = jnp.maximum(sums.tokens, 1.0)
    return sums.chosen.shape[0] * jnp.sum(sums.chosen / tokens * (sums.probability / tokens))


class Experts(nnx.Module):
    """One projection of every expert: rows sorted by expert, each times its expert's matrix.

    Attributes:
      kernel: `nnx.Param [E, in, out]`; its value is a `StackedWeight` in a serving decoder.
    """

    def __init__(self, config: DecoderConfig, moe: MoeConfig, shape: tuple[int, int], rngs: nnx.Rngs, param_dtype):
        init = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), (moe.num_experts, *shape), param_dtype))

    def __call__(self, x: Float[Array, "rows in"], group_sizes: Int[Array, "E"]) -> Float[Array, "rows out"]:
        kernel = self.kernel.get_value()
        if isinstance(kernel, StackedWeight):
            # The stack stays as it is: casting it would copy it.
            out = grouped_matmul(x.astype(kernel.weights.dtype), kernel.weights, group_sizes, layer=kernel.layer)
            return out.astype(x.dtype)
        return grouped_matmul(x, kernel.astype(x.dtype), group_sizes)


class Moe(nnx.Module):
    """`sum_e weight_e down_e(activation(gate_e(x)) * up_e(x))` over the chosen experts.

    Holds `gate_proj` and `up_proj`; or, in a serving decoder, one `gate_up_proj` with both side by side; or only the
    router, where the experts are kept elsewhere (`jaxstack.models.paged_experts`).
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        if config.moe is None:
            raise ValueError("Moe: the config has no moe")
        self.moe, self.activation = config.moe, config.activation
        inner = (config.hidden_size, config.moe.intermediate_size)
        init = nnx.initializers.normal(config.initializer_range)
        self.router = Linear(
            config.hidden_size, config.moe.num_experts, kernel_init=init, rngs=rngs, param_dtype=param_dtype
        )
        self.gate_proj: Experts | None = nnx.data(Experts(config, config.moe, inner, rngs, param_dtype))
        self.up_proj: Experts | None = nnx.data(Experts(config, config.moe, inner, rngs, param_dtype))
        self.gate_up_proj: Experts | None = nnx.data(None)
        self.down_proj: Experts | None = nnx.data(Experts(config, config.moe, inner[::-1], rngs, param_dtype))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.routed(x, None)[0]

    def routed(
        self, x: Float[Array, "... D"], counted: Bool[Array, "..."] | None
    ) -> tuple[Float[Array, "... D"], RouterSums | None]:
        """The output, and what the router did with the tokens that are `counted`, which padding should not be."""
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows)
        weights, experts = route(scores, self.moe)
        sums = None if counted is None else router_sums(scores, experts, counted.reshape(-1))
        chosen = experts.reshape(-1)
        order = jnp.argsort(chosen, stable=True)  # sorted place -> (row, rank) as row * k + rank
        sizes = jnp.sum(chosen[:, None] == jnp.arange(self.moe.num_experts), axis=0, dtype=jnp.int32)
        sorted_rows = rows[order // self.moe.experts_per_token]

        if self.gate_up_proj is not None:
            gate, up = jnp.split(self.gate_up_proj(sorted_rows, sizes), 2, axis=-1)
        elif self.gate_proj is not None and self.up_proj is not None:
            gate, up = self.gate_proj(sorted_rows, sizes), self.up_proj(sorted_rows, sizes)
        assert self.down_proj is not None
        out = self.down_proj(ACTIVATIONS[self.activation](gate) * up, sizes)

        # Gathered back rather than added in place: a row's sum then has the same order whatever the other rows do.
        back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
        parts = out[back].reshape(*experts.shape, -1).astype(jnp.float32)
        return jnp.sum(parts * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape), sums


def route(scores: Float[Array, "rows E"], moe: MoeConfig) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The weights, float32, and numbers of each row's experts, likeliest first; ties go to the lower number."""
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, moe.experts_per_token)
    if moe.weight_norm == 1:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    elif moe.weight_norm is not None:
        weights = weights / jnp.sum(weights**moe.weight_norm, axis=-1, keepdims=True) ** (1 / moe.weight_norm)
    return weights, experts


def router_sums(
    scores: Float[Array, "rows E"], experts: Int[Array, "rows k"], counted: Bool[Array, "rows"]
) -> RouterSums:
    """The sums over the counted rows of one layer."""
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    hits = jnp.sum(experts[..., None] == jnp.arange(scores.shape[-1]), axis=1)
    keep = counted[:, None]
    return RouterSums(
        jnp.sum(jnp.where(keep, hits, 0), axis=0, dtype=jnp.float32),
        jnp.sum(jnp.where(keep, probabilities, 0.0), axis=0),
        jnp.sum(counted, dtype=jnp.float32),
    )
