"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, in both directions.

Tensors are called `base_model.model.<module path>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]: the transposes
of ours; and `.lora_magnitude_vector` [out] for DoRA. What this stack cannot honour is refused by name instead of being
left out.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy for safetensors
import numpy as np
import safetensors
import safetensors.numpy

from jaxstack.models.decoder import Decoder
from jaxstack.models.lora import ALL_LINEAR, Factors, LoraConfig, adapter_factors, set_adapters, sites
from jaxstack.runtime.errors import UserError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_((?P<factor>[AB])\.weight|magnitude_vector)")


@dataclasses.dataclass(frozen=True)
class PeftAdapter:
    """An adapter folder in memory.

    Attributes:
      config: its shape.
      factors: Hugging Face module path -> float32 factors.
      dtype: of the stored tensors.
      settings: the whole `adapter_config.json`.
    """

    config: LoraConfig
    factors: dict[str, Factors]
    dtype: np.dtype
    settings: dict[str, Any]


def read_peft(folder: str | Path) -> PeftAdapter:
    """Reads an adapter folder.

    Raises:
      UserError: not such a folder, or it uses a feature that is not supported; the message names it.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    config = _lora_config(settings, folder)
    path = folder / _WEIGHTS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        found = "adapter_model.bin, a pickle that could run code" if pickle.exists() else "no weights"
        raise UserError(f"{folder}: found {found}; expected {_WEIGHTS}")
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:200]})") from error
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"{path}: tensor {key!r} is unknown; expected base_model.model.<module>.lora_A.weight or lora_B"
            )
        pairs.setdefault(match["module"], {})[match["factor"] or "magnitude"] = tensor
    if not pairs:
        raise UserError(f"{path}: holds no tensors; expected at least one adapter")
    factors = {}
    for module, pair in pairs.items():
        magnitude = pair.pop("magnitude", None)
        _check_magnitude(magnitude, pair, config, f"{path}: {module}")
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{path}: {module} has lora_{'/'.join(pair)} only; expected lora_A and lora_B")
        rank = config.rank_of(module)
        for name, axis in (("A", 0), ("B", 1)):
            if pair[name].ndim != 2 or pair[name].shape[axis] != rank:
                raise UserError(
                    f"{path}: {module}.lora_{name} has shape {list(pair[name].shape)}, expected rank {rank} "
                    f"as {_CONFIG} says"
                )
            if not np.isfinite(pair[name].astype(np.float32)).all():
                raise UserError(f"{path}: {module}.lora_{name} holds values that are not finite")
        factors[module] = Factors(
            pair["A"].astype(np.float32).T,
            pair["B"].astype(np.float32).T,
            config.scale_of(module),
            None if magnitude is None else magnitude.astype(np.float32),
        )
    return PeftAdapter(config, factors, next(iter(tensors.values())).dtype, settings)


def _check_magnitude(
    magnitude: np.ndarray | None, pair: Mapping[str, np.ndarray], config: LoraConfig, where: str
) -> None:
    if (magnitude is not None) != config.use_dora:
        found = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
        raise UserError(f"{where} has {found}, though {_CONFIG} has use_dora={json.dumps(config.use_dora)}")
    if magnitude is None:
        return
    out_features = pair["B"].shape[0] if "B" in pair else magnitude.size
    if magnitude.shape != (out_features,):
        raise UserError(f"{where}.lora_magnitude_vector has shape {list(magnitude.shape)}, expected [{out_features}]")
    if not np.isfinite(magnitude.astype(np.float32)).all():
        raise UserError(f"{where}.lora_magnitude_vector holds values that are not finite")


def load_adapters(model: Decoder, folders: Sequence[str | Path]) -> list[PeftAdapter]:
    """Puts adapter folders into slots 1, 2, ... of a decoder, replacing its adapters; slot 0 is "no adapter".

    Raises:
      UserError: see `read_peft`; or an adapter is for a module that the model has not, or of another shape.
    """
    shapes = {m: (site.in_features, site.out_features) for site in sites(model) for m in site.modules}
    adapters = []
    for folder in folders:
        adapter = read_peft(folder)
        for module, factors in adapter.factors.items():
            if module not in shapes:
                raise UserError(
                    f"{folder}: adapts {module!r}, which the model has not; expected one of its linear layers"
                )
            found = (factors.a.shape[0], factors.b.shape[1])
            if found != shapes[module]:
                raise UserError(
                    f"{folder}: adapts {module} from {found[0]} to {found[1]} features, expected {shapes[module][0]} "
                    f"to {shapes[module][1]}: it was made for another model"
                )
        adapters.append(adapter)
    set_adapters(model, [adapter.factors for adapter in adapters])
    return adapters


def save_peft(
    model: Decoder,
    folder: str | Path,
    config: LoraConfig,
    *,
    slot: int = 1,
    base_model: str | None = None,
    dtype: Any = np.float32,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the adapter in a slot as a PEFT folder: into a temporary folder, which then takes the place of `folder`.

    Args:
      config: the adapter's shape.
      base_model: what `base_model_name_or_path` names.
      dtype: of the stored tensors.
      settings: further fields of `adapter_config.json`, as `PeftAdapter.settings` holds them.

    Raises:
      UserError: the folder cannot be written.
    """
    factors = adapter_factors(model, config, slot)
    tensors = {}
    for module, pair in factors.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(pair.a.T.astype(dtype))
        tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(pair.b.T.astype(dtype))
        if pair.magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = np.ascontiguousarray(pair.magnitude.astype(dtype))
    content = {
        **(settings or {}),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or (settings or {}).get("base_model_name_or_path"),
        "r": config.r,
        "lora_alpha": config.alpha,
        "target_modules": _peft_targets(config),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }
    defaults = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    content = {**defaults, "modules_to_save": None, "init_lora_weights": True, **content}
    folder = Path(folder)
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / _CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        safetensors.numpy.save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        if folder.exists():
            for name in (_WEIGHTS, _CONFIG):
                (temporary / name).replace(folder / name)
            temporary.rmdir()
        else:
            temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def _peft_targets(config: LoraConfig) -> list[str] | str:
    if config.targets == (ALL_LINEAR,):
        return ALL_LINEAR
    # PEFT reads a list as names and a string as a regular expression.
    if len(config.targets) == 1 and re.search(r"[\\^$*+?\[\](){}|]", config.targets[0]):
        return config.targets[0]
    return list(config.targets)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no {_CONFIG}; expected a PEFT adapter folder") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: found {type(settings).__name__}, expected a JSON object")
    return settings


# Settings that change what the adapter computes, and the values that leave it a plain LoRA.
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
}


def _lora_config(settings: Mapping[str, Any], folder: Path) -> LoraConfig:
    path = folder / _CONFIG
    for name, allowed in _ONLY.items():
        if name == "peft_type" and name not in settings:
            raise UserError(f"{path}: no peft_type; expected LORA")
        if name in settings and settings[name] not in allowed:
            expected = json.dumps(allowed[0])
            raise UserError(f"{path}: {name} is {json.dumps(settings[name])}, expected {expected}")
    for name, value in settings.items():
        # PEFT's other variants of LoRA each bring a switch or a table of their own.
        variant = name.startswith("use_") or (name.endswith("_config") and name != "eva_config")
        if variant and name not in ("use_rslora", "use_dora") and value:
            raise UserError(f"{path}: {name} is {json.dumps(value)[:60]}, a variant that is not supported")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.split("_")[0].lower() not in ("gaussian", "eva", "orthogonal"):
        raise UserError(f"{path}: init_lora_weights is {init!r}, which changed the base weights too; expected true")
    targets = settings.get("target_modules")
    if isinstance(targets, str):
        targets = [targets]
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise UserError(f"{path}: target_modules is {settings.get('target_modules')!r}, expected names or one pattern")
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(name) or {}
        if not isinstance(pattern, dict):
            raise UserError(f"{path}: {name} is {pattern!r}, expected an object")
        patterns[name] = tuple(pattern.items())
    try:
        return LoraConfig(
            r=settings.get("r", 8),
            alpha=settings.get("lora_alpha", 8),
            targets=tuple(targets),
            use_rslora=bool(settings.get("use_rslora", False)),
            use_dora=bool(settings.get("use_dora", False)),
            **patterns,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
