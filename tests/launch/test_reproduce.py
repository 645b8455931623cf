"""`python -m launch.reproduce`: a study killed midway goes on where it was; plans of the full run; bad usage."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import programs
import pytest

from jaxstack.reasoning.longcot.cells import CellRunner
from jaxstack.reasoning.longcot.config import Cell, study_config
from jaxstack.reasoning.longcot.report import analyse, report_text
from jaxstack.runtime.errors import UserError
from launch.papers.longcot import look_through

CONFIG = study_config(
    "relay",
    cells=(Cell("correct"), Cell("shuffle")),
    seeds=1,
    base_steps=6,
    base_documents=200,
    sft_steps=24,
    sft_documents=100,
    batch_rows=2,
    problems=8,
    width=16,
    layers=1,
    save_every=2,
    workers=1,
)


def start_study(workdir: Path) -> programs.Program:
    return programs.start("tests.launch.tiny_study", workdir, json.dumps(CONFIG.as_json()))


def start_until_checkpoint(workdir: Path, cell: str) -> programs.Program:
    """A study in the middle of a cell."""
    process, deadline = start_study(workdir), time.monotonic() + 300
    while not any((workdir / cell / "train" / "checkpoints").glob("[0-9]*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


def finished(process: programs.Program) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def trained_steps(folder: Path) -> list[int]:
    file = folder / "train" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_killed_study_goes_on_where_it_was(tmp_path, compiled_programs):
    workdir = tmp_path / "killed"
    workdir.mkdir()
    (workdir / "compiled").symlink_to(compiled_programs)
    process = start_until_checkpoint(workdir, "shuffle-1-seed0")
    process.kill()  # alone: its worker finds out
    process.communicate()
    assert not (workdir / "shuffle-1-seed0" / "summary.json").exists()
    done = {name: (workdir / name / "summary.json").stat().st_mtime_ns for name in ("base", "correct-seed0")}
    table = finished(start_study(workdir))
    for name, written in done.items():
        assert (workdir / name / "summary.json").stat().st_mtime_ns == written

    # The cell that was killed, once more and undisturbed, beside the same others.
    reference = tmp_path / "reference"
    for name in ("base", "correct-seed0", "tokenizer"):
        shutil.copytree(workdir / name, reference / name)
    summary = CellRunner(CONFIG, reference).run(Cell("shuffle"))
    assert summary is not None and summary["train"]["recompilations"] == 0
    assert table == report_text(analyse(CONFIG, reference)) + "\n"
    assert "| shuffle-1 |" in table and "| correct |" in table
    for name in ("correct-seed0", "shuffle-1-seed0"):
        assert trained_steps(workdir / name) == trained_steps(reference / name) == [10, 20, 24]
        answers = [(folder / name / "answers.jsonl").read_text() for folder in (workdir, reference)]
        assert answers[0] == answers[1]
    assert (workdir / "longcot.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((workdir / "summary.json").read_text())["cells"]
    assert [row["name"] for row in rows] == ["correct", "shuffle-1"]


def reproduce(*arguments: str, **how: bool) -> subprocess.CompletedProcess[str]:
    return programs.run("launch.reproduce", *arguments, **how)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--paper is missing; expected one of dlpm, longcot"),
        (("--paper=longcot", "--cells=correct,nonsense"), "'nonsense' is unknown; expected some of correct"),
    ],
)
def test_bad_usage(arguments, message, tmp_path):
    done = reproduce(*arguments, f"--workdir={tmp_path}")
    assert done.returncode in (1, 2)
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_the_full_run_is_planned_without_weights(tmp_path):
    rows = [
        {"conversations": [
            {"from": "user", "value": "2 + 2?"},
            {"from": "assistant", "value": "<|begin_of_thought|>\n\nAdd.\n\nWait, 4.\n\n<|end_of_thought|>\n4"},
        ]}
    ]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    flags = ["--paper=longcot", "--scale=full", f"--data={data}", f"--workdir={tmp_path / 'out'}"]
    done = reproduce(*flags, anew=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["demonstrations"] == {
        "rows": 2,
        "without_thought": 0,
        "steps_a_thought": 2.0,
        "keywords_a_thought": 1.0,
    }
    assert summary["parameters"] == 32_763_876_352  # as the model's card counts them
    # Rank 64 on seven linear layers of 64: 64 * (in + out) each.
    sides = 2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 27_648)
    assert summary["trainable"] == 64 * 64 * sides
    assert summary["device_gb"]["weights"] == round(summary["parameters"] * 2 / 8 / 1e9, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "found the fields 'text', expected 'conversations'"),
        ({"conversations": [{"from": "user"}]}, "conversations\\[0\\]: expected an object with 'from' and 'value'"),
    ],
)
def test_rows_that_are_no_demonstrations(row, message, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"conversations": []}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"{re.escape(str(data))}:2: {message}"):
        look_through(str(data))
