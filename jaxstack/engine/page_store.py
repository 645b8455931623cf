"""The feed-forward weights of a served model in pages: all of them on the host, and on the device those that stay or
are passing through.

Two kinds of store, with one face. `SpacePages` uses JAX's memory spaces: pages are page-locked arrays, and a transfer
is a `device_put` that the device does by itself. `EmulatedPages` is for an emulated machine: pages are numpy buffers,
and a transfer is a copy over an emulated link into one of the buffers that stand for the device's memory.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxstack.engine.memory.weight_pages import PageTable
from jaxstack.models.decoder import Decoder
from jaxstack.models.paged_experts import ExpertPage, PageLayout
from jaxstack.runtime.emulation import ALIGNMENT, ByteLedger, EmulatedMachine, aligned_empty
from jaxstack.runtime.memory_spaces import Space, Spaces, alias, host_processor

DEVICE, HOST = "device", "host"
"""The ledger's spaces."""

_RESIDENT, _STREAMED, _ON_HOST = "pages that stay", "pages passing through", "pages"


def take_matrices(decoder: Decoder, dtype: jnp.dtype) -> list[dict[str, np.ndarray]]:
    """Takes the feed-forward matrices out of a decoder as loaded: for each layer gate, up `[experts, D, inner]` and
    down `[experts, inner, D]`, views of the stacks where the dtype is theirs. What is left has its routers, no MLPs.
    """
    layers, config = decoder.layers, decoder.config
    stacks: dict[bool, dict[str, np.ndarray]] = {}
    for sparse, module in ((False, layers.mlp), (True, layers.moe)):
        if module is None:
            continue
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        stacks[sparse] = {
            short: np.asarray(getattr(module, name).kernel.get_value()).astype(dtype, copy=False)
            for short, name in names.items()
        }
    strip(decoder)
    seen = {False: 0, True: 0}
    out = []
    for layer in range(config.num_layers):
        sparse = layer in config.sparse_layers
        own = {name: stack[seen[sparse]] for name, stack in stacks[sparse].items()}
        out.append(own if sparse else {name: matrix[None] for name, matrix in own.items()})
        seen[sparse] += 1
    return out


def strip(decoder: Decoder) -> None:
    """Leaves a decoder without feed-forward matrices; routers stay."""
    layers = decoder.layers
    layers.mlp = nnx.data(None)
    if layers.moe is not None:
        layers.moe.gate_proj = layers.moe.up_proj = nnx.data(None)
        layers.moe.down_proj = nnx.data(None)


def fill_page(layout: PageLayout, matrices: dict[str, np.ndarray], page: int, into: ExpertPage) -> None:
    """Writes a page's numbers into two host arrays."""
    (gate, up), down = layout.cut(matrices["gate"], matrices["up"], matrices["down"], page)
    inner = gate.shape[-1]
    gate_up: Any = into.gate_up
    gate_up[..., :inner], gate_up[..., inner:] = gate, up
    target: Any = into.down
    target[...] = down


class PageStore(Protocol):
    """What tasks ask of a store. `layer` and `transfer` as the schedule has them."""

    table: PageTable

    def bring(self, layer: int, transfer: int, seconds: float) -> None:
        """Starts, or does, the transfer of those pages to the device."""

    def drop(self, layer: int, transfer: int) -> None:
        """Gives their place on the device up."""

    def on_device(self, layer: int) -> tuple[ExpertPage, ...]:
        """All pages of a layer. Raises RuntimeError if one is not there."""

    def on_host(self, layer: int) -> tuple[ExpertPage, ...]:
        """All pages of a layer where the host computes with them."""

    def reset(self) -> None:
        """Drops whatever has been brought."""


class SpacePages:
    """Pages in JAX's memory spaces.

    Args:
      spaces: of the device.
      layouts: of each layer.
      matrices: of each layer, as `take_matrices` has them; the entries are taken away as they are copied.
      table: whose resident pages are put on the device now.
      dtype: of the pages.
      ledger: has the spaces "device" and "host".
      host_computes: pages are read by the host's processor, and never brought: they stay ordinary arrays of its.
    """

    def __init__(
        self,
        spaces: Spaces,
        layouts: Sequence[PageLayout],
        matrices: list[dict[str, np.ndarray]],
        table: PageTable,
        *,
        dtype: jnp.dtype,
        ledger: ByteLedger,
        host_computes: bool = False,
    ):
        self.table, self._spaces, self._layouts, self._ledger = table, spaces, tuple(layouts), ledger
        self._host: list[list[ExpertPage]] = []
        self._device: dict[tuple[int, int], ExpertPage] = {}
        cpu = host_processor() if host_computes else None
        for layer, layout in enumerate(layouts):
            pages = []
            for number in range(layout.pages):
                page = ExpertPage(*(aligned_empty(shape, dtype) for shape in layout.shapes))  # type: ignore[arg-type]
                fill_page(layout, matrices[layer], number, page)
                if number in table.resident(layer):
                    ledger.take(DEVICE, _bytes(page), _RESIDENT)
                    # A copy: on a CPU the device may otherwise keep reading numpy's memory.
                    self._device[layer, number] = ExpertPage(*(spaces.put(jnp.array(x), Space.DEVICE) for x in page))
                    pages.append(page)
                    continue
                ledger.take(HOST, _bytes(page), _ON_HOST)
                if cpu is not None:
                    pages.append(ExpertPage(*(jax.device_put(x, cpu) for x in page)))
                else:
                    pages.append(ExpertPage(*(spaces.put(x, Space.HOST) for x in page)))
                jax.block_until_ready(pages[-1])
            self._host.append(pages)
            matrices[layer] = {}

    def shared(self, table: PageTable, ledger: ByteLedger) -> "SpacePages":
        """The same pages on the host for another runner, by its own table, in which none stays on the device."""
        other = copy.copy(self)
        other.table, other._ledger, other._device = table, ledger, {}
        ledger.take(HOST, sum(_bytes(page) for pages in self._host for page in pages), _ON_HOST)
        return other

    def bring(self, layer: int, transfer: int, seconds: float) -> None:
        pages = self.table.transfer(layer, transfer)
        self.table.begin(layer, pages)
        for page in pages:
            source = self._host[layer][page]
            self._ledger.take(DEVICE, _bytes(source), _STREAMED)
            self._device[layer, page] = ExpertPage(*(self._spaces.put(x, Space.DEVICE) for x in source))
        self.table.arrive(layer, pages)  # whoever reads it waits by itself

    def drop(self, layer: int, transfer: int) -> None:
        pages = self.table.transfer(layer, transfer)
        self.table.free(layer, pages)
        for page in pages:
            self._ledger.give(DEVICE, _bytes(self._device.pop((layer, page))), _STREAMED)

    def on_device(self, layer: int) -> tuple[ExpertPage, ...]:
        self.table.check_readable(layer)
        return tuple(self._device[layer, page] for page in range(self._layouts[layer].pages))

    def on_host(self, layer: int) -> tuple[ExpertPage, ...]:
        return tuple(self._host[layer])

    def reset(self) -> None:
        for layer, page in list(self._device):
            if page not in self.table.resident(layer):
                self._ledger.give(DEVICE, _bytes(self._device.pop((layer, page))), _STREAMED)
        self.table.reset()


class EmulatedPages:
    """Pages in numpy buffers, brought over a machine's emulated link. The device's memory for them is taken at once, as
    buffers for one transfer each, two layers of them; JAX reads them in place.

    Args:
      buffers: two layers of transfers; 0 where nothing is streamed.
      layouts, matrices, table, dtype, ledger: as `SpacePages` has them.
    """

    def __init__(
        self,
        machine: EmulatedMachine,
        layouts: Sequence[PageLayout],
        matrices: list[dict[str, np.ndarray]],
        table: PageTable,
        *,
        buffers: int,
        dtype: jnp.dtype,
        ledger: ByteLedger,
    ):
        self.table, self._machine, self._layouts, self._ledger = table, machine, tuple(layouts), ledger
        dtype = np.dtype(dtype)
        self._host: list[list[np.ndarray]] = []
        self._views: list[list[ExpertPage]] = []
        self._resident: dict[tuple[int, int], ExpertPage] = {}
        for layer, layout in enumerate(layouts):
            raws, views = [], []
            for number in range(layout.pages):
                raw = aligned_empty((_page_bytes(layout, dtype),), np.uint8)
                page = _parts(raw, layout, dtype)
                fill_page(layout, matrices[layer], number, page)
                raws.append(raw)
                views.append(ExpertPage(*(alias(x) for x in page)))  # type: ignore[arg-type]
                if number in table.resident(layer):
                    ledger.take(DEVICE, raw.nbytes, _RESIDENT)
                    self._resident[layer, number] = views[-1]
                else:
                    ledger.take(HOST, raw.nbytes, _ON_HOST)
            self._host.append(raws)
            self._views.append(views)
        layers = range(len(layouts))
        most = max((len(table.transfer(i, n)) for i in layers for n in range(table.transfers)), default=0)
        largest = max(raw.nbytes for raws in self._host for raw in raws)
        self._buffers = [_Buffer(most, largest, set(layouts), dtype) for _ in range(buffers)]
        ledger.take(DEVICE, buffers * most * largest, _STREAMED)
        self._free = list(self._buffers)
        self._held: dict[tuple[int, int], _Buffer] = {}

    def bring(self, layer: int, transfer: int, seconds: float) -> None:
        pages = self.table.transfer(layer, transfer)
        self.table.begin(layer, pages)
        buffer = self._free.pop()
        self._held[layer, transfer] = buffer
        share = seconds / len(pages) if pages and seconds else None
        for place, page in enumerate(pages):
            source = self._host[layer][page]
            self._machine.to_device.copy_now(buffer.raw[place][: source.nbytes], source, seconds=share)
        self.table.arrive(layer, pages)

    def drop(self, layer: int, transfer: int) -> None:
        self.table.free(layer, self.table.transfer(layer, transfer))
        self._free.append(self._held.pop((layer, transfer)))

    def on_device(self, layer: int) -> tuple[ExpertPage, ...]:
        self.table.check_readable(layer)
        layout, found = self._layouts[layer], {}
        for number in range(self.table.transfers):
            for place, page in enumerate(self.table.transfer(layer, number)):
                found[page] = self._held[layer, number].pages[place][layout]
        return tuple(found[page] if page in found else self._resident[layer, page] for page in range(layout.pages))

    def on_host(self, layer: int) -> tuple[ExpertPage, ...]:
        return tuple(self._views[layer])

    def reset(self) -> None:
        self._held.clear()
        self._free = list(self._buffers)
        self.table.reset()


class _Buffer:
    """The device's room for one transfer: of every place the bytes, and a page of each layout in them."""

    def __init__(self, places: int, size_bytes: int, layouts: set[PageLayout], dtype: np.dtype):
        self.raw = [aligned_empty((size_bytes,), np.uint8) for _ in range(places)]
        self.pages = [
            {layout: ExpertPage(*(alias(x) for x in _parts(raw, layout, dtype))) for layout in layouts}  # type: ignore
            for raw in self.raw
        ]


def _parts(raw: np.ndarray, layout: PageLayout, dtype: np.dtype) -> ExpertPage:
    """A page's two arrays in one buffer, both aligned."""
    out, start = [], 0
    for shape in layout.shapes:
        size = math.prod(shape) * dtype.itemsize
        out.append(raw[start : start + size].view(dtype).reshape(shape))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return ExpertPage(*out)  # type: ignore[arg-type]


def _page_bytes(layout: PageLayout, dtype: np.dtype) -> int:
    return sum(-(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape in layout.shapes)


def _bytes(page: ExpertPage) -> int:
    return sum(x.nbytes for x in page)
