"""The router's benchmark, with few requests, before a replica that answers at once."""

import asyncio
import json
from pathlib import Path

import programs

from tests.serving.router.raw_replica import RawReplica, whole


async def answers(writer: asyncio.StreamWriter) -> None:
    writer.write(whole(b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}'))


def test_its_last_line_has_every_figure(tmp_path: Path) -> None:
    with RawReplica(answers) as replica:
        flags = [
            f"--replica={replica.url}",
            "--requests=20",
            "--decisions=100",
            "--queued=10",
            "--queued=200",
            f"--workdir={tmp_path}",
        ]
        done = programs.run("launch.bench_router", *flags)
        assert done.returncode == 0, done.stderr
        # Each way and kind: the ones that are counted, and twenty before.
        assert len(replica.heads) == 2 * 2 * (20 + 20)
    figures = json.loads(done.stdout.splitlines()[-1])
    for name in ("whole", "stream"):
        assert figures[f"direct_{name}_p50_ms"] > 0 and figures[f"router_{name}_cpu_ms"] > 0
        assert {f"added_{name}_p50_ms", f"added_{name}_p99_ms"} <= figures.keys()
    assert figures["decisions_per_s"] > 0 and figures["decisions_from_bodies_per_s"] > 0
    assert 0 < figures["match_ms_at_10_queued"] < figures["match_ms_at_200_queued"]
    assert json.loads((tmp_path / "summary.json").read_text()) == figures
