"""Fresh decoders."""

import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxstack.models import Decoder, DecoderConfig


def fresh_decoder(config: DecoderConfig, *, seed: int = 0, param_dtype: Any = jnp.float32) -> Decoder:
    """A decoder from scratch: matrices normal with `config.initializer_range`, norms the identity, biases 0.

    Numbers are drawn by NumPy, keyed by (seed, parameter name): no program to compile, and the same weights whatever
    the version of JAX or the order of modules.
    """
    model = Decoder.abstract(config, param_dtype=param_dtype)
    graphdef, state = nnx.split(model)
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        shape = variable.get_value().shape
        if name.endswith(("kernel", "embedding")):
            rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(name.encode())]))
            values = rng.standard_normal(shape, np.float32) * np.float32(config.initializer_range)
        else:
            zero = name.endswith("bias") or config.norm == "rms_offset"  # a norm's weight may count from 1
            values = np.zeros(shape, np.float32) if zero else np.ones(shape, np.float32)
        filled[path] = variable.replace(jnp.asarray(values, param_dtype))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
