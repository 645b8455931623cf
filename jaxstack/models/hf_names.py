"""The names and layouts of a decoder's parameters in Hugging Face checkpoints.

The decoder's modules carry the names that Llama's checkpoints have inside a layer, so the map is short: three outer
modules are renamed, the layer number is put in, and matrices are transposed (theirs are `[out, in]`, ours `[in, out]`).
Where a family names a module otherwise, `_NAMES` says so; parameters that come to the same name lie one after another
in that tensor: the parts of a fused projection, or the experts of a stack.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np
from flax import nnx

from jaxstack.models.decoder import Decoder, DecoderConfig

_LEAF = {"kernel": "weight", "weight": "weight", "embedding": "weight", "bias": "bias"}
_FUSED_ORDER = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}


@dataclass(frozen=True)
class _Names:
    """A family's names.

    Attributes:
      outer: of the modules outside the layers.
      layer: of a layer.
      inner: of modules inside a layer, where they are not ours; {expert} is an expert's number.
      bare: modules whose tensor has no ".weight" after its name.
      untransposed: modules whose matrices lie as ours do.
    """

    outer: Mapping[str, str] = field(
        default_factory=lambda: {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
    )
    layer: str = "model.layers.{layer}"
    inner: Mapping[str, str] = field(default_factory=dict)
    bare: frozenset[str] = frozenset()
    untransposed: frozenset[str] = frozenset()

    def tensor(self, path: tuple[str, ...], layer: int | None, expert: int | None) -> str:
        *module, leaf = path
        if layer is None:
            return f"{self.outer[path[0]]}.{_LEAF[leaf]}"
        own = ".".join(module[1:])
        name = f"{self.layer}.{self.inner.get(own, own)}".format(layer=layer, expert=expert)
        return name if own in self.bare else f"{name}.{_LEAF[leaf]}"


_LLAMA = _Names()
_NAMES = {
    "Phi3ForCausalLM": _Names(
        inner={f"self_attn.{part}_proj": "self_attn.qkv_proj" for part in "qkv"}
        | {f"mlp.{part}_proj": "mlp.gate_up_proj" for part in ("gate", "up")}
    ),
    "MixtralForCausalLM": _Names(
        inner={
            "moe.router": "block_sparse_moe.gate",
            "moe.gate_proj": "block_sparse_moe.experts.{expert}.w1",
            "moe.up_proj": "block_sparse_moe.experts.{expert}.w3",
            "moe.down_proj": "block_sparse_moe.experts.{expert}.w2",
        }
    ),
    "Qwen3MoeForCausalLM": _Names(
        inner={"moe.router": "mlp.gate"}
        | {f"moe.{part}_proj": f"mlp.experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down")}
    ),
    "DbrxForCausalLM": _Names(
        outer={"embed": "transformer.wte", "final_norm": "transformer.norm_f", "lm_head": "lm_head"},
        layer="transformer.blocks.{layer}",
        inner={
            "input_layernorm": "norm_attn_norm.norm_1",
            "post_attention_layernorm": "norm_attn_norm.norm_2",
            **{f"self_attn.{part}_proj": "norm_attn_norm.attn.Wqkv" for part in "qkv"},
            "self_attn.o_proj": "norm_attn_norm.attn.out_proj",
            "moe.router": "ffn.router.layer",
            "moe.gate_proj": "ffn.experts.mlp.w1",
            "moe.up_proj": "ffn.experts.mlp.v1",
            "moe.down_proj": "ffn.experts.mlp.w2",
        },
        bare=frozenset({"moe.gate_proj", "moe.up_proj", "moe.down_proj"}),
        untransposed=frozenset({"moe.down_proj"}),
    ),
}


@dataclass(frozen=True)
class Piece:
    """Part of a checkpoint's tensor, and where it lives in a `Decoder`.

    Attributes:
      path: of the Param in the decoder's state: ("layers", "self_attn", "q_proj", "kernel").
      index: on the Param's leading axes: of the layer among those that have it, of the expert; () for all of it.
      rows: of the tensor's first axis, (start, stop).
      transposed: whether the checkpoint holds the transpose of ours.
    """

    path: tuple[str, ...]
    index: tuple[int, ...]
    rows: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint: its name, its shape, and the pieces that it consists of, first rows first."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def assemble(self, params: Mapping[tuple[str, ...], np.ndarray]) -> np.ndarray:
        """The tensor, from the decoder's parameters by path; a view where it is one piece."""
        parts = [params[piece.path][piece.index] for piece in self.pieces]
        parts = [part.T if piece.transposed else part for part, piece in zip(parts, self.pieces)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def hf_tensors(config: DecoderConfig) -> list[HfTensor]:
    """Every tensor of such a model's checkpoint, in the customary order: embedding, layer by layer, last norm, head."""
    params = {path: value.shape for path, value in flat_params(Decoder.abstract(config)).items()}
    names = _NAMES.get(config.architecture, _LLAMA)
    found: dict[str, list[tuple[Piece, tuple[int, ...]]]] = {}
    for path, layer, expert, index in _places(config, params):
        own = ".".join(path[1:-1])
        transposed = path[-1] == "kernel" and own not in names.untransposed
        shape = params[path][len(index) :]
        shape = shape[::-1] if transposed else shape
        entry = found.setdefault(names.tensor(path, layer, expert), [])
        entry.append((Piece(path, index, (0, shape[0]), transposed), shape))
    return [_joined(name, pieces) for name, pieces in found.items()]


def _places(
    config: DecoderConfig, params: Mapping[tuple[str, ...], tuple[int, ...]]
) -> Iterator[tuple[tuple[str, ...], int | None, int | None, tuple[int, ...]]]:
    """Every matrix and vector: its path, layer, expert, and index on the Param's leading axes."""
    yield from ((path, None, None, ()) for path in params if path[0] == "embed")
    for layer in range(config.num_layers):
        for path in params:
            if path[0] != "layers":
                continue
            having = layers_having(config, path)
            if layer not in having:
                continue
            index = having.index(layer)
            if path[1] == "moe" and path[2] != "router" and config.moe is not None:
                yield from ((path, layer, expert, (index, expert)) for expert in range(config.moe.num_experts))
            else:
                yield path, layer, None, (index,)
    for outer in ("final_norm", "lm_head"):
        yield from ((path, None, None, ()) for path in params if path[0] == outer)


def _joined(name: str, pieces: list[tuple[Piece, tuple[int, ...]]]) -> HfTensor:
    """One tensor of pieces that lie one after another."""
    pieces = sorted(pieces, key=lambda piece: _FUSED_ORDER.get(piece[0].path[-2], 0))
    start, placed = 0, []
    for piece, shape in pieces:
        placed.append(Piece(piece.path, piece.index, (start, start + shape[0]), piece.transposed))
        start += shape[0]
    return HfTensor(name, (start, *pieces[0][1][1:]), tuple(placed))


def layers_having(config: DecoderConfig, path: tuple[str, ...]) -> tuple[int, ...]:
    """The numbers of the layers on the leading axis of a parameter, or of a module, of the stack."""
    if path[1] == "mlp":
        return config.dense_layers
    return config.sparse_layers if path[1] == "moe" else tuple(range(config.num_layers))


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
    """The usual name of a module: `("layers", "mlp", "up_proj"), 3` gives "model.layers.3.mlp.up_proj"."""
    return _LLAMA.tensor((*path, "weight"), layer, None).removesuffix(".weight")
