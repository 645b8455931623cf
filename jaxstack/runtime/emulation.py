"""A small device and its link, emulated on a CPU: real work and real copies that take the time a profile says.

What more memory than a device has costs is decided by a race between computation and copies. On a machine without the
device the race can still be run: a lane does a task's real work and then sleeps until its roofline time is over; a link
copies real bytes between persistent buffers, no faster than its bandwidth; a ledger counts the bytes of each space and
refuses what the device could not have held. Nothing here imports jax.
"""

import collections
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from jaxstack.runtime.errors import UserError

_Result = TypeVar("_Result")

ALIGNMENT = 64
"""Bytes to whose multiple a buffer must be aligned for XLA on a CPU to use it in place."""

CHUNK_BYTES = 256 * 1024
"""A link copies so much between two looks at the clock."""

# Sleeping shorter is less exact than not sleeping.
_SHORTEST_SLEEP_S = 5e-5

# By so much a thread may oversleep and have it back: what follows at once counts from when the task before was due.
_OVERSLEPT_S = 5e-4


def aligned_empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An uninitialised array that starts on a multiple of `ALIGNMENT` bytes, as numpy's own do not."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class BudgetExceeded(RuntimeError):
    """A space was asked for more bytes than it has."""


class ByteLedger:
    """Live and peak bytes of each memory space. Callable from any thread.

    Args:
      budgets: bytes that a space has, None for no limit. Only these spaces exist.

    Raises:
      UserError: a budget below zero.
    """

    def __init__(self, budgets: Mapping[str, int | None]):
        for space, budget in budgets.items():
            if budget is not None and budget < 0:
                raise UserError(f"budget of {space}: found {budget} bytes, expected none below 0")
        self._budgets = dict(budgets)
        self._lock = threading.Lock()
        self._live: dict[str, collections.Counter[str]] = {space: collections.Counter() for space in budgets}
        self._peak = dict.fromkeys(budgets, 0)

    def budget(self, space: str) -> int | None:
        return self._budgets[space]

    def take(self, space: str, size_bytes: int, what: str) -> None:
        """Counts `size_bytes` more as live in `space`, under the name `what`.

        Raises:
          BudgetExceeded: there is no room; nothing has changed. The message names what holds most.
        """
        with self._lock:
            held, budget = self._live[space], self._budgets[space]
            total = held.total() + size_bytes
            if budget is not None and total > budget:
                most = ", ".join(f"{name} {n}" for name, n in held.most_common(3) if n) or "nothing"
                raise BudgetExceeded(
                    f"{space}: {what} needs {size_bytes} bytes, found {budget - held.total()} of {budget} free; "
                    f"held by {most}"
                )
            if size_bytes:
                held[what] += size_bytes
            self._peak[space] = max(self._peak[space], total)

    def give(self, space: str, size_bytes: int, what: str) -> None:
        """Counts them as live no longer. Raises ValueError for more than `what` holds."""
        with self._lock:
            held = self._live[space]
            if held[what] < size_bytes:
                raise ValueError(f"{space}: {what} gives back {size_bytes} bytes and holds {held[what]}")
            held[what] -= size_bytes
            if not held[what]:
                del held[what]

    @contextlib.contextmanager
    def holding(self, space: str, size_bytes: int, what: str) -> Iterator[None]:
        """`take` for the length of a block."""
        self.take(space, size_bytes, what)
        try:
            yield
        finally:
            self.give(space, size_bytes, what)

    def live(self, space: str) -> int:
        with self._lock:
            return self._live[space].total()

    def peak(self, space: str) -> int:
        """The most that has been live at once, since the start or `reset_peak`."""
        with self._lock:
            return self._peak[space]

    def reset_peak(self) -> None:
        with self._lock:
            self._peak = {space: held.total() for space, held in self._live.items()}

    def held(self, space: str) -> dict[str, int]:
        """Bytes by name."""
        with self._lock:
            return dict(self._live[space])


@dataclasses.dataclass
class Usage:
    """What a lane has done.

    Attributes:
      tasks: finished.
      work_s: their own real time.
      busy_s: from start to end, the sleep to the emulated time included.
      late_s: by how much their real work exceeded the emulated time.
      moved_bytes: copied, by a link.
    """

    tasks: int = 0
    work_s: float = 0.0
    busy_s: float = 0.0
    late_s: float = 0.0
    moved_bytes: int = 0


class _Lane:
    """A thread that does what it is given, one thing after another."""

    def __init__(self, name: str):
        self.name = name
        self.usage = Usage()
        self._due_s = 0.0
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"emulated-{name}", daemon=True)
        self._closed = False
        self._thread.start()

    def _submit(self, work: Callable[[], Any]) -> Future:
        if self._closed:
            raise RuntimeError(f"{self.name} is closed")
        done: Future = Future()
        self._queue.put((work, done))
        return done

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done = item
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            del work, done, item  # or what they hold would live until the next

    def _start(self) -> float:
        """When a task that begins now is taken to have begun."""
        now = time.perf_counter()
        return self._due_s if 0 <= now - self._due_s <= _OVERSLEPT_S else now

    def _end(self, due_s: float) -> None:
        """Sleeps until a task is over that should be at `due_s`."""
        sleep_until(due_s)
        now = time.perf_counter()
        self._due_s = due_s if now - due_s <= _OVERSLEPT_S else now

    def close(self) -> None:
        """Ends the thread once it has done what it was given."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EmulatedDevice(_Lane):
    """Computes: runs a task's function, then sleeps until the task's emulated time is over.

    A function must wait for its results itself (`jax.block_until_ready`). Work that takes longer than its emulated time
    is counted in `usage.late_s`: then the emulation says little.
    """

    def submit(self, work: Callable[[], _Result], seconds: float = 0.0) -> "Future[_Result]":
        """Queues `work`; its future holds what it returns or raises, once `seconds` have passed since it began."""
        return self._submit(lambda: self.run(work, seconds))

    def run(self, work: Callable[[], _Result], seconds: float = 0.0) -> _Result:
        """The same on the caller's thread, which then is the lane."""
        begin, start = time.perf_counter(), self._start()
        try:
            result = work()
            worked = time.perf_counter() - begin
            self._end(start + seconds)
        finally:
            usage = self.usage
            usage.tasks += 1
            usage.busy_s += time.perf_counter() - begin
        usage.work_s += worked
        usage.late_s += max(0.0, worked - seconds)
        return result


class EmulatedLink(_Lane):
    """One direction of a link: copies bytes between buffers, first come first served, at a bandwidth.

    Args:
      name: for messages and the thread.
      bytes_per_s: its bandwidth; None for as fast as the machine copies.

    Raises:
      UserError: a bandwidth that is not positive.
    """

    def __init__(self, name: str, bytes_per_s: float | None):
        if bytes_per_s is not None and not bytes_per_s > 0:
            raise UserError(f"{name}: found {bytes_per_s} bytes/s, expected a positive number")
        super().__init__(name)
        self.bytes_per_s = bytes_per_s

    def copy(self, target: np.ndarray, source: np.ndarray, *, seconds: float | None = None) -> "Future[None]":
        """Queues a copy of `source` to `target`; the future is done when the last byte has arrived.

        Args:
          target, source: contiguous and equally large; neither may change or be read, respectively, meanwhile.
          seconds: how long it takes, for bytes that stand for more than they are; None goes by the bandwidth.

        Raises:
          ValueError: sizes that differ or arrays that are not contiguous.
        """
        pieces = _bytes_of(target, source)
        return self._submit(lambda: self._copy(*pieces, seconds))

    def copy_now(self, target: np.ndarray, source: np.ndarray, *, seconds: float | None = None) -> None:
        """The same on the caller's thread, which then is the link."""
        self._copy(*_bytes_of(target, source), seconds)

    def _copy(self, target: np.ndarray, source: np.ndarray, seconds: float | None) -> None:
        size = target.nbytes
        if seconds is None:
            seconds = 0.0 if self.bytes_per_s is None else size / self.bytes_per_s
        begin, since = time.perf_counter(), self._start()
        late = 0.0
        # A bucket of tokens that starts empty: after n bytes no less than n / size of the time has passed.
        for start in range(0, size, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, size)
            target[start:end] = source[start:end]
            due = since + seconds * end / size
            late = max(0.0, time.perf_counter() - due)
            self._end(due)
        usage = self.usage
        usage.tasks += 1
        usage.moved_bytes += size
        usage.late_s += late
        usage.busy_s += time.perf_counter() - begin


class EmulatedMachine:
    """A device, its host, and the two directions of the link between them.

    Args:
      to_device_bytes_per_s, to_host_bytes_per_s: bandwidths; None for as fast as this machine copies.
    """

    def __init__(self, to_device_bytes_per_s: float | None = None, to_host_bytes_per_s: float | None = None):
        self.device, self.host = EmulatedDevice("device"), EmulatedDevice("host")
        self.to_device = EmulatedLink("link to the device", to_device_bytes_per_s)
        self.to_host = EmulatedLink("link to the host", to_host_bytes_per_s)

    def close(self) -> None:
        for lane in (self.device, self.host, self.to_device, self.to_host):
            lane.close()

    def __enter__(self) -> "EmulatedMachine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bytes_of(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if target.nbytes != source.nbytes:
        raise ValueError(f"copy: found {source.nbytes} bytes for a buffer of {target.nbytes}")
    if not (target.flags.c_contiguous and source.flags.c_contiguous):
        raise ValueError("copy: found an array that is not contiguous")
    return target.reshape(-1).view(np.uint8), source.reshape(-1).view(np.uint8)


def sleep_until(when_s: float) -> None:
    """Sleeps until `time.perf_counter` shows `when_s`."""
    while (left := when_s - time.perf_counter()) > 0:
        time.sleep(left) if left > _SHORTEST_SLEEP_S else time.sleep(0)
