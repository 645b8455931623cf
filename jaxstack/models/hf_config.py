"""Hugging Face `config.json` to `DecoderConfig` and back.

Both generations of the file are read: `torch_dtype`, `rope_theta` and `rope_scaling` of transformers 4, `dtype` and
`rope_parameters` of transformers 5. Both are written, so that either version, and other software, opens what we save.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.rope import ROPE_TYPES, RopeConfig
from jaxstack.runtime.errors import UserError


@dataclass(frozen=True)
class _Family:
    """What one architecture's class fixes, and what it assumes of keys that a file leaves out."""

    model_type: str
    bias: Literal["none", "qkv", "attention_bias"]  # attention_bias: the key of that name, for q, k, v and o alike
    windows: Literal["none", "all", "per_layer"]
    qk_norm: bool = False
    mlp_bias: bool = False  # whether the key of that name exists
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | None = None


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        "llama", "attention_bias", "none", mlp_bias=True, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2
    ),
    "MistralForCausalLM": _Family(
        "mistral", "none", "all", max_position_embeddings=131072, bos_token_id=1, eos_token_id=2
    ),
    "Qwen2ForCausalLM": _Family("qwen2", "qkv", "per_layer"),
    "Qwen3ForCausalLM": _Family("qwen3", "attention_bias", "per_layer", qk_norm=True, head_dim=128),
}

ARCHITECTURES = tuple(_FAMILIES)
"""The `architectures[0]` values that are known."""

_MISTRAL_WINDOW = 4096
_QWEN_WINDOW, _QWEN_MAX_WINDOW_LAYERS = 4096, 28
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
        fields = _Fields(read_json(generation), str(generation))
        if fields.given("eos_token_id"):
            config = replace(config, eos_token_ids=fields.token_ids("eos_token_id"))
        if fields.given("bos_token_id"):
            config = replace(config, bos_token_id=fields.token_id("bos_token_id", None))
        if fields.given("pad_token_id"):
            config = replace(config, pad_token_id=fields.token_id("pad_token_id", None))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; one-line `UserError` if it is missing, unreadable, or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a Hugging Face model folder with it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}: {error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: found a JSON {type(data).__name__}, expected an object")
    return data


def config_from_hf(data: Mapping[str, Any], *, source: str = "config.json") -> DecoderConfig:
    """A `DecoderConfig` from the contents of a `config.json`.

    Args:
      data: the parsed file.
      source: what error messages call it.

    Raises:
      UserError: an unknown architecture, activation or rope_type, a quantised checkpoint, or a key that is missing or
        malformed; one line naming file and field.
    """
    fields = _Fields(data, source)
    architecture, family = _family_of(fields)
    if fields.given("quantization_config"):
        raise fields.error("quantization_config", "an unquantised checkpoint")
    if fields.text("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "'silu'")

    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", family.head_dim if "head_dim" not in data else None, optional=True)
    if head_dim is None:
        if hidden % heads:
            raise fields.error(
                "num_attention_heads", f"a divisor of hidden_size = {hidden} where head_dim is not given"
            )
        head_dim = hidden // heads
    layers = fields.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    attention_bias = family.bias == "attention_bias" and fields.flag("attention_bias", False)
    max_positions = fields.integer("max_position_embeddings", family.max_position_embeddings)
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
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(fields, max_positions),
            max_position_embeddings=max_positions,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias or family.bias == "qkv",
            attention_out_bias=attention_bias,
            mlp_bias=family.mlp_bias and fields.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            layer_windows=_windows_from_hf(fields, family, layers),
            bos_token_id=fields.token_id("bos_token_id", family.bos_token_id),
            eos_token_ids=fields.token_ids("eos_token_id", family.eos_token_id),
            pad_token_id=fields.token_id("pad_token_id", None),
            initializer_range=fields.number("initializer_range", 0.02) or 0.02,
        )
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(source) else f"{source}: {message}") from None


def stored_dtype(data: Mapping[str, Any], *, source: str = "config.json") -> str:
    """The dtype a `config.json` names for its weights (`dtype`, formerly `torch_dtype`); float32 if none."""
    fields = _Fields(data, source)
    name = "dtype" if fields.given("dtype") else "torch_dtype"
    found = fields.text(name, "float32").removeprefix("torch.")
    if found not in _DTYPES:
        raise fields.error(name, f"one of {', '.join(_DTYPES)}")
    return found


def _family_of(fields: "_Fields") -> tuple[str, _Family]:
    found = fields.data.get("architectures")
    if isinstance(found, list) and found and isinstance(found[0], str):
        architecture = found[0]
    elif found is None and fields.given("model_type"):  # some hand-written files name the type alone
        model_type = fields.text("model_type", "")
        architecture = next((a for a, f in _FAMILIES.items() if f.model_type == model_type), model_type)
    else:
        raise fields.error("architectures", f"a list with one of {', '.join(_FAMILIES)}")
    if architecture not in _FAMILIES:
        raise UserError(
            f"{fields.source}: architectures: found {architecture!r}, expected one of {', '.join(_FAMILIES)}"
        )
    return architecture, _FAMILIES[architecture]


def _windows_from_hf(fields: "_Fields", family: _Family, layers: int) -> tuple[int | None, ...]:
    if family.windows == "none":
        return (None,) * layers
    types = fields.data.get("layer_types")
    if types is not None:
        kinds = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or not all(t in kinds for t in types):
            raise fields.error("layer_types", f"a list of {layers} entries, each one of {', '.join(kinds)}")
    if family.windows == "all":
        window = fields.integer(
            "sliding_window", None if "sliding_window" in fields.data else _MISTRAL_WINDOW, optional=True
        )
        if types is not None and window is not None and "full_attention" in types:
            raise fields.error("layer_types", "sliding_attention in every layer, as this architecture has it")
        return (window,) * layers
    if not fields.flag("use_sliding_window", False):
        return (None,) * layers
    window = fields.integer("sliding_window", None if "sliding_window" in fields.data else _QWEN_WINDOW, optional=True)
    if types is None:
        first = fields.integer("max_window_layers", _QWEN_MAX_WINDOW_LAYERS, minimum=0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if t == "sliding_attention" else None for t in types)


def _rope_from_hf(fields: "_Fields", max_positions: int) -> RopeConfig:
    # transformers 5 prefers the old key where a file has both; rope_theta may stand inside the object or beside it.
    name = "rope_scaling" if fields.given("rope_scaling") else "rope_parameters"
    found = fields.data.get(name)
    if found is not None and not isinstance(found, dict):
        raise fields.error(name, "an object")
    rope = _Fields(found or {}, fields.source, prefix=f"{name}.")
    newer = fields.data.get("rope_parameters")
    beside = newer.get("rope_theta") if isinstance(newer, dict) else None
    theta = rope.number("rope_theta", fields.number("rope_theta", beside if beside is not None else 10_000.0))
    rope_type = rope.text("rope_type" if rope.given("rope_type") else "type", "default")
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"{fields.source}: {name}.rope_type: found {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}"
        )
    for owner in (fields, rope):
        if owner.given("partial_rotary_factor") and owner.number("partial_rotary_factor", 1.0) != 1.0:
            raise owner.error("partial_rotary_factor", "1.0: these architectures rotate whole heads")
    if rope_type == "default":
        return _named(RopeConfig, fields.source, theta=theta)
    factor = rope.number("factor")
    if rope_type == "linear":
        return _named(RopeConfig, fields.source, theta=theta, rope_type="linear", factor=factor)
    original = fields.integer("original_max_position_embeddings", None, optional=True) or rope.integer(
        "original_max_position_embeddings", max_positions
    )
    scaling = {"theta": theta, "rope_type": rope_type, "factor": factor, "original_max_position_embeddings": original}
    if rope_type == "llama3":
        bands = {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        return _named(RopeConfig, fields.source, **scaling, **bands)
    attention_factor = rope.number("attention_factor") if rope.given("attention_factor") else None
    if attention_factor is None and rope.given("mscale") and rope.given("mscale_all_dim"):
        over, under = (0.1 * rope.number(key) * math.log(max(factor, 1)) + 1 for key in ("mscale", "mscale_all_dim"))
        attention_factor = over / under
    return _named(
        RopeConfig,
        fields.source,
        **scaling,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _named(make: Any, source: str, **values: Any) -> Any:
    """`make(**values)` with the file's name before its complaint."""
    try:
        return make(**values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def config_to_hf(config: DecoderConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The contents of a `config.json` that transformers 4 and 5 both read as this decoder.

    Args:
      config: the decoder's.
      dtype: the dtype its weights are stored in.

    Raises:
      UserError: the architecture is unknown, or cannot express one of the config's fields.
    """
    family = _FAMILIES.get(config.architecture)
    if family is None:
        raise UserError(f"architecture: found {config.architecture!r}, expected one of {', '.join(_FAMILIES)}")
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
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": token_ids_to_hf(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        **_rope_to_hf(config.rope),
    }
    if family.bias == "attention_bias":
        data["attention_bias"] = config.qkv_bias
    if family.mlp_bias:
        data["mlp_bias"] = config.mlp_bias
    window = next((w for w in config.layer_windows if w is not None), None)
    if family.windows == "all":
        data["sliding_window"] = window
    elif family.windows == "per_layer":
        sliding = [w is not None for w in config.layer_windows]
        data["use_sliding_window"] = window is not None
        data["sliding_window"] = window
        data["max_window_layers"] = sliding.index(True) if True in sliding else config.num_layers
        data["layer_types"] = ["sliding_attention" if s else "full_attention" for s in sliding]
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


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.rope_type == "default" else dict(scaling),
        "rope_parameters": {**scaling, "rope_theta": rope.theta},
    }


def _require_expressible(config: DecoderConfig, family: _Family) -> None:
    windows = {w for w in config.layer_windows if w is not None}
    mixed = bool(windows) and None in config.layer_windows
    attention_bias = family.bias == "attention_bias" and config.qkv_bias
    fixed = {
        "qkv_bias": (config.qkv_bias, attention_bias or family.bias == "qkv"),
        "attention_out_bias": (config.attention_out_bias, attention_bias),
        "mlp_bias": (config.mlp_bias, family.mlp_bias and config.mlp_bias),
        "qk_norm": (config.qk_norm, family.qk_norm),
    }
    for name, (found, expected) in fixed.items():
        if found != expected:
            raise UserError(f"{name}: found {found}, expected {expected}: {config.architecture} has no other form")
    if len(windows) > 1 or (windows and family.windows == "none") or (mixed and family.windows == "all"):
        allowed = {
            "none": "full attention in every layer",
            "all": "the same window in every layer",
            "per_layer": "one window size, in any of the layers",
        }[family.windows]
        raise UserError(
            f"layer_windows: found {config.layer_windows}, expected {allowed}, as {config.architecture} has it"
        )


_REQUIRED: Any = object()


class _Fields:
    """Typed reads from a JSON object; every complaint names file, field, what was found and what was expected.

    A key that is null counts as absent.
    """

    def __init__(self, data: Mapping[str, Any], source: str, prefix: str = ""):
        self.data, self.source, self.prefix = data, source, prefix

    def given(self, name: str) -> bool:
        return self.data.get(name) is not None

    def error(self, name: str, expected: str) -> UserError:
        shown = repr(self.data[name]) if name in self.data else "nothing"
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return UserError(f"{self.source}: {self.prefix}{name}: found {shown}, expected {expected}")

    def _value(self, name: str, default: Any, expected: str) -> Any:
        value = self.data.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self.error(name, expected)
            return default
        return value

    def integer(
        self, name: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = 2**31 - 1, optional: bool = False
    ) -> Any:
        """An integer in range; None only where `optional`."""
        expected = f"an integer from {minimum} to {maximum}"
        value = self._value(name, default, expected)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(name, expected)
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._value(name, default, "a finite number")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            raise self.error(name, "a finite number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default, "a string")
        if not isinstance(value, str):
            raise self.error(name, "a string")
        return value

    def token_id(self, name: str, default: int | None) -> int | None:
        """A token id; absent keys give `default`, null and the -1 of some old files None."""
        value = self.data.get(name, default)
        if value is None or value == -1:
            return None
        return self.integer(name, default, minimum=0)

    def token_ids(self, name: str, default: int | None = None) -> tuple[int, ...]:
        """One id or a list of them."""
        value = self.data.get(name, default)
        if not isinstance(value, list):
            one = self.token_id(name, default)
            return () if one is None else (one,)
        if any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**31 for v in value):
            raise self.error(name, "a token id or a list of token ids")
        return tuple(value)
