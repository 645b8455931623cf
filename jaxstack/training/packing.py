"""Examples into rows of one length: which examples share a row, in which order, and the arrays of a batch.

Everything is a function of (lengths, row length, seed, epoch, window), so the place in the data is two integers and a
job that resumes replays nothing.
"""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxstack.training.data import TokenizedDataset

HostBatch = dict[str, np.ndarray]
"""token_ids, segment_ids, positions: int32 [rows, T]; loss_mask: float32 [rows, T]."""


def permutation(count: int, *, seed: int, epoch: int, stream: int = 0) -> Int[np.ndarray, "count"]:
    """The order of `count` things in an epoch: Philox keyed by (seed, epoch, stream), so no epoch needs the one
    before.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, (epoch << 8) | stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def pack(lengths: Int[np.ndarray, "examples"], row_length: int) -> list[list[int]]:
    """First-fit-decreasing: rows of example indices whose lengths sum to at most `row_length`.

    Every example goes, longest first (ties in the given order), into the first row that has room for it. At most 11/9
    of the best possible number of rows, plus one (Johnson 1973).

    Raises:
      ValueError: an example is longer than a row, or empty.
    """
    if len(lengths) and (lengths.max() > row_length or lengths.min() < 1):
        raise ValueError(f"example lengths {lengths.min()}..{lengths.max()} do not fit rows of 1..{row_length} tokens")
    order = np.argsort(-lengths, kind="stable")
    room = np.full(len(lengths), row_length, np.int64)
    rows: list[list[int]] = []
    for index in order.tolist():
        length = lengths[index]
        # Rows not begun yet have full room, so there always is a first one.
        row = int(np.argmax(room[: len(rows) + 1] >= length))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        room[row] -= length
    return rows


def fill_rows(dataset: TokenizedDataset, rows: list[list[int]], row_count: int, row_length: int) -> HostBatch:
    """The arrays of a batch: documents one after the other in each row, padding (segment 0) behind them.

    Args:
      rows: example indices of each row; fewer than `row_count` are padded with empty rows.
    """
    batch: HostBatch = {
        "token_ids": np.zeros((row_count, row_length), np.int32),
        "segment_ids": np.zeros((row_count, row_length), np.int32),
        "positions": np.zeros((row_count, row_length), np.int32),
        "loss_mask": np.zeros((row_count, row_length), np.float32),
    }
    ramp = np.arange(row_length, dtype=np.int32)
    for r, row in enumerate(rows):
        at = 0
        for segment, index in enumerate(row, start=1):
            begin, end = dataset.offsets[index], dataset.offsets[index + 1]
            stop = at + end - begin
            batch["token_ids"][r, at:stop] = dataset.token_ids[begin:end]
            batch["loss_mask"][r, at:stop] = dataset.loss_mask[begin:end]
            batch["segment_ids"][r, at:stop] = segment
            batch["positions"][r, at:stop] = ramp[: stop - at]
            at = stop
    return batch


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the next batch comes from."""

    epoch: int = 0
    batch: int = 0

    def as_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class PackedBatches:
    """The batches of a data set, by place.

    Args:
      dataset: tokenised examples, none longer than `row_length`.
      row_count: rows in a batch, all microbatches of a step together.
      row_length: tokens in a row.
      seed: of the order.
      packing: False gives every example a row of its own.
      window: examples packed together; packing mixes no more than this many neighbours of the epoch's order.
      shuffle: False keeps the given order (and packs in it), for evaluation.
    """

    def __init__(
        self,
        dataset: TokenizedDataset,
        *,
        row_count: int,
        row_length: int,
        seed: int = 0,
        packing: bool = True,
        window: int = 4096,
        shuffle: bool = True,
    ):
        self.dataset, self.row_count, self.row_length = dataset, row_count, row_length
        self._seed, self._packing, self._window, self._shuffle = seed, packing, window, shuffle
        self._plans: dict[int, list[list[int]]] = {}
        self._lock = threading.Lock()

    def rows(self, epoch: int) -> list[list[int]]:
        """The example indices of every row of an epoch, in the order they are trained."""
        with self._lock:
            if epoch not in self._plans:
                # The current epoch and the one being prefetched.
                for old in sorted(self._plans)[:-1]:
                    del self._plans[old]
                self._plans[epoch] = self._plan(epoch)
            return self._plans[epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        count = len(self.dataset)
        order = permutation(count, seed=self._seed, epoch=epoch) if self._shuffle else np.arange(count)
        if not self._packing:
            return [[int(i)] for i in order]
        lengths = self.dataset.lengths
        rows: list[list[int]] = []
        for start in range(0, count, self._window):
            chosen = order[start : start + self._window]
            rows += [[int(chosen[i]) for i in row] for row in pack(lengths[chosen], self.row_length)]
        if not self._shuffle:
            return rows
        return [rows[i] for i in permutation(len(rows), seed=self._seed, epoch=epoch, stream=1)]

    def batches_in(self, epoch: int) -> int:
        """Steps in an epoch; the last batch may hold empty rows."""
        return math.ceil(len(self.rows(epoch)) / self.row_count)

    def fill_rate(self, epoch: int = 0) -> float:
        """The part of an epoch's token slots that holds tokens."""
        return int(self.dataset.lengths.sum()) / (len(self.rows(epoch)) * self.row_length)

    def most_targets(self, steps: int, accum_steps: int = 1) -> int:
        """Target tokens of the fullest microbatch of the first `steps` batches: what a loss must have room for."""
        data = self.dataset
        counts = np.add.reduceat(data.loss_mask.astype(np.int64), data.offsets[:-1])
        counts -= data.loss_mask[data.offsets[:-1]]  # nothing predicts a document's first token
        rows_at_once = self.row_count // accum_steps
        most, epoch = 0, 0
        while steps > 0:
            rows = self.rows(epoch)[: steps * self.row_count]
            sums = np.array([int(counts[row].sum()) for row in rows])
            sums = np.pad(sums, (0, -len(sums) % rows_at_once))
            most = max(most, int(sums.reshape(-1, rows_at_once).sum(1).max(initial=0)))
            steps -= self.batches_in(epoch)
            epoch += 1
        return most

    def batch(self, place: Place) -> HostBatch:
        """The batch at a place."""
        start = place.batch * self.row_count
        rows = self.rows(place.epoch)[start : start + self.row_count]
        return fill_rows(self.dataset, rows, self.row_count, self.row_length)

    def after(self, place: Place) -> Place:
        """The place behind `place`."""
        if place.batch + 1 < self.batches_in(place.epoch):
            return Place(place.epoch, place.batch + 1)
        return Place(place.epoch + 1, 0)

    def epoch_batches(self, epoch: int = 0) -> Iterator[HostBatch]:
        """All batches of one epoch."""
        for number in range(self.batches_in(epoch)):
            yield self.batch(Place(epoch, number))


class PackedLoader:
    """Prepares the next batches in a thread while the device works on the current one.

    `state()` is the place behind the last batch handed out, never behind those prepared ahead.

    Args:
      batches: where they come from.
      prefetch: batches prepared ahead.
      place: of the first batch.
      transform: applied to each batch in the thread, for instance the copy to the device.
    """

    def __init__(
        self,
        batches: PackedBatches,
        *,
        place: Place | None = None,
        prefetch: int = 2,
        transform: Callable[[HostBatch], Any] | None = None,
    ):
        self._batches = batches
        self._place = place or Place()
        self._transform = transform or (lambda batch: batch)
        self._queue: queue.Queue[tuple[Any, Place] | BaseException] = queue.Queue(maxsize=max(1, prefetch))
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.waited_s = 0.0
        """Seconds that `next` has waited for data."""

    def state(self) -> Place:
        return self._place

    def set_state(self, place: Place) -> None:
        """Continues from `place`. Only before the first batch is taken."""
        if self._thread is not None:
            raise RuntimeError("set_state after the first batch: make a new PackedLoader")
        self._place = place

    def next(self, stop: Callable[[], bool] = lambda: False) -> Any | None:
        """The next batch; None if `stop()` becomes true while waiting for it."""
        if self._thread is None:
            args = (self._place,)
            self._thread = threading.Thread(target=self._produce, args=args, name="packed-loader", daemon=True)
            self._thread.start()
        began = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=0.1)
                break
            except queue.Empty:
                if stop():
                    return None
        self.waited_s += time.perf_counter() - began
        if isinstance(item, BaseException):
            raise item
        batch, self._place = item
        return batch

    def _produce(self, place: Place) -> None:
        try:
            while not self._closing.is_set():
                following = self._batches.after(place)
                self._put((self._transform(self._batches.batch(place)), following))
                place = following
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: tuple[Any, Place] | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
