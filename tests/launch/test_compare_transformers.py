"""The live comparison's own errors; the comparison itself needs the peers' environment."""

import subprocess
import sys


def test_a_missing_peer_is_one_line():
    command = [sys.executable, "-m", "launch.compare_transformers", "--peer_python=/nowhere/python"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "/nowhere/python" in done.stderr
    assert "make peers" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
