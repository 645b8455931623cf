"""The live comparison's own errors; the comparison itself needs the peers' environment."""

from programs import run


def test_a_missing_peer_is_one_line():
    done = run("launch.compare_transformers", "--peer_python=/nowhere/python")
    assert (done.returncode, done.stdout) == (1, "")
    assert "/nowhere/python" in done.stderr
    assert "make peers" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
