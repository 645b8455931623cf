"""Flash attention on NVIDIA GPUs, written in Pallas for its Triton back end.

Decode rows: one program for each sequence, key/value head and piece of the context (flash-decoding); what the pieces
found is joined afterwards. Prompt chunks: one program for a block of query rows of a work item and a key/value head. In
both, the query heads that share a key/value head lie side by side as rows of one matrix, padded to what a tensor core
takes, and meet each block of keys once. Head dimensions that are no power of two are padded by masks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels.paged_attention.block_sizes import TENSOR_CORE_ROWS, GpuBlocks, decode_splits, gpu_blocks
from kernels.paged_attention.ragged import QUERY_BLOCK

try:
    from jax.experimental.pallas import triton
except ImportError:  # `kernels.platforms` says so to whoever asks for this form
    triton = None  # type: ignore[assignment]

_MASKED = -1e30
_WIDEST_HEAD = 256


def refuses(q, kv) -> str:
    """Why the kernel cannot take these arrays, in one line; empty if it can."""
    if not {q.dtype, kv.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"found {q.dtype} over a cache of {kv.dtype}, expected float32 or bfloat16"
    if q.shape[-1] > _WIDEST_HEAD:
        return f"found head_dim {q.shape[-1]}, expected at most {_WIDEST_HEAD}"
    return "" if triton is not None else "this version of JAX has no Triton form of Pallas"


def paged_attention(q, kv, layer, batch, *, scale, window, softcap=None, sinks=None, staged=None, interpret=False):
    sequences = batch.kv_lens.shape[0]
    attention = _Attention(q, kv, batch, scale, softcap, sinks, staged, interpret)
    # The counts are a step's and not a layer's: together they would be put together anew in every layer.
    scalars = layer[None], window[None], jnp.stack([batch.num_decodes, batch.num_items])
    decoded = attention.decode(q, kv, scalars, batch, sinks, staged)
    if batch.item_sequence.shape[0] == 0:
        return decoded
    out = attention.chunks(q, kv, scalars, batch, sinks, staged)
    is_decode = (jnp.arange(sequences) < batch.num_decodes)[:, None, None]
    return out.at[:sequences].set(jnp.where(is_decode, decoded, out[:sequences]))


class _Attention:
    """What is static: sizes, scale, soft cap. Inside a kernel q is `[rows * heads, head_dim]` and the cache
    `[layers * pages * page_size * 2 * kv_heads, head_dim]`, so that an element lies at (one row number, one column)."""

    def __init__(self, q, kv, batch, scale, softcap, sinks, staged, interpret):
        self.rows, self.heads, self.head_dim = q.shape
        _, self.pages, self.page_size, kv_heads_2, _ = kv.shape
        self.kv_heads = kv_heads_2 // 2
        self.group = self.heads // self.kv_heads
        self.width = max(TENSOR_CORE_ROWS, pl.next_power_of_2(self.head_dim))
        self.sequences, self.table_pages = batch.block_tables.shape
        self.scale, self.softcap = scale, softcap
        self.has_sinks, self.has_staged = sinks is not None, staged is not None
        self.interpret = interpret
        self.dtype = kv.dtype if q.dtype == kv.dtype else jnp.float32
        self.out_dtype = q.dtype
        self.blocks: GpuBlocks = gpu_blocks(self.width, jnp.dtype(self.dtype).itemsize)

    def decode(self, q, kv, scalars, batch, sinks, staged):
        table_tokens = self.table_pages * self.page_size
        splits = decode_splits(self.sequences, self.kv_heads, pl.cdiv(table_tokens, self.blocks.keys))
        places, shape = self.sequences * self.heads, (self.sequences, self.heads, self.head_dim)
        kernel = functools.partial(self._decode_kernel, splits)
        grid, inputs = (self.sequences, self.kv_heads, splits), (*scalars, batch.block_tables, batch.kv_lens)
        inputs += self._arrays(q, kv, sinks, staged)
        if splits == 1:
            (out,) = self._call(kernel, grid, [jax.ShapeDtypeStruct((places, self.head_dim), self.out_dtype)])(*inputs)
            return out.reshape(shape)
        statistics = jax.ShapeDtypeStruct((splits * places,), jnp.float32)
        out = jax.ShapeDtypeStruct((splits * places, self.head_dim), jnp.float32)
        out, top, total = self._call(kernel, grid, [out, statistics, statistics])(*inputs)
        top, total = top.reshape(splits, places, 1), total.reshape(splits, places, 1)
        share = jnp.exp(top - top.max(0))
        out = (share * out.reshape(splits, places, -1)).sum(0) / jnp.maximum((share * total).sum(0), 1e-30)
        return out.reshape(shape).astype(self.out_dtype)

    def chunks(self, q, kv, scalars, batch, sinks, staged):
        group = pl.next_power_of_2(self.group)
        queries = max(TENSOR_CORE_ROWS, min(self.blocks.queries, QUERY_BLOCK * group))
        rows = max(1, queries // group)
        # Given as an input that the output replaces: rows of no work item are zeros.
        zeros = jnp.zeros((self.rows * self.heads, self.head_dim), self.out_dtype)
        inputs = (*scalars, batch.block_tables, batch.kv_lens, *self._arrays(q, kv, sinks, staged))
        inputs += (batch.query_starts, batch.item_sequence, batch.item_row, zeros)
        (out,) = self._call(
            functools.partial(self._chunk_kernel, rows, group),
            (batch.item_sequence.shape[0], self.kv_heads, pl.cdiv(QUERY_BLOCK, rows)),
            [jax.ShapeDtypeStruct(zeros.shape, zeros.dtype)],
            input_output_aliases={len(inputs) - 1: 0},
        )(*inputs)
        return out.reshape(q.shape)

    def _arrays(self, q, kv, sinks, staged):
        sinks = jnp.zeros(1, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
        more = () if staged is None else (staged.reshape(-1, self.head_dim),)
        return q.reshape(-1, self.head_dim), kv.reshape(-1, self.head_dim), sinks, *more

    def _call(self, kernel, grid, out_shape, **more):
        params = triton.CompilerParams(num_warps=self.blocks.num_warps, num_stages=self.blocks.num_stages)
        return pl.pallas_call(
            kernel, grid=grid, out_shape=out_shape, interpret=self.interpret, compiler_params=params, **more
        )

    def _decode_kernel(self, splits, layer, window, counts, tables, lens, q, kv, sinks, *refs):
        kv, (out, *statistics) = self._pages(kv, refs)
        sequence, kv_head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        layer, window, num_decodes = layer[0], window[0], counts[0]
        member = jnp.arange(max(TENSOR_CORE_ROWS, pl.next_power_of_2(self.group)))
        length = jnp.where(sequence < num_decodes, lens[sequence], 0)
        first = jnp.maximum(length - window, 0) // self.blocks.keys
        end = pl.cdiv(length, self.blocks.keys)
        each = pl.cdiv(end - first, splits)
        first = first + split * each
        real = member < self.group
        head = kv_head * self.group + member
        place = sequence * self.heads + head
        # A sink is one key more, of the first piece.
        start = self._start(sinks, head, real, split == 0)
        position = jnp.full(member.shape, length - 1)
        top, total, result = self._attend(
            self._load(q, place, real), kv, tables, sequence, layer, kv_head, position, window, start, first,
            jnp.minimum(first + each, end), length,
        )  # fmt: skip
        place = jnp.where(real, split * self.sequences * self.heads + place, splits * self.sequences * self.heads)
        if statistics:
            triton.store(statistics[0].at[place], top, mask=real)
            triton.store(statistics[1].at[place], total, mask=real)
        else:
            result = result / jnp.maximum(total, 1e-30)[:, None]
        self._store(out, place, result, real)

    def _chunk_kernel(
        self,
        rows,
        group,
        layer,
        window,
        counts,
        tables,
        lens,
        q,
        kv,
        sinks,
        *refs,
    ):
        kv, (query_starts, sequences, item_rows, zeros, out) = self._pages(kv, refs)
        del zeros  # the same memory as out
        item, kv_head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        layer, window, num_items = layer[0], window[0], counts[1]
        sequence = sequences[item]
        length, end_row = lens[sequence], query_starts[sequence + 1]
        before = item_rows[item] + part * rows
        index = jnp.arange(rows * group)
        row, member = before + index // group, index % group
        # A work item has at most QUERY_BLOCK rows: those behind belong to the next.
        end_row = jnp.where(item < num_items, jnp.minimum(end_row, item_rows[item] + QUERY_BLOCK), before)
        shift = length - query_starts[sequence + 1]  # from a row to its position
        real = (row < end_row) & (member < self.group)
        head = kv_head * self.group + member
        place = row * self.heads + head
        first = jnp.maximum(before + shift - window + 1, 0) // self.blocks.keys
        seen = jnp.minimum(before + rows, end_row) + shift  # keys that the last row sees
        last = jnp.where(before < end_row, pl.cdiv(seen, self.blocks.keys), first)
        _, total, result = self._attend(
            self._load(q, place, real), kv, tables, sequence, layer, kv_head, row + shift, window,
            self._start(sinks, head, real, True), first, last, length,
        )  # fmt: skip
        result = result / jnp.maximum(total, 1e-30)[:, None]
        self._store(out, jnp.where(real, place, self.rows * self.heads), result, real)

    def _pages(self, kv, refs):
        """The cache and the staged pages, if there are any, and the other references."""
        return ((kv, refs[0]), refs[1:]) if self.has_staged else ((kv, None), refs)

    def _start(self, sinks, head, real, here):
        """Largest score and sum of weights before the first key."""
        if not self.has_sinks:
            return jnp.full(head.shape, _MASKED, jnp.float32), jnp.zeros(head.shape, jnp.float32)
        real = real & here
        return triton.load(sinks.at[head], mask=real, other=_MASKED), real.astype(jnp.float32)

    def _load(self, ref, place, real):
        """Rows `place` of a flat array, `[places, width]`; zeros where not real."""
        shape = (place.shape[0], self.width)
        column = jnp.arange(self.width)[None, :]
        at = (jnp.broadcast_to(place[:, None], shape), jnp.broadcast_to(column, shape))
        return triton.load(ref.at[at], mask=real[:, None] & (column < self.head_dim), other=0.0).astype(self.dtype)

    def _store(self, ref, place, value, real):
        column = jnp.arange(self.width)[None, :]
        at = (jnp.broadcast_to(place[:, None], value.shape), jnp.broadcast_to(column, value.shape))
        triton.store(ref.at[at], value.astype(ref.dtype), mask=real[:, None] & (column < self.head_dim))

    def _attend(self, query, kv, tables, sequence, layer, kv_head, position, window, start, first, end, length):
        """Online softmax of `query` over the key blocks first..end: largest score, sum of weights, weighted values."""
        keys = self.blocks.keys
        page_size = jnp.int32(self.page_size)

        def block(i, carry):
            top, total, out = carry
            token = i * keys + jnp.arange(keys)
            written = token < length
            page = triton.load(tables.at[sequence, jax.lax.div(token, page_size)], mask=written, other=0)
            keys_and_values = self._placed(kv, layer, page, jax.lax.rem(token, page_size), kv_head, written)
            scores = _product(query, keys_and_values(0), 1) * self.scale
            if self.softcap is not None:
                scores = self.softcap * jnp.tanh(scores / self.softcap)
            visible = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
            scores = jnp.where(visible, scores, _MASKED)
            higher = jnp.maximum(top, scores.max(1))
            weights = jnp.where(visible, jnp.exp(scores - higher[:, None]), 0.0)
            scaled = jnp.exp(top - higher)
            values = keys_and_values(1)
            out = out * scaled[:, None] + _product(weights.astype(self.dtype), values, 0)
            return higher, total * scaled + weights.sum(1), out

        carry = (*start, jnp.zeros(query.shape, jnp.float32))
        return jax.lax.fori_loop(first, end, block, carry)

    def _placed(self, pages, layer, page, offset, kv_head, written):
        """What loads the keys (0) or the values (1) of tokens, given by page and place in it."""
        kv, staged = pages

        def place(page):
            return (page * self.page_size + offset) * (2 * self.kv_heads) + 2 * kv_head

        if staged is None:
            here = place(layer * self.pages + page)
            return lambda which: self._load(kv, here + which, written)
        cached = page < self.pages
        here, there = place(layer * self.pages + page), place(page - self.pages)

        def load(which):
            ours = self._load(kv, here + which, written & cached)
            return jnp.where(cached[:, None], ours, self._load(staged, there + which, written & ~cached))

        return load


def _product(a, b, contracted):
    """a [m, k] times b along its axis `contracted`, summed in float32; float32 inputs are not rounded first."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)
