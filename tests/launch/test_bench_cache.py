"""bench_cache: the launcher in small without a peer, what is verified, and the real peer where it is installed."""

import json
from pathlib import Path

import numpy as np
import programs
import pytest

from launch.cache_benchmark.sides import GPTCacheSide, OurSide, exact_nearest, make_load

PEER = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"


def has_gptcache():
    return PEER.exists() and any(PEER.parents[1].glob("lib/python*/site-packages/gptcache"))


def test_vectors_and_queries():
    load = make_load(300, 64, 50)
    for rows in (load.entries, load.queries):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    brute = [max(range(300), key=lambda i, q=q: float(load.entries[i] @ q)) for q in load.queries]
    assert exact_nearest(load).tolist() == brute
    assert (exact_nearest(load) == load.near).mean() > 0.9


def test_our_lookups_answer_with_the_nearest_entry():
    load = make_load(300, 64, 200)
    ours = OurSide(load)
    ours.learn(range(100))
    found = ours.lookup(range(100, 200))
    hit = found.answers >= 0
    assert hit.mean() > 0.5 and (found.answers[hit] == exact_nearest(load)[100:][hit]).all()
    assert (ours.nearest() == exact_nearest(load)).all() and ours.policy.budget.pending == 0
    summary = found.summary()
    assert 0 < summary["p50_ms"] <= summary["p99_ms"] and summary["hits"] == hit.mean()
    assert ours.batched_per_s(range(100, 200)) > 0


def test_the_launcher_prints_every_figure(tmp_path):
    done = programs.run(
        "launch.bench_cache", "--peer=none", "--entries=300", "--dim=32", "--lookups=40", "--rounds=2", "--learn=100",
        f"--workdir={tmp_path}", f"--encoder={Path(__file__).parents[1] / 'golden' / 'encoder' / 'bert'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["recall"] == 1 and summary["hits_not_nearest"] == 0 and "lookups_ratio" not in summary
    assert set(summary["embed_ms"]) == {"hashed", "encoder"}


def test_a_missing_peer_is_one_line(tmp_path):
    done = programs.run("launch.bench_cache", "--peer_python=/nowhere", f"--workdir={tmp_path}")
    assert done.returncode == 1 and "`make peers` makes it" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not has_gptcache(), reason="GPTCache is not installed (`make peers`)")
def test_the_peer_finds_the_same_entries(tmp_path):
    load = make_load(200, 32, 20)
    peer = GPTCacheSide(str(PEER), tmp_path, threads=1)
    try:
        peer.build(load)
        found = peer.lookup(range(5, 20))
    finally:
        peer.close()
    assert (found.answers == exact_nearest(load)[5:20]).all()
