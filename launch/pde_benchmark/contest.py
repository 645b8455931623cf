"""Sides in turn on the same problems, seed by seed, and what comes out of it."""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from jaxstack.pde.compare import Case, ratios
from launch.pde_benchmark.sides import Side
from launch.serve_benchmark.machine import LoadMeter


def contest(
    cases: Sequence[Case],
    ours: Mapping[str, Side],
    others: Mapping[str, Side],
    *,
    seeds: int,
    budget_s: float,
    processes: Callable[[], Sequence[psutil.Process]] = lambda: (),
) -> list[dict[str, Any]]:
    """Runs both on every case and seed: in order for even seeds, backwards for odd ones, so that a machine's moods hit
    all alike. All of `others` are tried with the first seed; the best one on a case meets ours with the others.
    `processes` are those of the sides that are not this one: their work is not foreign.
    """
    runs: list[dict[str, Any]] = []
    total, sides = len(cases) * (len(ours) * seeds + len(others) + seeds - 1), {**ours, **others}
    for seed in range(seeds):
        for case in cases:
            labels = [*ours, *(others if seed == 0 else [best_of(runs, case.name, list(others))])]
            for label in labels if seed % 2 == 0 else labels[::-1]:
                name = f"[{len(runs) + 1}/{total}] {case.name} seed {seed} {label}"
                _tell(f"{name} ...")
                with LoadMeter(processes) as meter:
                    found = sides[label](case, seed, budget_s, lambda text, name=name: _tell(f"{name}: {text}"))
                found["foreign_cores"] = round(meter.foreign_cores, 3)
                runs.append(found)
                best = found["best_c_l2"]
                _tell(
                    f"{name}: {'>' if found['censored'] else ''}{found['seconds']:.2f} s, {found['iterations']} "
                    f"iterations, best {'not finite' if best is None else format(best, '.3g')} "
                    f"({found['compile_s']:.1f} s compiling)"
                )
    return runs


def best_of(runs: Sequence[Mapping[str, Any]], case: str, labels: Sequence[str]) -> str:
    """The quickest of these sides on a case with the first seed, which all of them have run; of those that did not
    arrive, the one that came nearest."""

    def standing(label: str) -> tuple[float, float]:
        run = next(run for run in runs if (run["case"], run["label"]) == (case, label))
        return run["seconds"], float("inf") if run["best_c_l2"] is None else run["best_c_l2"]

    return min(labels, key=standing)


def best_by_case(runs: Sequence[Mapping[str, Any]], ours: str, others: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By case: `ratios` of the other that is best there, its label, and whether a censored run makes the ratio a
    bound."""
    found: dict[str, dict[str, Any]] = {}
    for case in dict.fromkeys(run["case"] for run in runs):
        best = best_of(runs, case, others)
        row = ratios(runs, ours, best)[case]
        found[case] = row | {
            "best_mode": best,
            "ours_s": _median(runs, case, ours, "seconds"),
            "other_s": _median(runs, case, best, "seconds"),
            "lower_bound": row["censored_other"] > 0 and not row["censored_ours"],
            "upper_bound": row["censored_ours"] > 0 and not row["censored_other"],
        }
    return found


def summarise(runs: Sequence[Mapping[str, Any]], ours: str, others: Sequence[str]) -> dict[str, Any]:
    """The figures of a contest: the headline is the median over cases of the best other's time over ours."""
    by_case = best_by_case(runs, ours, others)
    labels = [ours, *others]
    by_side = lambda field: {  # noqa: E731
        case: {label: _median(runs, case, label, field) for label in labels} for case in by_case
    }
    return {
        "time_to_error_ratio": statistics.median(row["ratio"] for row in by_case.values()),
        "time_to_error_ratio_is_lower_bound": any(row["lower_bound"] for row in by_case.values()),
        "time_to_error_ratio_by_problem": by_case,
        "seconds_by_problem": by_side("seconds"),
        "error_at_the_end_by_problem": by_side("c_l2"),
        "censored_by_problem": {
            case: {
                label: sum(run["censored"] for run in runs if (run["case"], run["label"]) == (case, label))
                for label in labels
            }
            for case in by_case
        },
        "foreign_cores": max(run["foreign_cores"] for run in runs),
        "runs": [{k: v for k, v in run.items() if k != "history"} for run in runs],
    }


def report(summary: Mapping[str, Any]) -> str:
    """A table for people."""
    lines = [f"| seconds to {summary['target']:g} | " + " | ".join(summary["time_to_error_ratio_by_problem"]) + " |"]
    lines.append("|" + "---|" * (1 + len(summary["seconds_by_problem"])))
    cases = list(summary["seconds_by_problem"])
    for label in summary["seconds_by_problem"][cases[0]]:
        cells = [
            f"{'>' if summary['censored_by_problem'][case][label] else ''}"
            f"{summary['seconds_by_problem'][case][label]:.2f} "
            f"({summary['error_at_the_end_by_problem'][case][label]:.3g} at the end)"
            for case in cases
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    shown = [
        f"{'>' if row['lower_bound'] else '<' if row['upper_bound'] else ''}{row['ratio']:.1f} over {row['best_mode']}"
        for row in summary["time_to_error_ratio_by_problem"].values()
    ]
    lines.append("| ratio | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _median(runs: Sequence[Mapping[str, Any]], case: str, label: str, field: str) -> float:
    return statistics.median(run[field] for run in runs if (run["case"], run["label"]) == (case, label))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
