"""Rows of Parquet files, a few at a time: the same rows as a JSONL file's, as columns.

A file is read batch by batch and only in the columns that a row can have, so neither the file nor one of its row groups
has to fit into memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxstack.runtime.errors import UserError

COLUMNS = (
    "messages",
    "conversations",
    "system",
    "prompt",
    "response",
    "token_ids",
    "loss_mask",
    "chat_template_kwargs",
)
"""Columns that are read; any others are passed over."""

_ROWS_AT_A_TIME = 256


def read_parquet(path: str | Path) -> Iterator[tuple[str, dict[str, Any] | UserError]]:
    """(`file: row n`, row) of every row, counted from 1; a null column or field is one that the row does not have.

    Raises:
      UserError: no such file, not a Parquet file, none of the known columns, or a part of it that cannot be read.
    """
    # Imported here: only jobs that read such files should wait for it.
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(str(path))
    except OSError as error:
        found = os.strerror(error.errno) if error.errno else _line(error)
        raise UserError(f"data file {str(path)!r}: {found}; expected a Parquet file") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"data file {str(path)!r}: {_line(error)}; expected a Parquet file") from error
    with file:
        found = file.schema_arrow.names
        columns = [name for name in COLUMNS if name in found]
        if not {"messages", "conversations", "token_ids"} & set(columns) and not {"prompt", "response"} <= set(columns):
            raise UserError(
                f"data file {str(path)!r}: found the columns {', '.join(map(repr, found)) or 'none'}; expected "
                "'messages', 'conversations', 'prompt' and 'response', or 'token_ids'"
            )
        number = 0
        try:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                    values = [_values(name, batch.column(name)) for name in columns]
                    for row in zip(*values):
                        number += 1
                        yield f"{path}: row {number}", {k: v for k, v in zip(columns, row) if v is not None}
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path}: cannot be read behind row {number} of {file.metadata.num_rows}: {_line(error)}; expected a "
                "whole Parquet file"
            ) from error


def _values(name: str, column: Any) -> list[Any]:
    """A column's values as Python has them, token ids and masks as arrays."""
    if name in ("token_ids", "loss_mask") and hasattr(column, "value_lengths"):
        return [row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in column]
    return [_without_nulls(value) for value in column.to_pylist()]


def _without_nulls(value: Any) -> Any:
    """Structs have every field of their type: those that are null were not given."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value


def is_parquet(path: str | Path) -> bool:
    return Path(path).suffix.lower() in (".parquet", ".pq")


def files_of(path: str | Path) -> list[str]:
    """A folder's Parquet files in the order of their names; a file is itself.

    Raises:
      UserError: a folder without any.
    """
    if not Path(path).is_dir():
        return [str(path)]
    found = sorted(str(child) for child in Path(path).iterdir() if is_parquet(child))
    if not found:
        raise UserError(f"data folder {str(path)!r}: found no .parquet file, expected at least one")
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
