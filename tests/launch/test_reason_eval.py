"""`python -m launch.reason_eval` with the embedded model: figures, files, continuation, and one line for bad usage."""

import json
from pathlib import Path

from programs import run


def test_the_embedded_model(tmp_path: Path) -> None:
    """A real engine, asked from several threads; its prompt opens the thought."""
    flags = ["--limit=12", "--samples=2", "--budgets=40,150", "--temperature=1", f"--workdir={tmp_path}"]
    flags += ["--max_sequences=4", "--max_batch_tokens=32", "--pages=100"]
    done = run("launch.reason_eval", *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["task"] == summary["model"] == "countdown" and summary["questions"] == 12 and summary["failed"] == 0
    figures = {k: interval["mean"] for k, interval in summary["pass_at"].items()}
    assert summary["greedy"]["mean"] >= 0.6 and figures["2"] >= figures["1"] > 0
    assert summary["budgets"]["40"]["mean"] < summary["budgets"]["150"]["mean"] == figures["1"]
    assert 20 < summary["mean_tokens"] < 150
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 36
    assert "pass@1" in done.stderr and "countdown: 100%" in done.stderr
    assert (tmp_path / "pass_at_k.png").stat().st_size > 1000


def test_bad_usage(tmp_path: Path) -> None:
    done = run("launch.reason_eval", "--task=chess", f"--workdir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --task: task 'chess' is unknown; known are AIME24")
    assert done.stderr.count("\n") == 1
