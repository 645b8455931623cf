"""The study's figures from cells made up for the purpose: drops, intervals, claims, table and plot."""

import json

import numpy as np
import pytest

from jaxstack.reasoning.longcot.config import BASE, Cell, study_config
from jaxstack.reasoning.longcot.report import analyse, report_text, study_plot

PROBLEMS, SEEDS = 40, 2
# Share of correct greedy answers and of samples.
ACCURACY = {
    "correct": (1.0, 0.5),
    "wrong": (1.0, 0.25),
    "shuffle-1": (0.1, 0.1),
    "wrongL": (0.3, 0.1),
    "wrongP": (0.95, 0.4),
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    cells = (Cell("correct"), Cell("wrong"), Cell("shuffle"), Cell("wrongL"), Cell("wrongP"))
    config = study_config("relay", cells=cells, seeds=SEEDS, problems=PROBLEMS)
    rng = np.random.default_rng(0)
    table = {}
    for cell in (BASE, *config.with_seeds()):
        folder = workdir / cell.folder
        folder.mkdir()
        greedy, sampled = ACCURACY.get(cell.name, (0.0, 0.0))
        drawn = {"greedy": rng.random(PROBLEMS) < greedy, "t1": rng.random(PROBLEMS) < sampled}
        rows = [
            {"cluster": str(i), **{mode: {"correct": bool(drawn[mode][i])} for mode in drawn}} for i in range(PROBLEMS)
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        figures = {mode: float(drawn[mode].mean()) for mode in drawn}
        figures |= {"slipped": 0.25 + 0.5 * cell.seed} if cell.name == "wrong" else {}
        figures |= {"mean_tokens": 100.0 + cell.seed, "carried_on": None, "train_s": 1.0, "evaluate_s": 1.0}
        (folder / "summary.json").write_text(json.dumps(figures))
        table[cell.folder] = drawn
    return config, workdir, table


def test_figures(study):
    config, workdir, table = study
    summary = analyse(config, workdir)

    def mean(name, mode):
        return np.mean([table[f"{name}-seed{seed}"][mode] for seed in range(SEEDS)])

    rows = {row["name"]: row for row in summary["cells"]}
    assert list(rows) == ["correct", "wrong", "shuffle-1", "wrongL", "wrongP"]
    for name, row in rows.items():
        assert row["greedy"] == pytest.approx(mean(name, "greedy"))
        assert row["t1"] == pytest.approx(mean(name, "t1"))
        assert row["drop"] == pytest.approx(mean("correct", "greedy") - mean(name, "greedy"))
        assert row["greedy_ci95"][0] <= row["greedy"] <= row["greedy_ci95"][1]
        assert row["mean_tokens"] == 100.5 and row["carried_on"] is None and row["counted_down"] is None
    for figure, name in {"structure": "shuffle-1", "content": "wrong", "place": "wrongL", "value": "wrongP"}.items():
        assert summary[f"{figure}_drop"] == pytest.approx(rows[name]["drop"])
        low, high = summary[f"{figure}_drop_ci95"]
        assert low <= summary[f"{figure}_drop"] <= high
    # Nothing differs between correct and wrong under greedy: the bootstrap says [0, 0], the rule of three 3/40.
    assert summary["content_drop_ci95"] == [0.0, 0.0]
    assert summary["content_drop_bound"] == pytest.approx(3 / PROBLEMS)
    assert summary["content_drop_t1"] > 0
    assert "structure_drop_bound" not in summary
    assert summary["lora_minus_full"] is None
    assert summary["base_accuracy"] == {"think": 0.0, "nothink": None}
    assert rows["shuffle-1"]["paper_drop_points"] is None  # the paper's figure that we know is of 0.67
    assert rows["wrong"]["paper_drop_points"] == 3.2


def test_claims(study):
    config, workdir, _ = study
    summary = analyse(config, workdir)
    claims = {row["figure"]: row["met"] for row in summary["acceptance"]}
    assert claims == {
        "base_greedy": True,
        "correct_greedy": True,
        "structure_drop": True,
        "content_drop": True,
        "place_drop": True,
        "value_drop": True,
    }
    assert summary["accepted"]
    # Predictions are judged like claims, where their cells were run, and decide nothing.
    assert [(row["figure"], row["value"], row["met"]) for row in summary["predictions"]] == [
        ("wrong_repaired", 0.5, True)
    ]
    for name in (f"shuffle-1-seed{seed}" for seed in range(SEEDS)):
        file = workdir / name / "answers.jsonl"
        kept = file.read_text()
        file.write_text(kept.replace('"greedy": {"correct": false}', '"greedy": {"correct": true}'))
        try:
            worse = analyse(config, workdir)
        finally:
            file.write_text(kept)
        assert not worse["accepted"]
        assert not {row["figure"]: row["met"] for row in worse["acceptance"]}["structure_drop"]


def test_report_and_plot(study, tmp_path):
    config, workdir, _ = study
    summary = analyse(config, workdir)
    text = report_text(summary)
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "within 0.075" in lines["wrong"]
    assert "3.2 (average accuracy)" in lines["wrong"] and "n/a" in lines["shuffle-1"]
    assert lines["structure_drop"].endswith("| met |")
    assert lines["wrong_repaired"] == "| wrong_repaired | <= 0.6 | 0.500 | right |"
    assert "Not claimed here" not in text
    control = report_text(
        {**summary, "task": "countdown", "acceptance": summary["acceptance"][:3], "content_drop": 0.5}
    )
    assert "Not claimed here: that content hardly matters. All-wrong demonstrations cost 0.500" in control
    study_plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(summary)
