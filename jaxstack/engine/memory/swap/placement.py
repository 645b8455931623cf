"""Where each page of the cache is: in a slot of the device's pool, or at a place in a chunk on the host.

The scheduler counts and hands out pages as ever, and does not know. A page gets a device slot when it is first written.
Only pages that are full go to the host, some together as a chunk that moves as one array; there they are read and
never written, so any number of sequences may share them, and nothing is ever copied back for having been changed.

A chunk has a number of its own for ever, so that what is on its way under it cannot be taken for something else. It is
dropped once none of its pages is alive and no copy of it is under way (`hold`).
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64

from jaxstack.engine.memory.pages import Owner, PagePool

COMPACT_BELOW = 0.7
"""Share of living pages in all chunks below which two of them become one."""


class Place(NamedTuple):
    """Of a page on the host: which chunk, and where in it."""

    chunk: int
    offset: int


@dataclasses.dataclass
class _Chunk:
    """`pages[i]` is the page at index i, -1 where it has died."""

    pages: list[int]
    living: int
    holds: int = 0


class OutOfSlots(RuntimeError):
    """More pages are to be written in a step than the device has slots for, with all that could leave gone."""


class PageSpaces(PagePool):
    """A page pool over two spaces.

    Args:
      device_slots: pages that the device holds.
      host_pages: pages that may be on the host at once.
      chunk_pages: pages of a chunk, at most.

    Attributes:
      withheld: pages that nobody new may have: the host's share is to be smaller than it could be.
      urgent: running sequences are to give up pages, too, until no more than the others are used.
    """

    def __init__(self, device_slots: int, host_pages: int, chunk_pages: int):
        super().__init__(device_slots + host_pages)
        self.device_slots, self.host_pages, self.chunk_pages = device_slots, host_pages, chunk_pages
        self._slots = list(range(device_slots - 1, -1, -1))
        self._slot_of: dict[int, int] = {}
        self._slot_at = np.full(self.size + 1, -1, np.int32)  # the same by page, for `slot_table`
        self._full = np.zeros(self.size, bool)
        self._place_of: dict[int, Place] = {}
        self._chunk_at = np.full(self.size, -1, np.int64)  # its chunk by page
        self._chunks: dict[int, _Chunk] = {}
        self._next_chunk = 0
        self._dropped: list[int] = []
        self.urgent = False

    # Reading.

    @property
    def overdrawn(self) -> int:
        return max(0, self.tree + self.private - (self.size - self.withheld)) if self.urgent else 0

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def on_device(self) -> int:
        """Pages in slots."""
        return len(self._slot_of)

    @property
    def on_host(self) -> int:
        """Living pages in chunks."""
        return len(self._place_of)

    @property
    def chunks(self) -> int:
        """Chunks that take memory on the host."""
        return len(self._chunks)

    def slot(self, page: int) -> int | None:
        """The device slot of a page, if it is there."""
        return self._slot_of.get(page)

    def place(self, page: int) -> Place | None:
        """Where a page is on the host, if it is there."""
        return self._place_of.get(page)

    def slots_of(self, pages: Iterable[int]) -> list[int]:
        """The device slots of pages that are there. Raises KeyError."""
        return [self._slot_of[page] for page in pages]

    def slot_table(self, elsewhere: int) -> Int32[np.ndarray, " pages_plus_1"]:
        """The device slot of every page, `elsewhere` for those that have none, and for a page more."""
        return np.where(self._slot_at < 0, np.int32(elsewhere), self._slot_at)

    def note_full(self, pages: Sequence[int]) -> None:
        """The first pages of a sequence have been written to their ends, and will not be written again."""
        if pages and not self._full[pages[-1]]:
            self._full[pages] = True

    def full_on_device(self) -> Int64[np.ndarray, " full"]:
        """The pages in slots that nobody will write again, ascending: those noted, and all of the tree."""
        tree = np.frombuffer(self.owners(), np.uint8) == Owner.TREE
        return np.flatnonzero((self._full | tree) & (self._slot_at[:-1] >= 0))

    def living_chunks(self) -> list[int]:
        """The chunks with a page that is alive."""
        return [number for number, chunk in self._chunks.items() if chunk.living]

    def chunk(self, chunk: int) -> Sequence[int]:
        """The page at each index, -1 for none."""
        return self._chunks[chunk].pages

    def chunks_of(self, pages: Int[np.ndarray, " n"]) -> list[int]:
        """The chunks that hold any of `pages`, the oldest first: what a step that reads them streams."""
        chunks = np.unique(self._chunk_at[pages])
        return chunks[chunks >= 0].tolist()

    def count_on_host(self, pages: Int[np.ndarray, " n"]) -> int:
        """How many of `pages` are in chunks."""
        return int(np.count_nonzero(self._chunk_at[pages] >= 0))

    def spaces(self) -> bytes:
        """A letter for every page, in order: "d"evice, "h"ost, or "-" for neither. Callable from any thread."""
        letters = bytearray(b"-" * self.size)
        for page in list(self._slot_of):
            letters[page] = ord("d")
        for page in list(self._place_of):
            letters[page] = ord("h")
        return bytes(letters)

    # Moving.

    def bind(self, pages: Iterable[int]) -> None:
        """Gives each of `pages`, which are nowhere yet or on the device, a slot.

        Raises:
          OutOfSlots: there are not enough; some may have been given.
        """
        for page in pages:
            if page in self._slot_of:
                continue
            assert page not in self._place_of, f"page {page} is on the host and would be written"
            if not self._slots:
                raise OutOfSlots(f"found no free slot of {self.device_slots} on the device for page {page}")
            self._settle(page)

    def demote(self, pages: Sequence[int]) -> int:
        """Full pages leave the device, at most `chunk_pages` of them: they are a new chunk, whose number this returns.
        Their slots are free. The caller copies them, before anything is written there.
        """
        assert 0 < len(pages) <= self.chunk_pages, f"{len(pages)} pages for a chunk of {self.chunk_pages}"
        number, self._next_chunk = self._next_chunk, self._next_chunk + 1
        self._chunks[number] = _Chunk(list(pages), len(pages))
        for index, page in enumerate(pages):
            self._vacate(page)
            self._lay(page, Place(number, index))
        return number

    def promote(self, pages: Sequence[int]) -> list[int]:
        """Pages of the host get a slot each; the caller copies them there. Returns the slots.

        Raises:
          OutOfSlots: there are not enough; then nothing has changed.
        """
        if len(pages) > len(self._slots):
            raise OutOfSlots(f"found {len(self._slots)} free slots on the device for {len(pages)} pages")
        for page in pages:
            self._die(page)
            self._settle(page)
        return self.slots_of(pages)

    def mergeable(self, among: Iterable[int] | None = None) -> tuple[int, int] | None:
        """Two chunks whose living pages fit into one, if enough of all is dead that it pays.

        Args:
          among: chunks to look at, all by default.
        """
        known = self._chunks if among is None else {number: self._chunks[number] for number in among}
        full = [(chunk.living, number) for number, chunk in known.items() if chunk.living]
        if len(full) < 2 or sum(living for living, _ in full) >= COMPACT_BELOW * self.chunk_pages * len(full):
            return None
        (a, first), (b, second) = sorted(full)[:2]
        return (first, second) if a + b <= self.chunk_pages else None

    def emptiest(self, among: Iterable[int]) -> tuple[int, int]:
        """The two chunks of `among` with the fewest living pages."""
        first, second = sorted(among, key=lambda number: (self._chunks[number].living, number))[:2]
        return first, second

    def compact(self, first: int, second: int) -> list[int]:
        """The living pages of two chunks, in order, become a new one, or a full one and another. Returns their numbers;
        the caller copies.
        """
        pages = [page for number in (first, second) for page in self._chunks[number].pages if page >= 0]
        fresh = []
        for start in range(0, len(pages), self.chunk_pages):
            group = pages[start : start + self.chunk_pages]
            number, self._next_chunk = self._next_chunk, self._next_chunk + 1
            self._chunks[number] = _Chunk(group, len(group))
            fresh.append(number)
            for index, page in enumerate(group):
                self._die(page)
                self._lay(page, Place(number, index))
        return fresh

    def hold(self, chunk: int) -> None:
        """A copy of `chunk` is under way, until as many `unhold`."""
        self._chunks[chunk].holds += 1

    def unhold(self, chunk: int) -> None:
        found = self._chunks[chunk]
        assert found.holds > 0, f"chunk {chunk} is not held"
        found.holds -= 1
        self._drop_if_dead(chunk)

    def lose(self, chunk: int) -> list[int]:
        """A copy failed: the pages that were alive in `chunk`, which are nowhere now. They have to be computed anew."""
        pages = [page for page in self._chunks[chunk].pages if page >= 0]
        for page in pages:
            self._die(page)
        return pages

    def dropped(self) -> list[int]:
        """The chunks dropped since the last call, whose memory is the caller's to free."""
        dropped, self._dropped = self._dropped, []
        return dropped

    # A page's end.

    def release(self, pages: Iterable[int], owner: Owner = Owner.PRIVATE) -> None:
        pages = list(pages)
        super().release(pages, owner)
        self._full[pages] = False
        for page in pages:
            if page in self._slot_of:
                self._vacate(page)
            elif page in self._place_of:
                self._die(page)

    def _settle(self, page: int) -> None:
        self._slot_of[page] = self._slot_at[page] = self._slots.pop()

    def _vacate(self, page: int) -> None:
        self._slots.append(self._slot_of.pop(page))
        self._slot_at[page] = -1

    def _lay(self, page: int, place: Place) -> None:
        self._place_of[page], self._chunk_at[page] = place, place.chunk

    def _die(self, page: int) -> None:
        place = self._place_of.pop(page)
        self._chunk_at[page] = -1
        chunk = self._chunks[place.chunk]
        chunk.pages[place.offset] = -1
        chunk.living -= 1
        self._drop_if_dead(place.chunk)

    def _drop_if_dead(self, number: int) -> None:
        chunk = self._chunks[number]
        if not chunk.living and not chunk.holds:
            del self._chunks[number]
            self._dropped.append(number)

    def check(self) -> None:
        """Raises AssertionError unless every page and every slot is in exactly one state."""
        slots = list(self._slot_of.values())
        assert all(self._slot_at[page] == slot for page, slot in self._slot_of.items()), "the table lags"
        assert np.count_nonzero(self._slot_at >= 0) == len(slots), "the table has more"
        assert {p: place.chunk for p, place in self._place_of.items()} == {
            p: chunk for p, chunk in enumerate(self._chunk_at.tolist()) if chunk >= 0
        }, "the table of chunks lags"
        assert len(set(slots)) == len(slots), "two pages in a slot"
        assert sorted(slots + self._slots) == list(range(self.device_slots)), "slots lost"
        assert not self._slot_of.keys() & self._place_of.keys(), "a page in two spaces"
        free = set(self._free)
        assert not free & (self._slot_of.keys() | self._place_of.keys()), "a free page that is somewhere"
        living: collections.Counter[int] = collections.Counter()
        for page, place in self._place_of.items():
            assert self._chunks[place.chunk].pages[place.offset] == page, f"page {page} is not where it says"
            living[place.chunk] += 1
        for number, chunk in self._chunks.items():
            assert chunk.living == living[number] == sum(page >= 0 for page in chunk.pages), f"chunk {number} miscounts"
            assert chunk.living or chunk.holds, f"chunk {number} is dead and keeps its memory"


def to_demote(
    spaces: PageSpaces, count: int, cold: Iterable[int], running: Iterable[Sequence[int]], kept: frozenset[int]
) -> list[list[int]]:
    """Pages to send to the host so that at least `count` slots become free, in groups of which each makes a chunk.

    First pages that no running request reads: they cost nothing there. Then whole requests, the longest first, from
    their beginning: their pages die together. A chunk once begun is filled as far as it goes.

    Args:
      cold: full pages that no running request reads.
      running: the full pages of each running request, in order.
      kept: pages that this step writes.

    Returns: as many groups as it takes, fewer where there are not enough pages.
    """
    size, groups, taken = spaces.chunk_pages, [], set(kept)

    def more(pages: Iterable[int]) -> None:
        nonlocal count
        fit = [p for p in pages if p not in taken and spaces.slot(p) is not None]
        for start in range(0, len(fit), size):
            if count <= 0:
                return
            group = fit[start : start + size]
            groups.append(group)
            taken.update(group)
            count -= len(group)

    more(cold)
    rest: list[int] = []
    for pages in sorted(running, key=len, reverse=True):
        rest.extend(pages)
    more(dict.fromkeys(rest))
    return groups
