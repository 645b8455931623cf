"""One decoder over several devices: each holds a share of the heads, of the MLPs' columns and of the vocabulary.

Inside a `jax.shard_map` over the mesh axis "tensor" a device sees its own share only, and the ordinary layers compute
with it: projections into heads and columns are cut by their outputs, the projections back by their inputs, and their
partial sums are added over the axis, once after attention and once after the MLP (Shoeybi et al. 2019, section 3).
Everything else (norms, the residual stream) is the same on every device. Kernels see plain local arrays, so any of
them will do.

With fewer key-value heads than devices, each device gets a copy of the one that its query heads read.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.linear import LoraParam
from jaxstack.runtime.errors import UserError

AXIS = "tensor"

# Layers cut by their outputs, and by their inputs. What a device has of the latter's result is a part of a sum.
_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUT = ("o_proj", "down_proj")


def check_mesh(mesh: Mesh, config: DecoderConfig) -> int:
    """The number of devices that share the decoder.

    Raises:
      UserError: the mesh has no axis "tensor", or another that is not 1 long; or the model does not divide evenly.
    """
    if AXIS not in mesh.shape:
        raise UserError(f"mesh: found axes {tuple(mesh.shape)}, expected one called {AXIS!r}")
    for name, length in mesh.shape.items():
        if name != AXIS and length != 1:
            raise UserError(
                f"mesh: found {length} devices on axis {name!r}, expected 1: an engine is one replica; run several for "
                "data parallelism"
            )
    shares = mesh.shape[AXIS]
    if config.moe is not None:
        raise UserError("mesh: found a model with experts, expected a dense one")
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % shares:
            raise UserError(f"mesh: found {name} = {getattr(config, name)}, expected a multiple of {shares} devices")
    if config.num_kv_heads % shares and shares % config.num_kv_heads:
        raise UserError(
            f"mesh: found num_kv_heads = {config.num_kv_heads}, expected a multiple or a divisor of {shares} devices"
        )
    return shares


def cached_kv_heads(config: DecoderConfig, shares: int) -> int:
    """Key-value heads in the caches of all devices together: copies count."""
    return max(config.num_kv_heads, shares)


def shard_for_serving(decoder: Decoder, mesh: Mesh) -> Decoder:
    """Rearranges `decoder` itself for a `shard_map` over "tensor" and lays its arrays out over the mesh.

    `hidden` is then for the inside of the `shard_map`, with the arrays' own specs (`specs`). `logits` is for the
    outside, on whole arrays; the vocabulary is padded to a multiple of the devices with tokens that score 0.

    Raises:
      UserError: see `check_mesh`; or the decoder carries LoRA adapters or has been rearranged already.
    """
    config = decoder.config
    shares = check_mesh(mesh, config)
    attention, mlp = decoder.layers.self_attn, decoder.layers.mlp
    if jax.tree.leaves(nnx.state(decoder, LoraParam)):
        raise UserError("a decoder that carries LoRA adapters cannot be sharded for serving; merge them into it first")
    if attention.k_proj is None or attention.v_proj is None or mlp is None:
        raise UserError("the decoder is rearranged for serving already")

    copies = cached_kv_heads(config, shares) // config.num_kv_heads
    for projection in (attention.k_proj, attention.v_proj):
        for param in (projection.kernel, projection.bias):
            if param is not None and copies > 1:
                param.set_value(repeat_heads(param.get_value(), config.num_kv_heads, copies))
    attention.num_heads = config.num_heads // shares
    attention.num_kv_heads = cached_kv_heads(config, shares) // shares
    attention.o_proj.sum_over = mlp.down_proj.sum_over = decoder.embed.sum_over = AXIS

    surplus = -config.vocab_size % shares
    if surplus:
        table = decoder.embed.embedding
        table.set_value(jnp.pad(table.get_value(), ((0, surplus), (0, 0))))
        if decoder.lm_head is not None:
            kernel = decoder.lm_head.kernel
            kernel.set_value(jnp.pad(kernel.get_value(), ((0, 0), (0, surplus))))
    place(decoder, mesh)
    return decoder


def place(decoder: Decoder, mesh: Mesh) -> None:
    """Lays every array of a rearranged decoder out over the mesh, its adapter slots too."""
    state = nnx.state(decoder)
    nnx.update(decoder, jax.tree_util.tree_map_with_path(lambda path, x: _placed(path, x, mesh), state))


def specs(tree: Any) -> Any:
    """The `PartitionSpec` of every array that `place` has laid out."""
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def repeat_heads(x: Any, heads: int, copies: int) -> Any:
    """Every head of the last axis `copies` times, one after the other; numpy or jax."""
    split = x.reshape(*x.shape[:-1], heads, -1)
    repeat = np.repeat if isinstance(x, np.ndarray) else jnp.repeat
    return repeat(split, copies, axis=-2).reshape(*x.shape[:-1], -1)


def _placed(path: tuple, x: jax.Array, mesh: Mesh) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, _spec([_name(key) for key in path], x.ndim)))


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


def _spec(path: list[str], axes: int) -> PartitionSpec:
    """Which axis of an array is cut, by the names on the way to it."""
    cut = None
    if path[0] == "embed":
        cut = 0
    elif path[0] == "lm_head" or any(name in path for name in _BY_OUTPUT):
        # Kernel, bias and an adapter's B end in the outputs; its A and scale know nothing of them.
        cut = None if path[-1] in ("a", "scale") else axes - 1
    elif any(name in path for name in _BY_INPUT):
        # The bias is added once, after the sum.
        cut = axes - 2 if path[-1] == "a" or "kernel" in path else None
    return PartitionSpec(*(AXIS if axis == cut else None for axis in range(axes)))
