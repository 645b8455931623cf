"""`python -m launch.fleet` as a user runs it: three real servers, killed while they answer, and the controller too."""

import json
import socket
import subprocess
from pathlib import Path

import programs
import pytest

from launch.skyserve_study.local import run_local


def fleet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return programs.run("launch.fleet", *arguments)


def test_replicas_and_controller_are_killed_and_no_answer_notices(tmp_path: Path) -> None:
    lines: list[str] = []
    found = run_local(
        tmp_path, seconds=4.0, kills=2, streams=12, controller_kills=1, clients=6, tokens=120, progress=lines.append
    )
    said = found, lines
    assert found["local_failed_requests"] == 0 and found["local_lost_or_repeated_tokens"] == 0, said
    assert found["local_streams_identical"] == 1.0 and found["local_requests"] >= 12, said
    assert found["local_kills"] == 2 and found["local_controller_kills"] == 1 and found["local_orphans"] == 0, said
    assert found["local_resumed"] >= 1, said
    # What it leaves can be looked at.
    shown = fleet("status", f"--workdir={tmp_path / 'fleet'}")
    assert shown.returncode == 0 and "service live, version 1: 0 ready" in shown.stdout
    # One that is killed in the last moments ends with the service, before anyone sees why.
    assert "PREEMPTED" in shown.stdout or "the service is brought down" in shown.stdout
    told = json.loads(fleet("status", "--json", f"--workdir={tmp_path / 'fleet'}").stdout)
    assert told["controller"] is None and told["version"] == 1 and all(row["ended"] for row in told["replicas"])
    name = told["replicas"][0]["id"]
    assert "serving tiny at" in fleet("logs", name, f"--workdir={tmp_path / 'fleet'}").stdout
    down = fleet("down", f"--workdir={tmp_path / 'fleet'}")
    assert json.loads(down.stdout.splitlines()[-1]) == {"ended": 0, "controller": None}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "command: found none, expected one of up, status, logs, down"),
        (("start",), 2, "command: found 'start'"),
        (("up",), 2, "up: found 0 further words, expected a service file"),
        (("up", "none.yaml"), 1, "service: none.yaml cannot be read"),
        (("status", "--workdir=/nonexistent/fleet"), 1, "workdir: found no fleet in /nonexistent/fleet"),
        (("down", "x"), 2, "down: found 1 further words, expected none"),
    ],
)
def test_mistakes_get_one_line_and_a_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = fleet(*arguments)
    assert done.returncode == code and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in said


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "service.yaml").write_text("service: {readiness_probe: /, replicas: 1}\nrun: sleep 60\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = fleet("up", str(tmp_path / "service.yaml"), f"--workdir={tmp_path / 'fleet'}", f"--port={port}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "error: proxy: " in said and f"cannot listen on 127.0.0.1:{port}" in said
    assert not list((tmp_path / "fleet" / "replicas").iterdir())  # nothing was started for nobody
