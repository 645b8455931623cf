"""What the tasks of a schedule do with the arrays of one step: see `schedule_build.py` for their names.

    A   before attention                 B   attention, with the new keys and values written
    D1  to the host                      C   after attention
    D2  to the device                    W   pages of weights to the device
    L   a micro-batch's keys and values to the device            S   the new ones to the host

Every array that a task leaves for another is in `Held`, which counts it in the ledger as long as it is there.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxstack.engine.batch import BatchShape, cut
from jaxstack.engine.layerwise import LayerNumbers
from jaxstack.engine.memory.schedule import Task, TaskId
from jaxstack.engine.page_store import DEVICE, HOST, PageStore
from jaxstack.runtime.emulation import ByteLedger, EmulatedMachine, aligned_empty
from jaxstack.runtime.memory_spaces import Space, Spaces


class Held:
    """Arrays by name, each counted in its space's bytes while it is held. Callable from any thread.

    Args:
      what: under which the ledger has them.
    """

    def __init__(self, ledger: ByteLedger, what: str):
        self._ledger, self._what = ledger, what
        self._arrays: dict[tuple[str, Hashable], Any] = {}

    def put(self, space: str, key: Hashable, arrays: Any) -> None:
        """Holds them; those that were held under the same name are given up."""
        self.drop(space, key)
        self._ledger.take(space, _bytes(arrays), self._what)
        self._arrays[space, key] = arrays

    def get(self, space: str, key: Hashable) -> Any:
        return self._arrays[space, key]

    def take(self, space: str, key: Hashable) -> Any:
        """What is held, which then is the caller's only."""
        arrays = self._arrays.pop((space, key))
        self._ledger.give(space, _bytes(arrays), self._what)
        return arrays

    def drop(self, space: str, key: Hashable) -> None:
        if (space, key) in self._arrays:
            self.take(space, key)

    def clear(self) -> None:
        for space, key in list(self._arrays):
            self.take(space, key)


class SpaceMover:
    """Moves activations between JAX's memory spaces. Returns before they have arrived."""

    def __init__(self, spaces: Spaces):
        self._spaces = spaces

    def to_host(self, arrays: Any, seconds: float) -> Any:
        return jax.tree.map(lambda x: self._spaces.put(x, Space.HOST), arrays)

    def to_device(self, arrays: Any, seconds: float) -> Any:
        return jax.tree.map(lambda x: self._spaces.put(x, Space.DEVICE), arrays)


class EmulatedMover:
    """Copies activations over an emulated link, to arrays of their own."""

    def __init__(self, machine: EmulatedMachine):
        self._machine = machine

    def to_host(self, arrays: Any, seconds: float) -> Any:
        return self._moved(self._machine.to_host, arrays, seconds)

    def to_device(self, arrays: Any, seconds: float) -> Any:
        return self._moved(self._machine.to_device, arrays, seconds)

    def _moved(self, link: Any, arrays: Any, seconds: float) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        sources = [np.ascontiguousarray(x) for x in leaves]
        total = sum(x.nbytes for x in sources)
        out = []
        for source in sources:
            target = aligned_empty(source.shape, source.dtype)
            link.copy_now(target, source, seconds=seconds * source.nbytes / total if seconds else None)
            out.append(target)
        return jax.tree.unflatten(tree, out)


Mover = SpaceMover | EmulatedMover


@dataclasses.dataclass
class MicroBatch:
    """A part of a step.

    Attributes:
      ints: of the part, as `batch.py` packs them; `ints_on_device` the same there.
      given: vectors in the place of tokens' own; None in a part of a decode step.
      staged: which pages of the host's cache the part's sequences have, and its integers with the numbers that these
        pages have in the device's staging room; None where nothing is staged.
    """

    shape: BatchShape
    ints: np.ndarray
    ints_on_device: Array
    given: Array | None = None
    staged: tuple[np.ndarray, Array] | None = None


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled pieces, by part shape (and kind of layer). Device pieces take the device's weights, host ones the
    host's; None where no task is computed there.
    """

    before: dict[BatchShape, Callable]
    attention: dict[BatchShape, Callable]
    after: dict[tuple[BatchShape, bool], Callable]


class StepWork:
    """Does tasks for one step after another. Several threads may be in it, each with tasks of one lane.

    Args:
      programs: compiled.
      weights: for A, and for C where the device computes it.
      host_weights: for C where the host does.
      layers: numbers of each, on the device and on the host.
      sparse: kind of each layer.
      store: of pages.
      mover: of activations.
      ledger: bytes.
      attention_on_device, ffn_on_device: where B and C are computed.
      wait: until arrays are there, before a task is over: an emulated machine's tasks take real time only so.

    Attributes:
      cache: keys and values, where attention is computed. Unused with `staging`.
      staging: keys and values that live on the host and pass through the device; None for no such.
      finish: given the task and the hidden state after C of the last layer, makes that of the next step, and its
        rotations; None: a step ends there.
    """

    def __init__(
        self,
        programs: Programs,
        *,
        weights: Any,
        host_weights: Any,
        layers: tuple[tuple[LayerNumbers, ...], tuple[LayerNumbers, ...]],
        sparse: tuple[bool, ...],
        store: PageStore,
        mover: Mover,
        ledger: ByteLedger,
        attention_on_device: bool,
        ffn_on_device: bool,
        wait: bool,
    ):
        self.programs, self._weights, self._host_weights = programs, weights, host_weights
        self._layers, self._host_layers = layers
        self._sparse, self._store, self._mover, self._ledger = sparse, store, mover, ledger
        self._attention_on_device, self._ffn_on_device, self._wait = attention_on_device, ffn_on_device, wait
        self.held = Held(ledger, "activations")
        self.parts: dict[tuple[int, int], MicroBatch] = {}
        self.cache: Array | None = None
        self.staging: Staging | None = None
        self.finish: Callable[[TaskId, Any], Any] | None = None

    def begin(self, parts: dict[tuple[int, int], MicroBatch], embedded: list[tuple[Any, Any, Any]]) -> None:
        """Steps of parts by step and number, of whose first one the hidden states and rotations are given."""
        self.parts = parts
        for j, (x, cos, sin) in enumerate(embedded):
            self.held.put(DEVICE, ("turn", j), (cos, sin))
            self.held.put(DEVICE, ("hidden", j), x)

    def end(self) -> list[Any]:
        """The hidden states of all parts."""
        hidden = [self.held.take(DEVICE, ("hidden", j)) for j in range(1 + max(j for _, j in self.parts))]
        self.held.clear()
        return hidden

    def fail(self) -> None:
        """Gives up whatever a step that failed has left."""
        self.held.clear()
        self._store.reset()

    def do(self, task: Task) -> None:
        """One task."""
        assert isinstance(task.id, TaskId)
        getattr(self, f"_{task.id.kind}")(task)

    def _A(self, task: Task) -> None:  # named as the schedule names them
        step, layer, j = _place(task)
        part = self.parts[step, j]
        x, (cos, sin) = self.held.get(DEVICE, ("hidden", j)), self.held.get(DEVICE, ("turn", j))
        program = self.programs.before[part.shape]
        qkv = program(self._weights, self._layers[layer], part.ints_on_device, x, cos, sin)
        self.held.put(DEVICE, ("qkv", j), self._there(qkv))
        if self.staging is not None:
            self.held.put(DEVICE, ("new", layer, j), qkv[1:])

    def _D1(self, task: Task) -> None:
        _, _, j = _place(task)
        if self._ffn_on_device:
            self._send(("qkv", j), task.seconds)
            return
        # The host goes on with the hidden state, and with what attention found or is to look for.
        self._send(("found", j) if self._attention_on_device else ("qkv", j), task.seconds)
        self._send(("hidden", j), task.seconds)

    def _send(self, key: Hashable, seconds: float) -> None:
        arrays = self.held.get(DEVICE, key)
        self.held.put(HOST, key, self._mover.to_host(arrays, seconds))
        self.held.drop(DEVICE, key)

    def _B(self, task: Task) -> None:
        step, layer, j = _place(task)
        part = self.parts[step, j]
        program = self.programs.attention[part.shape]
        if not self._attention_on_device:
            q, k, v = (np.asarray(x) for x in self.held.take(HOST, ("qkv", j)))
            out, self.cache = program(self.cache, self._host_layers[layer], part.ints, q, k, v)
            self.held.put(HOST, ("found", j), jax.block_until_ready(out))
        elif self.staging is None:
            q, k, v = self.held.take(DEVICE, ("qkv", j))
            out, self.cache = program(self.cache, self._layers[layer], part.ints_on_device, q, k, v)
            self.held.put(DEVICE, ("found", j), self._there(out))
        else:
            q, k, v = self.held.take(DEVICE, ("qkv", j))
            assert part.staged is not None
            cache = self.held.take(DEVICE, ("kv", layer, j))
            out, _ = program(cache, self._layers[layer], part.staged[1], q, k, v)
            self.held.put(DEVICE, ("found", j), self._there(out))

    def _D2(self, task: Task) -> None:
        _, _, j = _place(task)
        key = ("found" if self._ffn_on_device else "hidden", j)
        arrays = jax.tree.map(np.asarray, self.held.take(HOST, key))
        self.held.put(DEVICE, key, self._mover.to_device(arrays, task.seconds))

    def _C(self, task: Task) -> None:
        step, layer, j = _place(task)
        part, sparse = self.parts[step, j], self._sparse[layer]
        program = self.programs.after[part.shape, sparse]
        if self._ffn_on_device:
            out, x = self.held.take(DEVICE, ("found", j)), self.held.take(DEVICE, ("hidden", j))
            pages = self._store.on_device(layer)
            x = program(self._weights, self._layers[layer], part.ints_on_device, x, out, pages)
            del pages
            self.held.put(DEVICE, ("hidden", j), self._there(x))
        else:
            out, x = (np.asarray(self.held.take(HOST, (name, j))) for name in ("found", "hidden"))
            pages = self._store.on_host(layer)
            x = program(self._host_weights, self._host_layers[layer], part.ints, x, out, pages)
            self.held.put(HOST, ("hidden", j), jax.block_until_ready(x))
        freed = set(task.frees)
        for slot, content in task.reads:
            if slot in freed and isinstance(content, tuple) and content[0] == "weights":
                self._store.drop(content[1], content[2])
        if self.finish is not None and layer == len(self._sparse) - 1:
            assert isinstance(task.id, TaskId)
            x, turn = self.finish(task.id, self.held.take(DEVICE, ("hidden", j)))
            self.held.put(DEVICE, ("hidden", j), self._there(x))
            self.held.put(DEVICE, ("turn", j), turn)

    def _W(self, task: Task) -> None:
        _, layer, transfer = _place(task)
        self._store.bring(layer, transfer, task.seconds)

    def _L(self, task: Task) -> None:
        step, layer, j = _place(task)
        if self.staging is not None:
            staged = self.parts[step, j].staged
            assert staged is not None
            self.held.put(DEVICE, ("kv", layer, j), self.staging.load(layer, staged[0], self._mover, task.seconds))

    def _S(self, task: Task) -> None:
        step, layer, j = _place(task)
        if self.staging is not None:
            new = self.held.take(DEVICE, ("new", layer, j))
            self.staging.store(layer, self.parts[step, j], self._mover.to_host(new, task.seconds))

    def _there(self, arrays: Any) -> Any:
        return jax.block_until_ready(arrays) if self._wait else arrays


class Staging:
    """Keys and values that live on the host and pass through the device, a micro-batch of one layer at a time.

    Args:
      numbers: the host's cache, `[layers, pages + 1, page_size, 2 * kv_heads, head_dim]`.
      room: pages of the device's staging room; one more is for rows that mean nothing.
    """

    def __init__(self, numbers: np.ndarray, room: int):
        self.numbers, self.room = numbers, room

    def localise(self, shape: BatchShape, ints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which pages the part's sequences have, and its integers with those pages' places in the staging room."""
        page_size = self.numbers.shape[2]
        local = ints.copy()
        f = cut(local, shape.int_fields)
        used = -(-f["kv_lens"] // page_size)
        live = np.arange(f["block_tables"].shape[1]) < used[:, None]
        pages = np.unique(f["block_tables"][live])
        f["block_tables"][...] = np.where(live, np.searchsorted(pages, f["block_tables"]), 0)
        page, offset = np.divmod(f["write_slots"], page_size)
        place = np.minimum(np.searchsorted(pages, page), max(0, len(pages) - 1))
        known = pages[place] == page if len(pages) else np.zeros(page.shape, bool)
        f["write_slots"][...] = np.where(known, place * page_size + offset, self.room * page_size)
        return pages, local

    def load(self, layer: int, pages: np.ndarray, mover: Mover, seconds: float) -> Any:
        cache = aligned_empty((1, self.room + 1, *self.numbers.shape[2:]), self.numbers.dtype)
        cache[0, : len(pages)] = self.numbers[layer, pages]
        cache[0, len(pages) :] = 0
        return mover.to_device(cache, seconds)

    def store(self, layer: int, part: MicroBatch, new: Any) -> None:
        k, v = (np.asarray(x) for x in new)
        page, offset = np.divmod(cut(part.ints, part.shape.int_fields)["write_slots"], self.numbers.shape[2])
        self.numbers[layer, page, offset, 0::2] = k
        self.numbers[layer, page, offset, 1::2] = v


def _place(task: Task) -> tuple[int, int, int]:
    """Step, layer, and micro-batch or transfer."""
    assert isinstance(task.id, TaskId)
    return task.id.step, task.id.layer, task.id.index


def _bytes(arrays: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(arrays))
