"""probe_hardware as a user runs it: a profile that loads."""

import json
import subprocess
import sys

from jaxstack.runtime.machine import load_profile


def probe(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.probe_hardware", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_probe_writes_a_profile(tmp_path):
    path = tmp_path / "machine.json"
    run = probe(f"--out={path}", "--seconds=0.4", "--mib=4", "--name=here")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])
    profile = load_profile(str(path))
    assert profile.name == "here" == found["name"]
    assert found["device"] == profile.as_json()["device"] and found["link"] == profile.as_json()["link"]
    assert 1e8 < profile.device.flops_per_s < 1e16 and 1e8 < profile.device.bytes_per_s < 1e14
    assert 0 <= found["copy_hidden_under_compute"] <= 1
    assert "link, both at once" in run.stderr


def test_a_folder_that_is_not_there_is_named(tmp_path):
    run = probe(f"--out={tmp_path}/none/machine.json")
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "found no folder" in run.stderr
