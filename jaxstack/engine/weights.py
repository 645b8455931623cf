"""A decoder made ready to be served: its dtype, its layout on the devices, and the room for adapters."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxstack.engine.config import EngineConfig, sizes
from jaxstack.engine.offload import kv_cache_bytes, layouts_for, refuse_unsupported, resident_share
from jaxstack.models.adapter_slots import add_slots
from jaxstack.models.decoder import Decoder
from jaxstack.models.hf_config import config_from_folder
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.models.tensor_parallel import place, shard_for_serving
from jaxstack.runtime.memory_spaces import host_processor
from kernels import matmul


def served_dtype(config: EngineConfig) -> jnp.dtype:
    """Of weights, activations and cache on this machine."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")


def loading_place(config: EngineConfig, folder: str | Path) -> contextlib.AbstractContextManager[object]:
    """Where a model's arrays are to be made: on the device, or on the host if its weights are to be kept there.

    Raises:
      UserError: the device's budget is below what the model in `folder` needs at the least.
    """
    if config.offload is None:
        return contextlib.nullcontext()
    model, itemsize = config_from_folder(folder), served_dtype(config).itemsize
    refuse_unsupported(model)
    chosen = sizes(config, model, itemsize)
    kv_bytes = kv_cache_bytes(model, chosen.num_pages, config.page_size, itemsize)
    layouts = layouts_for(model, config.offload)
    resident_share(model, config.offload, layouts, chosen.shapes, itemsize=itemsize, kv_bytes=kv_bytes)
    return jax.default_device(host_processor())


def serving_form(decoder: Decoder, config: EngineConfig, mesh: Mesh | None, dtype: jnp.dtype) -> Decoder:
    """The decoder, taken over: fused and packed for one device, or cut up for the mesh; with room for adapters."""
    if mesh is not None:
        decoder = shard_for_serving(decoder, mesh)
    else:
        packing = config.pack_weights
        if packing is None:
            packing = jax.default_backend() == "cpu" and matmul.available()
        decoder = fuse_for_serving(decoder, pack=packing, dtype=dtype, consume=True)
    if config.max_adapters:
        add_slots(decoder, config.max_adapters, config.max_adapter_rank, dtype)
        if mesh is not None:
            place(decoder, mesh)
    return decoder
