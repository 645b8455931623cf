import io
import json

import pytest

from jaxstack.runtime.metrics import MetricWriter, WindowedMeans, plot_curves, read_rows, write_summary
from jaxstack.runtime.progress import Progress


def test_windowed_means_divide_once_and_continue_exactly_from_their_state():
    batches = [(0.1, 1.0), (30.3, 101.0), (7.7, 3.0)]
    whole = WindowedMeans()
    for num, den in batches:
        whole.add("loss", num, den)
    assert whole.means() == {"loss": pytest.approx(38.1 / 105)}
    stopped = WindowedMeans()
    stopped.add("loss", *batches[0])
    resumed = WindowedMeans(json.loads(json.dumps(stopped.state())))
    for num, den in batches[1:]:
        resumed.add("loss", num, den)
    assert resumed.means() == whole.means()
    whole.reset()
    whole.add("empty", 0.0, 0.0)
    assert whole.means() == {"empty": 0.0}


def test_rows_after_the_resumed_step_and_torn_lines_are_removed(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0 / step, "note": "x"})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [2, 4, 6]
    with MetricWriter(tmp_path, resume_step=4, tensorboard=False) as writer:
        writer.write(6, {"loss": 9.0}, group="eval")
        # On disk at once: a kill loses no row.
        assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.5, 0.25, 9.0]
    with MetricWriter(tmp_path, tensorboard=False):
        assert read_rows(tmp_path / "metrics.jsonl") == []
    assert list((tmp_path / "tensorboard").iterdir())


def test_summary_and_plot(tmp_path):
    write_summary(tmp_path, {"loss": float("nan"), "steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": None, "steps": 3}
    plot_curves(tmp_path / "loss.png", {"train": [(1, 2.0), (2, 1.0)]}, x="step", y="loss")
    plot_curves(tmp_path / "empty.png", {}, x="step", y="loss")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "empty.png").exists()


def test_progress_shows_rate_and_figures_and_is_silent_when_disabled():
    stream = io.StringIO()
    with Progress(10, "train", initial=4, stream=stream) as bar:
        bar.figures(loss=0.123456, tokens_per_s=7)
        bar.advance(6)
        bar.say("hello")
    text = stream.getvalue()
    assert "train: 100%" in text and "10/10" in text and "loss=0.1235" in text and "tokens_per_s=7" in text
    assert "hello" in text
    silent = io.StringIO()
    with Progress(10, "train", enabled=False, stream=silent) as bar:
        bar.advance()
        bar.say("hello")
    assert silent.getvalue() == ""
