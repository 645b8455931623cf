"""Pie's study: every part is simulated with few requests, and its report and pictures are drawn from them."""

import dataclasses
import json

import pytest

from launch.pie_study import plots, report
from launch.pie_study.simulated import Pool, Run, run_part, runs


@pytest.fixture(scope="module")
def parts():
    found = {}
    for name, what in runs(1).items():
        if isinstance(what, Pool):
            found[name] = {"pool_bytes": 4e10, "reduction": 1.2}
        else:
            found[name] = run_part(dataclasses.replace(what, requests=60))
    return found


def measured(step, law, sequences, **more):
    row = {"step_s": step, "law_s": law, "sequences": sequences, "throughput": sequences / step, "tokens_equal": True}
    return row | {"steps": 30, "peak_bytes": 9, "budget_bytes": 10, "recompilations": 0, "late_s": 0.0} | more


def test_the_report_and_the_pictures(parts, tmp_path):
    rows = {
        "k0": measured(0.26, 0.256, 50),
        "k8": measured(0.264, 0.259, 65, unlinked_step_s=0.262, unlinked_tokens_equal=True),
        "k16": measured(0.272, 0.264, 94, unlinked_step_s=0.27, unlinked_tokens_equal=True),
    }
    summary = report.summarise(parts | {"measured": rows}, 1)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["measured"]["throughput_gain_k8"] == pytest.approx(65 / 0.264 / (50 / 0.26), abs=1e-4)
    assert summary["measured"]["added_latency"] == pytest.approx(0.264 / 0.262 - 1, abs=1e-4)
    assert summary["simulated_vs_measured"] == pytest.approx(0.272 / 0.264 - 1, abs=1e-4)
    assert set(summary["bars"]) == set(report.BARS)
    equal = [
        report.summarise(parts | {"measured": rows | {"k16": rows["k16"] | {"unlinked_tokens_equal": same}}}, 1)
        for same in (True, False)
    ]
    assert [each["bars"]["measured.tokens_equal"] for each in equal] == [True, False]
    assert 1.0 < summary["throughput_gain_k8"] < summary["throughput_gain_k16"]
    assert summary["added_latency"] == 0 and summary["link_20GBps_forced_k16"] < 0.5
    text = report.text(summary)
    assert all(name in text for name in report.BARS)
    for file in plots.draw(parts, summary, tmp_path):
        assert file.stat().st_size > 10_000


def test_without_measurement_the_rest_is_reported(parts):
    summary = report.summarise(parts, 1)
    assert "measured" not in summary and "measured.added_latency" not in summary["bars"]
    assert "measured" not in report.text(summary)


def test_a_run_says_what_it_came_to():
    row = run_part(Run(requests=20, trace=True))
    assert row["rate"] > 0 and row["stall"] == 0 and len(row["samples"]) > 1
    assert row["samples"][-1][1] <= sum(job.output for job in Run(requests=20).jobs())
