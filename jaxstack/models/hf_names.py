"""The names and layouts of a decoder's parameters in Hugging Face checkpoints.

The decoder's modules carry Hugging Face's own names inside a layer, so the map is short: three outer modules are
renamed, the layer number is put in, and matrices are transposed (theirs are `[out, in]`, ours `[in, out]`).
"""

from dataclasses import dataclass

import jax
from flax import nnx

from jaxstack.models.decoder import Decoder, DecoderConfig

_OUTER = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_LEAF = {"kernel": "weight", "weight": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint and where it lives in a `Decoder`.

    Attributes:
      name: "model.layers.3.self_attn.q_proj.weight".
      path: of the Param in the decoder's state: ("layers", "self_attn", "q_proj", "kernel").
      layer: its index on the Param's leading axis; None for a Param without one.
      shape: as the checkpoint has it.
      transposed: whether the checkpoint holds the transpose of ours.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def hf_tensors(config: DecoderConfig) -> list[HfTensor]:
    """Every tensor of such a model's checkpoint, in the customary order: embedding, layer by layer, last norm, head."""
    params = flat_params(Decoder.abstract(config))
    stacked = {path: v for path, v in params.items() if path[0] == "layers"}
    tensors = [_tensor(path, None, params[path].shape) for path in params if path[0] == "embed"]
    for layer in range(config.num_layers):
        tensors += [_tensor(path, layer, v.shape[1:]) for path, v in stacked.items()]
    for outer in ("final_norm", "lm_head"):
        tensors += [_tensor(path, None, v.shape) for path, v in params.items() if path[0] == outer]
    return tensors


def text_model_name(name: str) -> str | None:
    """A tensor's name in the text model alone, from that in a multimodal checkpoint; None for one of another part.

    transformers 4 wrote "language_model.model.layers...", transformers 5 writes "model.language_model.layers...".
    """
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        inner = name.removeprefix("language_model.").removeprefix("model.")
        return inner if inner.startswith("lm_head.") else f"model.{inner}"
    return name if name.startswith("lm_head.") else None


def flat_params(decoder: Decoder) -> dict[tuple[str, ...], jax.Array]:
    """Every parameter's array by its path of attribute names, such as ("layers", "self_attn", "q_proj", "kernel")."""
    return {tuple(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(decoder, nnx.Param))}


def hf_module(path: tuple[str, ...], layer: int | None) -> str:
    """The checkpoint's name of a module: `("layers", "mlp", "up_proj"), 3` gives "model.layers.3.mlp.up_proj"."""
    outer = f"model.layers.{layer}" if path[0] == "layers" else _OUTER[path[0]]
    return ".".join((outer, *path[1:]))


def _tensor(path: tuple[str, ...], layer: int | None, shape: tuple[int, ...]) -> HfTensor:
    *module, leaf = path
    transposed = leaf == "kernel"
    name = f"{hf_module(tuple(module), layer)}.{_LEAF[leaf]}"
    return HfTensor(name, path, layer, shape[::-1] if transposed else shape, transposed)
