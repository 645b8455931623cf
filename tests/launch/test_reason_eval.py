"""`python -m launch.reason_eval` with the embedded model: figures, files, continuation, and one line for bad usage."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.reason_eval", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_embedded_model(tmp_path: Path) -> None:
    flags = ["--limit=6", "--samples=1", "--budgets=150", f"--workdir={tmp_path}"]
    done = run(*flags, "--max_sequences=4", "--max_batch_tokens=32", "--pages=100")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["task"] == summary["model"] == "countdown" and summary["questions"] == 6 and summary["failed"] == 0
    assert summary["greedy"]["mean"] >= 0.5 and set(summary["pass_at"]) == {"1"}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12
    assert "pass@1" in done.stderr and "countdown: 100%" in done.stderr
    assert (tmp_path / "pass_at_k.png").stat().st_size > 1000


def test_bad_usage(tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--task=chess"], 2, "--task: task 'chess' is unknown; known are AIME24"),
        (["--task=AIME24", "--samples=0"], 1, "AIME24: no data"),
    ):
        done = run(*arguments, f"--workdir={tmp_path}")
        assert done.returncode == code and done.stdout == "", done.stderr
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
