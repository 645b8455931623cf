"""The study of the semantic cache on short streams: replays against plain re-enactments, the summary, the report, the
pictures, going on, streams from files, bad flags."""

import dataclasses
import json

import numpy as np
import programs
import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.policies import StaticThreshold, make_policy
from jaxstack.serving.semantic_cache.streams import make_stream
from launch.vectorq_study import tasks
from launch.vectorq_study.replay import Neighbours, replay, replay_static
from launch.vectorq_study.study import run_study
from launch.vectorq_study.tasks import StudyConfig

SMALL = StudyConfig(requests=400, seeds=2, deltas=(0.02, 0.05), streams=("combo", "noisy"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vectorq")
    return workdir, run_study(SMALL, workdir, workers=1)


def test_neighbours_are_those_of_exact_search(monkeypatch):
    monkeypatch.setattr("launch.vectorq_study.replay._NEAREST", 6)  # so that lists end too early
    stream = make_stream("combo", 150, 3)
    near = Neighbours(stream.vectors)
    rng = np.random.default_rng(0)
    for i in (0, 1, 5, 80, 149):
        is_entry = rng.random(150) < 0.3
        ids, s = near.entries(i, is_entry, 4)
        among = np.flatnonzero(is_entry[:i])
        exact = np.sort(stream.vectors[among] @ stream.vectors[i])[::-1][:4]
        np.testing.assert_allclose(s, exact, atol=1e-6)
        np.testing.assert_allclose(stream.vectors[ids] @ stream.vectors[i], s, atol=1e-6)


@pytest.mark.parametrize("nearest", [5, 256])
def test_all_static_thresholds_at_once_are_each_by_itself(monkeypatch, nearest):
    monkeypatch.setattr("launch.vectorq_study.replay._NEAREST", nearest)
    stream = make_stream("noisy", 300, 1)
    near = Neighbours(stream.vectors)
    thresholds = np.array([0.4, 0.7, 0.9, 0.97])
    hits, wrong = replay_static(stream, near, thresholds)
    for threshold, h, w in zip(thresholds, hits, wrong):
        alone = replay(stream, near, StaticThreshold(threshold), seed=0)
        assert (h, w) == (pytest.approx(alone.hits), pytest.approx(alone.error))
    assert hits[0] > hits[-1] and wrong[0] > 0


def test_a_replay_is_the_life_of_a_cache():
    """Against a re-enactment without the sorted lists."""
    stream = make_stream("combo", 250, 5)
    found = replay(stream, Neighbours(stream.vectors), make_policy("bayes", delta=0.05), seed=2)
    policy, coins = make_policy("bayes", delta=0.05), np.random.default_rng([2, 1]).random(250)
    entries: list[int] = []
    for i in range(250):
        s = stream.vectors[entries] @ stream.vectors[i] if entries else np.zeros(0)
        order = np.argsort(-s, kind="stable")[: policy.k]
        ids = np.full((1, policy.k), -1)
        ids[0, : len(order)] = np.array(entries, int)[order] if entries else []
        cosines = np.zeros((1, policy.k))
        cosines[0, : len(order)] = s[order]
        made = policy.decide(ids, cosines, coins[i : i + 1])
        assert bool(made.hit[0]) == found.hit[i]
        if made.hit[0]:
            continue
        right = None
        if made.column[0] >= 0:
            chosen = ids[0, made.column[0]]
            right = bool(stream.answers[chosen] == stream.answers[i])
            policy.label(int(chosen), float(cosines[0, made.column[0]]), right, float(made.tau[0]))
        if not right:
            entries.append(i)
    assert found.hits > 0.05 and len(found.labels) > 100


def test_static_thresholds_in_hindsight(monkeypatch):
    monkeypatch.setattr(tasks, "THRESHOLDS", np.array([0.5, 0.7, 0.9]))
    hits, errors = np.array([0.6, 0.4, 0.1]), np.array([0.3, 0.1, 0.0])
    assert tasks.best_static(hits, errors, 0.1) == (0.4, 0.7)
    assert tasks.best_static(hits, errors + 0.5, 0.1) == (0.0, None)
    assert tasks.hits_at_error(hits, errors, 0.2) == pytest.approx(0.5)
    assert tasks.hits_at_error(hits, errors, 0.9) == pytest.approx(0.6)
    assert tasks.error_at_hits(hits, errors, 0.5) == pytest.approx(0.2)
    assert tasks.error_at_hits(hits, errors, 0.7) is None


def test_the_summary_has_every_figure(small):
    workdir, summary = small
    assert summary == json.loads((workdir / "summary.json").read_text())
    assert summary["cells"] == 4 and 0 <= summary["delta_violations"] <= 4
    for figure in ("hit_gain_best_static", "hit_gain_equal_error", "error_reduction_equal_hits"):
        assert set(summary[figure]) == set(summary["paper_rule_" + figure]) == {"combo", "noisy"}
    rows = summary["rows"]["combo"]
    assert rows["0.05"]["bayes"]["hits"] > rows["0.02"]["bayes"]["hits"] > 0
    row = rows["0.02"]
    assert row["bayes"]["hit_gain_best_static"] == pytest.approx(
        row["bayes"]["hits"] / row["best_static"]["hits"], rel=1e-3
    )
    assert set(row) == {"best_static", "bayes", "vcache", *tasks.OTHERS}
    assert set(summary["bars"]) == {
        "delta_violations", "hit_gain_best_static.combo", "hit_gain_best_static.noisy"
    }  # fmt: skip
    text = (workdir / "report.md").read_text()
    assert "NOT MET" in text or all(summary["bars"].values())
    assert "reject where tau = 1" in text
    for name in ("error_vs_hits.png", "error_over_time.png", "regions.png"):
        assert (workdir / name).stat().st_size > 10_000


def test_what_is_finished_is_not_done_again(small):
    workdir, _ = small
    file = workdir / "parts" / "combo-0.json"
    part = json.loads(file.read_text())
    for row in part["runs"]["bayes"].values():
        row["error"] = 0.5
    kept = file.read_text()
    file.write_text(json.dumps(part))
    assert run_study(SMALL, workdir, workers=1)["rows"]["combo"]["0.02"]["bayes"]["error"] > 0.2
    file.write_text(kept)
    with pytest.raises(UserError, match=r"found a study with other settings \(requests\)"):
        run_study(dataclasses.replace(SMALL, requests=500), workdir, workers=1)


def test_streams_from_files_by_the_command_line(tmp_path):
    stream = make_stream("combo", 150, 0)
    rows = zip(stream.vectors.tolist(), stream.classes.tolist())
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"emb_a": vector, "id_set": own}) + "\n" for vector, own in rows))
    command = ["--paper=vectorq", "--vectorq_seeds=1", "--deltas=0.02", "--vectorq_workers=1"]
    done = programs.run("launch.reproduce", *command, f"--data={data}", f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert list(summary["rows"]) == ["mine"] and summary["requests"] == {"mine": 150}


@pytest.mark.parametrize(
    ("flag", "code", "complaint"),
    [
        ("--scale=full", 1, "--scale=full: found no --data, expected files"),
        ("--streams=combo,calm", 2, "--streams: found 'calm', expected some of combo"),
        ("--deltas=0.01", 2, "expected 0.02 among them"),
        ("--deltas=a", 2, "--deltas: found 'a', expected numbers"),
        ("--data=/nowhere.parquet", 1, "/nowhere.parquet: cannot be read"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, flag, code, complaint):
    done = programs.run("launch.reproduce", "--paper=vectorq", "--vectorq_workers=1", flag, f"--workdir={tmp_path}")
    assert done.returncode == code and complaint in done.stderr
    assert "Traceback" not in done.stderr
