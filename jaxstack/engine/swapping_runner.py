"""A runner whose KV cache is larger than what the device holds: some pages are on the host, and every step streams them
past the layers that read them (`jaxstack.engine.memory.swap`).

A step, beside the tokens:

    plan     which pages it writes (they get device slots), which full pages leave for that as new chunks, and which
             chunks its sequences read: the segment that every layer streams its own slice of
    layer l  pages that leave are gathered from the device, and their copy to the host begins | the layer runs, with
             device pages and staged pages in one block table | its place in the ring is free: the segment of the
             layer after next begins to arrive, of the next step's first layers at the end of this one

The block table keeps the order of a sequence's pages wherever they are, so attention adds up in the order in which it
would without swapping, and answers are the same bit for bit. Host pages are full, hence never written again.

One program for a layer, compiled once for each batch shape and number of chunks, not for each layer.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from jaxstack.engine.batch import BatchShape, HostBatch, cut, size
from jaxstack.engine.errors import TransferFailed
from jaxstack.engine.layerwise import LayerNumbers, Layerwise
from jaxstack.engine.memory.swap import ExpansionController, PageSpaces, SegmentRing, SwapConfig, Target, Window
from jaxstack.engine.memory.swap.placement import to_demote
from jaxstack.engine.memory.swap.reading import SwapReading
from jaxstack.engine.memory.swap.sizing import SpacePlan
from jaxstack.engine.runner import Launched, Runner
from jaxstack.engine.swap_movers import EmulatedMachine, EmulatedMover, KindMover, Mover
from jaxstack.models.decoder import Decoder
from jaxstack.runtime.emulation import ByteLedger
from jaxstack.runtime.memory_spaces import probe_spaces


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Of one shape: `layer[sparse][chunks]`."""

    embed: Callable
    layer: Mapping[bool, Mapping[int, Callable]]
    head: Callable


@dataclasses.dataclass(frozen=True)
class _Merging:
    """Two chunks, and the new ones with their living pages: where those are in the two laid end to end."""

    first: int
    second: int
    fresh: Mapping[int, Int32[np.ndarray, " chunk_pages"]]


@dataclasses.dataclass
class _Move:
    """What a step does with pages beside reading them, the same in every layer.

    Attributes:
      segment: the chunks that its sequences read, in the order of the block table's numbers.
      following: those that the next step is expected to read.
      leaving: new chunks -> the device slots that they are gathered from.
      merging: chunks that are half empty become one.
      returning: a chunk, where in it living pages are, and their new slots; None for none.
    """

    ints: Int32[np.ndarray, " n"]
    segment: list[int]
    following: list[int]
    leaving: dict[int, Int32[np.ndarray, " chunk_pages"]]
    merging: _Merging | None = None
    returning: tuple[int, Int32[np.ndarray, " chunk_pages"], Int32[np.ndarray, " chunk_pages"]] | None = None


class SwappingRunner(Runner):
    """See the module's docstring.

    Args:
      plan: sizes of the two spaces.
      swap: settings; of these, `adaptive` needs a `controller`.
      kv_device_bytes: what keys and values may take of the device; more is an error (`BudgetExceeded`).
      controller: decides on the host's share; None keeps it.
      emulate: the times of a machine that is not there; None moves pages between JAX's memory kinds.
      options: as of `Runner`.
    """

    def __init__(
        self,
        decoder: Decoder,
        shapes: Seq[BatchShape],
        *,
        plan: SpacePlan,
        swap: SwapConfig,
        kv_device_bytes: int,
        controller: ExpansionController | None = None,
        emulate: EmulatedMachine | None = None,
        page_size: int,
        vocab_size: int,
        dtype: jnp.dtype,
        **options: Any,
    ):
        self.swap, self.plan, self.controller = swap, plan, controller
        config = decoder.config
        self.ledger = ByteLedger({"device": kv_device_bytes})
        self._ring = SegmentRing(config.num_layers, swap.staging_segments)
        slice_shape = (plan.chunk_pages, page_size, 2 * config.num_kv_heads, config.head_dim)
        self._slice_shape = slice_shape
        self._slice_bytes = int(np.prod(slice_shape)) * jnp.dtype(dtype).itemsize
        self._emulate = emulate
        self._mover: Mover
        leaving = swap.staging_segments * plan.new_chunks
        if emulate is None:
            self._mover = KindMover(
                probe_spaces(),
                slice_bytes=self._slice_bytes,
                staging=swap.staging_segments,
                leaving=leaving,
                ledger=self.ledger,
            )
        else:
            self._mover = EmulatedMover(
                emulate,
                shape=slice_shape,
                dtype=jnp.dtype(dtype),
                layers=config.num_layers,
                staging=swap.staging_segments,
                chunks=max(2, plan.chunks),
                leaving=leaving,
                ledger=self.ledger,
            )
        self.spaces = self._new_spaces()
        super().__init__(
            decoder, shapes, num_pages=plan.device_slots, page_size=page_size, vocab_size=vocab_size, dtype=dtype,
            **options,
        )  # fmt: skip
        self.ledger.take("device", self.cache_bytes, "pages")
        self._pieces = Layerwise(decoder, dtype=self.dtype, vocab_size=vocab_size)
        # Programs take a flat list: taking the decoder's tree apart for every layer costs more than a launch does.
        self._flat, self._tree = jax.tree.flatten(self._pieces.weights)
        self._numbers = [LayerNumbers(*(self._placement.put(n) for n in numbers)) for numbers in self._pieces.layers]
        self._scrap = plan.device_slots
        self._buckets = _buckets(plan.chunks)
        self._nothing = self._placement.put(np.zeros(slice_shape, self.dtype))
        self._gather: Callable
        self._scatter: Callable
        self._merge: Callable
        # Waiting for a layer before its place is filled anew keeps within the budget where a program's memory is taken
        # when it is launched. A GPU takes and gives it in the order of its stream, and is not waited for.
        self._strict = emulate is not None or jax.default_backend() == "cpu"
        # Pages go back to the device only where so many slots stay free that others need not leave for it soon.
        self._reserve = 2 * plan.new_chunks * plan.chunk_pages
        self._steps_run = 0
        self._compute_s = 0.0
        self._seen = (0, 0, 0.0)  # shortages, bytes and link seconds at the last window's end
        self._window: list[tuple[float, float, int]] = []
        self._decisions = dict.fromkeys(("grow", "hold", "shrink", "refuse"), 0)
        self._target: Target | None = None
        if controller is not None:
            self._aim(controller.share)

    # What the engine sees.

    def new_pool(self, num_pages: int) -> PageSpaces:
        """A new page pool with everything free; what was on its way is forgotten."""
        assert num_pages == self.plan.pages, f"{num_pages} pages for {self.plan.pages}"
        self._forget()
        self.spaces = self._new_spaces()
        if self.controller is not None:
            self._aim(self.controller.share)
        return self.spaces

    def _new_spaces(self) -> PageSpaces:
        return PageSpaces(self.plan.device_slots, self.plan.host_pages, self.plan.chunk_pages)

    def _forget(self) -> None:
        self._mover.reset()
        self._ring.restart()

    def reset_cache(self) -> None:
        self._forget()
        super().reset_cache()

    def replace_weights(self, decoder: Decoder) -> None:
        super().replace_weights(decoder)
        self._pieces.weights = nnx.split(decoder)[1]
        self._flat, self._tree = jax.tree.flatten(self._pieces.weights)

    def close(self) -> None:
        """Ends the emulated machine's threads."""
        self._mover.close()

    @property
    def late_s(self) -> float:
        """By how much this machine's own work exceeded the emulated times."""
        assert isinstance(self._mover, EmulatedMover)
        return self._mover.device.usage.late_s

    def change_link(self, bytes_per_s: float | None) -> None:
        """Another rate of the emulated link, in both directions; None for as fast as this machine copies."""
        assert isinstance(self._mover, EmulatedMover)
        self._mover.change_link(bytes_per_s)

    def swap_reading(self) -> SwapReading:
        """A reading, from any thread."""
        traffic, spaces = self._mover.traffic, self.spaces
        used = spaces.on_device + spaces.on_host
        return SwapReading(
            pages={"device": spaces.on_device, "host": spaces.on_host, "free": spaces.free},
            stall_s=traffic.stall_s,
            compute_s=self._compute_s,
            bytes={"to_device": traffic.to_device_bytes, "to_host": traffic.to_host_bytes},
            share=self.plan.host_pages / self.plan.pages if self.controller is None else self.controller.share,
            host_share=spaces.on_host / used if used else 0.0,
            link_bytes_per_s=0.0 if self.controller is None else self.controller.link_bytes_per_s,
            decisions=dict(self._decisions),
            reason="" if self._target is None else self._target.reason,
            device_peak_bytes=self.ledger.peak("device"),
            device_budget_bytes=self.ledger.budget("device") or 0,
        )

    # Compiling.

    def compile(self, shape: BatchShape) -> _Programs:
        """The pieces of one shape: embed, a layer for every number of chunks, head."""
        place, pieces = self._placement, self._pieces
        flat, whole = self._flat, partial(jax.tree.unflatten, self._tree)
        ints = place.struct((size(shape.int_fields),), jnp.int32)
        given = None if shape.decode else place.struct((shape.rows, self.config.hidden_size), jnp.float32)

        def first(flat, ints, last_token, given):
            return pieces.embed(shape, whole(flat), ints, last_token, given)

        embed = jax.jit(first).lower(flat, ints, self.sampler.last_token, given)
        x, cos, sin = (place.struct(out.shape, out.dtype) for out in embed.out_info)
        cache = place.struct(self._cache_shape, self.dtype)
        chunk = place.struct(self._slice_shape, self.dtype)
        scalar: Any = place.struct((), jnp.int32)
        number = LayerNumbers(*[scalar] * 4)

        def layer(sparse, flat, number, cache, ints, x, cos, sin, *chunks):
            weights = whole(flat)
            q, k, v = pieces.before(shape, weights, number, ints, x, cos, sin)
            staged = jnp.concatenate(chunks) if chunks else None
            out, cache = pieces.attention(shape, cache, number, ints, q, k, v, staged_pages=staged)
            return cache, pieces.after(shape, weights, number, ints, x, out, sparse=sparse)

        layers = {
            sparse: {
                chunks: jax.jit(partial(layer, sparse), donate_argnums=(2,))
                .lower(flat, number, cache, ints, x, cos, sin, *[chunk] * chunks)
                .compile()
                for chunks in self._buckets
            }
            for sparse in set(pieces.sparse)
        }

        def head(flat, ints, x):
            logits, hidden = pieces.head(shape, whole(flat), ints, x)
            return logits, None if shape.decode else hidden

        return _Programs(embed.compile(), layers, jax.jit(head).lower(flat, ints, x).compile())

    def _compile_moves(self) -> None:
        """Gathers, scatters and merges of a chunk's slice."""
        place, pages = self._placement, self.plan.chunk_pages
        cache = place.struct(self._cache_shape, self.dtype)
        chunk, index = place.struct(self._slice_shape, self.dtype), place.struct((pages,), jnp.int32)
        layer = place.struct((), jnp.int32)

        def gather(cache, layer, slots):
            return cache[layer, slots]

        def scatter(cache, layer, chunk, index, slots):
            return cache.at[layer, slots].set(chunk[index])

        def merge(first, second, index):
            return jnp.concatenate([first, second])[index]

        self._gather = jax.jit(gather).lower(cache, layer, index).compile()
        self._scatter = jax.jit(scatter, donate_argnums=(0,)).lower(cache, layer, chunk, index, index).compile()
        self._merge = jax.jit(merge).lower(chunk, chunk, index).compile()

    def _run_once(self, shape: BatchShape, step: Any, scorer: Callable | None) -> None:
        if not hasattr(self, "_gather"):
            self._compile_moves()
            slots = np.full(self.plan.chunk_pages, self._scrap, np.int32)
            index = np.zeros(self.plan.chunk_pages, np.int32)
            gathered = self._gather(self._cache, self._numbers[0].index, slots)
            merged = self._merge(gathered, gathered, index)
            self._cache = self._scatter(self._cache, self._numbers[0].index, merged, index, slots)
        super()._run_once(shape, step, scorer)

    def _forward_once(self, shape: BatchShape, step: Any, ints: np.ndarray, given: Array | None):
        flat = self._flat
        x, cos, sin = step.embed(flat, ints, self.sampler.last_token, given)
        for programs in step.layer.values():
            for chunks, program in programs.items():
                arrays = [self._nothing] * chunks
                self._cache, x = program(flat, self._numbers[0], self._cache, ints, x, cos, sin, *arrays)
        return step.head(flat, ints, x)

    # A step.

    def launch(self, batch: HostBatch) -> Launched:
        """Starts the forward pass of a step. Returns at once on a GPU; on a CPU, and emulated, once it is over.

        Raises:
          TransferFailed: pages could not be copied.
        """
        self.lost_pages = False
        try:
            return self._launch(batch)
        except TransferFailed:
            self.lost_pages = True
            raise

    def _launch(self, batch: HostBatch) -> Launched:
        move = self._plan(batch)
        given = self._nothing_given.get(batch.shape) if batch.embeddings is None else batch.embeddings
        programs: Any = self._steps[batch.shape]
        timed = self._strict or self._steps_run % self.swap.window_steps == 0
        tokens = sum(row.start + row.count for row in batch.plan.rows)
        ints = self._placement.put(move.ints)
        stalled, computed = self._mover.traffic.stall_s, 0.0
        x, cos, sin = programs.embed(self._flat, ints, self.sampler.last_token, given)
        step = self._ring.ran // self._ring.layers
        while self._ring.may_issue:
            self._fetch(move, step)
        for number, sparse in zip(self._numbers, self._pieces.sparse):
            place = self._ring.place(self._ring.ran)
            arrays = self._arrived(move, place, timed)
            begin = time.perf_counter()
            work = partial(self._layer, programs.layer[sparse], number, move, (ints, x, cos, sin), arrays, timed)
            if self._emulate is None:
                x = work()
            else:
                assert isinstance(self._mover, EmulatedMover)
                x = self._mover.device.run(work, self._emulate.layer_s(tokens, batch.plan.tokens))
            computed += time.perf_counter() - begin
            self._ring.run()
            self._free(place)
            self._fetch(move, step)
        for chunk in move.segment:
            self.spaces.unhold(chunk)
        for chunk in self.spaces.dropped():
            self._mover.drop(chunk)
        logits, hidden = programs.head(self._flat, ints, x)
        self._steps_run += 1
        if timed:
            self._observe(computed, self._mover.traffic.stall_s - stalled, tokens)
        return Launched(batch, logits, hidden)

    def _layer(
        self, programs, number: LayerNumbers, move: _Move, inputs, arrays: dict[int, Array], wait: bool
    ) -> Array:
        """One layer, and what its pages do besides."""
        layer = self._ring.layer(self._ring.ran)
        for chunk, slots in move.leaving.items():
            arrays[chunk] = self._gather(self._cache, number.index, slots)
            self._mover.store(layer, chunk, arrays[chunk])
        chosen = [arrays[chunk] for chunk in move.segment]
        bucket = next(b for b in self._buckets if b >= len(chosen))
        chosen += [self._nothing] * (bucket - len(chosen))
        self._cache, x = programs[bucket](self._flat, number, self._cache, *inputs, *chosen)
        if move.merging is not None:
            self._store_merged(layer, move.merging, arrays)
        if move.returning is not None:
            chunk, index, slots = move.returning
            self._cache = self._scatter(self._cache, number.index, arrays[chunk], index, slots)
        return jax.block_until_ready(x) if wait else x

    def _store_merged(self, layer: int, merging: _Merging, arrays: Mapping[int, Array]) -> None:
        for chunk, index in merging.fresh.items():
            merged = self._merge(arrays[merging.first], arrays[merging.second], index)
            self._mover.store(layer, chunk, jax.block_until_ready(merged) if self._strict else merged)

    def _fetch(self, move: _Move, step: int) -> None:
        """The next segment begins to arrive: of this step, or of the step after it."""
        position = self._ring.issue()
        later = position // self._ring.layers > step
        chunks = move.following if later else [chunk for chunk in move.segment if chunk not in move.leaving]
        self._bring(self._ring.layer(position), self._ring.place(position), chunks)

    def _bring(self, layer: int, place: int, chunks: list[int]) -> None:
        if chunks:
            for chunk in chunks:
                self.spaces.hold(chunk)
            self._mover.fetch(layer, place, chunks)

    def _free(self, place: int) -> None:
        for chunk in self._mover.free(place):
            self.spaces.unhold(chunk)

    def _arrived(self, move: _Move, place: int, wait: bool) -> dict[int, Array]:
        """The slices of the segment; those that nobody expected are fetched now."""
        wanted = [chunk for chunk in move.segment if chunk not in move.leaving]
        there = self._mover.at(place)
        missing = [chunk for chunk in wanted if chunk not in there]
        if missing and len(there) + len(missing) > self.plan.chunks:
            self._free(place)  # most of what was expected is of no use, and takes its room
            missing = wanted
        self._bring(self._ring.layer(self._ring.ran), place, missing)
        return dict(zip(wanted, self._mover.take(place, wanted, wait=wait)))

    def _observe(self, computed: float, stalled: float, tokens: int) -> None:
        """Takes in a timed step; at a window's end the controller decides."""
        self._compute_s += computed
        if self.controller is None:
            return
        self._window.append((computed, stalled, tokens))
        if len(self._window) < (self.swap.window_steps if self._strict else 1):
            return
        count, traffic = len(self._window), self._mover.traffic
        shortages, moved, busy_s = self._seen
        self._seen = (self.spaces.shortages, traffic.to_device_bytes, traffic.link_s)
        compute_s = sum(computed for computed, _, _ in self._window)
        window = Window(
            compute_s=compute_s,
            stall_s=sum(stalled for _, stalled, _ in self._window),
            layer_s=min(computed for computed, _, _ in self._window) / self._ring.layers,
            kv_tokens=sum(tokens for _, _, tokens in self._window) / count,
            waited=min(1.0, (self.spaces.shortages - shortages) / self.swap.window_steps),
            link_bytes=traffic.to_device_bytes - moved,
            link_s=traffic.link_s - busy_s,
        )
        self._window = []
        self._target = target = self.controller.observe(window)
        self._decisions[target.decision] += 1
        self._aim(target.share, target.urgent)

    def _aim(self, share: float, urgent: bool = False) -> None:
        allowed = min(self.plan.host_pages, int(share / (1 - share) * self.plan.device_slots))
        self.spaces.withheld, self.spaces.urgent = self.plan.host_pages - allowed, urgent

    # What a step is to do.

    def _plan(self, batch: HostBatch) -> _Move:
        """Gives the pages that the step writes their slots, and says where those are that it reads."""
        spaces = self.spaces
        ints = batch.ints.copy()
        f = cut(ints, batch.shape.int_fields)
        written = np.unique(f["write_slots"] // self.page_size).tolist()
        writes = [page for page in written if page < spaces.size]
        for row in batch.plan.rows:
            spaces.note_full(row.sequence.pages[: row.start // self.page_size])
        read = self._pages_read(batch)
        leaving = self._make_room(batch, writes, read)
        segment = self._shortened(spaces.chunks_of(read), leaving, read)
        table = self._table(segment)
        f["block_tables"][...] = table[f["block_tables"]]
        slots, offsets = np.divmod(f["write_slots"], self.page_size)
        f["write_slots"][...] = table[slots] * self.page_size + offsets
        for chunk in segment:
            spaces.hold(chunk)
        if leaving:
            return _Move(ints, segment, segment, leaving)
        merging = self._merging(spaces.mergeable(segment))
        returning = None if merging is not None else self._returning(segment)
        return _Move(ints, segment, spaces.chunks_of(read), leaving, merging, returning)

    def _pages_read(self, batch: HostBatch) -> set[int]:
        """The pages that queries see. Those left of the window of every layer are not among them, nor ever will be."""
        windows = self.config.layer_windows
        widest = max((window for window in windows if window is not None), default=0)
        seen: set[int] = set()
        for row in batch.plan.rows:
            first = 0 if None in windows else max(0, row.start - widest + 1) // self.page_size
            seen.update(row.sequence.pages[first : -(-(row.start + row.count) // self.page_size)])
        return seen

    def _make_room(
        self, batch: HostBatch, writes: list[int], read: set[int]
    ) -> dict[int, Int32[np.ndarray, " chunk_pages"]]:
        """Gives the pages to be written slots; what leaves the device for it, and from which slots."""
        spaces = self.spaces
        fresh = [page for page in writes if spaces.slot(page) is None]
        leaving: dict[int, Int32[np.ndarray, " chunk_pages"]] = {}
        if len(fresh) > spaces.free_slots:
            full = [row.sequence.pages[: row.start // self.page_size] for row in batch.plan.rows]
            cold = [page for page in spaces.full_on_device() if page not in read]
            for group in to_demote(spaces, len(fresh) - spaces.free_slots, cold, full, frozenset(writes)):
                slots = np.full(self.plan.chunk_pages, self._scrap, np.int32)
                slots[: len(group)] = spaces.slots_of(group)
                leaving[spaces.demote(group)] = slots
        spaces.bind(fresh)
        return leaving

    def _shortened(self, segment: list[int], leaving: Mapping[int, Any], read: set[int]) -> list[int]:
        """The segment, once so many half-empty chunks have been merged that it fits. Takes the time of many copies."""
        while len(segment) > self.plan.chunks:
            pair = self.spaces.emptiest(chunk for chunk in segment if chunk not in leaving)
            self._merge_now(*pair)
            segment = self.spaces.chunks_of(read)
        return segment

    def _merge_now(self, first: int, second: int) -> None:
        """Merges two chunks before the step, all else waiting."""
        begin = time.perf_counter()
        for place in range(self.swap.staging_segments):
            self._free(place)
        self._ring.rewind()
        for chunk in (first, second):
            self.spaces.hold(chunk)
        merging = self._merging((first, second))
        assert merging is not None
        for layer in range(self._ring.layers):
            self._mover.fetch(layer, 0, [first, second])
            arrays = dict(zip((first, second), self._mover.take(0, [first, second], wait=True)))
            self._store_merged(layer, merging, arrays)
            self._mover.free(0)
        for chunk in (first, second):
            self.spaces.unhold(chunk)
        self._mover.traffic.stall_s += time.perf_counter() - begin

    def _table(self, segment: list[int]) -> Int32[np.ndarray, " pages"]:
        """Page -> where the step finds it; pages that it does not read are the scrap page."""
        table = self.spaces.slot_table(self._scrap)
        first = self._scrap + 1
        for number, chunk in enumerate(segment):
            pages = np.asarray(self.spaces.chunk(chunk), np.int32)
            (living,) = np.nonzero(pages >= 0)
            table[pages[living]] = first + number * self.plan.chunk_pages + living
        return table

    def _merging(self, pair: tuple[int, int] | None) -> _Merging | None:
        """Has the living pages of two chunks be in a new one, or in two of which the first is full."""
        if pair is None:
            return None
        size = self.plan.chunk_pages
        living = [
            number * size + i
            for number, chunk in enumerate(pair)
            for i, page in enumerate(self.spaces.chunk(chunk))
            if page >= 0
        ]
        fresh = {}
        for number, chunk in enumerate(self.spaces.compact(*pair)):
            index = np.zeros(size, np.int32)
            part = living[number * size : (number + 1) * size]
            index[: len(part)] = part
            fresh[chunk] = index
        return _Merging(*pair, fresh)

    def _returning(self, segment: list[int]):
        """A chunk whose pages go back to the device, where there is room to spare."""
        spaces, spare = self.spaces, self.spaces.free_slots - self._reserve
        if not segment or spare <= 0:
            return None
        fewest = min(segment, key=lambda chunk: sum(page >= 0 for page in spaces.chunk(chunk)))
        pages = [page for page in spaces.chunk(fewest) if page >= 0]
        if len(pages) > spare:
            return None
        index = np.zeros(self.plan.chunk_pages, np.int32)
        slots = np.full(self.plan.chunk_pages, self._scrap, np.int32)
        index[: len(pages)] = [i for i, page in enumerate(spaces.chunk(fewest)) if page >= 0]
        slots[: len(pages)] = spaces.promote(pages)
        return fewest, index, slots


def _buckets(chunks: int) -> tuple[int, ...]:
    """Numbers of chunks that there are programs for; others are padded, which costs a copy on the device."""
    return tuple(sorted({0, *(-(-chunks * part // 4) for part in (1, 2, 4))}))
