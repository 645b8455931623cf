"""What a job writes down: `metrics.jsonl`, TensorBoard events, `summary.json` and a plot.

Averages are kept as numerators and denominators and divided once, over the whole window: a mean of means weighs a short
batch as much as a long one.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class WindowedMeans:
    """Named weighted means over a window, as sums of numerators and denominators in float64.

    `state()` is JSON-ready and exact, so that a job stopped inside a window continues it to the same bit.
    """

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None):
        self._sums: dict[str, tuple[float, float]] = {k: (float(v[0]), float(v[1])) for k, v in (state or {}).items()}

    def add(self, name: str, num: float, den: float) -> None:
        old_num, old_den = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_num + float(num), old_den + float(den))

    def state(self) -> dict[str, tuple[float, float]]:
        return dict(self._sums)

    def means(self) -> dict[str, float]:
        """name -> num / den; 0 where nothing was counted."""
        return {name: num / den if den else 0.0 for name, (num, den) in self._sums.items()}

    def reset(self) -> None:
        self._sums.clear()


class MetricWriter:
    """Appends rows to `workdir/metrics.jsonl` and mirrors their numbers into `workdir/tensorboard/`.

    Each row is one JSON object with a `step`, on disk (in the page cache) when `write` returns: SIGKILL loses none.

    Args:
      workdir: the job's folder.
      resume_step: rows of later steps are removed first, because a log runs ahead of the last checkpoint and would
        otherwise hold those steps twice. A torn last line goes as well. 0 starts a new log.
      tensorboard: also write event files.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int = 0, tensorboard: bool = True):
        self.path = Path(workdir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(self.path) if row["step"] <= resume_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if text != (self.path.read_text() if self.path.exists() else ""):
            write_atomically(self.path, text)
        self._file = open(self.path, "a")  # noqa: SIM115 - lives as long as the writer
        self._events: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
            )

    def write(self, step: int, values: Mapping[str, Any], *, group: str = "train") -> None:
        """Appends `{"step": step, **values}`; TensorBoard gets the numbers under `group/`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._events.add_scalar(f"{group}/{name}", value, step)

    def write_text(self, name: str, text: str) -> None:
        """Shows a text, such as the job's config, in TensorBoard."""
        if self._events is not None:
            self._events.add_text(name, f"```\n{text}\n```")

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a torn or foreign line is passed over. Empty where there is no file."""
    rows = []
    if Path(path).exists():
        with open(path) as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def write_atomically(path: str | Path, text: str) -> None:
    """Replaces a file's content: readers see the old text or the new one, whenever the process dies."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_summary(workdir: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes `workdir/summary.json`. Non-finite numbers become null: JSON has no NaN."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    write_atomically(Path(workdir) / "summary.json", json.dumps(clean, indent=2) + "\n")


def plot_curves(path: str | Path, curves: Mapping[str, Iterable[tuple[int, float]]], *, x: str, y: str) -> None:
    """Draws named (x, y) curves into a PNG."""
    # No pyplot: it keeps figures in a global and chooses a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        xs, ys = zip(*points) if (points := list(points)) else ((), ())
        axes.plot(xs, ys, label=name, marker="o" if len(xs) < 20 else None)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(path, dpi=110)
