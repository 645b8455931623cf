"""Which pages of a sequence others may use, and under which names. Plain Python, no jax."""

from collections.abc import Hashable

from jaxstack.engine.memory import RadixTree
from jaxstack.engine.request import Sequence


class Prefixes:
    """Names the pages of sequences for the prefix tree.

    Args:
      tree: where they are kept.
      page_size: tokens in a page.
      caching: whether finished prefixes are kept; else only the choices of one request share theirs.
    """

    def __init__(self, tree: RadixTree, page_size: int, caching: bool):
        self._tree, self._page_size, self.caching = tree, page_size, caching

    def shares(self, sequence: Sequence) -> bool:
        """Whether any pages of `sequence` are shared."""
        pooled = sequence.request.pooled
        if pooled is not None and pooled.whole:
            return False
        return self.caching or sequence.request.choices > 1

    def namespace(self, sequence: Sequence) -> Hashable:
        """Who may use the same prefixes: without a prefix cache still the choices of one request."""
        return sequence.request.namespace if self.caching else sequence.request

    def sharable(self, sequence: Sequence) -> int:
        """Pages that a cache hit may cover: at least one token must be left to compute."""
        return (len(sequence.tokens) - 1) // self._page_size

    def keys(self, sequence: Sequence, pages: int | None = None) -> list[tuple[int, ...]]:
        """Of the first `pages` pages; by default those that a cache hit may cover."""
        pages = self.sharable(sequence) if pages is None else pages
        size, keys = self._page_size, sequence.keys
        given = sequence.request.given
        for i in range(len(keys), pages):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            keys.append(tuple(tokens) if given is None else given.page_key(tokens, i * size))
        return keys if len(keys) == pages else keys[:pages]

    def extend(self, sequence: Sequence, chain: list[int]) -> bool:
        """Appends the hashes of some more pages that a cache hit may cover to those in `chain` (`PrefixLengths`)."""
        have = len(chain)
        pages = min(self.sharable(sequence), 2 * have + 4) if self.shares(sequence) else 0
        if have >= pages:
            return False
        keys = self.keys(sequence, pages)[have:]
        chain += self._tree.chain_hashes(keys, self.namespace(sequence), chain[-1] if chain else None)
        return True
