"""Hugging Face model folders to decoders and back.

Loading checks everything that can be checked before any weight is read: the configuration, that every file lies in the
folder and is well formed, every tensor's name and shape, and that the model fits into memory. Then it streams, tensor
by tensor.
"""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from tqdm import tqdm

from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.hf_config import config_from_folder, config_to_hf, generation_config_to_hf, stored_dtype
from jaxstack.models.hf_families import TEXT_MODELS
from jaxstack.models.hf_fields import read_json
from jaxstack.models.hf_names import HfTensor, Piece, flat_params, hf_tensors, text_model_name
from jaxstack.models.linear import LoraParam
from jaxstack.models.safetensors_file import DTYPES, StoredTensor, TensorToWrite, read_header, write_file
from jaxstack.runtime.errors import UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")

# What travels with a model besides its weights and configuration.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_decoder(folder: str | Path, *, param_dtype: jnp.dtype | None = jnp.float32, progress: bool = True) -> Decoder:
    """The decoder of a Hugging Face folder: `config.json` and safetensors, one file or shards with an index.

    Peak memory is the model plus one parameter's stack of layers plus one tensor.

    Args:
      folder: the model's folder.
      param_dtype: dtype of the parameters, whatever the files hold; None for the one that `config.json` names.
      progress: show a bar on stderr if it takes longer than two seconds.

    Raises:
      UserError: one line for: a bad configuration, a pickle-only folder, a malformed file, an index that leaves the
        folder, a missing, extra or misshapen tensor, NaN or infinite weights, or too little memory.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a Hugging Face model folder")
    config = config_from_folder(folder)
    described = read_json(folder / "config.json")
    if param_dtype is None:
        dtype = np.dtype(stored_dtype(described, source=str(folder / "config.json")))
    else:
        dtype = np.dtype(param_dtype)
    wanted = hf_tensors(config)
    stored = stored_tensors(folder)
    if (described.get("architectures") or [""])[0] in TEXT_MODELS:
        renamed = {text_model_name(name): tensor for name, tensor in stored.items()}
        stored = {name: tensor for name, tensor in renamed.items() if name is not None}
    stored = _matched(folder, config, wanted, stored)

    by_path: dict[tuple[str, ...], list[tuple[str, Piece]]] = defaultdict(list)
    for tensor in wanted:
        for piece in tensor.pieces:
            by_path[piece.path].append((tensor.name, piece))
    decoder = Decoder.abstract(config, param_dtype=dtype)
    shapes = {path: value.shape for path, value in flat_params(decoder).items()}
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes.values()]
    require_memory(folder, device_bytes=sum(sizes), host_bytes=max(sizes))

    arrays: dict[tuple[str, ...], jax.Array] = {}
    with tqdm(
        total=sum(sizes), unit="B", unit_scale=True, desc=f"loading {folder.name}", delay=2, disable=not progress
    ) as bar:
        for path, pieces in by_path.items():
            stack = np.empty(shapes[path], dtype)
            for name, piece in pieces:
                target = stack[piece.index]
                _fill(target, finite_values(stored[name], piece.rows, dtype), transposed=piece.transposed)
                bar.update(target.nbytes)
            # A copy, not an alias of numpy's memory: training donates its parameters.
            arrays[path] = jnp.array(stack)
    nnx.update(decoder, nnx.from_flat_state(list(arrays.items())))
    return decoder


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all files of a folder, headers checked; as the folder names them."""
    if (folder / _SINGLE).exists():
        return read_header(_inside(folder, _SINGLE, folder / _SINGLE))
    index = folder / _INDEX
    if not index.exists():
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise UserError(
                f"{folder}: found {pickles[0]}, a pickle, which can run code; expected {_SINGLE} or {_INDEX}"
            )
        raise UserError(f"{folder}: found no weights, expected {_SINGLE} or {_INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: weight_map: expected an object of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        held = read_header(_inside(folder, name, index))
        expected = {tensor for tensor, file in weight_map.items() if file == name}
        if absent := expected - held.keys():
            raise UserError(f"{folder / name}: missing tensor {min(absent)}, which {_INDEX} places in it")
        tensors |= held
    return tensors


def _inside(folder: Path, name: str, named_by: Path) -> Path:
    """`folder / name`, if that is a file of the folder itself.

    Links may point into the folder, or from a snapshot of the Hugging Face cache to its store of blobs beside the
    snapshots.
    """
    path = folder / name
    real_folder = folder.resolve()
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(f"{named_by}: found the file name {name!r}, expected one inside the folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file, named by {named_by}")
    real = path.resolve()
    blobs = real_folder.parent.parent / "blobs"
    if not real.is_relative_to(real_folder) and not (real_folder.parent.name == "snapshots" and real.parent == blobs):
        raise UserError(f"{path}: a link to {real}, expected a file inside the folder")
    return path


def _matched(
    folder: Path, config: DecoderConfig, wanted: list[HfTensor], stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """`stored` if it holds exactly the `wanted` tensors in their shapes, leaving aside known harmless extras."""
    by_name = {t.name: t for t in wanted}
    if missing := [name for name in by_name if name not in stored]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: missing tensor {missing[0]}{more}, expected shape {by_name[missing[0]].shape}")
    for name, tensor in stored.items():
        harmless = name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")
        if name not in by_name and not harmless:
            raise UserError(
                f"{folder}: extra tensor {name} of shape {tensor.shape}, expected none of that name in a "
                f"{config.architecture} of {config.num_layers} layers"
            )
    for name, wanted_tensor in by_name.items():
        if stored[name].shape != wanted_tensor.shape:
            raise UserError(
                f"{folder}: misshapen tensor {name}: found {stored[name].shape}, expected {wanted_tensor.shape}"
            )
    return stored


def finite_values(tensor: StoredTensor, rows: tuple[int, int] | None, dtype: np.dtype) -> np.ndarray:
    """A tensor, or some of its rows, as `dtype`; refuses NaN and infinities."""
    data = tensor.read(rows)
    with np.errstate(over="ignore"):
        data = data.astype(dtype, copy=False)
    if not np.isfinite(data).all():
        raise UserError(f"{tensor.file}: {tensor.name}: holds NaN or infinite values as {dtype.name}")
    return data


def _fill(target: np.ndarray, data: np.ndarray, *, transposed: bool) -> None:
    if not transposed:
        target[...] = data
        return
    for start in range(0, len(data), 64):  # as many rows as the cache holds: a third of the time of one assignment
        target[:, start : start + 64] = data[start : start + 64].T


def require_memory(folder: Path, *, device_bytes: int, host_bytes: int) -> None:
    """Refuses a model that the device, or on the way to it the host, has no room for."""
    (device,) = jax.device_put(0).devices()  # where new arrays go
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats is None:
        host_bytes += device_bytes
    elif device_bytes > (free := stats.get("bytes_limit", device_bytes) - stats.get("bytes_in_use", 0)):
        raise UserError(f"{folder}: needs {_gigabytes(device_bytes)} on {device}, found {_gigabytes(free)} free")
    if host_bytes > (free := psutil.virtual_memory().available):
        raise UserError(f"{folder}: needs {_gigabytes(host_bytes)} of memory, found {_gigabytes(free)} available")


def _gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB"


def save_decoder(
    decoder: Decoder,
    folder: str | Path,
    *,
    dtype: jnp.dtype | None = None,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a Hugging Face folder: weights, `config.json`, `generation_config.json`, and the tokenizer's files.

    Everything is written into a temporary folder beside `folder`, which then takes its name: whoever looks sees the old
    model or the new one. Files in an older `folder` that are not replaced stay, except its weights.

    Args:
      decoder: as loaded or trained, not rearranged for serving.
      folder: made if need be; if it exists and is not empty it must be a model folder.
      dtype: of the stored weights; None for the parameters' own.
      tokenizer_from: a folder whose tokenizer files and chat template are copied, and whose `generation_config.json`
        gives the sampling defaults.
      max_shard_bytes: a larger model is split over several files with an index.

    Raises:
      UserError: the decoder carries adapters or is fused, its config has no Hugging Face form, or the folder cannot be
        written.
    """
    folder = Path(folder).resolve()
    tensors = _tensors_to_write(decoder, dtype)
    stored_name = next(t.dtype for t in tensors)
    config = config_to_hf(decoder.config, dtype=DTYPES[stored_name].name)
    source = None if tokenizer_from is None else Path(tokenizer_from)
    if source is not None and not source.is_dir():
        raise UserError(f"tokenizer_from: {source}: no such folder")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise UserError(f"{folder}: found something that is not a model folder, expected an empty or new one")

    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        needed, free = sum(t.size_bytes for t in tensors), shutil.disk_usage(temporary).free
        if needed > free:
            raise UserError(f"{folder}: needs {_gigabytes(needed)} of disk space, found {_gigabytes(free)} free")
        _write_weights(temporary, tensors, max_shard_bytes)
        generation = generation_config_to_hf(decoder.config)
        if source is not None:
            for name in _TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, temporary / name)
            if (source / "generation_config.json").is_file():
                generation = read_json(source / "generation_config.json") | generation
        _write_json(temporary / "config.json", config)
        _write_json(temporary / "generation_config.json", generation)
        _put_in_place(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors_to_write(decoder: Decoder, dtype: jnp.dtype | None) -> list[TensorToWrite]:
    if jax.tree.leaves(nnx.state(decoder, LoraParam)):
        raise UserError("the decoder carries LoRA adapters; merge them first, or save them as an adapter folder")
    wanted = hf_tensors(decoder.config)
    params = flat_params(decoder)
    if {piece.path for tensor in wanted for piece in tensor.pieces} != params.keys():
        raise UserError("the decoder is rearranged for serving; save the one it was made from")
    names = {np_dtype: name for name, np_dtype in DTYPES.items()}
    # One zero-copy view (on CPU) of each stack; layers are cut and transposed when their turn comes.
    host = {path: np.asarray(value) for path, value in params.items()}

    def loader(tensor: HfTensor) -> Callable[[], np.ndarray]:
        return lambda: tensor.assemble(host)

    stored = {path: names.get(np.dtype(dtype) if dtype is not None else value.dtype) for path, value in host.items()}
    if unknown := [path for path, name in stored.items() if name is None]:
        found = dtype if dtype is not None else host[unknown[0]].dtype
        raise UserError(f"dtype: found {found}, expected one of {', '.join(d.name for d in names)}")
    return [TensorToWrite(t.name, t.shape, str(stored[t.pieces[0].path]), loader(t)) for t in wanted]


def _write_weights(folder: Path, tensors: list[TensorToWrite], max_shard_bytes: float) -> None:
    shards: list[list[TensorToWrite]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    if len(shards) == 1:
        write_file(folder / _SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(t.size_bytes for t in tensors)
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _put_in_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = folder.parent / f".{folder.name}.{os.getpid()}.old"
    folder.rename(old)
    temporary.rename(folder)
    for kept in old.iterdir():
        weights = kept.name.startswith(("model.safetensors", "model-")) and ".safetensors" in kept.name
        if not weights and not (folder / kept.name).exists():
            kept.rename(folder / kept.name)
    shutil.rmtree(old)
