"""Flash attention on TPUs, written in Pallas.

The grid walks work items: decode rows one sequence a step, prompt chunks QUERY_BLOCK rows of one sequence a step. Block
tables and lengths lie in scalar memory. Pages are copied from the cache to on-chip memory one block of keys ahead of
the arithmetic, across the border between work items too, so that copying never stops. All heads of a page come with it.

Keys and values alternate on the cache's head axis. Of two bfloat16 heads side by side the hardware makes one 32-bit
word, so a strided read of words fetches a key (the low half) and its value (the high half) together.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.block_sizes import LANES, SUBLANES, tpu_memory, tpu_pages
from kernels.paged_attention.ragged import QUERY_BLOCK

_MASKED = -1e30


def refuses(q, kv, batch) -> str:
    """Why the compiled kernel cannot take these arrays, in one line; empty if it can."""
    head_dim, heads = kv.shape[-1], kv.shape[-2]
    if (q.dtype, kv.dtype) not in ((jnp.float32,) * 2, (jnp.bfloat16,) * 2):
        return f"found {q.dtype} over a cache of {kv.dtype}, expected both float32 or both bfloat16"
    if head_dim % LANES:
        return f"found head_dim {head_dim}, expected a multiple of {LANES}"
    words = heads * kv.dtype.itemsize // 4
    if words not in (1, 2, 4) and words % SUBLANES:
        return f"found {heads // 2} key/value heads of {kv.dtype}, whose rows do not fill whole tiles"
    return tpu_memory(q, kv, batch).refuses()


def paged_attention(q, kv, layer, batch, *, scale, window, softcap=None, sinks=None, staged=None, interpret=False):
    sequences = batch.kv_lens.shape[0]
    scalars = jnp.stack([layer, window, batch.num_decodes, batch.num_items])
    attention = _Attention(q, kv, batch, scale, softcap, sinks is not None, staged is not None, interpret)
    kv = (kv,) if staged is None else (kv, staged)
    decoded = attention.decode(q, kv, scalars, batch, sinks)
    if batch.item_sequence.shape[0] == 0:
        return decoded
    out = attention.chunks(q, kv, scalars, batch, sinks)
    is_decode = (jnp.arange(sequences) < batch.num_decodes)[:, None, None]
    return out.at[:sequences].set(jnp.where(is_decode, decoded, out[:sequences]))


class _Attention:
    """What is static: sizes, scale, soft cap."""

    def __init__(self, q, kv, batch, scale, softcap, has_sinks, has_staged, interpret):
        self.rows, self.heads, self.head_dim = q.shape
        self.page_size, self.kv_heads = kv.shape[2], kv.shape[3] // 2
        self.group = self.heads // self.kv_heads
        self.sequences, self.table_pages = batch.block_tables.shape
        self.pages = tpu_pages(self.page_size, self.table_pages)
        self.keys = self.pages * self.page_size
        self.scale, self.softcap, self.has_sinks, self.interpret = scale, softcap, has_sinks, interpret
        self.dtype, self.cached, self.has_staged = kv.dtype, kv.shape[1], has_staged

    def decode(self, q, kv, scalars, batch, sinks):
        padded = pl.cdiv(self.group, SUBLANES) * SUBLANES
        query = q[: self.sequences].astype(jnp.float32).reshape(self.sequences, self.kv_heads, self.group, -1)
        query = jnp.pad(query, ((0, 0), (0, 0), (0, padded - self.group), (0, 0)))
        per_row = pl.BlockSpec((None, *query.shape[1:]), lambda n, *_: (n, 0, 0, 0))
        out = self._call(
            self._decode_kernel,
            self.sequences,
            (scalars, batch.block_tables.reshape(-1), batch.kv_lens),
            [query, *self._sinks(sinks, padded, 1)],
            [per_row, *self._sink_spec(padded)],
            kv,
            jax.ShapeDtypeStruct(query.shape, jnp.float32),
            per_row,
            padded,
        )
        return out[:, :, : self.group].reshape(self.sequences, self.heads, self.head_dim).astype(q.dtype)

    def chunks(self, q, kv, scalars, batch, sinks):
        # An item may start near the end: room for a whole block of rows behind the last one.
        query = jnp.pad(q.astype(jnp.float32), ((0, QUERY_BLOCK), (0, 0), (0, 0)))
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        queries = self.group * QUERY_BLOCK
        described = (batch.kv_lens, batch.query_starts, batch.item_sequence, batch.item_row)
        tables = (scalars, batch.block_tables.reshape(-1), *described)
        out = self._call(
            self._chunk_kernel,
            batch.item_sequence.shape[0],
            tables,
            # The zeros become the output: rows of no work item stay so.
            [jnp.zeros_like(query), query, *self._sinks(sinks, self.group, QUERY_BLOCK)],
            [anywhere, anywhere, *self._sink_spec(queries)],
            kv,
            jax.ShapeDtypeStruct(query.shape, jnp.float32),
            anywhere,
            queries,
            more_scratch=(
                pltpu.VMEM((QUERY_BLOCK, self.heads, self.head_dim), jnp.float32),
                pltpu.VMEM((self.kv_heads, queries, self.head_dim), jnp.float32),
                pltpu.SemaphoreType.DMA,
            ),
            input_output_aliases={len(tables): 0},
        )
        return out[: self.rows].astype(q.dtype)

    def _sinks(self, sinks, members, copies):
        """One row of equal lanes for each query: `[kv_heads, members * copies, LANES]`."""
        if sinks is None:
            return []
        sinks = sinks.astype(jnp.float32).reshape(self.kv_heads, self.group)
        sinks = jnp.pad(sinks, ((0, 0), (0, members - self.group)))
        return [jnp.repeat(sinks, copies, axis=1)[..., None] * jnp.ones(LANES)]

    def _sink_spec(self, queries):
        return [pl.BlockSpec((self.kv_heads, queries, LANES), lambda n, *_: (0, 0, 0))] * self.has_sinks

    def _call(self, kernel, steps, scalars, inputs, specs, kv, out_shape, out_spec, queries, more_scratch=(), **more):
        scratch = (
            pltpu.VMEM((2, self.pages, *kv[0].shape[2:]), self.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.VMEM((self.kv_heads, queries, LANES), jnp.float32),
            pltpu.VMEM((self.kv_heads, queries, LANES), jnp.float32),
            pltpu.VMEM((self.kv_heads, queries, self.head_dim), jnp.float32),
        )
        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(steps,),
                in_specs=[*specs, *[pl.BlockSpec(memory_space=pl.ANY)] * len(kv)],
                out_specs=out_spec,
                scratch_shapes=[*scratch, *more_scratch],
            ),
            out_shape=out_shape,
            # In order: a step starts the copies of the next, and rows behind an item are overwritten by the next item.
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
            interpret=self.interpret,
            **more,
        )
        return call(*scalars, *inputs, *kv)

    def _decode_kernel(self, scalars, tables, lens, query, *refs):
        sinks, refs = (refs[0], refs[1:]) if self.has_sinks else (None, refs)
        kv, (out, *scratch) = self._pages(refs)
        n, count = pl.program_id(0), scalars[2]

        def span(n):
            first = jnp.maximum(lens[n] - scalars[1], 0) // self.keys
            return n, lens[n], first, pl.cdiv(lens[n], self.keys)

        self._attend(n, count, span, lambda shape: lens[n] - 1, scalars, tables, query, sinks, kv, *scratch)
        *_, total, result = scratch

        @pl.when(n < count)
        def divide():
            for head in range(self.kv_heads):
                out[head] = result[head] / jnp.maximum(total[head][:, :1], 1e-30)

        @pl.when(n >= count)
        def nothing():
            out[...] = jnp.zeros(out.shape, out.dtype)

    def _chunk_kernel(self, scalars, tables, lens, starts, sequences, item_rows, zeros, query, *refs):
        del zeros  # the same memory as out
        sinks, refs = (refs[0], refs[1:]) if self.has_sinks else (None, refs)
        kv, (out, *scratch) = self._pages(refs)
        *scratch, rows, gathered, semaphore = scratch
        *_, total, result = scratch
        n, count = pl.program_id(0), scalars[3]

        def shift(n):
            """From a row of item n to its position."""
            return lens[sequences[n]] - starts[sequences[n] + 1]

        def span(n):
            sequence, row = sequences[n], item_rows[n]
            last = jnp.minimum(row + QUERY_BLOCK, starts[sequence + 1])
            first = jnp.maximum(row + shift(n) - scalars[1] + 1, 0) // self.keys
            return sequence, lens[sequence], first, pl.cdiv(last + shift(n), self.keys)

        def position(shape):
            # Queries of a key/value head: its query heads outside, rows inside.
            row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (QUERY_BLOCK - 1)
            return item_rows[n] + shift(n) + row

        def move(to_rows):
            here = (query if to_rows else out).at[pl.ds(item_rows[n], QUERY_BLOCK)]
            copy = pltpu.make_async_copy(*((here, rows) if to_rows else (rows, here)), semaphore)
            copy.start()
            copy.wait()

        @pl.when(n < count)
        def gather():
            move(True)
            for head in range(self.heads):
                group, member = divmod(head, self.group)
                gathered[group, pl.ds(member * QUERY_BLOCK, QUERY_BLOCK), :] = rows[:, head, :]

        self._attend(n, count, span, position, scalars, tables, gathered, sinks, kv, *scratch)

        @pl.when(n < count)
        def scatter():
            for head in range(self.heads):
                group, member = divmod(head, self.group)
                part = pl.ds(member * QUERY_BLOCK, QUERY_BLOCK)
                rows[:, head, :] = result[group, part, :] / jnp.maximum(total[group, part, :][:, :1], 1e-30)
            move(False)

    def _pages(self, refs):
        """The cache and the staged pages, if there are any, and the other references."""
        return ((refs[0], refs[1]), refs[2:]) if self.has_staged else ((refs[0], None), refs[1:])

    def _attend(
        self, n, count, span, position, scalars, tables, query, sinks, kv, buffers, semaphores, slot, top, total, out
    ):
        """Online softmax of item n over its blocks of keys, into the scratch arrays top, total and out.

        Args:
          count: items that have work; they come first, and each has a block at least.
          span: item -> its sequence, cached tokens, first block of keys and the one after the last.
          position: shape -> position of the query in each row of an array of that shape.
          slot: which buffer the first block of this item is in, or on its way to.
        """

        def copies(act, sequence, length, block, slot):
            def page(j, _):
                page = tables[sequence * self.table_pages + block * self.pages + j]
                to = (buffers.at[slot, j], semaphores.at[slot])
                cache, staged = kv
                if staged is None:
                    act(pltpu.make_async_copy(cache.at[scalars[0], page], *to))
                    return _

                @pl.when(page < self.cached)
                def cached():
                    act(pltpu.make_async_copy(cache.at[scalars[0], page], *to))

                @pl.when(page >= self.cached)
                def fetched():
                    act(pltpu.make_async_copy(staged.at[page - self.cached], *to))

                return _

            written = pl.cdiv(length, self.page_size) - block * self.pages
            jax.lax.fori_loop(0, jnp.minimum(written, self.pages), page, None)

        start, wait = (functools.partial(copies, act) for act in (lambda copy: copy.start(), lambda copy: copy.wait()))

        @pl.when((n == 0) & (count > 0))
        def begin():
            sequence, length, first, _ = span(0)
            slot[0] = 0
            start(sequence, length, first, 0)

        @pl.when(n < count)
        def run():
            if sinks is None:
                top[...] = jnp.full(top.shape, _MASKED, jnp.float32)
                total[...] = jnp.zeros(total.shape, jnp.float32)
            else:  # one key more, without a value
                top[...] = sinks[...]
                total[...] = jnp.ones(total.shape, jnp.float32)
            out[...] = jnp.zeros(out.shape, jnp.float32)
            sequence, length, first, end = span(n)

            def block(i, slot):
                @pl.when(i + 1 < end)
                def prefetch():
                    start(sequence, length, i + 1, 1 - slot)

                @pl.when((i + 1 == end) & (n + 1 < count))
                def prefetch_following():
                    following, its_length, its_first, _ = span(n + 1)
                    start(following, its_length, its_first, 1 - slot)

                wait(sequence, length, i, slot)
                for head in range(self.kv_heads):
                    keys, values = self._head(buffers.at[slot], head)
                    self._block(i, keys, values, position, scalars[1], length, query, head, top, total, out)
                return 1 - slot

            slot[0] = jax.lax.fori_loop(first, end, block, slot[0])

    def _head(self, buffer, head):
        """Keys and values `[keys, head_dim]` of one head, out of `[pages, page_size, 2 * kv_heads, head_dim]`."""
        if self.dtype == jnp.bfloat16:
            words = buffer.bitcast(jnp.uint32).reshape(self.keys * self.kv_heads, self.head_dim)
            words = words[head :: self.kv_heads, :]
            halves = (words << 16, words & jnp.uint32(0xFFFF0000))
            keys, values = (jax.lax.bitcast_convert_type(half, jnp.float32).astype(jnp.bfloat16) for half in halves)
            return keys, values
        flat = buffer.reshape(self.keys * 2 * self.kv_heads, self.head_dim)
        return flat[2 * head :: 2 * self.kv_heads, :], flat[2 * head + 1 :: 2 * self.kv_heads, :]

    def _block(self, i, keys, values, position, window, length, query, head, top, total, out):
        """Adds one block of keys of one head."""
        scores = _product(query[head].astype(self.dtype), keys, 1) * self.scale
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        token = i * self.keys + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        at = position(scores.shape)
        # Rows behind an item's last see no more than the sequence has: they are overwritten or never read, but finite.
        visible = (token <= at) & (token > at - window) & (token < length)
        scores = jnp.where(visible, scores, _MASKED)
        before = top[head]
        higher = jnp.maximum(before, scores.max(1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - higher[:, :1]), 0.0)
        scaled = jnp.exp(before - higher)
        # What lies behind the sequence's end was never copied here, or is an earlier owner's.
        owner = i * self.keys + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(owner < length, values, jnp.zeros_like(values))
        top[head] = higher
        total[head] = total[head] * scaled + weights.sum(1, keepdims=True)
        out[head] = out[head] * scaled[:, :1] + _product(weights.astype(self.dtype), values, 0)


def _product(a, b, contracted):
    """a [m, k] times b along its axis `contracted`, summed in float32; float32 inputs are not rounded first."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)
