"""Hugging Face folders of BERT's kind (BERT, MiniLM, BGE, GTE, E5) to encoders.

What a folder of sentence-transformers says beside the model is read too: how texts are pooled
(`1_Pooling/config.json`) and how long they may be (`sentence_bert_config.json`).
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxstack.models.checkpoint import finite_values, require_memory, stored_tensors
from jaxstack.models.encoder import Encoder, EncoderActivation, EncoderConfig, Pooling
from jaxstack.models.hf_fields import Fields, read_json
from jaxstack.models.safetensors_file import StoredTensor
from jaxstack.runtime.errors import UserError

_ACTIVATIONS: Mapping[str, EncoderActivation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_MODEL_TYPES = ("bert",)

# A parameter's path -> its tensor's name, its layer's number put in.
_EMBEDDINGS = {
    ("words",): "embeddings.word_embeddings.weight",
    ("positions",): "embeddings.position_embeddings.weight",
    ("segments",): "embeddings.token_type_embeddings.weight",
    ("embedding_norm", "weight"): "embeddings.LayerNorm.weight",
    ("embedding_norm", "bias"): "embeddings.LayerNorm.bias",
}
_IN_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# Heads that an embedding has no use for.
_UNUSED = ("pooler.", "cls.", "classifier.", "embeddings.position_ids")


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What a folder says of how texts become vectors.

    Attributes:
      pooling: "mean" where it does not say.
      max_tokens: of a text, with its markers.
    """

    pooling: Pooling
    max_tokens: int


def encoder_config_from_hf(data: Mapping[str, Any], *, source: str = "config.json") -> EncoderConfig:
    """An `EncoderConfig` from the contents of a `config.json`.

    Raises:
      UserError: another kind of model, an unknown activation, or a key that is missing or malformed; one line.
    """
    fields = Fields(data, source)
    if fields.text("model_type", "") not in _MODEL_TYPES:
        raise fields.error("model_type", f"one of {', '.join(_MODEL_TYPES)}")
    if fields.text("position_embedding_type", "absolute") != "absolute":
        raise fields.error("position_embedding_type", "absolute")
    if fields.flag("is_decoder", False):
        raise fields.error("is_decoder", "false")
    activation = fields.text("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise fields.error("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    heads = fields.integer("num_attention_heads", 12)
    hidden = fields.integer("hidden_size", 768)
    if hidden % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {hidden}")
    eps = fields.number("layer_norm_eps", 1e-12)
    if not eps > 0:
        raise fields.error("layer_norm_eps", "a number > 0")
    return EncoderConfig(
        vocab_size=fields.integer("vocab_size", 30522),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 3072),
        num_layers=fields.integer("num_hidden_layers", 12, maximum=4096),
        num_heads=heads,
        max_positions=fields.integer("max_position_embeddings", 512),
        segments=fields.integer("type_vocab_size", 2),
        activation=_ACTIVATIONS[activation],
        norm_eps=eps,
    )


def text_settings(folder: str | Path) -> TextSettings:
    """How the folder's texts are pooled and cut.

    Raises:
      UserError: a malformed file, or a way of pooling that is neither the mean nor the first token.
    """
    folder = Path(folder)
    config = encoder_config_from_hf(read_json(folder / "config.json"), source=str(folder / "config.json"))
    pooling: Pooling = "mean"
    file = folder / "1_Pooling" / "config.json"
    if file.is_file():
        fields = Fields(read_json(file), str(file))
        asked = [name for name in fields.data if name.startswith("pooling_mode_") and fields.flag(name, False)]
        if asked not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
            found = ", ".join(asked) or "none"
            raise UserError(f"{file}: found {found}, expected pooling_mode_mean_tokens or pooling_mode_cls_token alone")
        pooling = "mean" if asked == ["pooling_mode_mean_tokens"] else "cls"
    max_tokens = min(256, config.max_positions)
    file = folder / "sentence_bert_config.json"
    if file.is_file():
        fields = Fields(read_json(file), str(file))
        max_tokens = min(fields.integer("max_seq_length", max_tokens), config.max_positions)
    return TextSettings(pooling, max_tokens)


def load_encoder(folder: str | Path, *, param_dtype: jnp.dtype = jnp.float32, progress: bool = True) -> Encoder:
    """The encoder of a Hugging Face folder: `config.json` and safetensors, with or without the prefix "bert.".

    Args:
      param_dtype: dtype of the parameters, whatever the files hold.
      progress: show a bar on stderr if it takes longer than two seconds.

    Raises:
      UserError: one line for: a bad configuration, a pickle-only folder, a malformed file, a missing, extra or
        misshapen tensor, NaN or infinite weights, or too little memory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a Hugging Face model folder")
    config = encoder_config_from_hf(read_json(folder / "config.json"), source=str(folder / "config.json"))
    encoder = Encoder.abstract(config, param_dtype=param_dtype)
    state = nnx.to_flat_state(nnx.state(encoder, nnx.Param))
    params = {tuple(map(str, path)): leaf.get_value() for path, leaf in state}
    wanted = {path: _tensor_names(path, config.num_layers) for path in params}
    stored = _matched(folder, {n: s for p, names in wanted.items() for n, s in names.items()}, params, wanted)
    dtype = np.dtype(param_dtype)
    sizes = {path: math.prod(value.shape) * dtype.itemsize for path, value in params.items()}
    require_memory(folder, device_bytes=sum(sizes.values()), host_bytes=max(sizes.values()))
    arrays: dict[tuple[str, ...], jax.Array] = {}
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc=f"loading {folder.name}", delay=2,
        disable=not progress,
    ) as bar:  # fmt: skip
        for path, value in params.items():
            layers = [finite_values(stored[name], None, dtype) for name in wanted[path]]
            layers = [layer.T if path[-1] == "kernel" else layer for layer in layers]
            arrays[path] = jnp.array(np.stack(layers) if path[0] == "layers" else layers[0])
            assert arrays[path].shape == value.shape
            bar.update(sizes[path])
    nnx.update(encoder, nnx.from_flat_state([(path, arrays[path]) for path in params]))
    return encoder


def _tensor_names(path: tuple[str, ...], layers: int) -> dict[str, int]:
    """The tensors that a parameter is made of, and each one's layer; in order."""
    if path[0] != "layers":
        return {_EMBEDDINGS[path]: 0}
    leaf = "bias" if path[-1] == "bias" else "weight"
    return {f"encoder.layer.{layer}.{_IN_LAYER[path[1]]}.{leaf}": layer for layer in range(layers)}


def _matched(
    folder: Path,
    names: Mapping[str, int],
    params: Mapping[tuple[str, ...], Any],
    wanted: Mapping[tuple[str, ...], Mapping[str, int]],
) -> dict[str, StoredTensor]:
    """The folder's tensors by the names of `wanted`, all there and in their shapes."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored_tensors(folder).items():
        name = name.removeprefix("bert.")
        # TensorFlow's names of a norm's parameters, in some old files.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(_UNUSED):
            continue
        if name not in names:
            raise UserError(
                f"{folder}: extra tensor {tensor.name} of shape {tensor.shape}, expected none of that name in a BERT"
            )
        found[name] = tensor
    for path, value in params.items():
        shape = value.shape[1:] if path[0] == "layers" else value.shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        for name in wanted[path]:
            if name not in found:
                raise UserError(f"{folder}: missing tensor {name}, expected shape {shape}")
            if found[name].shape != shape:
                raise UserError(f"{folder}: misshapen tensor {name}: found {found[name].shape}, expected {shape}")
    return found
