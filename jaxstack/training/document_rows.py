"""Documents with arrays of their own for every token, into packed batches of one shape."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxstack.runtime.errors import UserError
from jaxstack.training.packing import HostBatch, pack

Document = Mapping[str, np.ndarray]
"""`token_ids` int32 [n], `loss_mask` float32 [n], and any further [n] arrays, the same names in every document."""


def document_batches(
    units: Sequence[Sequence[Document]], *, row_count: int, row_length: int, what: str = "unit"
) -> list[HostBatch]:
    """Packs documents into as many batches of `row_count` rows as they need, the last filled up with empty rows.

    Args:
      units: documents that stay in one row, next to each other and in their order.
      row_count: rows in a batch.
      row_length: tokens in a row.
      what: a unit is called in messages.

    Raises:
      UserError: a unit is longer than a row, or there is none.
    """
    if not units:
        raise UserError(f"no {what} to make a batch of; expected at least one")
    lengths = np.array([sum(len(document["token_ids"]) for document in unit) for unit in units], np.int64)
    longest = int(np.argmax(lengths))
    if lengths[longest] > row_length:
        raise UserError(f"{what} {longest} has {lengths[longest]} tokens, expected at most the row's {row_length}")
    rows = pack(lengths, row_length)
    chunks = [rows[i : i + row_count] for i in range(0, len(rows), row_count)]
    return [_fill(units, chunk, row_count, row_length) for chunk in chunks]


def _fill(units: Sequence[Sequence[Document]], rows: list[list[int]], row_count: int, row_length: int) -> HostBatch:
    shape = (row_count, row_length)
    batch = {name: np.zeros(shape, array.dtype) for name, array in units[0][0].items()}
    batch |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
    for r, row in enumerate(rows):
        documents = [document for index in row for document in units[index]]
        at = 0
        for segment, document in enumerate(documents, start=1):
            stop = at + len(document["token_ids"])
            for name, array in document.items():
                batch[name][r, at:stop] = array
            batch["segment_ids"][r, at:stop] = segment
            batch["positions"][r, at:stop] = np.arange(stop - at)
            at = stop
    return batch
