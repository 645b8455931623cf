"""Nearest entries of one scope: exact search while there are few, a navigable graph over the same rows when there are
many.

The graph (HNSW, by usearch) holds the rows in eight bits and only proposes. Similarities come from the float32 rows, so
they are exact, and what has been deleted is never returned: it has no row. The graph holds nothing that the rows do
not, so it is never written to disk; after a start it is built in the background while exact search answers.
"""

import logging
import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxstack.serving.semantic_cache.policy import NO_ENTRY

log = logging.getLogger(__name__)

# Rows from which on a graph pays.
_GRAPH_FROM = 4096
# Of the graph: links of a row, and how widely it is searched when a row is put in and when one is looked for.
_LINKS, _ADD_WIDTH, _SEARCH_WIDTH = 16, 128, 80
_LEAST_PROPOSED = 16
# Share of the graph that may be deleted rows before it is built anew.
_DEAD = 0.25
_BUILD_CHUNK = 1024
# Rows that may be missing when a graph built in the background is finished: searches wait until these are put in.
_LAST = 64
# Room for at least so many rows; more is given back when three quarters of it are empty.
_ROOM = 16
# Queries multiplied with the rows at once.
_BLOCK = 64


class NeighbourIndex:
    """Unit vectors by entry id. Thread-safe.

    Args:
      background: build graphs on a thread of their own; otherwise whoever adds the row that makes one worth it waits.
    """

    def __init__(self, dim: int, *, background: bool = True, graph_from: int = _GRAPH_FROM):
        self.dim = dim
        self._background, self._graph_from = background, graph_from
        self._lock = threading.RLock()
        self._rows = np.empty((0, dim), dtype=np.float32)
        self._ids = np.empty(0, dtype=np.int64)
        self._row_of: dict[int, int] = {}
        self._graph: _Graph | None = None
        self._building: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, entry: int) -> bool:
        return entry in self._row_of

    def add(self, entries: Sequence[int], vectors: Float[np.ndarray, "n dim"]) -> None:
        """Adds entries; an id is used once.

        Raises:
          ValueError: an id that has been used, a vector of another size, or one that is no unit vector.
        """
        vectors = np.ascontiguousarray(vectors, dtype=np.float32).reshape(len(entries), -1)
        if vectors.shape[1] != self.dim:
            raise ValueError(f"vector: found {vectors.shape[1]} dimensions, expected {self.dim}")
        if not usable(vectors).all():
            raise ValueError("vector: found one that is not of unit length, or not finite")
        with self._lock:
            inside = self._graph.inside if self._graph is not None else ()
            known = next((entry for entry in entries if entry in self._row_of or entry in inside), None)
            if known is not None:
                raise ValueError(f"entry: {known} was there already")
            first, last = len(self._row_of), len(self._row_of) + len(entries)
            if last > len(self._ids):
                self._take_room(max(_ROOM, last, 2 * len(self._ids)), first)
            self._rows[first:last] = vectors
            self._ids[first:last] = entries
            self._row_of.update(zip(map(int, entries), range(first, last)))
            if self._graph is not None:
                self._graph.put(entries, vectors)
            self._keep_graph()

    def remove(self, entry: int) -> None:
        """Removes an entry, if it is there. The last row takes its place."""
        with self._lock:
            row = self._row_of.pop(entry, None)
            if row is None:
                return
            last = len(self._row_of)
            if row != last:
                self._rows[row], self._ids[row] = self._rows[last], self._ids[last]
                self._row_of[int(self._ids[row])] = row
            if len(self._ids) > _ROOM and last < len(self._ids) // 4:
                self._take_room(max(_ROOM, 2 * last), last)
            self._keep_graph()

    def _take_room(self, room: int, live: int) -> None:
        """Room for so many rows, of which the first are in use."""
        self._rows = np.concatenate([self._rows[:live], np.empty((room - live, self.dim), np.float32)])
        self._ids = np.concatenate([self._ids[:live], np.empty(room - live, np.int64)])

    def vector(self, entry: int) -> Float[np.ndarray, "dim"]:
        """Raises KeyError."""
        with self._lock:
            return self._rows[self._row_of[entry]].copy()

    def search(
        self, queries: Float[np.ndarray, "n dim"], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """Ids and cosines of the k nearest entries, nearest first; `NO_ENTRY` and 0 where there are fewer."""
        queries = np.ascontiguousarray(queries, dtype=np.float32).reshape(-1, self.dim)
        with self._lock:
            if not len(self):
                return np.full((len(queries), k), NO_ENTRY, dtype=np.int64), np.zeros((len(queries), k), np.float32)
            if self._graph is not None:
                found = [self._search_graph(self._graph, query, k) for query in queries]
                return np.stack([ids for ids, _ in found]), np.stack([near for _, near in found])
            return self.search_exactly(queries, k)

    def search_exactly(
        self, queries: Float[np.ndarray, "n dim"], k: int
    ) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
        """As `search`, by looking at every row."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        ids = np.full((len(queries), k), NO_ENTRY, dtype=np.int64)
        near = np.zeros((len(queries), k), dtype=np.float32)
        with self._lock:
            live, kept = len(self), min(k, len(self))
            for first in range(0, len(queries) if live else 0, _BLOCK):
                block = slice(first, first + _BLOCK)
                cosine = queries[block] @ self._rows[:live].T
                if kept < live:
                    best = np.argpartition(cosine, live - kept, axis=1)[:, live - kept :]
                else:
                    best = np.broadcast_to(np.arange(live), cosine.shape)
                self._ranked(best, np.take_along_axis(cosine, best, axis=1), ids[block, :kept], near[block, :kept])
        return ids, near

    @property
    def exact(self) -> bool:
        """Whether every row is looked at."""
        return self._graph is None

    def wait(self) -> None:
        """Until no graph is being built."""
        while (building := self._building) is not None:
            building.join(1.0)

    # ---------------------------------------------------------------------------------------------------------- graph

    def _search_graph(
        self, graph: "_Graph", query: Float[np.ndarray, "dim"], k: int
    ) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        wanted = max(_LEAST_PROPOSED, 2 * k)
        row_of, rows = self._row_of, list[int]()
        # Deleted rows are proposed, too. With many of them near, ask for more.
        while len(rows) < min(k, len(row_of)) and wanted <= max(4 * _LEAST_PROPOSED, 2 * k):
            rows = [row for key in graph.propose(query, wanted) if (row := row_of.get(key)) is not None]
            wanted *= 4
        if len(rows) < min(k, len(row_of)):
            ids, near = self.search_exactly(query[None], k)
            return ids[0], near[0]
        ids, near = np.full((1, k), NO_ENTRY, dtype=np.int64), np.zeros((1, k), dtype=np.float32)
        chosen = np.array(rows)
        cosine = self._rows[chosen] @ query
        kept = min(k, len(chosen))
        self._ranked(chosen[None], cosine[None], ids[:, :kept], near[:, :kept])
        return ids[0], near[0]

    def _ranked(
        self,
        rows: Int[np.ndarray, "n m"],
        cosine: Float[np.ndarray, "n m"],
        ids: Int[np.ndarray, "n k"],
        near: Float[np.ndarray, "n k"],
    ) -> None:
        """Writes the best rows, nearest first; of equals the oldest entry."""
        of = self._ids[rows]
        order = np.lexsort((of, -cosine))[:, : ids.shape[1]]
        ids[:] = np.take_along_axis(of, order, axis=1)
        near[:] = np.take_along_axis(cosine, order, axis=1)

    def _keep_graph(self) -> None:
        """Begins a graph where one is worth it, and a new one where too much of it has been deleted."""
        live = len(self)
        if self._building is not None:
            return
        if live < self._graph_from:
            if self._graph is not None and live < self._graph_from // 2:
                self._graph = None
            return
        if self._graph is not None and len(self._graph.inside) - live <= _DEAD * live:
            return
        if not self._background:
            self._build()
            return
        self._building = threading.Thread(target=self._build_beside, name="cache-graph", daemon=True)
        self._building.start()

    def _build_beside(self) -> None:
        try:
            self._build()
        except Exception:
            log.exception("no graph of the cache's entries; every one of them is looked at")
            with self._lock:
                self._graph_from, self._building = 2 * max(self._graph_from, len(self)), None

    def _build(self) -> None:
        """Builds a graph of all rows beside the one in use, a chunk at a time so that searches go on."""
        with self._lock:
            graph = _Graph(self.dim, float(np.abs(self._rows[: len(self)]).max(initial=0.0)))
        while True:
            with self._lock:
                missing = [entry for entry in self._row_of if entry not in graph.inside]
                if len(missing) <= (_LAST if self._background else 0):
                    graph.put(missing, self._rows[[self._row_of[e] for e in missing]])
                    # With next to nothing left, the scale of what was there says nothing of what will be.
                    self._graph = graph if len(self) >= self._graph_from // 2 else None
                    self._building = None
                    return
            for first in range(0, len(missing), _BUILD_CHUNK):
                with self._lock:
                    chunk = [e for e in missing[first : first + _BUILD_CHUNK] if e in self._row_of]
                    vectors = self._rows[[self._row_of[e] for e in chunk]]
                graph.put(chunk, vectors)


def usable(vectors: Float[np.ndarray, "n dim"]) -> np.ndarray:
    """Which rows are finite and of unit length."""
    with np.errstate(invalid="ignore", over="ignore"):
        length = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=-1)
    return np.isfinite(length) & (np.abs(length - 1) < 1e-3)


class _Graph:
    """Proposes rows that are near. An id is put in once, and never taken out.

    Args:
      largest: of the vectors' absolute values: what eight bits reach to.
    """

    def __init__(self, dim: int, largest: float):
        # Not at the top: most caches stay small and never need it.
        from usearch.index import Index

        self.inside: set[int] = set()
        self._scale = 127 / max(largest, 1e-6)
        self._index = Index(
            ndim=dim,
            metric="ip",
            dtype="i8",
            connectivity=_LINKS,
            expansion_add=_ADD_WIDTH,
            expansion_search=_SEARCH_WIDTH,
        )

    def put(self, entries: Sequence[int], vectors: Float[np.ndarray, "n dim"]) -> None:
        if len(entries):
            self._index.add(np.array(entries, dtype=np.uint64), self._quantised(vectors), threads=1)
            self.inside.update(map(int, entries))

    def propose(self, query: Float[np.ndarray, "dim"], count: int) -> list[int]:
        found: list[int] = self._index.search(self._quantised(query), count).keys.tolist()
        return found

    def _quantised(self, vectors: Float[np.ndarray, "*n dim"]) -> Int[np.ndarray, "*n dim"]:
        return np.clip(np.rint(vectors * self._scale), -127, 127).astype(np.int8)
