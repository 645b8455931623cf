"""`StackedWeight`: the matrices of all layers in one array, of which a product reads one where it lies."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """Matrices, or groups of matrices (a mixture's experts), of `L` layers, for serving.

    A scan over layers that is given the stack as `xs` cuts each layer's matrix out of it, which on a GPU copies every
    weight at every step; one that holds the stack and names a layer leaves that to the product.

    Attributes:
      weights: the stack.
      layer: which layer is meant; None for a stack not indexed yet.
    """

    weights: Float[Array, "L *group K N"]
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(*group, K, N)` of the layer meant, or `(L, *group, K, N)` of a stack not indexed yet."""
        return self.weights.shape if self.layer is None else self.weights.shape[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.weights.dtype

    def at_layer(self, index: Int[Array, ""] | int) -> "StackedWeight":
        """One layer of the stack; nothing is copied."""
        return dataclasses.replace(self, layer=jnp.asarray(index, jnp.int32))

    def cut(self) -> Float[Array, "*group K N"]:
        """The layer meant as an array of its own."""
        if self.layer is None:
            raise ValueError(f"cut: choose a layer of the stack of shape {self.shape} with at_layer(index)")
        return jax.lax.dynamic_index_in_dim(self.weights, self.layer, keepdims=False)
