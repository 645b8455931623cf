"""The page pool: which pages of the KV cache are free, and who owns the others."""

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum


class Owner(IntEnum):
    """Whose a page is. A page has one owner at a time."""

    FREE = 0
    TREE = 1
    PRIVATE = 2


class PagePool:
    """`size` pages numbered from 0, handed out and taken back in O(1) each.

    Every move names the owner it expects to find, so a page freed twice or shared by accident raises at once instead of
    corrupting another request's answer.

    Attributes:
      on_evicted: told of the pages that the tree has lost, on the thread that freed them.
      shortages: how often a sequence found too few pages, to start or to go on.
      withheld: free pages that no new sequence may take.
    """

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._owner = bytearray(size)
        self.tree = 0
        self.private = 0
        self.shortages = self.withheld = 0
        self.on_evicted: Callable[[Sequence[int]], None] | None = None

    @property
    def free(self) -> int:
        """Pages nobody owns."""
        return len(self._free)

    @property
    def overdrawn(self) -> int:
        """Pages that running sequences are to give up before anything else is planned."""
        return 0

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages as private ones. Raises IndexError when there are fewer."""
        if count > len(self._free):
            raise IndexError(f"{count} pages asked, {len(self._free)} free")
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._owner[page] = Owner.PRIVATE
        self.private += count
        return pages

    def give_to_tree(self, pages: Iterable[int]) -> None:
        """Private pages become the tree's."""
        for page in pages:
            self._move(page, Owner.PRIVATE, Owner.TREE)
            self.private -= 1
            self.tree += 1

    def release(self, pages: Iterable[int], owner: Owner = Owner.PRIVATE) -> None:
        """Pages of `owner` become free."""
        pages = list(pages)
        for page in pages:
            self._move(page, owner, Owner.FREE)
            self._free.append(page)
            if owner == Owner.TREE:
                self.tree -= 1
            else:
                self.private -= 1
        if owner == Owner.TREE and self.on_evicted is not None:
            self.on_evicted(pages)

    def owner(self, page: int) -> Owner:
        return Owner(self._owner[page])

    def owners(self) -> bytes:
        """An `Owner` for every page, in order; callable from any thread."""
        return bytes(self._owner)

    def _move(self, page: int, expected: Owner, new: Owner) -> None:
        found = self._owner[page]
        if found != expected:
            raise AssertionError(f"page {page} is {Owner(found).name}, expected {expected.name}")
        self._owner[page] = new
