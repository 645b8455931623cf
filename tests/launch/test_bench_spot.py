"""`python -m launch.bench_spot`: the simulator agrees with the naive loop, beside which it is timed."""

import json
from pathlib import Path

import programs
import pytest


def test_a_day_of_one_set_beside_the_naive_loop_and_a_wrapper(tmp_path: Path) -> None:
    # A wrapper as a user would write one; the cold start is no whole number of ticks.
    (tmp_path / "spot_simulator.py").write_text(
        "import time\n\n\ndef run(capacity, target, extra, cold_ticks):\n"
        "    assert (target, extra, cold_ticks) == (3, 1, 4)\n"
        "    end = time.process_time() + 0.2\n    while time.process_time() < end:\n        pass\n"
    )
    done = programs.run(
        "launch.bench_spot",
        "--sets=aws3",
        "--policies=ours",
        "--cold_start_s=100",
        "--runs=1",
        "--nobound",
        f"--artifact={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    row = found["aws3, ours, 100 s"]
    assert row["ticks_per_s"] > 0 and row["over_naive"] > 0 and row["over_artifact"] > 0
    assert found["over_naive_geometric_mean"] == row["over_naive"]
    assert "published" in done.stderr


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--policies=theirs", 2, "--policies: found 'theirs', expected some of ours"),
        ("--cold_start_s=120,soon", 2, "--cold_start_s: found '120,soon', expected numbers of seconds > 0"),
        ("--sets=", 2, "found none, expected at least one of each"),
        ("--sets=aws9", 1, "profile: found 'aws9', expected one of"),
    ],
)
def test_mistakes_get_one_line(flag: str, code: int, message: str) -> None:
    done = programs.run("launch.bench_spot", flag)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert any(line.startswith("error: ") and message in line for line in done.stderr.splitlines()), done.stderr
