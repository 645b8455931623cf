"""What a swapping step does with pages: which leave the device, which return, and where it finds those that it reads.

Decided from where pages are (`jaxstack.engine.memory.swap.PageSpaces`), without touching an array; the runner copies.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from jaxstack.engine.batch import HostBatch, cut
from jaxstack.engine.memory.swap import PageSpaces
from jaxstack.engine.memory.swap.placement import to_demote
from jaxstack.engine.memory.swap.sizing import SpacePlan

Leaving = dict[int, Int32[np.ndarray, " chunk_pages"]]
"""New chunks -> the device slots that their pages are gathered from."""


@dataclasses.dataclass(frozen=True)
class Merging:
    """Two chunks, and the new ones with their living pages: where those are in the two laid end to end."""

    first: int
    second: int
    fresh: Mapping[int, Int32[np.ndarray, " chunk_pages"]]


@dataclasses.dataclass(frozen=True)
class Returning:
    """Pages of a chunk, where they are in it, and their new slots."""

    chunk: int
    index: Int32[np.ndarray, " chunk_pages"]
    slots: Int32[np.ndarray, " chunk_pages"]


@dataclasses.dataclass
class Move:
    """What a step does with pages beside reading them, the same in every layer.

    Attributes:
      ints: the batch's integers, with device slots and staged pages for its pages.
      segment: the chunks that its sequences read, in the order of the block table's numbers.
      following: those that the next step is expected to read.
      leaving: new chunks -> the device slots that they are gathered from.
      merging: chunks that are half empty become one.
      returning: pages get slots again.
    """

    ints: Int32[np.ndarray, " n"]
    segment: list[int]
    following: list[int]
    leaving: Leaving
    merging: Merging | None = None
    returning: Returning | None = None

    @property
    def nothing(self) -> bool:
        """Whether all that the step reads is on the device, and stays there."""
        return not (self.segment or self.leaving or self.merging or self.returning)


class Copier(Protocol):
    """Who carries out at once what cannot wait for the step, all else waiting."""

    def store_now(self, leaving: Leaving) -> None:
        """Copies pages to the host, whose slots then are free indeed."""

    def squeeze_now(self, pair: tuple[int, int], merging: Merging | None, returning: Returning | None) -> None:
        """Fetches two chunks, of which `merging` makes new ones, or `returning` puts pages back."""


class MovePlanner:
    """Plans one step after another.

    Args:
      spaces: where pages are; changed as planned.
      plan: sizes of the two spaces.
      page_size: tokens of a page.
      windows: of each layer, in tokens; None for full attention.
      copier: of what comes before a step.

    Attributes:
      allowed: pages on the host that steps may read.
    """

    def __init__(
        self,
        spaces: PageSpaces,
        plan: SpacePlan,
        *,
        page_size: int,
        windows: Sequence[int | None],
        copier: Copier,
    ):
        self.spaces, self.sizes, self.page_size, self._windows, self._copier = spaces, plan, page_size, windows, copier
        self._scrap = plan.device_slots
        self._most_chunks = plan.chunks + plan.new_chunks  # that the host's bytes hold
        self.allowed = plan.host_pages

    def plan(self, batch: HostBatch) -> Move:
        """Gives the pages that the step writes their slots, and says where those are that it reads.

        Raises:
          OutOfSlots: the device has not even slots for what the step writes.
        """
        spaces = self.spaces
        ints = batch.ints.copy()
        f = cut(ints, batch.shape.int_fields)
        written = np.unique(f["write_slots"] // self.page_size).tolist()
        writes = [page for page in written if page < spaces.size]
        for row in batch.plan.rows:
            spaces.note_full(row.sequence.pages[: row.start // self.page_size])
        read = self._pages_read(f)
        leaving = self._make_room(batch, writes, read)
        segment = spaces.chunks_of(read)
        arriving = [chunk for chunk in segment if chunk not in leaving]
        if len(arriving) > self.sizes.chunks or len(spaces.living_chunks()) > self._most_chunks:
            leaving, segment = {}, self._make_fit(leaving, read)
        spare = self._spare(read, len(batch.plan.rows)) if segment and not leaving else 0
        if spare > spaces.free_slots:
            leaving = self._exchange(segment, spare, read)
        table = self._table(segment)
        f["block_tables"][...] = table[f["block_tables"]]
        slots, offsets = np.divmod(f["write_slots"], self.page_size)
        f["write_slots"][...] = table[slots] * self.page_size + offsets
        for chunk in segment:
            spaces.hold(chunk)
        if leaving:
            return Move(ints, segment, segment[: self.sizes.chunks], leaving)
        merging = self._merging(spaces.mergeable(segment))
        returning = None if merging is not None else self._returning(segment, spare, read)
        return Move(ints, segment, spaces.chunks_of(read), leaving, merging, returning)

    def _pages_read(self, f: Mapping[str, np.ndarray]) -> Int32[np.ndarray, " read"]:
        """The pages that queries see. Those left of the window of every layer are not among them, nor ever will be."""
        windows, ends = self._windows, f["kv_lens"]
        first = np.zeros_like(ends)
        if None not in windows:
            widest = max(window for window in windows if window is not None)
            first = np.maximum(0, ends - np.diff(f["query_starts"]) - widest + 1) // self.page_size
        column = np.arange(f["block_tables"].shape[1])
        return np.unique(f["block_tables"][(column >= first[:, None]) & (column < -(-ends // self.page_size)[:, None])])

    def _make_room(self, batch: HostBatch, writes: list[int], read: Int32[np.ndarray, " read"]) -> Leaving:
        """Gives the pages to be written slots; what leaves the device for it, and from which slots."""
        spaces = self.spaces
        fresh = [page for page in writes if spaces.slot(page) is None]
        leaving: Leaving = {}
        if len(fresh) > spaces.free_slots:
            full = [row.sequence.pages[: row.start // self.page_size] for row in batch.plan.rows]
            leaving = self._leave(
                to_demote(spaces, len(fresh) - spaces.free_slots, self._cold(read), full, frozenset(writes))
            )
        spaces.bind(fresh)
        return leaving

    def _leave(self, chunks: list[list[int]]) -> Leaving:
        """Has pages leave the device as new chunks: which these are, and from which slots they are gathered."""
        leaving: Leaving = {}
        for pages in chunks:
            slots = np.full(self.sizes.chunk_pages, self._scrap, np.int32)
            slots[: len(pages)] = self.spaces.slots_of(pages)
            leaving[self.spaces.demote(pages)] = slots
        return leaving

    def _cold(self, read: Int32[np.ndarray, " read"]) -> list[int]:
        """Full pages on the device that no running request reads."""
        return np.setdiff1d(self.spaces.full_on_device(), read, assume_unique=True).tolist()

    def _spare(self, read: Int32[np.ndarray, " read"], rows: int) -> int:
        """Slots that pages of the host may have: free and cold ones, less what steps are about to write."""
        return self.spaces.free_slots + len(self._cold(read)) - (self.sizes.step_pages if self.allowed else rows)

    def _exchange(self, segment: list[int], spare: int, read: Int32[np.ndarray, " read"]) -> Leaving:
        """Has cold pages leave for those that are read of a chunk, which return in the next step."""
        spaces = self.spaces
        pages = len(self._fewest(segment, read)[1])
        short = pages - spaces.free_slots
        if pages > spare or not 0 < short <= spaces.chunk_pages:
            return {}
        if spaces.chunks >= self._most_chunks:
            others = [chunk for chunk in spaces.living_chunks() if chunk not in segment]
            if spaces.mergeable(others) is None:
                return {}
            self._squeeze(others)
        return self._leave([self._cold(read)[:short]])

    def _fewest(self, segment: list[int], read: Int32[np.ndarray, " read"]) -> tuple[int, list[int]]:
        """The chunk of which the fewest pages are read, and where in it these are."""
        places = {chunk: np.flatnonzero(np.isin(self.spaces.chunk(chunk), read)).tolist() for chunk in segment}
        fewest = min(segment, key=lambda chunk: len(places[chunk]))
        return fewest, places[fewest]

    def _make_fit(self, leaving: Leaving, read: Int32[np.ndarray, " read"]) -> list[int]:
        """What leaves does so now, before anything returns to its slots, and chunks are squeezed until all fit; the
        segment then.
        """
        self._copier.store_now(leaving)
        while len(living := self.spaces.living_chunks()) > self._most_chunks:
            self._squeeze(living)
        while len(segment := self.spaces.chunks_of(read)) > self.sizes.chunks:
            self._squeeze(segment)
        return segment

    def _squeeze(self, chunks: Iterable[int]) -> None:
        """Merges the two emptiest chunks, or, if all but one are full, has that one's pages return: if so many chunks
        are too many, more is on the host than its part of a full cache, and as many slots are free.
        """
        spaces = self.spaces
        pair = spaces.emptiest(chunks)
        living = [[i for i, page in enumerate(spaces.chunk(chunk)) if page >= 0] for chunk in pair]
        for chunk in pair:
            spaces.hold(chunk)
        if sum(map(len, living)) <= spaces.chunk_pages or len(living[1]) < spaces.chunk_pages:
            self._copier.squeeze_now(pair, self._merging(pair), None)
        else:
            self._copier.squeeze_now(pair, None, self._promoted(pair[0], living[0][: spaces.free_slots]))
        for chunk in pair:
            spaces.unhold(chunk)

    def _table(self, segment: list[int]) -> Int32[np.ndarray, " pages"]:
        """Page -> where the step finds it; pages that it does not read are the scrap page."""
        table = self.spaces.slot_table(self._scrap)
        first = self._scrap + 1
        for number, chunk in enumerate(segment):
            pages = np.asarray(self.spaces.chunk(chunk), np.int32)
            (living,) = np.nonzero(pages >= 0)
            table[pages[living]] = first + number * self.sizes.chunk_pages + living
        return table

    def _merging(self, pair: tuple[int, int] | None) -> Merging | None:
        """Has the living pages of two chunks be in a new one, or in two of which the first is full."""
        if pair is None:
            return None
        size = self.sizes.chunk_pages
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
        return Merging(*pair, fresh)

    def _returning(self, segment: list[int], spare: int, read: Int32[np.ndarray, " read"]) -> Returning | None:
        """A chunk of which pages go back to the device, where there is room to spare."""
        spaces = self.spaces
        if not segment or spare <= 0:
            return None
        fewest, places = self._fewest(segment, read)
        if len(places) > min(spare, spaces.free_slots):
            return None
        return self._promoted(fewest, places)

    def _promoted(self, chunk: int, places: list[int]) -> Returning:
        """Gives the pages at some places of a chunk slots."""
        index = np.zeros(self.sizes.chunk_pages, np.int32)
        slots = np.full(self.sizes.chunk_pages, self._scrap, np.int32)
        index[: len(places)] = places
        slots[: len(places)] = self.spaces.promote([self.spaces.chunk(chunk)[i] for i in places])
        return Returning(chunk, index, slots)
