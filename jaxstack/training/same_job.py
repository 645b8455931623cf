"""Whether a start belongs to the run that a workdir holds: same configuration, same data, same base model."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxstack.models.tokenizer import Tokenizer
from jaxstack.training.config import SftConfig

FREE_TO_CHANGE = ("max_steps", "log_every", "save_every", "keep", "mesh", "resume")
"""Fields of `SftConfig` that may differ between two starts of one run."""


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: tuple[str, ...]) -> list[str]:
    """Fields in which two JSON-ready configs differ, as "a.b: old -> new"; `ignore` are top-level names."""

    def flat(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}.{name}").items()}
        return {prefix.removeprefix("."): list(value) if isinstance(value, tuple) else value}

    before, after = ({k: v for k, v in flat(c, "").items() if k.split(".")[0] not in ignore} for c in (old, new))
    missing = object()
    differing = []
    for name in sorted({*before, *after}):
        a, b = before.get(name, missing), after.get(name, missing)
        if a != b:
            shown = ("absent" if v is missing else repr(v) for v in (a, b))
            differing.append(f"{name}: {' -> '.join(shown)}")
    return differing


def comparable_config(config: SftConfig) -> dict[str, Any]:
    """The config as JSON, without places: what they hold is compared by digest."""
    whole = json.loads(json.dumps(dataclasses.asdict(config)))
    if isinstance(config.model, str):
        del whole["model"]
    for name in ("paths", "eval_paths"):
        del whole["data"][name]
    del whole["tokenizer"]
    return whole


def folder_fingerprint(folder: str | Path) -> str:
    """A short digest of a model folder: config and weight files by name, size, header and both ends, not every byte."""
    state = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.suffix == ".safetensors" or path.name == "config.json":
            size = path.stat().st_size
            state.update(f"{path.name}:{size}\0".encode())
            with open(path, "rb") as file:
                state.update(file.read(1 << 16))
                file.seek(max(0, size - (1 << 16)))
                state.update(file.read())
    return state.hexdigest()[:16]


def tokenizer_digest(folder: str | None, tokenizer: Tokenizer | None) -> str:
    if folder is None or tokenizer is None:
        return "none"
    state = hashlib.sha256()
    for path in sorted(Path(folder).glob("*")):
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens", "generation_config")):
            state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def workdir_has_checkpoints(workdir: str | Path) -> bool:
    """Whether a job has saved anything in this folder."""
    folder = Path(workdir) / "checkpoints"
    return folder.is_dir() and any(child.name.isdigit() for child in folder.iterdir())
