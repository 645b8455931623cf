"""Entries and queries of the benchmark, our lookups, and the peer's process."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import Float, Int

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.progress import Progress
from jaxstack.serving.semantic_cache.index import NeighbourIndex
from jaxstack.serving.semantic_cache.policies import BayesThreshold
from launch.peers import PeerProcess, find_interpreter

_PROGRAM = Path(__file__).parents[1] / "peers" / "gptcache_lookup.py"
_CLUSTER, _ENTRY_RADIUS, _QUERY_RADIUS = 10, 0.9, 0.3
_ADD_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Load:
    """Unit vectors. A cluster's entries have a cosine of about 0.55 to each other; a query is near one entry.

    Attributes:
      near: the entry that each query was made from: what it asks.
    """

    entries: Float[np.ndarray, "entries dim"]
    queries: Float[np.ndarray, "queries dim"]
    near: Int[np.ndarray, "queries"]


def make_load(entries: int, dim: int, queries: int, seed: int = 0) -> Load:
    rng = np.random.default_rng(seed)
    centres = _unit(rng.standard_normal((-(-entries // _CLUSTER), dim), dtype=np.float32))
    rows = _moved(centres[np.arange(entries) // _CLUSTER], _ENTRY_RADIUS, rng)
    near = rng.integers(entries, size=queries)
    return Load(rows, _moved(rows[near], _QUERY_RADIUS, rng), near)


def _moved(x: Float[np.ndarray, "n dim"], radius: float, rng: np.random.Generator) -> Float[np.ndarray, "n dim"]:
    noise = rng.standard_normal(x.shape, dtype=np.float32)
    return _unit(x + np.float32(radius / np.sqrt(x.shape[1])) * noise)


def _unit(x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact_nearest(load: Load) -> Int[np.ndarray, "queries"]:
    """The nearest entry of every query, by all products."""
    found = [np.argmax(load.queries[i : i + 64] @ load.entries.T, axis=1) for i in range(0, len(load.queries), 64)]
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True)
class Lookups:
    """What a side answered: an entry, or -1 where it did not, and each lookup's milliseconds."""

    answers: Int[np.ndarray, "n"]
    wall_ms: Float[np.ndarray, "n"]
    cpu_ms: Float[np.ndarray, "n"]

    def summary(self) -> dict[str, float]:
        return {
            "p50_ms": float(np.median(self.wall_ms)),
            "p99_ms": float(np.percentile(self.wall_ms, 99)),
            "lookups_per_s": 1e3 / float(np.mean(self.wall_ms)),
            "lookups_per_cpu_s": 1e3 / float(np.mean(self.cpu_ms)),
            "hits": float((self.answers >= 0).mean()),
        }


class OurSide:
    """The index, the posterior rule with what it learned from some labelled queries, and the answers."""

    def __init__(self, load: Load, progress: Progress | None = None):
        self.load = load
        self.answers = [str(i) for i in range(len(load.entries))]
        began = time.perf_counter()
        self.index = NeighbourIndex(load.entries.shape[1], background=False)
        for start in range(0, len(load.entries), _ADD_ROWS):
            rows = load.entries[start : start + _ADD_ROWS]
            self.index.add(range(start, start + len(rows)), rows)
            if progress is not None:
                progress.advance(len(rows))
        self.build_s = time.perf_counter() - began
        self.policy = BayesThreshold()
        self._coins = np.random.default_rng(1)

    def learn(self, queries: range) -> None:
        """Takes in the labels of queries: right is the answer of the entry that the query is made from."""
        ids, s = self.index.search(self.load.queries[queries.start : queries.stop], self.policy.k)
        for query, entry, similarity in zip(queries, ids[:, 0].tolist(), s[:, 0].tolist()):
            self.policy.label(entry, similarity, entry == self.load.near[query], 1.0)

    def lookup(self, queries: range) -> Lookups:
        """One by one."""
        answers, wall, cpu = np.full(len(queries), -1), np.zeros(len(queries)), np.zeros(len(queries))
        for place, query in enumerate(queries):
            began, used = time.perf_counter(), time.process_time()
            ids, s = self.index.search(self.load.queries[query : query + 1], self.policy.k)
            made = self.policy.decide(ids, s, self._coins.random(1))
            found = self.answers[int(ids[0, made.column[0]])] if made.hit[0] else None
            cpu[place] = 1e3 * (time.process_time() - used)
            wall[place] = 1e3 * (time.perf_counter() - began)
            if found is not None:
                answers[place] = int(found)
            elif made.column[0] >= 0:  # the label of an explored lookup, so that none is outstanding
                entry = int(ids[0, made.column[0]])
                right = bool(entry == self.load.near[query])
                self.policy.label(entry, float(s[0, made.column[0]]), right, float(made.tau[0]))
        return Lookups(answers, wall, cpu)

    def batched_per_s(self, queries: range, batch: int = 64) -> float:
        """Lookups a second in batches."""
        began = time.perf_counter()
        for start in range(queries.start, queries.stop, batch):
            ids, s = self.index.search(self.load.queries[start : min(start + batch, queries.stop)], self.policy.k)
            made = self.policy.decide(ids, s, self._coins.random(len(ids)))
            for tau in made.tau[~made.hit]:
                self.policy.missing(float(tau))
        return len(queries) / (time.perf_counter() - began)

    def nearest(self) -> Int[np.ndarray, "queries"]:
        """The entry that the index holds to be nearest to each query."""
        return self.index.search(self.load.queries, 1)[0][:, 0]

    @staticmethod
    def rss_bytes() -> int:
        return int(psutil.Process().memory_info().rss)


class GPTCacheSide:
    """The peer's process, stopped while it is not asked.

    Raises:
      UserError: there is no such interpreter, or it has no GPTCache; the message says how to get it.
    """

    def __init__(self, interpreter: str, workdir: Path, *, threads: int):
        self._workdir, self._threads = workdir, threads
        self.peer = PeerProcess(
            [find_interpreter(interpreter), _PROGRAM],
            log_file=workdir / "gptcache.log",
            name="gptcache",
            environment={"OMP_NUM_THREADS": str(threads)},
        )
        try:
            self.versions = self.peer.ask("versions", timeout_s=120)["versions"]
        except UserError:
            self.close()
            raise

    def build(self, load: Load) -> dict[str, Any]:
        for name in ("entries", "queries"):
            np.save(self._workdir / f"{name}.npy", getattr(load, name))
        folder = (self._workdir / "gptcache").resolve()
        vectors, queries = ((self._workdir / f"{name}.npy").resolve() for name in ("entries", "queries"))
        return self.peer.ask(
            "build", timeout_s=3600, folder=str(folder), vectors=str(vectors), queries=str(queries),
            threads=self._threads,
        )  # fmt: skip

    def lookup(self, queries: range) -> Lookups:
        self.peer.thaw()
        found = self.peer.ask("lookup", timeout_s=1800, first=queries.start, count=len(queries))
        self.peer.freeze()
        answers = np.array([-1 if answer is None else answer for answer in found["answers"]])
        return Lookups(answers, np.array(found["wall_ms"]), np.array(found["cpu_ms"]))

    def rss_bytes(self) -> int:
        return int(self.peer.process.memory_info().rss)

    def close(self) -> None:
        self.peer.close()
