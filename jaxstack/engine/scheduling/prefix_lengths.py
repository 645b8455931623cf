"""How much of every waiting request is cached, without walking the prefix tree for each of them.

Pages are named by a hash of all tokens up to their end, so the set of cached pages is closed under prefixes and "page d
is cached" holds up to a depth and not from there on. A request's depth is remembered; where the cache has changed, two
look-ups confirm it, or a search finds the new one. Four hundred requests take a fraction of a millisecond. No more of a
prompt is hashed than its cached part and a little. Two prefixes with the same 64-bit hash would be taken for one here,
which costs a place in the queue and no more: admission compares tokens.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class CachedPages(Protocol):
    """What is cached: the chained hashes of all cached pages, and a count of changes to them."""

    cached: set[int]
    version: int


@dataclasses.dataclass(slots=True)
class _Known:
    """Of a request: hashes of its first pages (beyond the cached ones at least one, if there is one), how many pages
    are cached, and for which version of the cache that holds.
    """

    chain: list[int]
    depth: int = 0
    version: int = -1


class PrefixLengths:
    """Matched pages of waiting requests.

    Args:
      pages: the prefix tree.
      extend: appends the hashes of further pages of a request, as far as a hit may reach, to those it is given; False
        if there are no more.
    """

    def __init__(self, pages: CachedPages, extend: Callable[[Any, list[int]], bool]):
        self._pages, self._extend = pages, extend
        self._known: dict[Any, _Known] = {}

    def of(self, requests: Sequence[Any]) -> list[int]:
        """Cached pages of each request."""
        cached, version, known = self._pages.cached, self._pages.version, self._known
        depths = []
        for request in requests:
            found = known.get(request)
            if found is None:
                found = known[request] = _Known([])
            if found.version != version:
                chain, depth = found.chain, found.depth
                if depth and chain[depth - 1] not in cached:
                    found.depth = bisect.bisect_left(chain, True, 0, depth, key=lambda name: name not in cached)
                elif depth == len(chain) or chain[depth] in cached:
                    found.depth = self._reach(request, chain, depth)
                found.version = version
            depths.append(found.depth)
        return depths

    def forget(self, request: Any) -> None:
        """`request` does not wait any more, or its tokens have changed."""
        self._known.pop(request, None)

    def _reach(self, request: Any, chain: list[int], depth: int) -> int:
        """How many leading pages are cached, `depth` of them at least."""
        cached = self._pages.cached
        while depth < len(chain) or self._extend(request, chain):
            if chain[depth] not in cached:
                break
            depth += 1
        return depth
