"""A step's plan as one flat int32 array, in a layout that the jitted forward pass can cut apart.

One transfer instead of one per field: a numpy argument costs about ten microseconds, whatever its size. What the
sampler needs is packed later, by `draws.py`: while the forward pass runs.
"""

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np
from jaxtyping import Float32, Int32

from jaxstack.engine.scheduler import StepPlan


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static shape of a step: `rows` token rows of at most `sequences` sequences, with `table_pages` pages each.

    `rows == sequences` is a decode step: one token for each sequence. The sampler, a program of its own, sees `samples`
    rows, of which the first `sequences` are the step's: few programs for it serve many steps.
    """

    rows: int
    sequences: int
    table_pages: int
    samples: int

    @property
    def decode(self) -> bool:
        return self.rows == self.sequences

    @property
    def int_fields(self) -> dict[str, tuple[int, ...]]:
        rows, sequences = self.rows, self.sequences
        return {
            "tokens": (rows,),
            "positions": (rows,),
            "write_slots": (rows,),
            "adapters": (rows,),
            "use_embeddings": (rows,),
            "block_tables": (sequences, self.table_pages),
            "kv_lens": (sequences,),
            "query_starts": (sequences + 1,),
            "num_decodes": (),
        }


def size(fields: dict[str, tuple[int, ...]]) -> int:
    """Elements of all fields together."""
    return sum(int(np.prod(shape)) for shape in fields.values())


def cut(flat, fields: dict[str, tuple[int, ...]]) -> dict:
    """The named parts of a flat array, numpy or jax."""
    parts, start = {}, 0
    for name, shape in fields.items():
        count = int(np.prod(shape))
        parts[name] = flat[start : start + count].reshape(shape)
        start += count
    return parts


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """What one forward pass is launched with. `plan.rows[i]` is sequence i of the arrays: a draft row is one, too, with
    the pages of the sequence that it continues. `embeddings` are vectors in the place of tokens' own, where
    `use_embeddings` says so; None for nowhere.
    """

    plan: StepPlan
    shape: BatchShape
    ints: Int32[np.ndarray, " n"]
    embeddings: Float32[np.ndarray, "rows D"] | None = None


def choose(plan: StepPlan, shapes: Seq[BatchShape]) -> BatchShape:
    """The smallest of `shapes` (decode steps first, then by rows) that holds the plan."""
    only_decodes = plan.decodes == len(plan.rows)
    for shape in shapes:
        if shape.decode and not only_decodes:
            continue
        if shape.sequences >= len(plan.rows) and shape.rows >= plan.tokens:
            return shape
    raise AssertionError(f"no step shape for {plan.tokens} tokens of {len(plan.rows)} sequences")


def pack(plan: StepPlan, shapes: Seq[BatchShape], *, page_size: int, num_pages: int) -> HostBatch:
    """Fills the array of the smallest shape that fits. Rows beyond the plan write to the scrap page, `num_pages`.

    Pages that the prefix cache owns are never written: a position on one that is computed once more writes to the scrap
    page. A token that the step in flight is still drawing is written as `-1 - slot`: the device knows it by then.
    """
    shape = choose(plan, shapes)
    ints = np.zeros(size(shape.int_fields), np.int32)
    f = cut(ints, shape.int_fields)
    scrap = num_pages * page_size
    f["write_slots"][:] = scrap
    f["num_decodes"][...] = plan.decodes

    embeddings: np.ndarray | None = None
    at = 0
    for i, row in enumerate(plan.rows):
        sequence, end = row.sequence, row.start + row.count
        if row.count == 1:
            if row.draft is not None:
                f["tokens"][at] = row.draft
            else:
                known = row.start < len(sequence.tokens)
                f["tokens"][at] = sequence.tokens[row.start] if known else -1 - sequence.slot
            f["positions"][at] = row.start
            page, offset = divmod(row.start, page_size)
            if page >= sequence.shared_pages:
                f["write_slots"][at] = sequence.pages[page] * page_size + offset
        else:
            position = np.arange(row.start, end)
            f["tokens"][at : at + row.count] = sequence.tokens[row.start : end]
            f["positions"][at : at + row.count] = position
            place = position // page_size
            slots = np.asarray(sequence.pages)[place] * page_size + position % page_size
            f["write_slots"][at : at + row.count] = np.where(place >= sequence.shared_pages, slots, scrap)
        if sequence.request.adapter is not None:
            f["adapters"][at : at + row.count] = sequence.request.adapter.slot
        given = sequence.request.given
        if given is not None and given.used[row.start : end].any():
            if embeddings is None:
                embeddings = np.zeros((shape.rows, given.rows.shape[1]), np.float32)
            used = given.used[row.start : end]
            f["use_embeddings"][at : at + len(used)] = used
            embeddings[at : at + len(used)] = given.rows[row.start : end]
        f["block_tables"][i, : len(sequence.pages)] = sequence.pages
        f["kv_lens"][i] = end
        at += row.count
        f["query_starts"][i + 1] = at
    f["query_starts"][len(plan.rows) + 1 :] = at
    return HostBatch(plan, shape, ints, embeddings)
