"""What a study's cells say together: accuracies, drops with intervals, claims borne out, table and plot.

All cells answer the same problems, and their samples at temperature 1 have the same seeds, so differences are paired:
problems and seeds are resampled together (`jaxstack.reasoning.statistics`). The paper's figures stand beside ours and
never enter them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxstack.reasoning.longcot.config import BASE, Cell, StudyConfig
from jaxstack.reasoning.longcot.results import read_answers, read_summary
from jaxstack.reasoning.statistics import Interval, bootstrap_mean, paired_bootstrap, rule_of_three

PAPER: Mapping[str, Any] = {
    "source": "arXiv 2502.07374; Qwen2.5-32B-Instruct",
    "aime_2024": {"base": 16.7, "17k samples": 56.7},
    "drop_points": {
        "wrong": {"points": 3.2, "of": "average accuracy"},
        "digits-0.5": {"points": 4.3, "of": "average accuracy, as recalled"},
        "keywords-1": {"points": 3.3, "of": "average accuracy, as recalled"},
        "shuffle-0.67": {"points": 13.3, "of": "AIME 2024"},
    },
}
"""What the paper reports; cells that are not here are not known to us, and printed as n/a."""

_DIAGNOSTICS = (
    *("mean_tokens", "keywords_per_sample", "right_steps", "carried_on", "counted_down", "illegal_steps"),
    *("repeated_steps", "no_answer"),
)


@dataclasses.dataclass(frozen=True)
class Gate:
    """A claim of the study: a figure of the summary, and its bound."""

    figure: str
    bound: float
    at_least: bool

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


GATES: Mapping[str, tuple[Gate, ...]] = {
    "relay": (
        Gate("base_greedy", 0.05, False),
        Gate("correct_greedy", 0.95, True),
        Gate("structure_drop", 0.60, True),
        Gate("content_drop", 0.10, False),
        Gate("place_drop", 0.50, True),
        Gate("value_drop", 0.10, False),
        Gate("digits-0.2_drop", 0.10, False),
        Gate("keywords-1_drop", 0.15, False),
        Gate("insert-1_drop", 0.50, True),
        Gate("delete-0.67_drop", 0.50, True),
    ),
    "countdown": (
        Gate("gain", 0.30, True),
        Gate("structure_drop", 0.10, True),
        Gate("keywords-1_drop", 0.10, False),
    ),
}
PREDICTIONS: Mapping[str, tuple[Gate, ...]] = {
    "relay": (
        # A slip is followed by a recheck in every right demonstration, and in about half of the wrong ones.
        Gate("correct_repaired", 0.80, True),
        Gate("wrong_repaired", 0.60, False),
        Gate("shuffle-1_repaired", 0.10, False),
        Gate("keywords-1_repaired", 0.50, True),
        Gate("correct-lora_drop", 0.10, False),
        Gate("correct-60samples_drop", 0.20, True),
        Gate("correct-250samples_drop", 0.10, False),
        Gate("correct-1000samples_drop", 0.05, False),
    ),
    "countdown": (),
}
"""Said before the cells were run, and not gated: whether the model still backtracks, adapters, and fewer samples."""
# Name of a figure -> the cell whose drop it is.
_NAMED_DROPS = {"structure": "shuffle-1", "content": "wrong", "place": "wrongL", "value": "wrongP"}


def analyse(config: StudyConfig, workdir: Path) -> dict[str, Any]:
    """The summary of a study whose cells are all done."""
    modes = ("greedy", "t1")
    clusters = [row["cluster"] for row in read_answers(workdir / BASE.folder)]

    def answers(cell: Cell) -> dict[str, Bool[np.ndarray, "seeds problems"]]:
        seeds = (dataclasses.replace(cell, seed=seed) for seed in range(config.seeds))
        rows = [read_answers(workdir / seed.folder) for seed in seeds]
        return {mode: np.array([[row[mode]["correct"] for row in of_seed] for of_seed in rows]) for mode in modes}

    reference = answers(next(cell for cell in config.cells if cell.name == "correct"))
    base = read_summary(workdir / BASE.folder)
    assert base is not None
    rows: list[dict[str, Any]] = []
    drops: dict[str, dict[str, Interval]] = {}
    for cell in config.cells:
        runs = [read_summary(workdir / dataclasses.replace(cell, seed=s).folder) or {} for s in range(config.seeds)]
        table = answers(cell)
        drops[cell.name] = {mode: paired_bootstrap(reference[mode], table[mode], clusters=clusters) for mode in modes}
        greedy = bootstrap_mean(table["greedy"], clusters=clusters)
        sampled = bootstrap_mean(table["t1"], clusters=clusters)
        rows.append(
            {
                "name": cell.name,
                "kind": cell.kind,
                "fraction": cell.fraction,
                "lora": cell.lora,
                "seeds": config.seeds,
                "greedy": greedy.mean,
                "greedy_ci95": [greedy.low, greedy.high],
                "greedy_by_seed": [float(mean) for mean in table["greedy"].mean(axis=1)],
                "t1": sampled.mean,
                "t1_ci95": [sampled.low, sampled.high],
                "nothink": _mean([run.get("no_thinking") for run in runs]),
                "repaired": _mean([run.get("slipped") for run in runs]),
                "drop": drops[cell.name]["greedy"].mean,
                "drop_ci95": [drops[cell.name]["greedy"].low, drops[cell.name]["greedy"].high],
                "paper_drop_points": PAPER["drop_points"].get(cell.name, {}).get("points"),
                **{name: _mean([run.get(name) for run in runs]) for name in _DIAGNOSTICS},
                "train_s": _mean([run.get("train_s") for run in runs]),
                "evaluate_s": _mean([run.get("evaluate_s") for run in runs]),
            }
        )
    summary: dict[str, Any] = {"task": config.task, "seeds": config.seeds, "problems": config.problems}
    for figure, name in _NAMED_DROPS.items():
        if name in drops:
            summary |= _drop_figures(figure, drops[name], config.problems)
    accuracy = {row["name"]: row["greedy"] for row in rows}
    summary["base_accuracy"] = {"think": base["greedy"], "nothink": base.get("no_thinking")}
    summary["lora_minus_full"] = accuracy["correct-lora"] - accuracy["correct"] if "correct-lora" in accuracy else None
    figures = {f"{name}_drop": both["greedy"].mean for name, both in drops.items()}
    figures |= {name: value for name, value in summary.items() if isinstance(value, float)}
    figures |= {"base_greedy": base["greedy"], "correct_greedy": accuracy["correct"]}
    figures["gain"] = accuracy["correct"] - base["greedy"]
    figures |= {f"{row['name']}_repaired": row["repaired"] for row in rows if row["repaired"] is not None}

    def judged(gates: Sequence[Gate]) -> list[dict[str, Any]]:
        return [
            {
                "figure": gate.figure,
                "value": figures[gate.figure],
                "expected": f"{'>=' if gate.at_least else '<='} {gate.bound:g}",
                "met": gate.met(figures[gate.figure]),
            }
            for gate in gates
            if gate.figure in figures
        ]

    summary["acceptance"], summary["predictions"] = judged(GATES[config.task]), judged(PREDICTIONS[config.task])
    return {**summary, "accepted": all(row["met"] for row in summary["acceptance"]), "cells": rows, "paper": PAPER}


def report_text(summary: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        f"# Structure or content? Long-CoT study on {summary['task']}",
        "",
        f"{summary['problems']} held-out problems, {_seeds(summary)} a cell, 95 % intervals over problems and "
        f"seeds, paired. Base model: {_number(summary['base_accuracy']['think'])}.",
        "",
        "| cell | greedy | T=1 | drop | paper's drop (points) | repaired | tokens | keywords | right | carried on "
        "| counted down |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["cells"]:
        low, high = row["drop_ci95"]
        drop = "-" if row["name"] == "correct" else f"{row['drop']:.3f} [{low:.3f}, {high:.3f}]"
        if row["name"] != "correct" and low == high:
            drop += f" (within {rule_of_three(summary['problems']):.3f})"
        paper = row["paper_drop_points"]
        cells = [
            row["name"],
            f"{row['greedy']:.3f} [{row['greedy_ci95'][0]:.3f}, {row['greedy_ci95'][1]:.3f}]",
            _number(row["t1"]),
            drop,
            "n/a" if paper is None else f"{paper:.1f} ({PAPER['drop_points'][row['name']]['of']})",
            _number(row["repaired"]),
            _number(row["mean_tokens"], 0),
            _number(row["keywords_per_sample"], 2),
            *(_number(row[name], 2) for name in ("right_steps", "carried_on", "counted_down")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Repaired: right answers, greedy, to thoughts begun with right steps of which the last one slipped. Right: "
        "steps whose result follows from their operands. Carried on: steps that begin with the result before them. "
        "Counted down: their counter follows the one before. All of greedy answers.",
        "",
        "| claim | expected | measured | |",
        "|---|---|---|---|",
        *(
            f"| {row['figure']} | {row['expected']} | {row['value']:.3f} | {'met' if row['met'] else 'NOT MET'} |"
            for row in summary["acceptance"]
        ),
        "",
    ]
    if "content_drop" in summary and not any(row["figure"] == "content_drop" for row in summary["acceptance"]):
        drop = summary["content_drop"]
        lines += [
            f"Not claimed here: that content hardly matters. All-wrong demonstrations cost {drop:.3f} (structure: "
            f"{summary.get('structure_drop', float('nan')):.3f}), since in this task a wrong trace must take a false "
            "hit for a true one, a verdict that stands where the model can foresee it.",
            "",
        ]
    if summary["predictions"]:
        lines += [
            "Predictions beyond the paper, made before these cells were first run:",
            "",
            "| figure | predicted | measured | |",
            "|---|---|---|---|",
            *(
                f"| {row['figure']} | {row['expected']} | {row['value']:.3f} | {'right' if row['met'] else 'WRONG'} |"
                for row in summary["predictions"]
            ),
            "",
        ]
    return "\n".join(lines)


def study_plot(summary: Mapping[str, Any], path: Path) -> None:
    """Bars by cell: greedy solid and T=1 hatched, with intervals, and what the paper's drop would leave of ours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = summary["cells"]
    figure = Figure(figsize=(max(6.0, 1.0 * len(rows) + 2), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = np.arange(len(rows))
    for offset, mode, label, style in (
        (-0.2, "greedy", "greedy", {}),
        (0.2, "t1", "T = 1", {"hatch": "//", "alpha": 0.5}),
    ):
        means = np.array([row[mode] for row in rows])
        bounds = np.array([row[f"{mode}_ci95"] for row in rows])
        whiskers = np.maximum(0.0, [means - bounds[:, 0], bounds[:, 1] - means])
        axes.bar(places + offset, means, 0.4, label=label, color="tab:blue", yerr=whiskers, capsize=3, **style)  # type: ignore[arg-type]
    reference = next(row["greedy"] for row in rows if row["name"] == "correct")
    known = [
        (place, row["paper_drop_points"]) for place, row in zip(places, rows) if row["paper_drop_points"] is not None
    ]
    if known:
        axes.scatter(
            [place - 0.2 for place, _ in known],
            [reference - points / 100 for _, points in known],
            marker="D",
            color="tab:red",
            zorder=3,
            label="correct less the paper's drop",
        )
    axes.axhline(summary["base_accuracy"]["think"], color="gray", linestyle=":", label="base model")
    axes.set_xticks(places, [row["name"] for row in rows], rotation=30, ha="right")
    axes.set_ylabel("accuracy on held-out problems")
    axes.set_ylim(0, 1.05)
    axes.set_title(f"{summary['task']}: {_seeds(summary)}, {summary['problems']} problems, 95 % intervals")
    axes.legend()
    figure.savefig(path, dpi=110)


def _drop_figures(figure: str, drop: Mapping[str, Interval], problems: int) -> dict[str, Any]:
    greedy, sampled = drop["greedy"], drop["t1"]
    figures: dict[str, Any] = {
        f"{figure}_drop": greedy.mean,
        f"{figure}_drop_ci95": [greedy.low, greedy.high],
        f"{figure}_drop_t1": sampled.mean,
        f"{figure}_drop_t1_ci95": [sampled.low, sampled.high],
    }
    if greedy.degenerate:
        figures[f"{figure}_drop_bound"] = rule_of_three(problems)
    return figures


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _seeds(summary: Mapping[str, Any]) -> str:
    return "1 seed" if summary["seeds"] == 1 else f"{summary['seeds']} seeds"


def _number(value: float | None, digits: int = 3) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
