"""probe_hardware as a user runs it: a profile that loads."""

import json

from programs import run

from jaxstack.runtime.machine import load_profile


def test_a_probe_writes_a_profile(tmp_path):
    path = tmp_path / "machine.json"
    flags = [f"--out={path}", "--seconds=0.4", "--mib=4", "--name=here"]
    done = run("launch.probe_hardware", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    profile = load_profile(str(path))
    assert profile.name == "here" == found["name"]
    assert found["device"] == profile.as_json()["device"] and found["link"] == profile.as_json()["link"]
    assert 1e8 < profile.device.flops_per_s < 1e16 and 1e8 < profile.device.bytes_per_s < 1e14
    assert 0 <= found["copy_hidden_under_compute"] <= 1
    assert "link, both at once" in done.stderr


def test_a_folder_that_is_not_there_is_named(tmp_path):
    done = run("launch.probe_hardware", f"--out={tmp_path}/none/machine.json")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "found no folder" in done.stderr
