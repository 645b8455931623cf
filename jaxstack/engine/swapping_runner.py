"""A runner whose KV cache is larger than what the device holds: some pages are on the host, and every step streams them
past the layers that read them (`jaxstack.engine.memory.swap`).

A step, beside the tokens:

    plan     which pages it writes (they get device slots), which full pages leave for that as new chunks, and which
             chunks its sequences read: the segment that every group of layers streams its own slice of
    group g  pages that leave are gathered from the device, and their copy to the host begins | the group's layers run,
             with device pages and staged pages in one block table | its place in the ring is free: the segment of the
             group after next begins to arrive, of the next step's first groups at the end of this one

The block table keeps the order of a sequence's pages wherever they are, so attention adds up in the order in which it
would without swapping, and answers are the same bit for bit. Host pages are full, hence never written again.

A group is one layer, or several where launching a program for each would take longer than computing it. There is one
program for a group, compiled once for each batch shape and number of chunks, not for each group; and one for all
layers, for steps that have nothing on the host and nothing to move.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxstack.engine.batch import BatchShape, HostBatch, size
from jaxstack.engine.errors import TransferFailed
from jaxstack.engine.layerwise import LayerNumbers, Layerwise
from jaxstack.engine.memory.swap import ExpansionController, PageSpaces, SegmentRing, SwapConfig, Target, Window
from jaxstack.engine.memory.swap.reading import SwapReading
from jaxstack.engine.memory.swap.sizing import SpacePlan
from jaxstack.engine.runner import Launched, Runner
from jaxstack.engine.swap_movers import EmulatedMachine, EmulatedMover, KindMover, Mover
from jaxstack.engine.swap_moves import Leaving, Merging, Move, MovePlanner, Returning
from jaxstack.models.decoder import Decoder
from jaxstack.runtime.emulation import ByteLedger
from jaxstack.runtime.memory_spaces import probe_spaces

Kinds = tuple[bool, ...]
"""Of some layers in a row: whether each has experts."""


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Of one shape: `group[kinds of its layers][chunks]`, and all layers without any chunks, if steps use it."""

    embed: Callable
    group: Mapping[Kinds, Mapping[int, Callable]]
    whole: Callable | None
    head: Callable


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
        assert config.num_layers % plan.group == 0, f"groups of {plan.group} of {config.num_layers} layers"
        self._ring = SegmentRing(config.num_layers // plan.group, swap.staging_segments)
        slice_shape = (plan.group, plan.chunk_pages, page_size, 2 * config.num_kv_heads, config.head_dim)
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
                groups=self._ring.layers,
                staging=swap.staging_segments,
                chunks=max(2, plan.chunks),
                leaving=leaving,
                ledger=self.ledger,
            )
        super().__init__(
            decoder, shapes, num_pages=plan.device_slots, page_size=page_size, vocab_size=vocab_size, dtype=dtype,
            **options,
        )  # fmt: skip
        self._start_afresh()
        self.ledger.take("device", self.cache_bytes, "pages")
        self._pieces = Layerwise(decoder, dtype=self.dtype, vocab_size=vocab_size)
        # Programs take a flat list: taking the decoder's tree apart for every layer costs more than a launch does.
        self._flat, self._tree = jax.tree.flatten(self._pieces.weights)
        kinds, size = self._pieces.sparse, plan.group
        self._groups = [
            (self._numbers(slice(i, i + size)), kinds[i : i + size]) for i in range(0, config.num_layers, size)
        ]
        self._all_layers = self._numbers(slice(None))
        self._scrap = plan.device_slots
        # Others are padded, which costs a copy on the device. What leaves is in the segment, too, and need not arrive.
        self._buckets = tuple(sorted({0, -(-plan.chunks // 2), plan.chunks, plan.chunks + plan.new_chunks}))
        self._nothing = self._placement.put(np.zeros(slice_shape, self.dtype))
        self._gather: Callable
        self._scatter: Callable
        self._merge: Callable
        # Waiting for a layer before its place is filled anew keeps within the budget where a program's memory is taken
        # when it is launched. A GPU takes and gives it in the order of its stream, and is not waited for.
        self._strict = emulate is not None or jax.default_backend() == "cpu"
        # An emulated device is given its times group by group, like its pages.
        self._whole_steps = emulate is None
        self._steps_run = 0
        self._compute_s = 0.0
        # The host's time for a step in groups where it waits for nothing: of each since the last timed step, and as
        # known then; beside how many steps that were one program.
        self._launches: list[float] = []
        self._launch_s = 0.0
        self._wholes = 0
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
        self._start_afresh()
        if self.controller is not None:
            self._aim(self.controller.share)
        return self.spaces

    def _numbers(self, part: slice) -> LayerNumbers:
        """Of some layers, int32 `[layers]` each."""
        return LayerNumbers(*(self._placement.put(np.stack(n)) for n in zip(*self._pieces.layers[part])))

    def _start_afresh(self) -> None:
        self.spaces = PageSpaces(self.plan.device_slots, self.plan.host_pages, self.plan.chunk_pages)
        windows = self.config.layer_windows
        self._moves = MovePlanner(self.spaces, self.plan, page_size=self.page_size, windows=windows, copier=self)

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
            launch_s=self._launch_s,
        )

    # Compiling.

    def compile(self, shape: BatchShape) -> _Programs:
        """The pieces of one shape: embed, a group of layers for every number of chunks, all layers, head."""
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

        def run(kinds: Kinds, flat, numbers, cache, ints, x, cos, sin, *chunks):
            def layer(i, carried, sparse):
                cache, x = carried
                number = LayerNumbers(*(n[i] for n in numbers))
                weights = whole(flat)  # taken apart in here: a loop's body cannot use variables from outside it
                q, k, v = pieces.before(shape, weights, number, ints, x, cos, sin)
                staged = jnp.concatenate([chunk[i] for chunk in chunks]) if chunks else None
                out, cache = pieces.attention(shape, cache, number, ints, q, k, v, staged_pages=staged)
                return cache, pieces.after(shape, weights, number, ints, x, out, sparse=sparse)

            carried, start = (cache, x), 0
            for sparse, alike in itertools.groupby(kinds):
                stop = start + len(list(alike))
                if stop == start + 1:
                    carried = layer(start, carried, sparse)
                else:
                    carried = jax.lax.fori_loop(start, stop, partial(layer, sparse=sparse), carried)
                start = stop
            return carried

        def compiled(kinds: Kinds, chunks: int) -> Callable:
            numbers = LayerNumbers(*[place.struct((len(kinds),), jnp.int32)] * 4)
            jitted = jax.jit(partial(run, kinds), donate_argnums=(2,))
            return jitted.lower(flat, numbers, cache, ints, x, cos, sin, *[chunk] * chunks).compile()

        groups = {
            kinds: {n: compiled(kinds, n) for n in self._buckets} for kinds in {kinds for _, kinds in self._groups}
        }
        every = None
        if self._whole_steps:
            every = groups.get(pieces.sparse, {}).get(0) or compiled(pieces.sparse, 0)

        def head(flat, ints, x):
            logits, hidden = pieces.head(shape, whole(flat), ints, x)
            return logits, None if shape.decode else hidden

        return _Programs(embed.compile(), groups, every, jax.jit(head).lower(flat, ints, x).compile())

    def _compile_moves(self) -> None:
        """Gathers, scatters and merges of a chunk's slice."""
        place, pages = self._placement, self.plan.chunk_pages
        cache = place.struct(self._cache_shape, self.dtype)
        chunk, index = place.struct(self._slice_shape, self.dtype), place.struct((pages,), jnp.int32)
        layers = place.struct((self.plan.group,), jnp.int32)

        def gather(cache, layers, slots):
            return cache[layers[:, None], slots]

        def scatter(cache, layers, chunk, index, slots):
            return cache.at[layers[:, None], slots].set(chunk[:, index])

        def merge(first, second, index):
            return jnp.concatenate([first, second], axis=1)[:, index]

        self._gather = jax.jit(gather).lower(cache, layers, index).compile()
        self._scatter = jax.jit(scatter, donate_argnums=(0,)).lower(cache, layers, chunk, index, index).compile()
        self._merge = jax.jit(merge).lower(chunk, chunk, index).compile()

    def _run_once(self, shape: BatchShape, step: Any, scorer: Callable | None) -> None:
        if not hasattr(self, "_gather"):
            self._compile_moves()
            slots = np.full(self.plan.chunk_pages, self._scrap, np.int32)
            index = np.zeros(self.plan.chunk_pages, np.int32)
            layers = self._groups[0][0].index
            gathered = self._gather(self._cache, layers, slots)
            merged = self._merge(gathered, gathered, index)
            self._cache = self._scatter(self._cache, layers, merged, index, slots)
        super()._run_once(shape, step, scorer)

    def _forward_once(self, shape: BatchShape, step: Any, ints: np.ndarray, given: Array | None):
        flat = self._flat
        x, cos, sin = step.embed(flat, ints, self.sampler.last_token, given)
        of_kinds = {kinds: numbers for numbers, kinds in self._groups}
        for kinds, programs in step.group.items():
            for chunks, program in programs.items():
                arrays = [self._nothing] * chunks
                self._cache, x = program(flat, of_kinds[kinds], self._cache, ints, x, cos, sin, *arrays)
        if step.whole is not None:
            self._cache, x = step.whole(flat, self._all_layers, self._cache, ints, x, cos, sin)
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
        began = time.perf_counter()
        move = self._moves.plan(batch)
        given: Any = self._nothing_given.get(batch.shape) if batch.embeddings is None else batch.embeddings
        programs: Any = self._steps[batch.shape]
        timed = self._strict or self._steps_run % self.swap.window_steps == 0
        tokens = sum(row.start + row.count for row in batch.plan.rows)
        ints = self._placement.put(move.ints)
        stalled = self._mover.traffic.stall_s
        x, *inputs = programs.embed(self._flat, ints, self.sampler.last_token, given)
        if timed and not self._strict:
            jax.block_until_ready(x)  # and with it all steps before this one
        whole = self._whole_steps and move.nothing
        if whole:
            x, computed = self._run_whole(programs.whole, (ints, x, *inputs), timed)
        else:
            x, computed = self._run_groups(programs.group, move, (ints, x, *inputs), timed, (tokens, batch.plan.tokens))
        for chunk in move.segment:
            self.spaces.unhold(chunk)
        for chunk in self.spaces.dropped():
            self._mover.drop(chunk)
        logits, hidden = programs.head(self._flat, ints, x)
        self._steps_run += 1
        if timed:
            self._observe(computed, self._mover.traffic.stall_s - stalled, tokens)
        elif whole:
            self._wholes += 1
        else:
            self._launches.append(time.perf_counter() - began)
        return Launched(batch, logits, hidden)

    def _run_whole(self, program: Callable, inputs: tuple[Array, ...], wait: bool) -> tuple[Array, float]:
        """All layers, with everything on the device; the last one's result, and seconds of computing if waited for."""
        for place in range(self.swap.staging_segments):
            self._free(place)  # what was expected to be read
        self._ring.rewind()
        begin = time.perf_counter()
        self._cache, x = program(self._flat, self._all_layers, self._cache, *inputs)
        return (jax.block_until_ready(x) if wait else x), time.perf_counter() - begin

    def _run_groups(
        self,
        programs: Mapping[Kinds, Mapping[int, Callable]],
        move: Move,
        inputs: tuple[Array, ...],
        wait: bool,
        tokens: tuple[int, int],
    ) -> tuple[Array, float]:
        """One group of layers after another, while segments come and go; as `_run_whole`. `tokens`: cached and new."""
        ints, x, cos, sin = inputs
        computed, step = 0.0, self._ring.ran // self._ring.layers
        # What this step has leave is not on the host yet: the next step's segments follow only as its groups have run.
        while self._ring.may_issue and self._ring.issued < (step + 1) * self._ring.layers:
            self._fetch(move, step)
        for numbers, kinds in self._groups:
            place = self._ring.place(self._ring.ran)
            arrays = self._arrived(move, place, wait)
            begin = time.perf_counter()
            work = partial(self._group, programs[kinds], numbers, move, (ints, x, cos, sin), arrays, wait)
            if self._emulate is None:
                x = work()
            else:
                assert isinstance(self._mover, EmulatedMover)
                x = self._mover.device.run(work, len(kinds) * self._emulate.layer_s(*tokens))
            computed += time.perf_counter() - begin
            self._ring.run()
            self._free(place)
            self._fetch(move, step)
        return x, computed

    def _group(
        self,
        programs: Mapping[int, Callable],
        numbers: LayerNumbers,
        move: Move,
        inputs: tuple[Array, ...],
        arrays: dict[int, Array],
        wait: bool,
    ) -> Array:
        """One group of layers, and what its pages do besides."""
        group = self._ring.layer(self._ring.ran)
        for chunk, slots in move.leaving.items():
            arrays[chunk] = self._gather(self._cache, numbers.index, slots)
            self._mover.store(group, chunk, arrays[chunk])
        chosen = [arrays[chunk] for chunk in move.segment]
        bucket = next(b for b in self._buckets if b >= len(chosen))
        chosen += [self._nothing] * (bucket - len(chosen))
        self._cache, x = programs[bucket](self._flat, numbers, self._cache, *inputs, *chosen)
        if move.merging is not None:
            self._store_merged(group, move.merging, arrays)
        if move.returning is not None:
            self._put_back(numbers, move.returning, arrays)
        return jax.block_until_ready(x) if wait else x

    def _store_merged(self, group: int, merging: Merging, arrays: Mapping[int, Array]) -> None:
        for chunk, index in merging.fresh.items():
            merged = self._merge(arrays[merging.first], arrays[merging.second], index)
            self._mover.store(group, chunk, jax.block_until_ready(merged) if self._strict else merged)

    def _put_back(self, numbers: LayerNumbers, returning: Returning, arrays: Mapping[int, Array]) -> None:
        chunk = arrays[returning.chunk]
        self._cache = self._scatter(self._cache, numbers.index, chunk, returning.index, returning.slots)
        if self._strict:
            jax.block_until_ready(self._cache)  # the chunk's place is filled anew

    def _fetch(self, move: Move, step: int) -> None:
        """The next segment begins to arrive: of this step, or of the step after it."""
        position = self._ring.issue()
        later = position // self._ring.layers > step
        chunks = move.following if later else [chunk for chunk in move.segment if chunk not in move.leaving]
        self._bring(self._ring.layer(position), self._ring.place(position), chunks)

    def _bring(self, group: int, place: int, chunks: list[int]) -> None:
        if chunks:
            assert len(self._mover.at(place)) + len(chunks) <= self.plan.chunks, f"{chunks} and others at one place"
            for chunk in chunks:
                self.spaces.hold(chunk)
            self._mover.fetch(group, place, chunks)

    def _free(self, place: int) -> None:
        for chunk in self._mover.free(place):
            self.spaces.unhold(chunk)

    def _arrived(self, move: Move, place: int, wait: bool) -> dict[int, Array]:
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
        if self._launches:
            # The device has waited for the host, if that takes longer to launch a step than the step to compute.
            self._launch_s = min(self._launches)
            in_groups = len(self._launches) / (len(self._launches) + self._wholes)
            stalled += in_groups * max(0.0, self._launch_s - computed)
        self._launches, self._wholes = [], 0
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
            layer_s=min(computed for computed, _, _ in self._window) / self.config.num_layers,
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
        self._moves.allowed = allowed

    # Before a step, where what it reads would not fit. Takes the time of many copies.

    def store_now(self, leaving: Leaving) -> None:
        for group, (numbers, _) in enumerate(self._groups):
            for chunk, slots in leaving.items():
                self._mover.store(group, chunk, self._gather(self._cache, numbers.index, slots))

    def squeeze_now(self, pair: tuple[int, int], merging: Merging | None, returning: Returning | None) -> None:
        begin = time.perf_counter()
        for place in range(self.swap.staging_segments):
            self._free(place)
        self._ring.rewind()
        for group, (numbers, _) in enumerate(self._groups):
            self._mover.fetch(group, 0, list(pair))
            arrays = dict(zip(pair, self._mover.take(0, pair, wait=True)))
            if merging is not None:
                self._store_merged(group, merging, arrays)
            if returning is not None:
                self._put_back(numbers, returning, arrays)
            self._mover.free(0)
        self._mover.traffic.stall_s += time.perf_counter() - begin
