"""What survives: a close, a kill at any moment, another embedder; and files that are not a cache's."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache import CacheConfig, CachedResponse, SemanticCache
from jaxstack.serving.semantic_cache.store import CacheStore, StoredLabel

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


def embedded_anew(cache):
    for _ in range(1000):
        if not cache.strangers:
            return
        time.sleep(0.01)
    raise AssertionError("entries of another embedder are left")


class Held(Seeded):
    """Of another version; several texts at once are embedded when `go` is set."""

    def __init__(self, fails=False):
        super().__init__("2")
        self.begun, self.go, self.batches, self.fails = threading.Event(), threading.Event(), [], fails

    def embed(self, texts):
        if len(texts) > 1:
            self.batches.append(len(texts))
            self.begun.set()
            assert self.go.wait(60)
            if self.fails:
                raise RuntimeError("no such\nmodel")
        return super().embed(texts)


@pytest.fixture
def of_another(tmp_path):
    """A file with 100 entries of another embedder."""
    with opened(tmp_path / "c", policy="static", threshold=1.0) as cache:
        for n in range(100):
            ask(cache, f"w{n}#0", "yes")
    return tmp_path / "c"


def test_labels_come_before_what_is_embedded_anew(of_another):
    held, seen = Held(), []

    class Judge:
        def same(self, query, a, b):
            seen.append(len(held.batches))
            return True

    with opened(of_another, policy="vcache", embedder=held) as cache:
        cache.judge = Judge()
        assert held.begun.wait(30)
        ask(cache, "new#0", "yes")
        assert ask(cache, "new#1", "yes").kind == "explore"
        held.go.set()
        cache.flush()
        assert seen == [1]
        embedded_anew(cache)
        assert sum(held.batches) == 100


def test_the_end_does_not_wait_until_all_is_embedded_anew(of_another):
    held = Held()
    cache = opened(of_another, embedder=held)
    assert held.begun.wait(30)
    closing = threading.Thread(target=cache.close)
    closing.start()
    while cache._over_s is None:
        time.sleep(0.001)
    held.go.set()
    closing.join()
    assert len(held.batches) == 1
    with opened(of_another, embedder=Seeded("2")) as cache:
        assert cache.stats(None).entries == 100
        embedded_anew(cache)


def test_an_embedder_that_cannot_embed_anew_is_told_of_once(of_another, caplog):
    held = Held(fails=True)
    held.go.set()
    with opened(of_another, embedder=held) as cache:
        embedded_anew(cache)
        assert cache.repeat(cache.scope.prompt("w0#0")).kind == "exact"
    (record,) = caplog.records
    assert record.getMessage() == (
        "100 entries of another embedder answer their own requests only, until the next start: no such model"
    )


def test_entries_of_another_embedder_answer_repeats_and_are_embedded_anew(tmp_path):
    with opened(tmp_path / "c", policy="static", threshold=0.9) as cache:
        ask(cache, "a#0", "yes")
        ask(cache, "b#0", "no")
        assert ask(cache, "a#1", "").kind == "hit"
    with opened(tmp_path / "c", policy="static", threshold=0.9, embedder=Seeded("2")) as cache:
        assert cache.repeat(cache.scope.prompt("a#0")).response.text == "yes"
        embedded_anew(cache)
        assert ask(cache, "a#1", "").response.text == "yes"
    with opened(tmp_path / "c", policy="static", threshold=0.9, embedder=Seeded("2")) as cache:
        assert ask(cache, "b#1", "").response.text == "no"


def test_what_was_used_last_is_known_after_a_restart(tmp_path):
    settings = {"ttl_s": None, "eviction": "lru", "policy": "static", "threshold": 1.0}
    with opened(tmp_path / "c", **settings) as cache:
        for now, text in enumerate(("a#0", "b#0", "a#0")):
            lookup = cache.lookup([cache.scope.prompt(text)], float(now))[0]
            if lookup.response is None:
                cache.complete(lookup, CachedResponse(text), float(now))
    with opened(tmp_path / "c", max_entries=1, **settings) as cache:
        assert cache.repeat(cache.scope.prompt("a#0")) is not None
        assert cache.repeat(cache.scope.prompt("b#0")) is None


def rows(path, query):
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def test_labels_of_an_entry_that_is_asked_for_ever_do_not_pile_up(tmp_path):
    store = CacheStore(tmp_path / "c")
    store.begin()
    for n in range(700):
        store.label(StoredLabel(1 + n % 2, n / 1000, True), 0.5, "explored", "e", 0.0)
    assert store.flush()
    store.close()
    kept = rows(tmp_path / "c", "SELECT entry_id, count(*), max(s) FROM labels GROUP BY entry_id ORDER BY entry_id")
    assert kept == [(1, 256, 0.698), (2, 256, 0.699)]


def test_a_store_that_cannot_be_opened_for_writing_says_so(tmp_path, monkeypatch):
    def refuse(self, connection):
        raise sqlite3.OperationalError("disk I/O error")

    with opened(tmp_path / "c", policy="static", threshold=0.9) as cache:
        ask(cache, "a#0", "yes")
        assert cache.flush()
    monkeypatch.setattr(CacheStore, "_settings", refuse)
    with opened(tmp_path / "c", policy="static", threshold=0.9) as cache:
        assert cache.repeat(cache.scope.prompt("a#0")) is not None
        assert not cache.flush()
        assert "disk I/O error" in cache.stats(None).store
        assert ask(cache, "a#1", "").response.text == "yes"


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
    other.execute("PRAGMA user_version = 1")  # as many programs do
    other.close()
    empty = sqlite3.connect(tmp_path / "unversioned")
    empty.execute("CREATE TABLE things(a)")
    empty.close()
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    for name, words in (
        ("text", "cannot be read"),
        ("other", "another program"),
        ("unversioned", "another program"),
        ("newer", "version 99"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            opened(tmp_path / name)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be opened"):
        opened("/proc/none/cache")


def test_a_file_whose_contents_make_no_sense_is_one_line(tmp_path):
    for column, value in (("response", "{"), ("response", '{"words": 3}'), ("embedding", b"\xff" * 4 * DIM)):
        path = tmp_path / f"{column}{len(value)}"
        with opened(path) as cache:
            ask(cache, "a#0", "yes")
        connection = sqlite3.connect(path)
        connection.execute(f"UPDATE entries SET {column} = ?", (value,))
        connection.commit()
        connection.close()
        with pytest.raises(UserError, match="cannot be read as a cache") as caught:
            opened(path)
        assert caught.value.exit_code == 2
        with pytest.raises(UserError, match="cannot be read as a cache"):  # and is not held on to
            opened(path)


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
