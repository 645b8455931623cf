"""Trace files, and traces made up: their statistics are those asked for."""

import json

import numpy as np
import pytest

from jaxstack.fleet.spot.evaluation import random_window
from jaxstack.fleet.spot.synthetic import PROFILES, TraceProfile, ZoneProfile, generate
from jaxstack.fleet.spot.traces import UNLIMITED, SpotTrace, load_trace_dir, region_of, save_trace_dir
from jaxstack.fleet.spot.view import ZonePrice
from jaxstack.runtime.errors import UserError


def write(folder, name, data, gap=300, content=None):
    folder.mkdir(exist_ok=True)
    whole = {"metadata": {"gap_seconds": gap}, "data": data} | (content or {})
    (folder / name).write_text(json.dumps(whole))


def test_round_trip(tmp_path):
    trace = SpotTrace(("us-east-1f", "us-west-2c"), 300.0, np.array([[4, 0, 1], [2, 3, 3]]))
    save_trace_dir(trace, tmp_path / "set", suffix="v100_1")
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == [
        "us-east-1f_v100_1.json",
        "us-west-2c_v100_1.json",
    ]
    loaded = load_trace_dir(tmp_path / "set")
    assert loaded.zones == trace.zones and loaded.gap_s == 300.0 and loaded.name == "set"
    assert (loaded.capacity == trace.capacity).all()


def test_unlike_gaps_and_lengths_are_told(tmp_path):
    write(tmp_path / "t", "a_g_1.json", [1, 2, 3], gap=300)
    write(tmp_path / "t", "b_g_1.json", [5, 6, 7, 8], gap=200)
    said = []
    trace = load_trace_dir(tmp_path / "t", say=said.append)
    assert trace.gap_s == 100.0
    assert trace.capacity.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3], [5, 5, 6, 6, 7, 7, 8, 8]]
    assert len(said) == 2 and "every 100 s" in said[0] and "shortest" in said[1]


def test_zones_that_only_have_some_are_unlimited(tmp_path):
    write(tmp_path / "t", "a_g_1.json", [1, 0])
    write(tmp_path / "t", "a_g_8.json", [1, 1])
    trace = load_trace_dir(tmp_path / "t")
    assert trace.zones == ("a_g_1", "a_g_8")  # the zone alone would not tell them apart
    assert trace.capacity.tolist() == [[UNLIMITED, 0], [UNLIMITED, UNLIMITED]]


@pytest.mark.parametrize(
    "content, found",
    [
        ({"metadata": None}, "metadata.gap_seconds None"),
        ({"metadata": {}}, "metadata.gap_seconds None"),
        ({"metadata": {"gap_seconds": 0}}, "gap_seconds 0"),
        ({"metadata": {"gap_seconds": True}}, "gap_seconds True"),
        ({"data": []}, "no samples"),
        ({"data": [1, -1]}, "-1 as sample 1"),
        ({"data": [1, 1.5]}, "1.5 as sample 1"),
        ({"data": ["1"]}, "'1' as sample 0"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(tmp_path, content, found):
    write(tmp_path / "t", "a_g_1.json", [1], content=content)
    with pytest.raises(UserError, match=found) as error:
        load_trace_dir(tmp_path / "t")
    assert "a_g_1.json" in str(error.value) and "\n" not in str(error.value)


def test_no_files_and_no_json(tmp_path):
    with pytest.raises(UserError, match=r"found no \*.json"):
        load_trace_dir(tmp_path)
    with pytest.raises(UserError, match=r"found no \*.json"):
        load_trace_dir(tmp_path / "nowhere")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x.json: found no JSON"):
        load_trace_dir(tmp_path)


def test_a_window_is_inside_or_an_error():
    trace = SpotTrace(("a",), 300.0, np.arange(10)[None])
    assert trace.window(600.0, 900.0).capacity.tolist() == [[2, 3, 4]]
    assert trace.ticks(150.0)[0, :5].tolist() == [0, 0, 1, 1, 2]
    assert trace.ticks(600.0)[0].tolist() == [0, 2, 4, 6, 8]
    for start, duration in ((2700.0, 600.0), (-300.0, 300.0), (0.0, 0.0)):
        with pytest.raises(UserError, match="expected one inside"):
            trace.window(start, duration)
    with pytest.raises(UserError, match="expected one inside"):
        random_window(trace, 86400.0, 0)


def test_a_trace_is_whole():
    rows = np.ones((1, 3), int)
    with pytest.raises(UserError, match="found no price for zone 'a'"):
        SpotTrace(("a",), 300.0, rows, {"b": ZonePrice(1.0, 3.0)})
    with pytest.raises(UserError, match="for 2 zones"):
        SpotTrace(("a", "b"), 300.0, rows)
    with pytest.raises(UserError, match="capacity of -1"):
        SpotTrace(("a",), 300.0, -rows)


@pytest.mark.parametrize(
    "zone, region",
    [
        ("us-east-1f", "us-east-1"),
        ("us-central1-a", "us-central1"),
        ("asia-northeast1-b", "asia-northeast1"),
        ("z", "z"),
    ],
)
def test_regions_by_name(zone, region):
    assert region_of(zone) == region


@pytest.mark.parametrize("name", PROFILES)
def test_made_up_traces_have_the_statistics_asked_for(name):
    """Means over ten seeds: shares of time up, and correlations inside regions."""
    profile = PROFILES[name]
    up = np.array([generate(profile, seed).capacity > 0 for seed in range(10)], float)
    assert up.mean((0, 2)) == pytest.approx([zone.up for zone in profile.zones], abs=0.05)
    for i, first in enumerate(profile.zones):
        for j, second in enumerate(profile.zones[:i]):
            wanted = profile.correlation(first, second)
            if wanted:
                found = np.mean([np.corrcoef(rows[[i, j]])[0, 1] for rows in up])
                assert found == pytest.approx(wanted, abs=0.15), (first.name, second.name)


def test_levels_and_seeds():
    trace, same, other = (generate(PROFILES["aws1"], seed, days=5) for seed in (1, 1, 2))
    assert (trace.capacity == same.capacity).all()
    assert not (trace.capacity == other.capacity).all()
    assert set(np.unique(trace.capacity)) <= set(range(5)) and len(np.unique(trace.capacity)) > 3
    assert trace.duration_s == 5 * 86400.0


def test_a_bad_profile_is_one_line():
    with pytest.raises(UserError, match="zone a"):
        TraceProfile("p", (ZoneProfile("a", 1.5),), {}, 1.0)
    with pytest.raises(UserError, match="no outages of region 'r'"):
        TraceProfile("p", (ZoneProfile("a", 0.5, region="r"),), {}, 1.0)
    with pytest.raises(UserError, match="at least one sample"):
        generate(TraceProfile("p", (ZoneProfile("a", 0.5),), {}, 1.0), 0, days=1e-4)
