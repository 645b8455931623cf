"""Hugging Face `config.json` to `DecoderConfig` and back.

Both generations of the file are read: `torch_dtype`, `rope_theta` and `rope_scaling` of transformers 4, `dtype` and
`rope_parameters` of transformers 5. Both are written, so that either version, and other software, opens what we save.
What the families fix and assume stands in `hf_families`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxstack.models.decoder_config import DecoderConfig
from jaxstack.models.hf_families import ARCHITECTURES, FAMILIES, HIDDEN_ACTS, TEXT_MODELS, Family
from jaxstack.models.hf_fields import Fields, read_json
from jaxstack.models.hf_moe import dbrx_to_hf, moe_from_hf, moe_to_hf
from jaxstack.models.hf_rope import rope_from_hf, rope_to_hf
from jaxstack.runtime.errors import UserError

_DTYPES = ("float32", "bfloat16", "float16")
# More layers than any decoder has, few enough that a hostile file cannot make us build a list that fills the memory.
_MAX_LAYERS = 4096


def config_from_folder(folder: str | Path) -> DecoderConfig:
    """The configuration of a Hugging Face folder; token ids of `generation_config.json` override `config.json`'s.

    Raises:
      UserError: no such file, not JSON, or anything `config_from_hf` refuses.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = config_from_hf(read_json(path), source=str(path))
    generation = folder / "generation_config.json"
    if generation.is_file():
        fields = Fields(read_json(generation), str(generation))
        if fields.given("eos_token_id"):
            config = replace(config, eos_token_ids=fields.token_ids("eos_token_id"))
        if fields.given("bos_token_id"):
            config = replace(config, bos_token_id=fields.token_id("bos_token_id", None))
        if fields.given("pad_token_id"):
            config = replace(config, pad_token_id=fields.token_id("pad_token_id", None))
    return config


def config_from_hf(data: Mapping[str, Any], *, source: str = "config.json") -> DecoderConfig:
    """A `DecoderConfig` from the contents of a `config.json`.

    Args:
      data: the parsed file.
      source: what error messages call it.

    Raises:
      UserError: an unknown architecture, activation or rope_type, a quantised checkpoint, or a key that is missing or
        malformed; one line naming file and field.
    """
    architecture = _architecture(Fields(data, source))
    prefix = ""
    if architecture in TEXT_MODELS:
        architecture, prefix = TEXT_MODELS[architecture], "text_config."
        data = _text_config(data, source)
    family = FAMILIES[architecture]
    fields = Fields(data, source, prefix, keys=family.keys, defaults=family.defaults)
    if fields.given("quantization_config"):
        raise fields.error("quantization_config", "an unquantised checkpoint")
    act = HIDDEN_ACTS[family.activation]
    if fields.text("hidden_act", act) != act:
        raise fields.error("hidden_act", repr(act))
    if fields.flag("use_bidirectional_attention", False):
        raise fields.error("use_bidirectional_attention", "false: a decoder sees what came before")

    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", None, optional=True)
    if head_dim is None:
        if hidden % heads:
            raise fields.error(
                "num_attention_heads", f"a divisor of hidden_size = {hidden} where head_dim is not given"
            )
        head_dim = hidden // heads
    layers = fields.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    attention_bias = family.bias == "attention_bias" and fields.flag("attention_bias", False)
    max_positions = fields.integer("max_position_embeddings", family.defaults.get("max_position_embeddings", 2048))
    rope, local_rope = rope_from_hf(fields, family, max_positions)
    try:
        return DecoderConfig(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=fields.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            activation=family.activation,
            norm=family.norm,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            branch_norms=family.branch_norms,
            rope=rope,
            local_rope=local_rope,
            max_position_embeddings=max_positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            scale_embeddings=family.scale_embeddings,
            qkv_bias=attention_bias or family.bias == "qkv",
            attention_out_bias=attention_bias,
            mlp_bias=family.mlp_bias and fields.flag("mlp_bias", False),
            qkv_clip=fields.number("clip_qkv", optional=True) if family.clip else None,
            qk_norm=family.qk_norm,
            layer_windows=_windows_from_hf(fields, family, layers),
            moe=moe_from_hf(fields, family, layers),
            bos_token_id=fields.token_id("bos_token_id", None),
            eos_token_ids=fields.token_ids("eos_token_id", None),
            pad_token_id=fields.token_id("pad_token_id", None),
            initializer_range=fields.number("initializer_range", 0.02) or 0.02,
            **(_softcaps_from_hf(fields) if family.softcaps else {}),
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(source) else f"{source}: {message}") from None


def stored_dtype(data: Mapping[str, Any], *, source: str = "config.json") -> str:
    """The dtype a `config.json` names for its weights (`dtype`, formerly `torch_dtype`); float32 if none."""
    fields = Fields(data, source)
    name = "dtype" if fields.given("dtype") else "torch_dtype"
    found = fields.text(name, "float32").removeprefix("torch.")
    if found not in _DTYPES:
        raise fields.error(name, f"one of {', '.join(_DTYPES)}")
    return found


def _architecture(fields: Fields) -> str:
    found = fields.get("architectures")
    if isinstance(found, list) and found and isinstance(found[0], str):
        architecture = found[0]
    elif found is None and fields.given("model_type"):  # some hand-written files name the type alone
        model_type = fields.text("model_type", "")
        architecture = next((a for a, f in FAMILIES.items() if f.model_type == model_type), model_type)
    else:
        raise fields.error("architectures", f"a list with one of {', '.join(ARCHITECTURES)}")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{fields.source}: architectures: found {architecture!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    return architecture


def _text_config(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The language model's part of a multimodal configuration; token ids and the like may stand outside it."""
    inner = data.get("text_config")
    if not isinstance(inner, dict):
        raise Fields(data, source).error("text_config", "an object")
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")
    return {**{key: data[key] for key in outer if data.get(key) is not None}, **inner}


def _softcaps_from_hf(fields: Fields) -> dict[str, float | None]:
    return {
        "query_pre_attn_scalar": fields.number("query_pre_attn_scalar"),
        "attention_softcap": fields.number("attn_logit_softcapping", optional=True),
        "logits_softcap": fields.number("final_logit_softcapping", optional=True),
    }


def _windows_from_hf(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    if family.windows == "none":
        return (None,) * layers
    types = fields.get("layer_types")
    if types is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(t in kinds for t in types):
            raise fields.error("layer_types", f"a list of {layers} entries, each one of {', '.join(kinds)}")
    if family.window_flag and not fields.flag("use_sliding_window", False):
        return (None,) * layers
    window = fields.integer("sliding_window", None, optional=family.windows != "pattern")
    if family.windows == "all":
        if types is not None and window is not None and "full_attention" in types:
            raise fields.error("layer_types", "sliding_attention in every layer, as this architecture has it")
        return (window,) * layers
    if types is None and family.windows == "pattern":
        period = fields.integer("sliding_window_pattern", family.window_pattern)
        types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    elif types is None:
        first = fields.integer("max_window_layers", minimum=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if t == "sliding_attention" else None for t in types)


def config_to_hf(config: DecoderConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The contents of a `config.json` that transformers 4 and 5 both read as this decoder.

    Args:
      config: the decoder's.
      dtype: the dtype its weights are stored in.

    Raises:
      UserError: the architecture is unknown, or cannot express one of the config's fields.
    """
    family = FAMILIES.get(config.architecture)
    if family is None:
        raise UserError(f"architecture: found {config.architecture!r}, expected one of {', '.join(FAMILIES)}")
    _require_expressible(config, family)
    data: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": HIDDEN_ACTS[family.activation],
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **rope_to_hf(config, family),
    }
    if family.bias == "attention_bias":
        data["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        data["mlp_bias"] = config.mlp_bias
    if family.softcaps:
        data |= {
            "hidden_activation": HIDDEN_ACTS[family.activation],
            "query_pre_attn_scalar": _whole(config.query_pre_attn_scalar or config.head_dim),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logits_softcap,
        }
    data |= moe_to_hf(config, family) | _windows_to_hf(config, family)
    return dbrx_to_hf(config, data) if family.moe == "dbrx" else data


def _whole(number: float) -> float:
    """An integer where it is one: other readers' types insist."""
    return int(number) if number == int(number) else number


def _windows_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    data: dict[str, Any] = {}
    window = next((w for w in config.layer_windows if w is not None), None)
    sliding = [w is not None for w in config.layer_windows]
    types = ["sliding_attention" if s else "full_attention" for s in sliding]
    if family.windows == "all":
        data["sliding_window"] = window
        if family.window_flag:
            data["use_sliding_window"] = window is not None
    elif family.windows == "pattern":
        data["sliding_window"] = window or family.defaults["sliding_window"]
        data["layer_types"] = types
        period = sliding.index(False) + 1 if False in sliding else config.num_layers + 1
        if sliding == [bool((i + 1) % period) for i in range(config.num_layers)]:
            data["sliding_window_pattern"] = period
    elif family.windows == "per_layer":
        data["use_sliding_window"] = window is not None
        data["sliding_window"] = window
        data["max_window_layers"] = sliding.index(True) if True in sliding else config.num_layers
        data["layer_types"] = types
    return data


def generation_config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The token ids of a `generation_config.json`."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def token_ids_to_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    """One id bare, several as a list, none as null."""
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _require_expressible(config: DecoderConfig, family: Family) -> None:
    windows = {w for w in config.layer_windows if w is not None}
    mixed = bool(windows) and None in config.layer_windows
    attention_bias = family.bias == "attention_bias" and config.qkv_bias
    fixed: dict[str, tuple[Any, Any]] = {
        "qkv_bias": (config.qkv_bias, attention_bias or family.bias == "qkv"),
        "attention_out_bias": (config.attention_out_bias, attention_bias),
        "mlp_bias": (config.mlp_bias, family.mlp_bias and config.mlp_bias),
        "qkv_clip": (config.qkv_clip, config.qkv_clip if family.clip else None),
        "local_rope": (config.local_rope, config.local_rope if family.local_theta is not None else None),
    }
    for name in ("qk_norm", "activation", "norm", "branch_norms", "scale_embeddings"):
        fixed[name] = (getattr(config, name), getattr(family, name))
    for name in ("query_pre_attn_scalar", "attention_softcap", "logits_softcap"):
        fixed[name] = (getattr(config, name), getattr(config, name) if family.softcaps else None)
    for name, (found, expected) in fixed.items():
        if found != expected:
            raise UserError(f"{name}: found {found}, expected {expected}: {config.architecture} has no other form")
    if len(windows) > 1 or (windows and family.windows == "none") or (mixed and family.windows == "all"):
        allowed = {
            "none": "full attention in every layer",
            "all": "the same window in every layer",
            "per_layer": "one window size, in any of the layers",
            "pattern": "one window size, in any of the layers",
        }[family.windows]
        raise UserError(
            f"layer_windows: found {config.layer_windows}, expected {allowed}, as {config.architecture} has it"
        )
