"""Runs steps of a decoder whose weights are more than its device holds (MoE-Lightning, arXiv 2411.11217).

It has the face of the ordinary runner, and its sampler and scorers. A step's rows are cut into micro-batches; what is
done with them, and when which page of weights moves, is a `Schedule`, made once for each number of micro-batches and
proved by its checker before it runs. Between steps the first layer's pages are on the device already.

    Runner.launch -> this file: embed, cut -> executor.py: the schedule's tasks -> pipelined_step.py: each task
                                                                                -> page_store.py: weights
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxstack.engine.batch import BatchShape, cut, size
from jaxstack.engine.executor import run_in_lanes, run_in_order
from jaxstack.engine.layerwise import LayerNumbers, Layerwise, micro_shapes, split_step
from jaxstack.engine.memory.schedule import Schedule, check
from jaxstack.engine.memory.weight_pages import PageState, PageTable
from jaxstack.engine.offload import (
    OffloadConfig,
    kv_cache_bytes,
    layouts_for,
    refuse_unsupported,
    resident_share,
    step_schedule,
)
from jaxstack.engine.page_store import DEVICE, HOST, EmulatedPages, PageStore, SpacePages, take_matrices
from jaxstack.engine.pipelined_step import EmulatedMover, MicroBatch, Mover, Programs, SpaceMover, Staging, StepWork
from jaxstack.engine.runner import Runner
from jaxstack.models.decoder import Decoder
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.runtime.emulation import BudgetExceeded, ByteLedger, EmulatedMachine, aligned_empty
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.memory_spaces import Space, host_processor, probe_spaces
from kernels import matmul


class PipelinedRunner(Runner):
    """The ordinary runner's face; see the module.

    Args:
      decoder: as loaded, on the host (`jax.default_device` of JAX's CPU backend around the loading); taken over.
      shapes, num_pages, page_size, slots, max_length, vocab_size, dtype: as `Runner` has them.
      offload: settings.
      pack: lay out what is no page for the CPU's matrix kernel; None: where that runs.
      emulated: lanes that stand for a device and its link; None for JAX's own device.
      pages: makes the store of a decoder that has been stripped of its feed-forward matrices already; None takes them.
      wait: for every task before the next one of its lane, as who offloads without a schedule does.

    Attributes:
      ledger: the bytes of the device and of the host.
      plan: what the device was planned to hold.
      weight_resident: the share of pages that stays there.
      store: the pages.
      transfers: in which a layer's streamed pages come.
      pieces: of the forward pass.
      work: what tasks do.

    Raises:
      UserError: a budget below the floor, or a model whose weights cannot be paged.
    """

    def __init__(
        self,
        decoder: Decoder,
        shapes: Sequence[BatchShape],
        *,
        num_pages: int,
        page_size: int,
        slots: int,
        max_length: int,
        vocab_size: int,
        dtype: jnp.dtype,
        offload: OffloadConfig,
        pack: bool | None = None,
        emulated: EmulatedMachine | None = None,
        pages: Callable[[PageTable, ByteLedger], PageStore] | None = None,
        wait: bool = False,
    ):
        config, dtype = decoder.config, jnp.dtype(dtype)
        refuse_unsupported(config)
        self._offload, self._emulated = offload, emulated
        policy = offload.policy
        self._layouts = layouts_for(config, offload)
        self.ledger = ByteLedger({DEVICE: offload.device_budget_bytes, HOST: None})
        self._spaces = probe_spaces()
        self._cpu = host_processor()
        with jax.default_device(self._cpu):
            matrices = take_matrices(decoder, dtype) if pages is None else []
            if pack is None:
                pack = self._spaces.device.platform == "cpu" and matmul.available()
            decoder = fuse_for_serving(decoder, pack=pack, dtype=dtype, consume=True)
            kept: Any = nnx.state(decoder)
        kept_bytes = sum(x.nbytes for x in jax.tree.leaves(kept))
        self.weight_resident, self.plan = resident_share(
            config,
            offload,
            self._layouts,
            shapes,
            itemsize=dtype.itemsize,
            kv_bytes=kv_cache_bytes(config, num_pages, page_size, dtype.itemsize),
            kept_bytes=kept_bytes,
        )
        layer_layouts = [self._layouts[layer in config.sparse_layers] for layer in range(config.num_layers)]
        streamed = policy.ffn_on_device and self.weight_resident < 1
        most = max(layout.pages - int(layout.pages * self.weight_resident + 1e-9) for layout in layer_layouts)
        self.transfers = 0 if not streamed else 1 if offload.one_piece else most
        stay = self.weight_resident if policy.ffn_on_device else 0.0
        table = PageTable([layout.pages for layout in layer_layouts], stay, max(1, self.transfers))
        self.store: PageStore
        options: dict[str, Any] = {"dtype": dtype, "ledger": self.ledger}
        if pages is not None:
            self.store = pages(table, self.ledger)
        elif emulated is None:
            self.store = SpacePages(
                self._spaces, layer_layouts, matrices, table, host_computes=not policy.ffn_on_device, **options
            )
        else:
            buffers = 2 * self.transfers
            self.store = EmulatedPages(emulated, layer_layouts, matrices, table, buffers=buffers, **options)
        self._host_weights = None if policy.ffn_on_device else jax.device_put(kept, self._cpu)
        nnx.update(decoder, jax.device_put(kept, self._spaces.sharding(Space.DEVICE)))
        self.ledger.take(DEVICE, kept_bytes, "weights that are no pages")
        self.pieces = Layerwise(decoder, dtype=dtype, vocab_size=vocab_size, layouts=self._layouts)

        self._programs = Programs({}, {}, {})
        self._embeds: dict[BatchShape, Callable] = {}
        self._schedules: dict[int, Schedule] = {}
        self._no_vectors: dict[BatchShape, Array] = {}
        self._noted: dict[str, int] = {}
        self._compiling = threading.Lock()
        self._host_thread = ThreadPoolExecutor(1, thread_name_prefix="host-lane")
        mover: Mover = SpaceMover(self._spaces) if emulated is None else EmulatedMover(emulated)
        layers = self.pieces.layers
        self.work = StepWork(
            self._programs,
            weights=self.pieces.weights,
            host_weights=self._host_weights,
            layers=(tuple(self._on_device(n) for n in layers), layers),
            sparse=self.pieces.sparse,
            store=self.store,
            mover=mover,
            ledger=self.ledger,
            attention_on_device=policy.attention_on_device,
            ffn_on_device=policy.ffn_on_device,
            wait=wait or emulated is not None,
        )
        self._kv_space: str | None = None
        super().__init__(
            decoder,
            shapes,
            num_pages=num_pages,
            page_size=page_size,
            slots=slots,
            max_length=max_length,
            vocab_size=vocab_size,
            dtype=dtype,
        )
        self._note("state of the sampler", self.sampler.state_bytes)

    @property
    def cache_bytes(self) -> int:
        return math.prod(self._cache_shape) * self.dtype.itemsize

    def warm_up(self, progress: bool = True, stopped: Callable[[], bool] = lambda: False) -> None:
        try:
            super().warm_up(progress, stopped)
        except BudgetExceeded as error:
            raise UserError(f"device budget: {error}; raise it, or lower max_sequences or max_batch_tokens") from error

    def reset_cache(self) -> None:
        """Empty keys and values, where the policy has them, and no page on the device but those that stay."""
        self.sampler.reset()
        self.work.fail()
        if self._kv_space is not None:
            self.ledger.give(self._kv_space, self.cache_bytes, "keys and values")
        policy, shape = self._offload.policy, self._cache_shape
        self._kv_space = DEVICE if policy.attention_on_device and policy.kv_resident else HOST
        self._cache = self._spaces.put(np.zeros((0,), self.dtype), Space.DEVICE)  # the programs do not take it
        self.work.cache = None
        self.ledger.take(self._kv_space, self.cache_bytes, "keys and values")
        if self._kv_space == DEVICE:
            self.work.cache = jnp.zeros(shape, self.dtype, device=self._spaces.sharding(Space.DEVICE))
        elif not policy.attention_on_device:
            self.work.cache = jnp.zeros(shape, self.dtype, device=self._cpu)
        else:
            self.work.staging = self.make_staging(shape, self._staging_pages())

    def make_staging(self, shape: tuple[int, ...], room: int) -> Staging:
        """Empty keys and values on the host, of the cache's shape, that pass through `room` pages of the device."""
        numbers = aligned_empty(shape, self.dtype)
        numbers[...] = 0
        return Staging(numbers, room)

    def close(self) -> None:
        """Ends the host's thread."""
        self._host_thread.shutdown()

    def replace_weights(self, decoder: Decoder) -> None:
        raise UserError("weights: found an engine that keeps weights on the host, which cannot exchange them")

    # Compiling.

    def compile(self, shape: BatchShape):
        """What runs a step of this shape, everything compiled; arguments and results as the ordinary one has them."""
        with self._compiling:
            return self._compile_step(shape)

    def _compile_step(self, shape: BatchShape) -> Callable:
        parts = self.parts(shape)
        for part in dict.fromkeys(parts):
            self._compile_part(part)
        hidden = [self._struct((part.rows, self.config.hidden_size), self.dtype) for part in parts]
        hidden_bytes = shape.rows * self.config.hidden_size * self.dtype.itemsize

        def joined(weights, ints, *hidden):
            return self.pieces.head(shape, weights, ints, jnp.concatenate(hidden)[: shape.rows])

        self._note("results of a step", 4 * shape.samples * self.sampler.columns + hidden_bytes)
        head = self._compiled(joined, self.pieces.weights, self._struct((size(shape.int_fields),), jnp.int32), *hidden)
        if len(parts) not in self._schedules:
            schedule = step_schedule(
                self._offload,
                layers=self.config.num_layers,
                micro_batches=len(parts),
                transfers=self.transfers,
            )
            check(schedule)
            self._schedules[len(parts)] = schedule

        def step(_, cache, ints, last_token, given):
            hidden = self._run(shape, np.asarray(ints), last_token, given)
            logits, final = head(self.pieces.weights, ints, *hidden)
            return cache, logits, None if shape.decode else final

        return step

    def _note(self, what: str, size_bytes: int) -> None:
        """The largest of what is there one at a time is taken for all: programs' scratch memory, steps' results."""
        more = size_bytes - self._noted.get(what, 0)
        if more > 0:
            self.ledger.take(DEVICE, more, what)
            self._noted[what] = size_bytes

    def parts(self, shape: BatchShape) -> list[BatchShape]:
        """The micro-batches of a step of this shape."""
        staged = self._offload.policy.attention_on_device and not self._offload.policy.kv_resident
        # Staged keys and values are loaded before those of the part before have come back: no sequence in two parts.
        return micro_shapes(shape, 1 if staged and not shape.decode else self._offload.policy.n_micro_batches)

    def _compile_part(self, part: BatchShape) -> None:
        if part in self._embeds:
            return
        pieces, config, policy = self.pieces, self.config, self._offload.policy
        weights, struct = pieces.weights, self._struct
        ints, slots = (size(part.int_fields),), self.sampler.last_token.shape
        x = struct((part.rows, config.hidden_size), self.dtype)
        vectors = None if part.decode else struct((part.rows, config.hidden_size), jnp.float32)
        embed = self._compiled(
            lambda *a: pieces.embed(part, *a), weights, struct(ints, jnp.int32), struct(slots, jnp.int32), vectors
        )
        numbers = LayerNumbers(*(struct((), jnp.int32) for _ in LayerNumbers._fields))
        tables = jax.eval_shape(
            lambda *a: pieces.embed(part, *a)[1:], weights, struct(ints, jnp.int32), struct(slots, jnp.int32), vectors
        )
        cos, sin = (struct(table.shape, table.dtype) for table in tables)
        self._programs.before[part] = self._compiled(
            lambda *a: pieces.before(part, *a), weights, numbers, struct(ints, jnp.int32), x, cos, sin
        )
        heads = [(part.rows, n, config.head_dim) for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
        staged = self.work.staging
        at_host = not policy.attention_on_device
        cache = self._cache_shape if staged is None else (1, staged.room + 1, *self._cache_shape[2:])
        self._programs.attention[part] = self._compiled(
            lambda *a: pieces.attention(part, *a, cache_layer=None if staged is None else jnp.int32(0)),
            *self._told(at_host, (cache, self.dtype), numbers, (ints, jnp.int32), *((h, self.dtype) for h in heads)),
            donate=() if staged is not None else (0,),
            on_host=at_host,
        )
        at_host = not policy.ffn_on_device
        after_weights = self._host_weights if at_host else weights
        for sparse in dict.fromkeys(pieces.sparse):
            layout = self._layouts[sparse]
            pages = [(shape, self.dtype) for _ in range(layout.pages) for shape in layout.shapes]
            told = self._told(
                at_host, numbers, (ints, jnp.int32), (x.shape, self.dtype), (heads[0], self.dtype), *pages
            )
            numbers_, ints_, x_, out_, *flat = told

            def after(weights, numbers, ints, x, out, pages, sparse=sparse):
                return pieces.after(part, weights, numbers, ints, x, out, pages, sparse=sparse)

            self._programs.after[part, sparse] = self._compiled(
                after,
                after_weights,
                numbers_,
                ints_,
                x_,
                out_,
                tuple(type(layout.shapes)(*flat[i : i + 2]) for i in range(0, len(flat), 2)),
                on_host=at_host,
            )
        self._embeds[part] = embed  # the last: what marks the part as done

    def _told(self, on_host: bool, *what: Any) -> list[Any]:
        """What a program is told of its arguments: shapes with dtypes, or numbers of a layer."""
        sharding = jax.sharding.SingleDeviceSharding(self._cpu) if on_host else self._spaces.sharding(Space.DEVICE)
        told = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
        return [
            LayerNumbers(*(told(n.shape, n.dtype) for n in each)) if isinstance(each, LayerNumbers) else told(*each)
            for each in what
        ]

    def _compiled(self, function: Callable, *told: Any, donate: tuple[int, ...] = (), on_host: bool = False) -> Any:
        jitted = jax.jit(function, donate_argnums=donate)
        if on_host:
            with jax.default_device(self._cpu):  # kernels choose their form by it
                return jitted.lower(*told).compile()
        compiled = jitted.lower(*told).compile()
        if (analysis := compiled.memory_analysis()) is not None:
            self._note("scratch memory of programs", int(analysis.temp_size_in_bytes))
        return compiled

    def _struct(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return self._spaces.struct(shape, dtype, Space.DEVICE)

    def _on_device(self, numbers: LayerNumbers) -> LayerNumbers:
        return LayerNumbers(*(self._spaces.put(n, Space.DEVICE) for n in numbers))

    def _staging_pages(self) -> int:
        """What the sequences of any part may have."""
        return max(
            min(part.sequences * part.table_pages, self._cache_shape[1])
            for shape in self.shapes
            for part in self.parts(shape)
        )

    # A step.

    def _run(self, shape: BatchShape, ints: np.ndarray, last_token: Any, given: Any) -> list[Any]:
        """All of a step but its end: the hidden states of its parts."""
        work, timeout_s = self.work, self._offload.timeout_s
        try:
            self._bring_first()
            batches = self.split(shape, ints, given)
            embedded = [self.embed(batch, last_token) for batch in batches]
            work.begin({(0, j): batch for j, batch in enumerate(batches)}, embedded)
            schedule = self._schedules[len(batches)]
            if self._emulated is None:
                run_in_order(schedule, work.do, self._host_thread, timeout_s=timeout_s)
            else:
                run_in_lanes(schedule, work.do, self._emulated, timeout_s=timeout_s)
            return work.end()
        except BaseException:
            work.fail()
            raise

    def _bring_first(self) -> None:
        """What a step expects the one before it to have brought: missing before the first one, and after a failure."""
        for transfer in range(self.transfers):
            pages = self.store.table.transfer(0, transfer)
            if pages and self.store.table.state(0, pages[0]) is PageState.HOST:
                self.store.bring(0, transfer, 0.0)

    def embed(self, batch: MicroBatch, last_token: Any) -> tuple[Array, Array, Array]:
        """A part's hidden state before the first layer, and its rotations."""
        return self._embeds[batch.shape](self.pieces.weights, batch.ints_on_device, last_token, batch.given)

    def split(self, shape: BatchShape, ints: np.ndarray, given: Any = None) -> list[MicroBatch]:
        """A step's parts, their integers on their way to the device.

        Args:
          given: vectors in the place of tokens' own; None for none.
        """
        scrap = (self._cache_shape[1] - 1) * self.page_size
        parts = self.parts(shape)
        cuts = split_step(ints, shape, parts, scrap_slot=scrap)
        return [self._micro_batch(part, own, given, i * part.rows) for i, (part, own) in enumerate(zip(parts, cuts))]

    def _micro_batch(self, part: BatchShape, ints: np.ndarray, given: Any, first: int) -> MicroBatch:
        vectors, staging = None, self.work.staging
        if not part.decode:
            if part not in self._no_vectors:
                nothing = np.zeros((part.rows, self.config.hidden_size), np.float32)
                self._no_vectors[part] = self._spaces.put(nothing, Space.DEVICE)
            vectors = self._no_vectors[part]
            used = cut(ints, part.int_fields)["use_embeddings"]
            if given is not None and used.any():
                own = np.zeros(vectors.shape, np.float32)
                piece = np.asarray(given)[first : first + part.rows]
                own[: len(piece)] = piece
                vectors = self._spaces.put(own, Space.DEVICE)
        staged = None
        if staging is not None:
            pages, local = staging.localise(part, ints)
            staged = (pages, self._spaces.put(local, Space.DEVICE))
        return MicroBatch(part, ints, self._spaces.put(ints, Space.DEVICE), vectors, staged)
