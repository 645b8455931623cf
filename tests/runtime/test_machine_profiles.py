"""Profiles of machines: as JSON and back, and what a wrong one is told."""

import json

import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.machine import PROFILES, HardwareProfile, load_profile


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_survives_its_file(name, tmp_path):
    PROFILES[name].save(tmp_path / "machine.json")
    assert load_profile(str(tmp_path / "machine.json")) == PROFILES[name] == load_profile(name)


def test_devices_multiply_everything_but_the_link():
    four = PROFILES["t4"].with_devices(4)
    assert four.all_devices.memory_bytes == 4 * PROFILES["t4"].device.memory_bytes
    assert four.all_devices.flops_per_s == 4 * 65e12
    assert four.link == PROFILES["t4"].link


def test_scaling_scales_rates_and_sizes():
    small = PROFILES["gh200"].scaled(0.25, name="quarter")
    assert small.device.bytes_per_s == 0.9e12 and small.link.both_bytes_per_s == 125e9
    assert small.host.memory_bytes == 120 * 10**9 and small.name == "quarter"


@pytest.mark.parametrize(
    "part, field, value, told",
    [
        ("device", "flops_per_s", 0, "device.flops_per_s: found 0, expected a number > 0"),
        ("host", "bytes_per_s", -1.0, "host.bytes_per_s: found -1.0"),
        ("link", "to_host_bytes_per_s", "fast", "link.to_host_bytes_per_s: found 'fast'"),
        ("link", "both_bytes_per_s", float("inf"), "link.both_bytes_per_s: found inf"),
        ("device", "memory_bytes", True, "device.memory_bytes: found True"),
    ],
)
def test_a_wrong_figure_is_named(part, field, value, told):
    found = PROFILES["t4"].as_json()
    found[part][field] = value
    with pytest.raises(UserError) as error:
        HardwareProfile.from_json(found, source="mine.json")
    assert told in str(error.value) and "mine.json" in str(error.value)


def test_missing_and_unknown_fields_are_named(tmp_path):
    found = PROFILES["t4"].as_json()
    del found["host"]["bytes_per_s"]
    with pytest.raises(UserError, match="host: the field 'bytes_per_s' is missing"):
        HardwareProfile.from_json(found)
    found = PROFILES["t4"].as_json() | {"gpus": 1}
    with pytest.raises(UserError, match="found the field 'gpus'"):
        HardwareProfile.from_json(found)
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(UserError, match="found no JSON"):
        load_profile(str(file))
    file.write_text(json.dumps([1]))
    with pytest.raises(UserError, match="found list, expected an object"):
        load_profile(str(file))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"found 'a4', expected a file or one of .*gh200.*t4"):
        load_profile("a4")
