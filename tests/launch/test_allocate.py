"""`python -m launch.allocate` and the study of Melange, small: what is printed and written, going on, mistakes."""

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import programs
import pytest

from jaxstack.fleet.plan_job import PlanConfig, problem_of, run_plan
from jaxstack.fleet.profile import DATASHEETS, LatencyObjective, LengthGrid, save_profile, throughput_from_datasheet
from jaxstack.fleet.profile.roofline import MODELS
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.mixed_fleet import RoutingTable
from launch.melange_study import race
from launch.melange_study.workloads import StudyConfig, lengths_of
from launch.papers import melange

REPOSITORY = Path(__file__).parents[2]


def allocate(*arguments: str) -> subprocess.CompletedProcess:
    return programs.run("launch.allocate", *arguments)


def test_a_plan_is_printed_and_written(tmp_path):
    done = allocate(f"--workdir={tmp_path}", "--config.rate_rps=20", "--config.replay_s=60", "--config.sensitivity=0")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "optimal" and summary["met"] and summary["attainment"] >= 0.99
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["allocation"]["counts"] == {name: summary["counts"].get(name, 0) for name in plan["types"]}
    assert "proven cheapest" in done.stdout and "alone: " in done.stdout
    table = RoutingTable.load(tmp_path / "routing.json")
    assert set(table.kinds) == set(summary["counts"])
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_get_one_line_and_a_code(tmp_path):
    (tmp_path / "bad.csv").write_text("input,output\n12,5\n7,many\n")
    cases = {
        (f"--config.lengths={tmp_path / 'bad.csv'}",): (1, "bad.csv:3: found '7,many', expected two whole numbers"),
        ("--config.rate_rps=60", "--config.caps=L4=1,A10G=0,A100-80GB=0,H100=0"): (1, "no plan: "),
        ("--config.bucket_point=middle",): (2, "expected one of mean, upper"),
    }
    for arguments, (code, message) in cases.items():
        done = allocate(f"--workdir={tmp_path / 'out'}", *arguments)
        assert done.returncode == code and "Traceback" not in done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert message in said
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["allocation"]["infeasibility"]["reasons"]


def test_plans_from_measured_profiles_and_lengths(tmp_path):
    grid = LengthGrid((100, 1000), (50, 500))
    for name in ("L4", "A100-80GB"):
        profile = throughput_from_datasheet([DATASHEETS[name]], MODELS["llama-2-7b"], grid, LatencyObjective(0.12))
        save_profile(tmp_path / f"{name}.json", profile, [DATASHEETS[name].accelerator()])
    (tmp_path / "lengths.csv").write_text("input,output\n" + "\n".join(f"{20 * i},{10 * i}" for i in range(1, 50)))
    config = PlanConfig(
        rate_rps=12.0, lengths=str(tmp_path / "lengths.csv"), replay_s=60.0, prices=("L4=0.1",), ttft_s=None,
        profile=(str(tmp_path / "L4.json"), str(tmp_path / "A100-80GB.json")),
    )  # fmt: skip
    outcome = run_plan(config)
    assert outcome.checked.met and outcome.checked.allocation.counts["L4"] >= 3  # so cheap that nothing else is rented
    assert outcome.checked.allocation.counts["A100-80GB"] == 0
    costs = [found[0] for found in outcome.by_rate.values() if found is not None]
    assert costs == sorted(costs) and len(costs) == 6
    assert all(flip.types != ("L4",) for flip in outcome.flips)
    untried = run_plan(dataclasses.replace(config, replay_s=0.0, sensitivity=False))
    assert untried.checked.report is None and untried.checked.allocation.found and not untried.by_rate
    few = dataclasses.replace(config, caps=("L4=1", "A100-80GB=0"))
    assert not run_plan(few).checked.allocation.found
    nobody = run_plan(dataclasses.replace(config, rate_rps=0.0))
    assert nobody.checked.allocation.cost_usd_per_hour == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"types": ("T4",)}, "types: found 'T4', expected some of L4"),
        ({"model": "gpt"}, "model: found 'gpt', expected one of"),
        ({"prices": ("L4=cheap",)}, "prices: found 'L4=cheap', expected a number >= 0"),
        ({"caps": ("L4=1.5",)}, "caps: found 'L4=1.5', expected a whole number"),
        ({"input_median": 0.0}, "input_median: found 0.0"),
        ({"rate_rps": -3.0}, "rate_rps: found -3.0"),
        ({"caps": ("T4=1",)}, "caps: found 'T4=1', expected TYPE=NUMBER with one of L4, A10G"),
        ({"lengths": "nowhere.csv"}, "nowhere.csv: cannot be read"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(UserError, match=message):
        problem_of(PlanConfig(**change))


def test_planning_needs_no_jax():
    code = "import sys; import jaxstack.fleet.plan_job, launch.melange_study.replays; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.stdout == "False\n", done.stderr


TINY = StudyConfig(rates_rps=(1,), replay_s=20.0, warmup_s=5.0, seeds=1)


def test_the_study_says_everything_and_goes_on_where_it_was(tmp_path, monkeypatch):
    # Two instances are enough; the peer is not there.
    monkeypatch.setattr(melange, "instances", lambda: list(race.instances())[4:6])
    summary = melange.run_study(TINY, tmp_path, interpreter=str(tmp_path / "no-python"))
    figures = {gate["figure"]: gate for gate in summary["acceptance"]}
    assert (summary["example_cost_f1"], summary["example_cost_f4"], summary["example_cost_continuous"]) == (
        6.70, 5.69, 4.68,
    )  # fmt: skip
    assert figures["example_cost_f1"]["met"] and figures["max_saving_short"]["met"]
    assert summary["replay_tpot_attainment"] >= 0.995
    assert summary["mean_point_saving"] is None or 0 < summary["mean_point_saving"] < 1
    assert summary["ttft_p99_paper_router_vs_ours"] > 0
    assert summary["speedup_vs_pulp_cbc"] is None and "no-python" in summary["pulp_cbc"]
    assert not figures["speedup_vs_pulp_cbc"]["met"] and not summary["accepted"]
    assert set(summary["max_saving_over_best_single"]) == {
        f"costs-{name}-{tpot}ms" for name in ("short", "long", "mixed") for tpot in (120, 40)
    }
    said = (tmp_path / "report.md").read_text()
    assert "| ttft_p99_paper_router_vs_ours |" in said and "## short, 120ms" in said and "was not raced" in said
    assert json.loads((tmp_path / "summary.json").read_text())["acceptance"] == summary["acceptance"]
    for picture in ("best_type.png", "cost.png", "routing.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    lost = tmp_path / "parts" / "routing-mixed-4.json"
    before, text = {f: f.stat().st_mtime_ns for f in (tmp_path / "parts").iterdir()}, lost.read_text()
    lost.unlink()
    monkeypatch.setattr(melange.plots, "draw", lambda *_: [])
    again = melange.run_study(TINY, tmp_path, interpreter=str(tmp_path / "no-python"))
    assert lost.read_text() == text
    assert all(f.stat().st_mtime_ns == written for f, written in before.items() if f != lost)
    assert {k: v for k, v in again.items() if k != "wall_s"} == {k: v for k, v in summary.items() if k != "wall_s"}


def test_the_stand_ins_are_what_they_are_said_to_be():
    short, long, mixed = (lengths_of(name) for name in ("short", "long", "mixed"))
    assert statistics.median(short[0]) == pytest.approx(45, rel=0.05)
    assert statistics.median(long[0]) == pytest.approx(3700, rel=0.05)
    assert sum(length > 1500 for length in mixed[0]) / len(mixed[0]) == pytest.approx(0.19, abs=0.02)


class Peer:
    """Answers as CBC's process would."""

    def __init__(self, cost):
        self.cost, self.asked = cost, []

    def ask(self, do, **arguments):
        self.asked.append(arguments)
        return {"status": "Optimal", "cost": self.cost, "counts": [], "wall_s": 4.0, "cpu_s": 2.0, "binaries": 96}


def test_a_race_compares_costs_and_seconds():
    instance = list(race.instances())[4]
    peer = Peer(4.37)
    found = race.race(instance, peer, cbc_limit_s=10.0, repeats=1)  # type: ignore[arg-type]
    assert found["cbc"]["dearer"] == pytest.approx(0) and not found["cbc"]["stopped"]
    assert found["slices_speedup_cpu_s"] == pytest.approx(2.0 / found["slices"]["cpu_s"])
    (asked,) = peer.asked
    assert asked["slices"] == 1 and len(asked["prices"]) == 4 and len(asked["loads"]) == len(instance.problem.asked())
    assert race.geometric_mean([2.0, 8.0]) == pytest.approx(4.0) and race.geometric_mean([]) is None
    stopped = race.race(instance, Peer(5.0), cbc_limit_s=2.0, repeats=1)  # type: ignore[arg-type]
    assert stopped["cbc"]["stopped"] and stopped["cbc"]["dearer"] > 0.1
