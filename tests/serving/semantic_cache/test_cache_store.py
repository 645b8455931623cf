"""What survives: a close, a kill at any moment, another embedder; and files that are not a cache's."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache import CacheConfig, CachedResponse, SemanticCache

DIM = 16


class Seeded:
    """Words before "#" choose the direction; what comes behind moves it a little."""

    dim = DIM

    def __init__(self, version="1"):
        self.id = f"seeded-{version}"

    def embed(self, texts):
        rows = []
        for text in texts:
            word, _, rest = text.partition("#")
            base = np.random.default_rng(list(f"{self.id}{word}".encode())).normal(size=DIM)
            rows.append(base + 0.1 * np.random.default_rng(list(rest.encode())).normal(size=DIM))
        rows = np.array(rows)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def opened(path, **settings):
    settings = {"policy": "bayes", "delta": 0.1, "lookup_timeout_ms": 30_000, "path": str(path), **settings}
    return SemanticCache(settings.pop("embedder", Seeded()), CacheConfig(**settings))


def ask(cache, text, answer, tenant=""):
    lookup = cache.lookup([cache.scope.prompt(text, tenant=tenant)])[0]
    if lookup.response is None:
        cache.complete(lookup, CachedResponse(answer, generation_s=0.1))
    return lookup


def fill(cache, first, last):
    for n in range(first, last):
        for word in ("a", "b"):
            ask(cache, f"{word}#{n}", word)
        cache.flush()


def test_a_restart_changes_no_decision(tmp_path):
    """Goes on with one cache, and with its file in another: the same answers, beliefs and coins."""
    path, copy = tmp_path / "cache.sqlite", tmp_path / "copy.sqlite"
    first = opened(path)
    fill(first, 0, 60)
    ask(first, "gone#0", "gone")
    first.invalidate("", prompt_prefix="gone")
    first.close()
    shutil.copy(path, copy)
    decisions = []
    for file in (path, copy):
        with opened(file) as cache:
            assert cache.stats("").entries == first.stats("").entries
            assert cache.repeat(cache.scope.prompt("gone#0")) is None
            assert cache.repeat(cache.scope.prompt("a#0")).kind == "exact"
            found = []
            for n in range(80):
                found.append(ask(cache, f"{'ab'[n % 2]}#x{n}", "ab"[n % 2]))
                cache.flush()  # labels come when they come; here, before the next request
            decisions.append([(f.kind, f.entry_id, f.similarity, f.alpha, f.tau, f.u) for f in found])
            error = cache.stats("").error, cache.stats("").labels
        decisions[-1].append(error)
    assert decisions[0] == decisions[1]
    assert {kind for kind, *_ in decisions[0][:-1]} >= {"hit", "explore"}


def test_beliefs_and_budget_are_those_from_before(tmp_path):
    cache = opened(tmp_path / "c")
    fill(cache, 0, 40)
    account = cache._accounts["t:"]
    entries = list(account.entries)
    before = [account.policy.table.posterior(entry) for entry in entries]
    budget, draws = account.policy.budget.state(), account.draws
    cache.close()
    with opened(tmp_path / "c") as again:
        account = again._accounts["t:"]
        after = [account.policy.table.posterior(entry) for entry in entries]
        assert np.allclose(before, after, atol=1e-12)
        assert account.policy.budget.state() == budget
        assert account.draws == draws


_CHILD = """
import sys
from jaxstack.serving.semantic_cache import CachedResponse
from tests.serving.semantic_cache.test_cache_store import ask, opened
cache = opened(sys.argv[1])
n = int(sys.argv[2])
while True:
    request = cache.scope.prompt(f"w{n}#0", cache={"mode": "refresh"})  # never answered from another
    cache.complete(cache.lookup([request])[0], CachedResponse(f"answer {n}"))
    ask(cache, f"near#{n}", "same")
    if n % 7 == 6:
        cache.invalidate("", prompt_prefix=f"w{n}")
    if n % 3 == 0:
        assert cache.flush()
        print(n, flush=True)
    n += 1
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path):
    """SIGKILL again and again while it writes: all that `flush` confirmed is there, and nothing is torn."""
    path, rng, first = tmp_path / "cache.sqlite", np.random.default_rng(0), 0
    root = Path(__file__).parents[3]
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(path), str(first)],
            stdout=subprocess.PIPE,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            text=True,
        )
        with child:
            confirmed = int(child.stdout.readline())
            time.sleep(float(rng.uniform(0, 0.15)))
            child.send_signal(signal.SIGKILL)
            confirmed = max([confirmed, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
        with opened(path) as cache:
            for n in range(confirmed + 1):
                found = cache.repeat(cache.scope.prompt(f"w{n}#0"))
                if n % 7 == 6:
                    assert found is None or n == confirmed
                else:
                    assert found is not None, n
                    assert found.response.text == f"answer {n}"
                near = cache.repeat(cache.scope.prompt(f"near#{n}"))
                assert near is None or near.response.text == "same"
            account = cache._accounts["t:"]
            assert len(account.exact) == len(account.entries)
            indexed = sum(len(index) for index in account.indexes.values())
            assert indexed == sum(entry.semantic for entry in account.entries.values())
        first = confirmed + 1


def test_expired_entries_are_gone_after_a_restart(tmp_path):
    with opened(tmp_path / "c", ttl_s=0.2) as cache:
        ask(cache, "a#0", "yes")
    time.sleep(0.25)
    with opened(tmp_path / "c") as cache:
        assert cache.stats(None).entries == 0
        assert ask(cache, "a#1", "no").kind == "miss"
    with opened(tmp_path / "c", max_entries=1) as cache:
        assert cache.stats(None).entries == 1
        ask(cache, "b#0", "no")
        assert cache.stats(None).entries == 1


def test_entries_of_another_embedder_answer_repeats_and_are_embedded_anew(tmp_path):
    with opened(tmp_path / "c", policy="static", threshold=0.9) as cache:
        ask(cache, "a#0", "yes")
        ask(cache, "b#0", "no")
        assert ask(cache, "a#1", "").kind == "hit"
    with opened(tmp_path / "c", policy="static", threshold=0.9, embedder=Seeded("2")) as cache:
        assert cache.repeat(cache.scope.prompt("a#0")).response.text == "yes"
        cache.flush()
        assert ask(cache, "a#1", "").response.text == "yes"
    with opened(tmp_path / "c", policy="static", threshold=0.9, embedder=Seeded("2")) as cache:
        assert ask(cache, "b#1", "").response.text == "no"


def test_a_second_process_is_told_so(tmp_path):
    with opened(tmp_path / "c"):
        with pytest.raises(UserError, match="in use by another process") as caught:
            opened(tmp_path / "c")
        assert caught.value.exit_code == 2
    opened(tmp_path / "c").close()


def test_files_that_are_no_cache(tmp_path):
    (tmp_path / "text").write_text("not a database" * 100)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE things(a)")
    other.close()
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    for name, words in (("text", "cannot be read"), ("other", "another program"), ("newer", "version 99")):
        with pytest.raises(UserError, match=words) as caught:
            opened(tmp_path / name)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be opened"):
        opened("/proc/none/cache")


def test_a_store_that_cannot_be_written_leaves_the_cache_in_memory(tmp_path):
    with opened(tmp_path / "c", policy="static", threshold=0.9) as cache:
        ask(cache, "a#0", "yes")
        assert cache.flush()
        thief = sqlite3.connect(tmp_path / "c", timeout=0)
        thief.execute("DROP TABLE entries")
        thief.close()
        ask(cache, "b#0", "no")
        assert not cache.flush()
        assert "no such table" in cache.stats(None).store
        assert cache.stats("").store == cache.stats(None).store
        assert ask(cache, "b#1", "").response.text == "no"
