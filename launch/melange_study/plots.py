"""The study's pictures: the best type by size, cost against rate, tighter plans, routing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jaxstack.fleet.profile.lengths import PAPER_SIZED_GRID
from launch.melange_study.report import best_type_table
from launch.melange_study.workloads import SHEETS, WORKLOADS, StudyConfig

Parts = Mapping[str, Mapping[str, Any]]

_COLOURS = dict(zip((sheet.name for sheet in SHEETS), ("tab:green", "tab:orange", "tab:blue", "tab:red")))


def draw(study: StudyConfig, parts: Parts, workdir: Path) -> list[Path]:
    """Draws all of them into `workdir`; returns the files."""
    figures = {"best_type.png": _best_type(parts), "cost.png": _cost(study, parts), "routing.png": _routing(parts)}
    for name, figure in figures.items():
        figure.savefig(workdir / name, dpi=110)
    return [workdir / name for name in figures]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _best_type(parts: Parts) -> Figure:
    names = [name for name in parts if name.startswith("sizes-")]
    figure = _figure(6.5 * len(names), 5.2)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        table = best_type_table(parts[name])
        order = list(_COLOURS)
        ax.imshow(
            [[-1 if cell is None else order.index(cell[0]) for cell in row] for row in table],
            cmap=ListedColormap(["lightgrey", *_COLOURS.values()]), vmin=-1, vmax=len(order) - 1,
            aspect="auto", alpha=0.6,
        )  # fmt: skip
        for i, row in enumerate(table):
            for j, cell in enumerate(row):
                lead = "" if cell is None else ("only" if cell[1] == float("inf") else f"+{cell[1]:.0%}")
                ax.text(j, i, "none" if cell is None else f"{cell[0]}\n{lead}", ha="center", va="center", fontsize=7)
        ax.set_xticks(range(PAPER_SIZED_GRID.shape[1]), [str(edge) for edge in PAPER_SIZED_GRID.output_edges_tokens])
        ax.set_yticks(range(PAPER_SIZED_GRID.shape[0]), [str(edge) for edge in PAPER_SIZED_GRID.input_edges_tokens])
        ax.set_xlabel("output tokens, at most")
        ax.set_ylabel("input tokens, at most")
        ax.set_title(f"Most tokens for a dollar, TPOT {name.removeprefix('sizes-')}, and the lead over the next type")
    return figure


def _cost(study: StudyConfig, parts: Parts) -> Figure:
    figure = _figure(13, 4.2 * len(study.tpots_s))
    axes = figure.subplots(len(study.tpots_s), len(WORKLOADS), squeeze=False)
    for row, tpot_s in zip(axes, study.tpots_s):
        for ax, workload in zip(row, WORKLOADS):
            rows = parts[f"costs-{workload}-{1e3 * tpot_s:.0f}ms"]["rows"]
            rates = [r["rate_rps"] for r in rows]
            for name, colour in _COLOURS.items():
                points = [(r["rate_rps"], r["alone"][name]) for r in rows if r["alone"][name] is not None]
                if points:
                    ax.plot(*zip(*points), marker="o", markersize=3, color=colour, label=f"{name} alone")
            ax.plot(rates, [r["cost"] for r in rows], color="black", linewidth=2.5, label="mix")
            ax.plot(rates, [r["fractional_bound"] for r in rows], "k:", linewidth=1, label="fractions of replicas")
            ax.set(xscale="log", yscale="log", xlabel="requests/s", ylabel="$/h")
            ax.set_title(f"{workload}, TPOT {1e3 * tpot_s:.0f} ms")
            ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    return figure


def _routing(parts: Parts) -> Figure:
    names = [name for name in parts if name.startswith("routing-")]
    figure = _figure(6 * len(names), 4)
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        rules = parts[name]["rules"]
        for place, (rule, row) in enumerate(rules.items()):
            colour = "tab:green" if rule == "occupancy" else "tab:gray"
            ax.scatter([place] * len(row["ttft_p99_s"]), row["ttft_p99_s"], color=colour, s=18)
            ax.plot([place - 0.3, place + 0.3], [row["median_ttft_p99_s"]] * 2, color=colour)
        ax.set_xticks(range(len(rules)), list(rules), rotation=15)
        ax.set(yscale="log", ylabel="TTFT P99, seconds")
        ax.set_title(f"{name.removeprefix('routing-').replace('-', ', ')} requests/s: a seed each, and the median")
        ax.grid(alpha=0.3, axis="y")
    return figure
