"""GPTCache's side of `launch.bench_cache`: its FAISS store and SQLite, called by its own `get`. Vectors are looked up
in an array instead of being embedded. Runs in the peers' environment and imports nothing of ours.
"""

import os
import shutil
import time
from typing import Any

import faiss
import gptcache
import numpy as np
import psutil
import sqlalchemy
from answering import answer_requests
from gptcache import Cache, Config
from gptcache.adapter.api import get
from gptcache.manager import CacheBase, VectorBase, get_data_manager
from gptcache.manager.scalar_data.base import Answer, DataType
from gptcache.processor.pre import get_prompt
from gptcache.similarity_evaluation import SearchDistanceEvaluation

BATCH = 1000


class Peer:
    def __init__(self) -> None:
        self.cache: Any = None
        self.queries: Any = None

    def versions(self) -> dict:
        from importlib.metadata import version

        return {
            "versions": {
                "gptcache": version("gptcache"), "faiss": faiss.__version__, "sqlalchemy": sqlalchemy.__version__
            },
            "package": gptcache.__name__,
        }  # fmt: skip

    def build(self, folder: str, vectors: str, queries: str, threads: int) -> dict:
        """A cache of the vectors in a file, whose answers are their row numbers. Seconds, and entries a second."""
        faiss.omp_set_num_threads(threads)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        entries = np.load(vectors)
        self.queries = np.load(queries)
        manager = get_data_manager(
            CacheBase("sqlite", sql_url=f"sqlite:///{folder}/sqlite.db"),
            VectorBase("faiss", dimension=entries.shape[1], index_path=f"{folder}/faiss.index"),
            max_size=2 * len(entries),
        )
        self.cache = Cache()
        self.cache.init(
            pre_embedding_func=get_prompt,
            embedding_func=lambda prompt, **_: self.queries[int(prompt)],
            data_manager=manager,
            similarity_evaluation=SearchDistanceEvaluation(),
            config=Config(enable_token_counter=False, disable_report=True),
        )
        began = time.perf_counter()
        for start in range(0, len(entries), BATCH):
            rows = entries[start : start + BATCH]
            names = [str(start + i) for i in range(len(rows))]
            answers = [Answer(name, DataType.STR) for name in names]
            manager.import_data([f"question {name}" for name in names], answers, list(rows), [None] * len(rows))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "inserts_per_s": len(entries) / seconds}

    def lookup(self, first: int, count: int) -> dict:
        """Answers to queries, None where there is none, and each one's milliseconds by wall clock and processor."""
        answers, wall, cpu = [], [], []
        for query in range(first, first + count):
            began, used = time.perf_counter(), time.process_time()
            found = get(str(query), cache_obj=self.cache)
            cpu.append(1e3 * (time.process_time() - used))
            wall.append(1e3 * (time.perf_counter() - began))
            answers.append(None if found is None else int(found))
        return {"answers": answers, "wall_ms": wall, "cpu_ms": cpu}

    def memory(self) -> dict:
        return {"rss_bytes": psutil.Process().memory_info().rss}


if __name__ == "__main__":
    answer_requests(Peer())
