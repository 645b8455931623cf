"""The prefix cache: a radix tree over page-sized runs of tokens.

A node holds a run of whole pages; children are keyed by the tokens of their first page. A sequence that uses a prefix
locks the path to it, so eviction takes only leaves that nobody reads, least recently used first. (The structure is
SGLang's RadixAttention, arXiv 2312.07104, at page granularity; eviction keeps a lazily cleaned heap, so it costs O(log
n) a node and not a walk.)
"""

import dataclasses
import heapq
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from jaxstack.engine.memory.pages import Owner, PagePool

PageKey = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Node:
    """A run of pages. `keys[i]` are the tokens in page `pages[i]`; the root of a namespace has none.

    `notes[i]` is whatever else is known of that page (the scores of its tokens), None for nothing; `chain[i]` is the
    hash of all keys from the root up to it, which the root begins with that of its namespace.
    """

    keys: list[PageKey]
    pages: list[int]
    notes: list[Any]
    parent: "Node | None"
    children: "dict[PageKey, Node]" = dataclasses.field(default_factory=dict)
    lock: int = 0
    last_use: int = 0
    chain: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Match:
    """The longest cached prefix: `node` ends exactly there, `pages` are its pages from the root on."""

    node: Node
    pages: list[int]


class RadixTree:
    """Prefixes, given as the keys of their whole pages, to pages. Those it owns are counted in `pool.tree`; of these,
    `evictable` could be freed now.

    Args:
      pool: where evicted and duplicate pages go back to.

    Attributes:
      cached: the chained hashes (`chain_hashes`) of all pages it owns.
      version: grows whenever that set changes.
    """

    def __init__(self, pool: PagePool):
        self._pool = pool
        self._roots: dict[Hashable, Node] = {}
        self._clock = itertools.count(1)
        self._heap: list[tuple[int, int, Node]] = []
        self._ticket = itertools.count()
        self.evictable = 0
        self.cached: set[int] = set()
        self.version = 0

    def chain_hashes(self, keys: Sequence[PageKey], namespace: Hashable = None, after: int | None = None) -> list[int]:
        """A name for each page of a prefix, that says what is in all pages up to it: 64 bits, so not beyond doubt.

        Args:
          after: the name of the page before the first of `keys`; None if they begin the prefix.
        """
        return _chain(keys, _seed(namespace) if after is None else after)

    def peek(self, keys: Sequence[PageKey], namespace: Hashable = None) -> int:
        """Pages of the longest cached prefix, without touching or splitting anything."""
        node = self._roots.get(namespace)
        done = 0
        while node is not None and done < len(keys) and (child := node.children.get(keys[done])) is not None:
            same = _common(child.keys, keys, done)
            done += same
            node = child if same == len(child.keys) else None
        return done

    def held(self, keys: Sequence[PageKey], namespace: Hashable = None) -> list[int]:
        """The pages of the longest cached prefix. Changes nothing, and may be called from any thread: beside one that
        changes the tree it sees it as it was or as it is, or somewhat less.
        """
        node = self._roots.get(namespace)
        pages: list[int] = []
        while node is not None and len(pages) < len(keys) and (child := node.children.get(keys[len(pages)])):
            have = list(child.pages)
            same = min(_common(child.keys, keys, len(pages)), len(have))
            pages.extend(have[:same])
            node = child if same == len(have) > 0 else None
        return pages

    def match(self, keys: Sequence[PageKey], namespace: Hashable = None) -> Match:
        """The longest cached prefix of `keys`. Splits a node where the match ends inside it; marks the path as used."""
        now = next(self._clock)
        node = self._root(namespace)
        pages: list[int] = []
        while len(pages) < len(keys) and (child := node.children.get(keys[len(pages)])) is not None:
            same = _common(child.keys, keys, len(pages))
            if same < len(child.keys):
                child = self._split(child, same)
            child.last_use = now
            pages.extend(child.pages)
            node = child
        return Match(node, pages)

    def notes(self, match: Match) -> list[Any]:
        """The notes on a match's pages, up to the first page without one."""
        path: list[Node] = []
        walk: Node | None = match.node
        while walk is not None:
            path.append(walk)
            walk = walk.parent
        every = [note for node in reversed(path) for note in node.notes]
        return every[: every.index(None)] if None in every else every

    def annotate(self, node: Node, notes: Sequence[Any]) -> None:
        """Puts `notes` on the first pages of the path from the root to `node`."""
        path: list[Node] = []
        walk: Node | None = node
        while walk is not None:
            path.append(walk)
            walk = walk.parent
        done = 0
        for run in reversed(path):
            part = list(notes[done : done + len(run.pages)])
            run.notes[: len(part)] = part
            done += len(part)

    def insert(self, keys: Sequence[PageKey], pages: Sequence[int], namespace: Hashable = None) -> Match:
        """Makes `keys` a cached prefix. `pages[i]` holds the keys and values of `keys[i]`.

        Pages beyond what is already cached pass from private to the tree. The match returned covers all of `keys`;
        where its pages differ from the caller's the prefix was already there, and the caller's own copy stays private
        for it to free.
        """
        found = self.match(keys, namespace)
        have = len(found.pages)
        if have == len(keys):
            return found
        fresh = list(pages[have : len(keys)])
        self._pool.give_to_tree(fresh)
        chain = _chain(keys[have:], found.node.chain[-1])
        leaf = Node(list(keys[have:]), fresh, [None] * len(fresh), found.node, last_use=next(self._clock), chain=chain)
        self.cached.update(chain)
        self.version += 1
        found.node.children[keys[have]] = leaf
        self.evictable += len(fresh)
        self._offer(leaf)
        return Match(leaf, found.pages + fresh)

    def lock(self, node: Node) -> None:
        """Keeps the path from the root to `node` from being evicted until `unlock`."""
        walk: Node | None = node
        while walk is not None:
            if walk.lock == 0:
                self.evictable -= len(walk.pages)
            walk.lock += 1
            walk = walk.parent

    def unlock(self, node: Node) -> None:
        """Undoes one `lock` of `node`."""
        walk: Node | None = node
        while walk is not None:
            walk.lock -= 1
            if walk.lock < 0:
                raise AssertionError("radix node unlocked more often than locked")
            if walk.lock == 0:
                self.evictable += len(walk.pages)
                self._offer(walk)
            walk = walk.parent

    def evict(self, count: int) -> int:
        """Frees at least `count` pages if so many are evictable, least recently used leaves first; returns how many."""
        freed = 0
        while freed < count and self._heap:
            stamp, _, node = heapq.heappop(self._heap)
            if node.parent is None or node.lock or node.children or not node.pages:
                continue
            if stamp != node.last_use:
                self._offer(node)
                continue
            take = min(len(node.pages), count - freed)
            self._pool.release(node.pages[-take:], Owner.TREE)
            self.evictable -= take
            freed += take
            first = node.keys[0]
            self._forget(node.chain[-take:])
            del node.pages[-take:], node.keys[-take:], node.notes[-take:], node.chain[-take:]
            if node.pages:
                self._offer(node)
            else:
                parent, node.parent = node.parent, None
                del parent.children[first]
                self._offer(parent)
        return freed

    def clear(self) -> int:
        """Evicts everything that is not locked; returns the pages freed."""
        return self.evict(self.evictable)

    def drop(self, namespace: Hashable) -> int:
        """Frees what a namespace holds and nobody has locked; returns how many pages."""
        root = self._roots.get(namespace)
        if root is None:
            return 0
        nodes = [root]
        for node in nodes:
            nodes.extend(node.children.values())
        freed = 0
        for node in reversed(nodes):  # children before parents
            if node.parent is not None and not node.lock:
                self._pool.release(node.pages, Owner.TREE)
                freed += len(node.pages)
                del node.parent.children[node.keys[0]]
                self._forget(node.chain)
                node.parent, node.pages, node.keys, node.notes, node.chain = None, [], [], [], []
        self.evictable -= freed
        if not root.children and not root.lock:
            del self._roots[namespace]
        return freed

    def nodes(self) -> Iterator[Node]:
        """Every node that holds pages, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _root(self, namespace: Hashable) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node([], [], [], None, chain=[_seed(namespace)])
        return root

    def _split(self, node: Node, at: int) -> Node:
        """Cuts `node` after `at` pages. The lower part stays the same object: handles to it keep their meaning."""
        parent = node.parent
        assert parent is not None
        upper = Node(node.keys[:at], node.pages[:at], node.notes[:at], parent, lock=node.lock, last_use=node.last_use)
        upper.chain, node.chain = node.chain[:at], node.chain[at:]
        parent.children[upper.keys[0]] = upper
        node.keys, node.pages, node.notes, node.parent = node.keys[at:], node.pages[at:], node.notes[at:], upper
        upper.children[node.keys[0]] = node
        return upper

    def _forget(self, chain: Sequence[int]) -> None:
        self.cached.difference_update(chain)
        self.version += 1

    def _offer(self, node: Node) -> None:
        """Puts a leaf that could be evicted on the heap; stale entries are skipped when they come up."""
        if node.parent is not None and not node.lock and not node.children:
            heapq.heappush(self._heap, (node.last_use, next(self._ticket), node))


def _seed(namespace: Hashable) -> int:
    return hash((namespace,))


def _chain(keys: Sequence[PageKey], before: int) -> list[int]:
    hashes = []
    for key in keys:
        before = hash((before, key))
        hashes.append(before)
    return hashes


def _common(run: Sequence[PageKey], keys: Sequence[PageKey], start: int) -> int:
    """How many leading keys of `run` equal `keys[start:]`."""
    count = 0
    for ours, theirs in zip(run, keys[start : start + len(run)], strict=False):
        if ours != theirs:
            break
        count += 1
    return count
