"""Streams of requests from files: the column layout of the paper's benchmarks, and pairs of paraphrases.

A file is Parquet, CSV, JSON or JSON lines, by its ending. Its columns:

    prompt             the text; optional where there are embeddings
    id_set             the equivalence class: an earlier answer is right if its class is the same
    emb_NAME           vectors, a list of numbers in each row (in CSV, as JSON); any number of such columns
    response_NAME      what a model answered; where there is no id_set, equal answers (apart from case, space and
                       punctuation) are equivalent
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from jaxtyping import Float

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.embedders import Embedder
from jaxstack.serving.semantic_cache.streams import Stream

_READERS: Mapping[str, Callable[[Path], pa.Table]] = {
    ".parquet": lambda path: pyarrow.parquet.read_table(path),
    ".csv": lambda path: pyarrow.csv.read_csv(path),
    ".jsonl": lambda path: pyarrow.json.read_json(path),
}


def read_stream(
    path: str | Path,
    *,
    embedder: Embedder | None = None,
    embedding: str | None = None,
    response: str | None = None,
    limit: int | None = None,
) -> Stream:
    """A stream from a file in the layout above, in the file's order.

    Args:
      embedder: makes the vectors, in place of a column.
      embedding: NAME of the vectors' column; None where there is one only.
      response: NAME of the answers' column, likewise; it is looked at only where there is no id_set.
      limit: rows read.

    Raises:
      UserError: the file cannot be read, or a column is missing, ambiguous or malformed; one line.
    """
    path = Path(path)
    table = _read(path)
    table = table if limit is None else table.slice(0, limit)
    if not table.num_rows:
        raise UserError(f"{path}: found no rows, expected at least one")
    names = table.column_names
    prompts = tuple(map(str, table["prompt"].to_pylist())) if "prompt" in names else ()
    if embedder is not None:
        if not prompts:
            raise UserError(f"{path}: found columns {', '.join(names)}, expected prompt among them, to embed it")
        vectors = embedder.embed(prompts)
    else:
        vectors = _vectors(path, table[_column(path, names, "emb_", embedding)].to_pylist())
    if "id_set" in names:
        classes = _numbered(table["id_set"].to_pylist())
    else:
        column = _column(path, names, "response_", response, instead="id_set, or ")
        classes = _numbered([_plain(str(text)) for text in table[column].to_pylist()])
    return Stream(path.stem, vectors, classes, classes, prompts)


def read_pairs(path: str | Path, embedder: Embedder) -> Stream:
    """Pairs of paraphrases, `[{"origin": TEXT, "similar": TEXT}, ...]`, as GPTCache's examples have them: all first
    texts, then all second ones. Classes have two members, too few for a rule that learns from labels.

    Raises:
      UserError: the file cannot be read or has another form.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        first, second = ([str(row[name]) for row in rows] for name in ("origin", "similar"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f'{path}: not readable, expected a JSON list of {{"origin", "similar"}}') from None
    if not first:
        raise UserError(f"{path}: found no pairs, expected at least one")
    own = _numbered(first)  # some first texts occur twice
    classes = np.concatenate([own, own])
    return Stream(path.stem, embedder.embed([*first, *second]), classes, classes, (*first, *second))


def _read(path: Path) -> pa.Table:
    reader = _READERS.get(path.suffix.lower())
    try:
        if reader is not None:
            return reader(path)
        if path.suffix.lower() == ".json":
            return pa.Table.from_pylist(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    raise UserError(f"{path}: found ending {path.suffix!r}, expected one of .json, {', '.join(_READERS)}")


def _column(path: Path, names: Sequence[str], prefix: str, wanted: str | None, instead: str = "") -> str:
    there = [name for name in names if name.startswith(prefix)]
    if wanted is not None and prefix + wanted in there:
        return prefix + wanted
    if wanted is None and len(there) == 1:
        return there[0]
    which = f"{prefix}{wanted}" if wanted is not None else f"one column {prefix}..."
    raise UserError(f"{path}: found columns {', '.join(names)}, expected {instead}{which}")


def _vectors(path: Path, rows: Sequence[Any]) -> Float[np.ndarray, "n dim"]:
    try:
        vectors = np.array([json.loads(row) if isinstance(row, str) else row for row in rows], dtype=np.float64)
    except (ValueError, TypeError):
        vectors = np.empty(0)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise UserError(f"{path}: found embeddings that are no numbers or unequally long, expected finite vectors")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not norms.all():
        raise UserError(f"{path}: row {int(np.argmin(norms))}: found an embedding of length 0, expected a direction")
    return (vectors / norms).astype(np.float32)


def _numbered(values: Sequence[Any]) -> np.ndarray:
    """Equal values get equal numbers, in the order in which they first occur."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
