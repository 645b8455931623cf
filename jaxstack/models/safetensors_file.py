"""The safetensors format, one tensor at a time: a strict reader and a streaming writer.

A file is 8 bytes (little-endian length of the header), a JSON header `name -> {dtype, shape, data_offsets}` and the
tensors' bytes. The reader trusts nothing: every offset is checked before a byte of data is read, so a hostile file
cannot make it read outside the file or allocate more than the file holds.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxstack.runtime.errors import UserError

MAX_HEADER_BYTES = 100_000_000
"""The limit that the format's own library has."""

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The stored types a model's weights may have."""

# The format's other types may stand in a file beside what we load.
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_ITEM_BYTES |= {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "C64": 8}
_ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes are. `start` counts from the beginning of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The tensor in its stored dtype; only [start, stop) of its first axis if `rows` are given.

        Raises:
          UserError: a dtype that is not one of `DTYPES`, or the file has become shorter.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"{self.file}: {self.name}: found dtype {self.dtype}, expected one of {', '.join(DTYPES)}")
        shape, start = self.shape, self.start
        if rows is not None:
            start += rows[0] * math.prod(shape[1:]) * DTYPES[self.dtype].itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        count = math.prod(shape)
        data = np.fromfile(self.file, DTYPES[self.dtype], count=count, offset=start)
        if data.size != count:
            raise UserError(f"{self.file}: {self.name}: found {data.size} of {count} values; the file was cut off")
        return data.reshape(shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name; reads the header only.

    Raises:
      UserError: a header longer than `MAX_HEADER_BYTES` or than the file, not JSON, malformed entries, offsets that
        leave the file, overlap, leave gaps, or do not match dtype and shape.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path}: found a header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
            if not 2 <= length <= size - 8:
                raise UserError(
                    f"{path}: found a header of {length} bytes in a file of {size}, expected a safetensors file"
                )
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: header is not a JSON object with unique keys: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: header: found a JSON {type(header).__name__}, expected an object")

    data_start = 8 + length
    spans: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, begin, end = _checked_entry(path, name, entry, size - data_start)
        spans.append((begin, end, name))
        tensors[name] = StoredTensor(path, name, dtype, shape, data_start + begin)
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            kind = "overlaps the tensor before it" if begin < reached else "leaves a gap"
            raise UserError(f"{path}: {name}: data_offsets: found [{begin}, {end}], which {kind}; expected {reached}")
        reached = end
    if reached != size - data_start:
        raise UserError(f"{path}: found {size - data_start} bytes of data, expected {reached} by the header")
    return tensors


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key appears twice")
    return entries


def _checked_entry(path: Path, name: str, entry: Any, data_bytes: int) -> tuple[str, tuple[int, ...], int, int]:
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{path}: {name}: expected an entry with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    itemsize = _ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
    if itemsize is None:
        raise UserError(f"{path}: {name}: dtype: found {dtype!r}, expected a safetensors type")
    if not isinstance(shape, list) or not all(map(is_size, shape)):
        raise UserError(f"{path}: {name}: shape: found {shape!r}, expected a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise UserError(f"{path}: {name}: data_offsets: found {offsets!r}, expected two byte positions")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise UserError(
            f"{path}: {name}: data_offsets: found {offsets}, expected them inside {data_bytes} bytes of data"
        )
    if end - begin != math.prod(shape) * itemsize:
        raise UserError(
            f"{path}: {name}: found {end - begin} bytes, expected {math.prod(shape) * itemsize} for {dtype} {shape}"
        )
    return dtype, tuple(shape), begin, end


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor's name, shape and stored dtype (a key of `DTYPES`); `load` is called when it is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_file(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Writes `tensors` in order, one in memory at a time, with the metadata `{"format": "pt"}` transformers wants."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            data = np.asarray(tensor.load(), DTYPES[tensor.dtype], order="C")
            assert data.shape == tensor.shape, (tensor.name, data.shape, tensor.shape)
            data.tofile(file)
