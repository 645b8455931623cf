"""Where the runner's arrays live: on one device, or over a mesh whose axis "tensor" shares the heads, the MLPs' columns
and the vocabulary (`jaxstack.models.tensor_parallel`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxstack.models.tensor_parallel import AXIS, specs

_CACHE = PartitionSpec(None, None, None, AXIS, None)
_LOGITS = PartitionSpec(None, AXIS)
_EVERYWHERE = PartitionSpec()


class Placement:
    """Shardings of arrays and programs; all None, and nothing wrapped, without a mesh.

    Attributes:
      everywhere: the same on every device.
      cache: the KV cache, cut by heads.
      logits: cut by the vocabulary.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        make = (lambda spec: None) if mesh is None else (lambda spec: NamedSharding(mesh, spec))
        self.everywhere, self.cache, self.logits = make(_EVERYWHERE), make(_CACHE), make(_LOGITS)

    def zeros(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> Array:
        """An array of zeros, made where it shall live."""
        return jnp.zeros(shape, dtype, device=sharding)

    def all_of(self, *shardings: NamedSharding | None) -> tuple | None:
        """The shardings of a program's several results."""
        return None if self.mesh is None else shardings

    def put(self, x: Any) -> Array:
        """A host array on every device."""
        return jax.device_put(np.asarray(x), self.everywhere)

    def struct(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        """What a program is told of an array that every call brings, by default the same on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self.everywhere)

    def shared(self, forward: Callable, weights: Any) -> Callable:
        """`forward(weights, cache, *inputs) -> cache, hidden` where each device computes with its share of the weights
        and of the cache; inputs and hidden states are the same on all.
        """
        if self.mesh is None:
            return forward

        def mapped(weights_, cache, *inputs):
            in_specs = (specs(weights), _CACHE, *[_EVERYWHERE] * len(inputs))
            out_specs = (_CACHE, _EVERYWHERE)
            run = jax.shard_map(forward, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
            return run(weights_, cache, *inputs)

        return mapped
