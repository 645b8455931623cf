"""The spot study end to end on windows of two hours: the summary, the report, the pictures, going on, bad flags."""

import dataclasses
import json
import math
import shutil

import programs
import pytest

from jaxstack.fleet.controller import load_service
from jaxstack.fleet.spot.synthetic import PROFILES, generate
from jaxstack.fleet.spot.traces import save_trace_dir
from jaxstack.runtime.errors import UserError
from launch.skyserve_study import full_scale, report
from launch.skyserve_study.simulated import Settings
from launch.skyserve_study.study import run_study


def reproduce(*arguments):
    return programs.run("launch.reproduce", "--paper=skyserve", *arguments)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("skyserve")
    settings = Settings(windows=1, hours=2.0, omniscient_windows=1)
    return workdir, settings, run_study(settings, workdir, workers=1, local=False)


def test_the_summary_has_every_figure(made_up):
    workdir, _, summary = made_up
    assert summary == json.loads((workdir / "summary.json").read_text())
    for name in report.BARS:
        assert name in summary or name.startswith("local_")
    assert summary["starvation_cost_ratio"] == pytest.approx(2.0, abs=0.01)
    assert summary["omniscient_integral"] and summary["omniscient_optimal"]
    assert summary["omniscient_gap"] > 1.0
    assert set(summary["availability_and_cost"]) == set(PROFILES)
    for pairs in summary["availability_and_cost"].values():
        assert pairs["on_demand"]["1"] == [1.0, 1.0]
    for policies in summary["latency"].values():
        for row in policies.values():
            assert 0 < row["p50"] <= row["p90"] <= row["p99"] <= 100.0
    joint = summary["joint"]["plans"]
    planned = {name: row["planned_usd_per_hour"] for name, row in joint.items() if row["plan"]}
    assert planned["joint"] == min(planned.values()) < planned["on_demand"]
    assert joint["joint"]["lower_bound_usd_per_hour"] == pytest.approx(planned["joint"], rel=1e-3)
    assert set(summary["joint"]["requests"]) == {"on_demand", "joint"}
    assert set(summary["sweep"]["aws1"]) == {"0", "1", "2", "3"}


def test_the_report_says_all_of_it_beside_the_paper(made_up):
    workdir, _, _ = made_up
    text = (workdir / "report.md").read_text()
    assert all(name in text for name in report.BARS)
    assert "100, 58" not in text and "99, 58" in text  # the paper's for its second set
    for name in ("cost.png", "sweep.png", "latency.png", "timeline.png", "joint.png"):
        assert (workdir / name).stat().st_size > 10_000


def test_what_is_finished_is_not_done_again(made_up):
    workdir, settings, _ = made_up
    file = workdir / "parts" / "starvation.json"
    part = json.loads(file.read_text())
    part["paper"]["cost"] = 3 * part["ours"]["cost"]
    file.write_text(json.dumps(part))
    assert run_study(settings, workdir, workers=1, local=False)["starvation_cost_ratio"] == 3.0
    with pytest.raises(UserError, match=r"found a study with other settings \(hours\)"):
        run_study(dataclasses.replace(settings, hours=3.0), workdir, workers=1, local=False)


def test_a_bound_that_was_not_found_in_time_is_said_to_be_missing(made_up, tmp_path):
    workdir, settings, _ = made_up
    shutil.copytree(workdir, tmp_path / "w")
    for name in settings.sets:
        file = tmp_path / "w" / "parts" / f"omniscient-{name}.json"
        part = json.loads(file.read_text())
        part["rows"] = [row | {"status": "time_limit", "cost": math.nan} for row in part["rows"]]
        file.write_text(json.dumps(part))
    summary = run_study(settings, tmp_path / "w", workers=1, local=False)
    assert summary["omniscient_gap"] is None and "omniscient_gap" not in summary["bars"]
    assert not summary["omniscient_optimal"]
    assert "not solved in time" in (tmp_path / "w" / "report.md").read_text()


def test_traces_of_files(tmp_path):
    trace = generate(PROFILES["aws1"], 0, days=1)
    save_trace_dir(trace, tmp_path / "traces" / "mine")
    done = reproduce(
        "--windows=1", "--hours=1", "--skyserve_workers=1", "--noskyserve_local", f"--workdir={tmp_path / 'w'}",
        f"--trace_dir={tmp_path / 'traces'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary["availability_and_cost"]) == ["mine"]
    assert "placer_cost_ratio_aws1" not in summary  # a bar for the made-up set of that name


def test_bad_flags_are_one_line(tmp_path):
    done = reproduce("--trace_dir=/nowhere", f"--workdir={tmp_path}")
    assert done.returncode == 1 and done.stderr.startswith("error: --trace_dir=/nowhere: found no folder")
    assert len(done.stderr.splitlines()) == 1


def test_the_paper_s_own_run_is_planned_in_files_that_can_be_read(tmp_path):
    summary = full_scale.run(tmp_path)
    spec = load_service(summary["files"]["spothedge"])
    assert spec.spot and spec.policy.overprovision == 1 and spec.policy.max_replicas == 3
    assert not load_service(summary["files"]["on-demand"]).spot
    costs = {name: row["usd"] for name, row in summary["expected"].items()}
    assert costs["on_demand"] == pytest.approx(3 * 24 * 16.288, abs=0.01)
    assert costs["spot_pool"] < costs["ours"] < costs["on_demand"]


def test_a_window_longer_than_the_trace_is_one_line(tmp_path):
    save_trace_dir(generate(PROFILES["aws1"], 0, days=0.5), tmp_path / "mine")
    with pytest.raises(UserError, match="expected one inside"):
        run_study(Settings(trace_dir=str(tmp_path / "mine")), tmp_path / "w", workers=1, local=False)
    with pytest.raises(UserError, match=r"--hours: found 0\.1"):
        Settings(hours=0.1)
