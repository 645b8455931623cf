"""Lookups of the semantic cache beside GPTCache: `python -m launch.bench_cache --peer=gptcache` (`make peers`).

The same unit vectors and queries for both, one lookup at a time, in turn; embedding is left out on both sides, and told
apart. Ours: nearest entries by the graph, the posterior rule's decision, the answer. GPTCache: its own `get` over
FAISS (its default, exact) and SQLite (which it reads for each answer), threshold 0.8. Every hit is compared with exact
search. The last line is one JSON object:

    lookups_ratio      our lookups a second over GPTCache's, by wall clock: the median over rounds
    lookup_p50_ms      search and decision of one request; also lookup_p99_ms
    recall             share of queries of which the index finds the nearest entry
    hits_not_nearest   hits of ours whose entry is not the nearest one by exact search
    batch64_per_s      lookups a second in batches of 64
    inserts_per_s      of each side; ours builds the graph as it goes
    rss_mb             of each process
    embed_ms           of one question by the embedder that needs no download, and by a folder's (`--encoder=FOLDER`)
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from jaxstack.serving.semantic_cache.embedders import Embedder, HashedNgramEmbedder
from jaxstack.serving.semantic_cache.questions import questions
from launch import job
from launch.cache_benchmark.sides import GPTCacheSide, OurSide, exact_nearest, make_load
from launch.peers.process import DEFAULT_INTERPRETER
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe

_PEER = flags.DEFINE_enum("peer", "gptcache", ["gptcache", "none"], "whom we are compared with")
_ENTRIES = flags.DEFINE_integer("entries", 100_000, "in either cache", lower_bound=100)
_DIM = flags.DEFINE_integer("dim", 384, "of the vectors", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each side", lower_bound=1)
_LOOKUPS = flags.DEFINE_integer("lookups", 1000, "of ours in a round", lower_bound=10)
_PEER_LOOKUPS = flags.DEFINE_integer("peer_lookups", 60, "of the peer's in a round: it is slower", lower_bound=5)
_LEARN = flags.DEFINE_integer("learn", 500, "labelled queries before anything is measured", lower_bound=0)
_ENCODER = flags.DEFINE_string("encoder", None, "a Hugging Face folder of BERT's kind, whose embedding is timed, too")
_THREADS = flags.DEFINE_integer("peer_threads", 2, "of FAISS", lower_bound=1)
_PYTHON = flags.DEFINE_string("peer_python", DEFAULT_INTERPRETER, "interpreter of the peers' environment")
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_cache", "where summary.json and the peer's store and log go")


def run() -> dict[str, Any]:
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    load = make_load(_ENTRIES.value, _DIM.value, _LEARN.value + _LOOKUPS.value)
    measured = range(_LEARN.value, _LEARN.value + _LOOKUPS.value)
    theirs_measured = range(measured.start, measured.start + min(_PEER_LOOKUPS.value, len(measured)))
    peer = GPTCacheSide(_PYTHON.value, workdir, threads=_THREADS.value) if _PEER.value != "none" else None
    try:
        with Progress(_ENTRIES.value, "building ours", unit="entry") as progress:
            ours = OurSide(load, progress)
        rss = ours.rss_bytes()
        ours.learn(range(_LEARN.value))
        if peer is not None:
            print("building GPTCache's, which takes minutes", file=sys.stderr)
            built = peer.build(load)
            peer.peer.freeze()
        nearest = exact_nearest(load)
        mine, theirs = [ours.lookup(measured)], []  # the first round warms up
        if peer is not None:
            peer.lookup(theirs_measured)
        with (
            Progress(_ROUNDS.value, "rounds", unit="round") as progress,
            LoadMeter(lambda: [peer.peer.process] if peer is not None else []) as machine,
        ):
            for _ in range(_ROUNDS.value):
                mine.append(ours.lookup(measured))
                if peer is not None:
                    theirs.append(peer.lookup(theirs_measured))
                progress.advance()
        summary: dict[str, Any] = {"entries": _ENTRIES.value, "dim": _DIM.value}
        rows = [side.summary() for side in mine[1:]]
        for name, key in (("p50_ms", "lookup_p50_ms"), ("p99_ms", "lookup_p99_ms"), ("lookups_per_s",) * 2):
            summary[key] = statistics.median(row[name] for row in rows)
        hits = np.concatenate([side.answers for side in mine[1:]])
        exact = np.tile(nearest[measured.start : measured.stop], _ROUNDS.value)
        summary |= {
            "hit_rate": float((hits >= 0).mean()),
            "hits_not_nearest": int(((hits >= 0) & (hits != exact)).sum()),
            "recall": float((ours.nearest() == nearest).mean()),
            "batch64_per_s": ours.batched_per_s(measured),
            "inserts_per_s": _ENTRIES.value / ours.build_s,
            "rss_mb": rss / 1e6,
        }
        if peer is not None:
            other = [side.summary() for side in theirs]
            found = np.concatenate([side.answers for side in theirs])
            wanted = np.tile(nearest[theirs_measured.start : theirs_measured.stop], _ROUNDS.value)
            for clock, suffix in (("lookups_per_s", ""), ("lookups_per_cpu_s", "_by_processor_time")):
                ratios = [own[clock] / row[clock] for own, row in zip(rows, other)]
                summary["lookups_ratio" + suffix] = statistics.median(ratios)
            summary["gptcache"] = {
                **{name: statistics.median(row[name] for row in other) for name in other[0]},
                "hits_not_nearest": int(((found >= 0) & (found != wanted)).sum()),
                "inserts_per_s": built["inserts_per_s"],
                "rss_mb": peer.rss_bytes() / 1e6,
                "versions": peer.versions,
            }
    finally:
        if peer is not None:
            peer.close()
    summary["embed_ms"] = embedding_ms()
    summary |= {"foreign_cores": machine.foreign_cores, "conclusive": machine.foreign_cores <= FOREIGN_LIMIT}
    summary = rounded(summary | describe())
    write_summary(workdir, summary)
    return summary


def embedding_ms() -> dict[str, float]:
    """Milliseconds of one question, by embedder: the median of 200."""
    embedders: dict[str, Embedder] = {"hashed": HashedNgramEmbedder()}
    if _ENCODER.value is not None:
        from jaxstack.serving.semantic_cache.encoder import EncoderEmbedder

        embedders["encoder"] = EncoderEmbedder(_ENCODER.value, warm=False)
    texts, _ = questions(200, np.random.default_rng(0))
    found = {}
    for name, embedder in embedders.items():
        for text in texts:  # compiles, and fills what it remembers
            embedder.embed([text])
        spans = []
        for text in texts:
            began = time.perf_counter()
            embedder.embed([text])
            spans.append(1e3 * (time.perf_counter() - began))
        found[name] = statistics.median(spans)
    return found


def rounded(value: Any) -> Any:
    """Floats with four digits that count."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    job.main(run)
