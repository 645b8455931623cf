"""bench_cached_server in small: every figure, answers that are the first ones, and both files."""

import json
from pathlib import Path

import programs


def test_the_launcher_prints_every_figure(tmp_path: Path) -> None:
    done = programs.run("launch.bench_cached_server", "--problems=3", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["different_answers"] == 0
    for kind in ("miss", "exact", "hit"):
        assert summary[f"{kind}_requests"] >= 1
        assert 0 < summary[f"{kind}_p50_ms"] <= summary[f"{kind}_max_ms"]
    asked = sum(summary[f"{kind}_requests"] for kind in ("miss", "exact", "hit"))
    assert asked + sum(summary["answered_otherwise"].values()) == 9
    assert summary["hit_over_miss"] > 0
    assert (tmp_path / "server.log").exists()
