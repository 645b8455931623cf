"""A step's plan as two flat host arrays, one of int32 and one of float32, in a layout the jitted step can cut apart.

One transfer each instead of one per field: a numpy argument costs about ten microseconds, whatever its size.
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
            "block_tables": (sequences, self.table_pages),
            "kv_lens": (sequences,),
            "query_starts": (sequences + 1,),
            "num_decodes": (),
        }


def sampling_fields(samples: int) -> dict[str, tuple[int, ...]]:
    """The sampler's int32 fields."""
    return {
        "top_k": (samples,),
        "seed": (samples, 2),
        "choice": (samples,),
        "position": (samples,),
        "wants_logprobs": (),
    }


def sampling_float_fields(samples: int) -> dict[str, tuple[int, ...]]:
    """The sampler's float32 fields."""
    return {"temperature": (samples,), "top_p": (samples,)}


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
    """What one step is launched with. `plan.rows[i]` is sequence i of the arrays."""

    plan: StepPlan
    shape: BatchShape
    ints: Int32[np.ndarray, " n"]
    sampling_ints: Int32[np.ndarray, " n_ints"]
    sampling_floats: Float32[np.ndarray, " n_floats"]


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
    """Fills the arrays of the smallest shape that fits. Rows beyond the plan write to the scrap page, `num_pages`."""
    shape = choose(plan, shapes)
    ints = np.zeros(size(shape.int_fields), np.int32)
    f = cut(ints, shape.int_fields)
    choices, floats = sampling_fields(shape.samples), sampling_float_fields(shape.samples)
    sampling_ints = np.zeros(size(choices), np.int32)
    sampling_floats = np.ones(size(floats), np.float32)
    h, g = cut(sampling_ints, choices), cut(sampling_floats, floats)
    f["write_slots"][:] = num_pages * page_size
    f["num_decodes"][...] = plan.decodes
    g["temperature"][:] = 0.0

    at = 0
    for i, row in enumerate(plan.rows):
        sequence, end = row.sequence, row.start + row.count
        request, sampling = sequence.request, sequence.request.sampling
        if row.count == 1:
            f["tokens"][at] = sequence.tokens[row.start]
            f["positions"][at] = row.start
            f["write_slots"][at] = sequence.pages[row.start // page_size] * page_size + row.start % page_size
        else:
            position = np.arange(row.start, end)
            f["tokens"][at : at + row.count] = sequence.tokens[row.start : end]
            f["positions"][at : at + row.count] = position
            pages = np.asarray(sequence.pages, np.int64)[position // page_size]
            f["write_slots"][at : at + row.count] = pages * page_size + position % page_size
        f["block_tables"][i, : len(sequence.pages)] = sequence.pages
        f["kv_lens"][i] = end
        at += row.count
        f["query_starts"][i + 1] = at
        h["top_k"][i] = sampling.top_k
        seed = request.seed
        h["seed"][i] = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32).view(np.int32)
        h["choice"][i] = sequence.index
        h["position"][i] = sequence.generated
        g["temperature"][i] = sampling.temperature
        g["top_p"][i] = sampling.top_p
        if sampling.logprobs is not None:
            h["wants_logprobs"][...] = 1
    f["query_starts"][len(plan.rows) + 1 :] = at
    return HostBatch(plan, shape, ints, sampling_ints, sampling_floats)
