"""The study of MoE-Lightning, a few settings of it: the report, the plots, and going on where it was."""

import json

import pytest

from jaxstack.engine.memory import hrm, laws
from jaxstack.runtime.errors import UserError
from launch.offload_study import full_scale, measured, published, report
from launch.papers.moe_lightning import run_study


def test_a_study_says_everything_and_goes_on_where_it_was(tmp_path):
    summary = run_study(tmp_path, settings=2, tables=False, measured=False)
    for name in ("s1_over_s2", "s1_over_s3", "s1_over_s4"):
        assert summary[name] >= summary[f"{name}_min"] > 1.35
    assert summary["hrm_vs_authors"] >= 1 and summary["hrm_vs_authors_executed"] >= summary["hrm_vs_authors"]
    assert summary["ours_over_s1"] >= summary["ours_over_s1_fractional"] > 1
    assert summary["measured"] is None and len(summary["tables"]["schedules"]) == 2
    plans = summary["tables"]["plans"].values()
    assert any(0 < plan["kv_streamed"] < 1 and plan["weights_streamed"] == 0 for plan in plans)
    assert any(plan["weights_streamed"] > 0.5 for plan in plans)
    assert summary["accepted"] == all(gate["met"] for gate in summary["acceptance"])
    for name in ("report.md", "timeline.png", "roofline.png", "schedules.png", "summary.json"):
        assert (tmp_path / name).stat().st_size > 1000
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    (tmp_path / "parts" / "ablation.json").unlink()
    times = {part: part.stat().st_mtime_ns for part in (tmp_path / "parts").iterdir()}
    again = run_study(tmp_path, settings=2, tables=False, measured=False)
    assert {**again, "wall_s": 0} == {**summary, "wall_s": 0}
    assert all(part.stat().st_mtime_ns == then for part, then in times.items())
    with pytest.raises(UserError, match=r"found a study with other settings \(settings\)"):
        run_study(tmp_path, settings=3, tables=False, measured=False)


def test_what_is_raced_has_the_times_of_the_paper_and_a_place_in_the_report():
    """The race itself is timed, which is no test's business; that its schedules draw the right tokens has its own."""
    on_host, on_device = measured.scaled_times(on_device=False), measured.scaled_times(on_device=True)
    n = measured.MICRO_BATCHES
    assert laws.s1_period(on_host, n) == pytest.approx(measured.PERIOD_S)
    setting = next(each for each in published.mtbench_settings() if each.name == "S1, 128")
    whole = hrm.policy_times(setting.machine, setting.model, setting.workload, setting.policy)
    scale = on_host.after / whole.after
    assert on_host.weights == pytest.approx(scale * whole.weights * n / setting.policy.n_micro_batches)
    assert on_device.load_kv > 0 and on_device.after == on_host.after
    row = {"measured_s": 0.2, "simulated_s": 0.19}
    raced = {"s1_over_s2": 1.5, "s1_over_s3": 1.6, "s1_over_s4": 1.2, "simulated_vs_measured": 0.053}
    raced |= {"schedules": {"S1": row, "S4": row}, "foreign_cores": 0.1, "conclusive": True}
    assert [gate["met"] for gate in report.measured_gates(raced)] == [True, True, False, True]
    assert "| S4 | 200.0 | 190.0 | 1.20 |" in report.measured_lines(raced)


def test_what_to_expect_of_an_accelerator():
    found = full_scale.expect("h100_pcie", "dbrx", 50)
    assert found["s1_over_s4"] > 1.35 and found["link_busy"] > 0.95
    assert found["best_of_all"]["tokens_per_s"] >= found["tokens_per_s"] * 0.999
    assert "dbrx" in full_scale.text({"h100, dbrx": found})
    none = full_scale.expect("h100_pcie", "dbrx", 8)
    assert "too little" in none["reason"] and "none" in full_scale.text({"h100, dbrx": none})


def test_the_published_settings_fit_their_machines():
    settings = published.mtbench_settings()
    assert len(settings) == 8 and len(published.padded_settings()) == 5
    assert all(0 <= each.policy.weight_resident < 1 / 8 for each in settings)
    assert all(each.executed.policy.weight_resident == 0 for each in settings)
    # The share that the artifact prints.
    assert settings[0].policy.weight_resident == pytest.approx(0.0559, abs=1e-4)
