"""The oracle, and what XLA runs."""

import functools
from collections.abc import Callable, Mapping

import jax

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def gated(gate, up, activation):
    return ACTIVATIONS[activation](gate) * up
