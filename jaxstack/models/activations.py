"""The gates' activations by `DecoderConfig.activation`."""

from collections.abc import Callable, Mapping
from functools import partial

from flax import nnx
from jaxtyping import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": nnx.silu,
    "gelu_tanh": partial(nnx.gelu, approximate=True),
}
