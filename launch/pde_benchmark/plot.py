"""Error against seconds, log-log: a panel for each problem, a colour for each side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw(path: str | Path, runs: Sequence[Mapping[str, Any]], targets: Mapping[str, float]) -> None:
    """Runs of a contest with their histories. `targets`: case -> the error that was to be reached."""
    cases = list(dict.fromkeys(run["case"] for run in runs))
    labels = list(dict.fromkeys(run["label"] for run in runs))
    figure = Figure(figsize=(5.2 * len(cases), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for panel, case in zip(panels, cases):
        for number, label in enumerate(labels):
            mine = [run for run in runs if (run["case"], run["label"]) == (case, label)]
            for index, run in enumerate(mine):
                points = [(s, c) for s, c in run["history"] if s > 0 and np.isfinite(c) and c > 0]
                if points:
                    panel.loglog(*zip(*points), color=f"C{number}", alpha=0.8, label=None if index else label)
        panel.axhline(targets[case], color="black", linestyle="--", linewidth=0.8)
        panel.set_title(case)
        panel.set_xlabel("run seconds")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("centred relative L2 error")
    if panels[0].lines:
        panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
