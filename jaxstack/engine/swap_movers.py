"""What moves chunks of pages between the host's memory and the device's, for `swapping_runner.py`: JAX's memory kinds,
or an emulated link.

A chunk is some pages of all layers; what moves is its slice of one group of layers, always as one whole array (XLA
would make host computation of a slice of a host array, and has no scatter there). On the device it lies in one of d
places, each for the segment of one group.
"""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxstack.engine.errors import TransferFailed
from jaxstack.runtime.emulation import ByteLedger, EmulatedDevice, EmulatedLink, aligned_empty
from jaxstack.runtime.memory_spaces import Space, Spaces, alias

ChunkSlice = Float[Array, "group chunk_pages page_size kv_heads_2 head_dim"]

# Without progress for so long, a copy is stuck.
_STUCK_S = 10.0


@dataclasses.dataclass
class Traffic:
    """Totals. `stall_s`: waiting for copies to the device; `link_s`: the link was busy with them, where known."""

    to_device_bytes: int = 0
    to_host_bytes: int = 0
    stall_s: float = 0.0
    link_s: float = 0.0


class Mover(Protocol):
    """Used by one thread.

    Attributes:
      traffic: so far.
    """

    traffic: Traffic

    def store(self, group: int, chunk: int, pages: ChunkSlice) -> None:
        """Starts to copy a slice to the host, where it is kept until `drop`."""

    def fetch(self, group: int, place: int, chunks: Sequence[int]) -> None:
        """Starts to copy slices to a place on the device, in addition to what is on its way there."""

    def at(self, place: int) -> Collection[int]:
        """The chunks at a place, or on their way there."""
        ...

    def take(self, place: int, chunks: Sequence[int], *, wait: bool) -> list[ChunkSlice]:
        """The slices at a place, in the order asked for. `wait`: until they have arrived; counted as a stall.

        Raises:
          TransferFailed: a copy failed, or makes no progress.
        """
        ...

    def free(self, place: int) -> list[int]:
        """A place holds nothing any more; returns the chunks that it held. Whoever read them has been told to."""
        ...

    def drop(self, chunk: int) -> None:
        """The host forgets a chunk of which no copy is under way."""

    def reset(self) -> None:
        """Both sides forget everything."""

    def close(self) -> None:
        """Ends threads, if there are any."""


class KindMover:
    """By `jax.device_put` between memory kinds: asynchronous, and ordered by the arrays themselves.

    Args:
      slice_bytes: of a chunk's slice.
      staging: places.
      leaving: slices that may be on their way to the host at once.
      ledger: counts what is on the device; raises above its budget.
    """

    def __init__(self, spaces: Spaces, *, slice_bytes: int, staging: int, leaving: int, ledger: ByteLedger):
        self.traffic = Traffic()
        self._leaving: collections.deque[Any] = collections.deque()
        self._most_leaving = leaving
        self._spaces, self._bytes, self._ledger = spaces, slice_bytes, ledger
        self._host: dict[tuple[int, int], Array] = {}
        self._groups: dict[int, set[int]] = {}
        self._places: list[dict[int, Array]] = [{} for _ in range(staging)]

    def store(self, group: int, chunk: int, pages: ChunkSlice) -> None:
        while self._leaving and (len(self._leaving) >= self._most_leaving or self._leaving[0].is_ready()):
            _copied(jax.block_until_ready, self._leaving.popleft())
            self._ledger.give("device", self._bytes, "leaving")
        self._ledger.take("device", self._bytes, "leaving")
        self._host[chunk, group] = _copied(self._spaces.put, pages, Space.HOST)
        self._leaving.append(self._host[chunk, group])
        self._groups.setdefault(chunk, set()).add(group)
        self.traffic.to_host_bytes += self._bytes

    def fetch(self, group: int, place: int, chunks: Sequence[int]) -> None:
        if not chunks:
            return
        self._ledger.take("device", self._bytes * len(chunks), "staging")
        arrays = _copied(self._spaces.put, [self._host[chunk, group] for chunk in chunks], Space.DEVICE)
        self._places[place].update(zip(chunks, arrays))
        self.traffic.to_device_bytes += self._bytes * len(chunks)

    def at(self, place: int) -> Collection[int]:
        return self._places[place]

    def take(self, place: int, chunks: Sequence[int], *, wait: bool) -> list[ChunkSlice]:
        arrays = [self._places[place][chunk] for chunk in chunks]
        if wait and arrays:
            begin = time.perf_counter()
            _copied(jax.block_until_ready, arrays)
            self.traffic.stall_s += time.perf_counter() - begin
        return arrays

    def free(self, place: int) -> list[int]:
        held, self._places[place] = self._places[place], {}
        self._ledger.give("device", self._bytes * len(held), "staging") if held else None
        return list(held)

    def drop(self, chunk: int) -> None:
        for group in self._groups.pop(chunk, ()):
            del self._host[chunk, group]

    def reset(self) -> None:
        for place in range(len(self._places)):
            self.free(place)
        self._ledger.give("device", self._bytes * len(self._leaving), "leaving") if self._leaving else None
        self._leaving.clear()
        self._host.clear()
        self._groups.clear()

    def close(self) -> None:
        pass


def _copied(put: Callable, *arguments: Any) -> Any:
    try:
        return put(*arguments)
    except Exception as error:
        raise TransferFailed(f"copying pages failed: {error}") from error


@dataclasses.dataclass(frozen=True)
class EmulatedMachine:
    """The times of a machine that is not there.

    Args:
      layer_s: cached tokens and new tokens of a step -> seconds of a layer.
      to_device_bytes_per_s, to_host_bytes_per_s: of the link; None: as fast as this machine copies.
    """

    layer_s: Callable[[int, int], float]
    to_device_bytes_per_s: float | None
    to_host_bytes_per_s: float | None


class EmulatedMover:
    """Copies the real pages between persistent buffers, no faster than a link would.

    Args:
      shape, dtype: of a chunk's slice.
      groups: of layers, which a chunk has a slice of each for.
      chunks: most of them at a place.
      leaving: slices that may be on their way to the host at once.
    """

    def __init__(
        self,
        machine: EmulatedMachine,
        *,
        shape: tuple[int, ...],
        dtype: Any,
        groups: int,
        staging: int,
        chunks: int,
        leaving: int,
        ledger: ByteLedger,
    ):
        self.traffic = Traffic()
        self._leaving: collections.deque[concurrent.futures.Future] = collections.deque()
        self._most_leaving = leaving
        self.device = EmulatedDevice("device")
        self._to_device = EmulatedLink("to device", machine.to_device_bytes_per_s)
        self._to_host = EmulatedLink("to host", machine.to_host_bytes_per_s)
        self._shape, self._dtype, self._groups, self._ledger = shape, dtype, groups, ledger
        self._places = [_Place([aligned_empty(shape, dtype) for _ in range(chunks)]) for _ in range(staging)]
        self._bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._host: dict[int, np.ndarray] = {}
        self._unused: list[np.ndarray] = []
        self._storing: dict[tuple[int, int], concurrent.futures.Future] = {}

    def store(self, group: int, chunk: int, pages: ChunkSlice) -> None:
        if chunk not in self._host:
            fresh = self._unused.pop() if self._unused else aligned_empty((self._groups, *self._shape), self._dtype)
            self._host[chunk] = fresh
        while self._leaving and (len(self._leaving) >= self._most_leaving or self._leaving[0].done()):
            self._wait(self._leaving.popleft(), "chunks to the host")
            self._ledger.give("device", self._bytes, "leaving")
        self._ledger.take("device", self._bytes, "leaving")
        self._storing[chunk, group] = self._to_host.copy(self._host[chunk][group], np.asarray(pages))
        self._leaving.append(self._storing[chunk, group])
        self.traffic.to_host_bytes += self._bytes

    def fetch(self, group: int, place: int, chunks: Sequence[int]) -> None:
        where = self._places[place]
        for chunk in chunks:
            if (storing := self._storing.pop((chunk, group), None)) is not None:
                self._wait(storing, f"chunk {chunk} of group {group} to the host")
            self._ledger.take("device", self._bytes, "staging")
            buffer = where.buffers[len(where.held)]
            where.held[chunk] = (self._to_device.copy(buffer, self._host[chunk][group]), where.arrays[len(where.held)])
            self.traffic.to_device_bytes += self._bytes

    def at(self, place: int) -> Collection[int]:
        return self._places[place].held

    def take(self, place: int, chunks: Sequence[int], *, wait: bool) -> list[ChunkSlice]:
        begin, arrays = time.perf_counter(), []
        for chunk in chunks:
            arriving, array = self._places[place].held[chunk]
            self._wait(arriving, f"chunk {chunk} to the device")
            arrays.append(array)
        self.traffic.stall_s += time.perf_counter() - begin
        self.traffic.link_s = self._to_device.usage.busy_s
        return arrays

    def free(self, place: int) -> list[int]:
        where = self._places[place]
        held, where.held = where.held, {}
        for chunk, (arriving, _) in held.items():
            self._wait(arriving, f"chunk {chunk} to the device")
            self._ledger.give("device", self._bytes, "staging")
        return list(held)

    def drop(self, chunk: int) -> None:
        buffer = self._host.pop(chunk, None)
        if buffer is None:
            return
        for group in range(self._groups):
            if (storing := self._storing.pop((chunk, group), None)) is not None:
                self._wait(storing, f"chunk {chunk} of group {group} to the host")
        self._unused.append(buffer)

    def reset(self) -> None:
        for place in range(len(self._places)):
            self.free(place)
        while self._leaving:
            concurrent.futures.wait([self._leaving.popleft()], timeout=_STUCK_S)
            self._ledger.give("device", self._bytes, "leaving")
        for chunk in list(self._host):
            self.drop(chunk)

    def close(self) -> None:
        for lane in (self.device, self._to_device, self._to_host):
            lane.close()

    def change_link(self, bytes_per_s: float | None) -> None:
        """Another rate for copies from now on."""
        self._to_device.bytes_per_s = self._to_host.bytes_per_s = bytes_per_s

    def _wait(self, copy: concurrent.futures.Future, what: str) -> None:
        try:
            copy.result(timeout=_STUCK_S)
        except concurrent.futures.TimeoutError:
            lanes = "; ".join(
                f"{link.name}: {link.usage.tasks} copies done, {link.usage.moved_bytes} bytes"
                for link in (self._to_device, self._to_host)
            )
            raise TransferFailed(f"{what}: no progress for {_STUCK_S:g} s ({lanes})") from None
        except Exception as error:
            raise TransferFailed(f"{what}: {error}") from error


class _Place:
    """Buffers of one place, JAX's view of each, and what is in the first of them."""

    def __init__(self, buffers: list[np.ndarray]):
        for buffer in buffers:
            buffer.fill(0)
        self.buffers = buffers
        self.arrays = [alias(buffer) for buffer in buffers]
        self.held: dict[int, tuple[concurrent.futures.Future, Array]] = {}
