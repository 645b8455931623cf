"""The study of DLPM, tiny: every part, the report, and going on after a part is lost. Replays of a trace."""

import json
import subprocess

import programs
import pytest

from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import drive
from jaxstack.engine.scheduling.simulator import SimulatedReplica
from jaxstack.engine.scheduling.step_cost import StepCostModel
from jaxstack.engine.scheduling.trace import TraceRecorder
from jaxstack.engine.scheduling.workloads import mixed
from jaxstack.runtime.errors import UserError
from launch.dlpm_study import full_scale
from launch.dlpm_study.config import Parts, StudyConfig
from launch.dlpm_study.simulated import simulate
from launch.papers import dlpm

TINY = StudyConfig(
    quanta=(512, 2048),
    warm_s=0.4,
    span_s=0.4,
    spans=2,
    short_spans=1,
    visits=1,
    simulated_s=0.15,
    simulated_warm_s=0.05,
    replicas=2,
    max_sequences=4,
    max_batch_tokens=64,
    num_pages=160,
    hidden_size=16,
    layers=1,
    heads=2,
    seeds=1,
    workers=1,
)


POLICIES = (*dlpm.GATED_FLEET, "lpm+preble")


class InProcess:
    """An executor that starts no process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = dlpm.concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_):
        pass


def test_a_study_says_everything_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(dlpm.concurrent.futures, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(dlpm, "FLEET_POLICIES", {name: dlpm.FLEET_POLICIES[name] for name in POLICIES})
    summary = dlpm.run_study(TINY, tmp_path, live_fleet=False)
    for name in ("dlpm_over_vtc_throughput", "dlpm_over_vtc_throughput_equal", "dlpm_over_vtc_requests"):
        assert summary[name] is None or summary[name] >= 0  # nothing may have ended in a span on a busy machine
    assert 0 < summary["gap_over_bound"] <= 1
    assert summary["d2lpm_over_vtc_throughput"] is None or summary["d2lpm_over_vtc_throughput"] >= 0
    assert summary["d2lpm_over_vtc_throughput_live"] is None
    assert summary["recompilations"] == 0
    assert summary["step_cost"]["error"]["samples"] >= 8
    for policy in ("fcfs", "lpm", "vtc", "dlpm"):
        row = summary["live"]["mixed"][policy]
        assert row["requests_per_s"] >= 0 and 0 <= row["hit_rate"] < 1 and 0 < row["jain"] <= 1
        assert (row["gap_over_bound"] is None) == (policy in ("fcfs", "lpm"))
        assert summary["trees"]["trees"]["programs"][policy].keys() == {"finished", "p50_s", "p99_s"}
    assert json.loads((tmp_path / "summary.json").read_text())["acceptance"] == summary["acceptance"]
    report = (tmp_path / "report.md").read_text()
    assert "| dlpm_over_vtc_throughput |" in report and "| lpm+preble |" in report
    for picture in ("service.png", "pareto.png", "latency.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    # Two parts are lost; the others stay as they are.
    files = sorted((tmp_path / "parts").glob("*.json"))
    lost = [tmp_path / "parts" / f"{name}.json" for name in ("sim-mixed-dlpm", "sim-fleet-mixed-d2lpm-0")]
    before = {file: (file.stat().st_mtime_ns, file.read_text()) for file in files}
    for file in lost:
        file.unlink()
    monkeypatch.setattr(dlpm.plots, "draw", lambda *_: [])
    again = dlpm.run_study(TINY, tmp_path, live_fleet=False)
    for file, (written, text) in before.items():
        if file in lost:
            ours, theirs = json.loads(file.read_text()), json.loads(text)
            assert ours["row"] == theirs["row"]  # the simulator is deterministic
        else:
            assert file.stat().st_mtime_ns == written
    same = ("dlpm_over_vtc_throughput", "d2lpm_over_vtc_throughput", "predicted", "gap_over_bound")
    assert {name: again[name] for name in same} == {name: summary[name] for name in same}
    with pytest.raises(UserError, match=r"other settings \(quantum\)"):
        Parts(tmp_path, json.loads((tmp_path / "study.json").read_text()) | {"quantum": 1})


def test_full_scale_runs_are_what_the_paper_ran(monkeypatch):
    step = full_scale.costs()
    assert 0.005 < step["base_s"] < 0.02 and 1e-5 < step["token_s"] < 1e-4
    runs = full_scale.simulations([1, 4], 1.0, step)
    assert len(runs) == 2 * 7 * 4
    run = runs["full-4-trees-s1-d2lpm"]
    assert run.replicas == 4 and run.options["programs"] == 16 and run.sizes["num_pages"] > 20_000
    small = simulate(runs["full-1-chat-dlpm"])
    found = full_scale.summarise({f"full-1-{w}-{p}": small for w in full_scale.WORKLOADS for p in full_scale.ONE}, [1])
    assert found["over_vtc_throughput"]["1"]["chat"] == 1.0 and "| dlpm |" in full_scale.text(found)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Two seconds of a simulated replica, recorded."""
    file = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    server = SimulatedReplica.of(policy_named("fcfs"), StepCostModel(0.002, 25e-6))
    with TraceRecorder(file, server.scheduler) as recorder:
        server.observers.append(recorder)
        drive(server, mixed(backlog=2, flood=8), until_s=2.0)
    return file


def replay(*arguments: str, **how: bool) -> subprocess.CompletedProcess[str]:
    return programs.run("launch.replay", *arguments, **how)


def test_replay_prints_a_table(trace, tmp_path):
    done = replay(f"--trace={trace}", "--policies=vtc,dlpm", "--quantum=2048", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["policies"].keys() == {"vtc", "dlpm"} and summary["requests"] > 50
    assert summary["policies"]["dlpm"]["gap_over_bound"] <= 1
    # Fitted to a log whose costs are known.
    assert summary["step_cost"]["token_s"] == pytest.approx(25e-6, rel=1e-3)
    assert "dlpm" in done.stderr and done.stderr.count("\n") == 4


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ((), "--trace is missing", 2),
        (("--trace=nowhere",), "nowhere: cannot be read", 1),
        (("--trace={trace}", "--costs=nowhere"), "--costs: found 'nowhere'", 1),
        (("--trace={trace}", "--policies=best"), "policy: found 'best', expected one of", 1),
    ],
)
def test_bad_usage_of_replay(trace, arguments, message, code):
    done = replay(*(argument.format(trace=trace) for argument in arguments))
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr
