"""What is made of the runs: figures, a table, pictures."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxstack.pde.compare import ratios, success_rates
from jaxstack.pde.plots import plot_errors

Run = Mapping[str, Any]

GOALS = {
    "time_ratio_vs_adam_pinn_median": (5.0, "at least"),
    "final_c_l2 poisson-20": (0.01, "at most"),
    "final_c_l2 poisson-50": (0.03, "at most"),
}
"""What is aimed at, here; the paper states no number for these."""


def figures(
    main: Sequence[Run], variable: Sequence[Run], others: Sequence[Run], low: Sequence[Run], floor: Sequence[Run]
) -> dict[str, Any]:
    """The comparisons' part of the summary."""
    plain, tuned = ratios(main, "npdg", "pinn_adam"), ratios(main, "npdg", "pinn_adam_tuned")
    every = [*main, *variable, *others, *low]
    by_case: dict[str, dict[str, float]] = {}
    for run in floor:
        by_case.setdefault(run["case"], {})[run["label"]] = run["c_l2"]
    return {
        "time_ratio_vs_adam_pinn_median": _median(plain),
        "time_ratio_vs_tuned_adam_pinn_median": _median(tuned),
        "time_ratio_by_dim": plain,
        "time_ratio_by_dim_tuned": tuned,
        "variable_ratio": ratios(variable, "npdg", "pinn_adam"),
        "variable_ratio_tuned": ratios(variable, "npdg", "pinn_adam_tuned"),
        "low_dimension": {r["label"]: {k: r[k] for k in ("seconds", "censored", "best_c_l2")} for r in low},
        "best_method_by_dim": best_methods(every),
        "success_rate_by_method": success_rates(every),
        "final_c_l2_by_method": by_case,
    }


def _median(rows: Mapping[str, Mapping[str, Any]]) -> float | None:
    return statistics.median(r["ratio"] for r in rows.values()) if rows else None


def best_methods(runs: Sequence[Run]) -> dict[str, str]:
    """Of each problem, the method whose median time is least, among those that reached the target with every seed."""
    best = {}
    for case in dict.fromkeys(r["case"] for r in runs):
        times: dict[str, list[float]] = {}
        for label in dict.fromkeys(r["label"] for r in runs if r["case"] == case):
            mine = [r for r in runs if (r["case"], r["label"]) == (case, label)]
            if not any(r["censored"] for r in mine):
                times[label] = [r["seconds"] for r in mine]
        if times:
            best[case] = min(times, key=lambda label: statistics.median(times[label]))
    return best


def spread(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """case -> label -> how many seeds, the share that arrived, and the best errors' median and worst."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for case, label in dict.fromkeys((r["case"], r["label"]) for r in runs):
        mine = [r for r in runs if (r["case"], r["label"]) == (case, label)]
        best = [math.inf if r["best_c_l2"] is None else r["best_c_l2"] for r in mine]
        found.setdefault(case, {})[label] = {
            "seeds": len(mine),
            "arrived": sum(not r["censored"] for r in mine) / len(mine),
            "seconds_median": statistics.median(r["seconds"] for r in mine),
            "best_c_l2_median": statistics.median(best),
            "best_c_l2_worst": max(best),
        }
    return found


def text(summary: Mapping[str, Any]) -> str:
    """Tables for people."""
    lines = [
        "| seconds of a rival over ours, median of seeds | Adam, same samples | Adam, tuned batch and schedule |",
        "|---|---|---|",
    ]
    for case, row in (summary["time_ratio_by_dim"] | summary["variable_ratio"]).items():
        other = (summary["time_ratio_by_dim_tuned"] | summary["variable_ratio_tuned"]).get(case)
        lines.append(f"| {case} | {_ratio(row)} | {_ratio(other)} |")
    medians = (summary["time_ratio_vs_adam_pinn_median"], summary["time_ratio_vs_tuned_adam_pinn_median"])
    lines.append("| median over Poisson | " + " | ".join("-" if m is None else f"{m:.2g}" for m in medians) + " |")
    lines.append(
        f"\n>: the rival did not arrive within {summary['run_budget_s']:g} s or ten times ours, which then count as "
        f"its time. {summary['tuning']}"
    )
    for case, row in summary["final_c_l2_by_method"].items():
        lines += [f"\n| {case}, after {summary['floor_budget_s']:g} s | centred L2 error |", "|---|---|"]
        lines += [f"| {label} | {error:.3g} |" for label, error in sorted(row.items(), key=lambda item: item[1])]
    if summary["low_dimension"]:
        lines += ["\n| poisson-2 | seconds to 0.01 | best error |", "|---|---|---|"]
        for label, row in summary["low_dimension"].items():
            mark = ">" if row["censored"] else ""
            lines.append(f"| {label} | {mark}{row['seconds']:.2g} | {row['best_c_l2']:.2g} |")
    rates = summary["success_rate_by_method"]
    cases = list(dict.fromkeys(case for row in rates.values() for case in row))
    if cases:
        lines += ["\n| share of seeds that arrived | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
        for label, row in rates.items():
            lines.append(f"| {label} | " + " | ".join("" if c not in row else f"{row[c]:.2f}" for c in cases) + " |")
    for case, of_case in summary["stability"].items():
        seeds = max(row["seeds"] for row in of_case.values())
        lines += [f"\n| {case}, {seeds} seeds | arrived | median s | worst error |", "|---|---|---|---|"]
        for label, row in of_case.items():
            lines.append(
                f"| {label} | {row['arrived']:.2f} | {row['seconds_median']:.2g} | {row['best_c_l2_worst']:.2g} |"
            )
    lines.append("")
    for name in (
        "best_method_by_dim", "convergence_factor_measured", "convergence_factor_closed_form", "allen_cahn_rms",
        "ot1d_rms", "ot_gaussian_rms",
    ):  # fmt: skip
        lines.append(f"- {name}: {summary[name]}")
    for name, met in summary["goals_met"].items():
        goal, side = GOALS[name]
        lines.append(f"- {name} {side} {goal:g}: {'met' if met else 'NOT met'}")
    return "\n".join(lines)


def _ratio(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    late = f" (ours {row['censored_ours']} of {row['seeds']} not in time)" if row["censored_ours"] else ""
    return f"{'>' if row['censored_other'] else ''}{row['ratio']:.2g}{late}"


def goals_met(summary: Mapping[str, Any]) -> dict[str, bool]:
    """Of those goals whose part of the study was run."""
    values = {"time_ratio_vs_adam_pinn_median": summary["time_ratio_vs_adam_pinn_median"]}
    for case, row in summary["final_c_l2_by_method"].items():
        values[f"final_c_l2 {case}"] = next((v for k, v in row.items() if k in ("npdg", "npdg and polish")), None)
    found = {}
    for name, (goal, side) in GOALS.items():
        value = values.get(name)
        if value is not None:
            found[name] = value >= goal if side == "at least" else value <= goal
    return found


def draw(runs: Sequence[Run], workdir: Path, prefix: str = "") -> None:
    """Errors against seconds, a picture for each problem."""
    for case in dict.fromkeys(r["case"] for r in runs):
        curves = {
            r["label"] if r["seed"] == 0 else f"{r['label']}, seed {r['seed']}": [
                {"seconds": s, "c_l2": c} for s, c in r["history"]
            ]
            for r in runs
            if r["case"] == case
        }
        plot_errors(workdir / f"{prefix}{case}.png", curves)
