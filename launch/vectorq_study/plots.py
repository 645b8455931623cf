"""The study's pictures: error against hits, error over time, and what six entries have learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.vectorq_study.report import TITLES
from launch.vectorq_study.tasks import OTHERS, OURS, PAPER, StudyConfig, statics

Parts = Mapping[str, Mapping[str, Any]]

_COLOURS = {OURS: "tab:green", PAPER: "tab:red"}
_LEAST_TAU = 0.051


def draw(config: StudyConfig, parts: Parts, summary: Mapping[str, Any], workdir: Path) -> list[Path]:
    """Draws all of them into `workdir`; returns the files."""
    figures = {"error_vs_hits.png": _frontier(config, parts, summary), "error_over_time.png": _over_time(config, parts)}
    shown = next((part["entries"] for part in parts.values() if "entries" in part), None)
    if shown is not None:
        figures["regions.png"] = _regions(shown)
    for name, figure in figures.items():
        figure.savefig(workdir / name, dpi=110)
    return [workdir / name for name in figures]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, count: int) -> list[Any]:
    columns = min(3, count)
    rows = -(-count // columns)
    return list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()[:count])


def _frontier(config: StudyConfig, parts: Parts, summary: Mapping[str, Any]) -> Figure:
    rows = summary["rows"]
    figure = _figure(4.6 * min(3, len(rows)), 3.8 * -(-len(rows) // 3))
    axes = _axes(figure, len(rows))
    for ax, (stream, by_delta) in zip(axes, rows.items()):
        hits, errors = statics(parts, stream)
        ax.plot(errors, hits, "-", color="tab:gray", label="static thresholds")
        for name in (OURS, PAPER):
            points = sorted((row[name]["error"], row[name]["hits"]) for row in by_delta.values())
            ax.plot(*zip(*points), "o-", color=_COLOURS[name], label=TITLES[name], markersize=4)
        row = by_delta[f"{config.headline:g}"]
        for name in OTHERS:
            ax.plot(row[name]["error"], row[name]["hits"], "x", label=TITLES[name])
        ax.axvline(config.headline, color="black", linestyle=":", linewidth=0.8)
        ax.set_xlim(0, 2 * max(config.deltas))
        ax.set_ylim(bottom=0)
        ax.set_title(f"{stream} (dotted: delta {config.headline:g})", fontsize=10)
        ax.set_xlabel("wrong hits a request")
        ax.set_ylabel("hits a request")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def _over_time(config: StudyConfig, parts: Parts) -> Figure:
    streams = list(dict.fromkeys(part["stream"] for part in parts.values()))
    figure = _figure(4.6 * min(3, len(streams)), 3.6 * -(-len(streams) // 3))
    axes = _axes(figure, len(streams))
    for ax, stream in zip(axes, streams):
        own = [part for part in parts.values() if part["stream"] == stream]
        for name in (OURS, PAPER):
            curves = [part["runs"][name][f"{config.headline:g}"]["curve"] for part in own]
            at = curves[0]["requests"]
            for i, curve in enumerate(curves):
                label = TITLES[name] if i == 0 else None
                ax.plot(curve["requests"], curve["error"], color=_COLOURS[name], alpha=0.25, linewidth=0.8)
                if label and len({len(c["error"]) for c in curves}) == 1:
                    ax.plot(at, np.mean([c["error"] for c in curves], axis=0), color=_COLOURS[name], label=label)
        ax.axhline(config.headline, color="black", linestyle=":", linewidth=0.8)
        ax.set_ylim(0, 2 * config.headline)
        ax.set_title(stream, fontsize=10)
        ax.set_xlabel("requests")
        ax.set_ylabel("wrong hits a request so far")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _regions(entries: Mapping[str, Any]) -> Figure:
    """tau by similarity of six entries of either rule: reject, uncertain, accept; labels as ticks."""
    count = max(len(rows) for rows in entries.values())
    figure = _figure(2.9 * count, 2.6 * len(entries))
    grid = figure.subplots(len(entries), count, squeeze=False, sharex=True, sharey=True)
    for row, (name, shown) in zip(grid, entries.items()):
        for ax, entry in zip(row, shown):
            s, tau = np.array(entry["similarity"]), np.array(entry["tau"])
            ax.plot(s, tau, color=_COLOURS[name])
            for where, colour in ((tau >= 1, "tab:red"), (tau <= _LEAST_TAU, "tab:green")):
                ax.fill_between(s, 0, 1, where=where, color=colour, alpha=0.12, step="mid")
            for similarity, right in entry["labels"]:
                ax.plot(similarity, 1.06 if right else -0.06, "|", color="tab:green" if right else "tab:red")
            ax.set_title(f"{TITLES[name]}: entry {entry['entry']}, {len(entry['labels'])} labels", fontsize=8)
            ax.set_xlim(0, 1)
        row[0].set_ylabel("tau: chance of exploring", fontsize=8)
    for ax in grid[-1]:
        ax.set_xlabel("similarity", fontsize=8)
    return figure
