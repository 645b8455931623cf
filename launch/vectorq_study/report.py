"""The study's figures, and the report for people."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.vectorq_study.tasks import (
    OTHERS,
    OURS,
    PAPER,
    THRESHOLDS,
    WITHOUT_BUDGET,
    StudyConfig,
    best_static,
    error_at_hits,
    hits_at_error,
    statics,
)

Parts = Mapping[str, Mapping[str, Any]]

BARS: Mapping[str, tuple[str, float]] = {
    "delta_violations": ("<=", 0),
    "hit_gain_best_static.combo": (">=", 2.0),
    "hit_gain_best_static.noisy": (">=", 4.0),
}
CLAIMS = {
    "VectorQ (v1)": "a combination of four data sets: hit rate up to 12x, error rate down up to 92 %",
    "VectorQ (v2)": "of three: up to 26x hits, 74 % fewer errors; thresholds converge",
    "vCache (v3, v4)": "the error bound that users set is held; up to 12.5x hits, 26x lower error",
}
TITLES = {
    OURS: "ours", PAPER: "paper's rule", WITHOUT_BUDGET: "ours, no budget", "global": "one curve for all",
    "sigmoid-only": "curve, no doubt", "sigmoid-probability": "curve's probability", "wilson-iid": "i.i.d., Wilson",
}  # fmt: skip
DEFINITIONS = """\
hits and error are shares of all requests; error counts wrong hits. Static thresholds: all from 0.3 to 0.995 in steps of
0.005 and the paper's, the best one chosen in hindsight, on the mean over seeds. A cell (stream, delta) is violated if
its error, mean over seeds, less the half-width of its 95 % interval over seeds (normal) exceeds delta.
  hit_gain_best_static      our hits over those of the best static threshold whose error is at most delta
  hit_gain_equal_error      our hits over the static frontier's at our error, linear between thresholds
  error_reduction_equal_hits   1 - our error over the error of the static threshold with as many hits
  estimate                  the error as an operator sees it, without knowing the truth
Regions as in VectorQ: reject where tau = 1, accept where tau is at its least, uncertain between; that they are
those of vCache's tau is our reading."""


def summarise(config: StudyConfig, parts: Parts) -> dict[str, Any]:
    """Every figure."""
    streams = list(dict.fromkeys(part["stream"] for part in parts.values()))
    rows = {stream: _rows(config, parts, stream) for stream in streams}
    headline = f"{config.headline:g}"
    summary: dict[str, Any] = {
        "requests": config.requests if not config.data else {p["stream"]: p["requests"] for p in parts.values()},
        "seeds": config.seeds,
        "deltas": list(config.deltas),
        "delta_violations": _violations(rows, OURS),
        "paper_rule_delta_violations": _violations(rows, PAPER),
        "cells": len(streams) * len(config.deltas),
        "cells_with_mean_error_above_delta": sum(
            row[OURS]["error"] > float(delta) for by_delta in rows.values() for delta, row in by_delta.items()
        ),
    }
    for figure in ("hit_gain_best_static", "hit_gain_equal_error", "error_reduction_equal_hits"):
        for name, prefix in ((OURS, ""), (PAPER, "paper_rule_")):
            summary[prefix + figure] = {s: by_delta[headline][name][figure] for s, by_delta in rows.items()}
    summary["largest_error_reduction_equal_hits"] = _largest(rows, "error_reduction_equal_hits")
    summary["largest_hit_gain_equal_error"] = _largest(rows, "hit_gain_equal_error")
    summary["largest_estimate_gap"] = max(
        abs(row[OURS]["estimate"] - row[OURS]["error"]) for by_delta in rows.values() for row in by_delta.values()
    )
    summary["rows"] = rows
    summary = _rounded(summary)
    summary["bars"] = {
        name: _holds(value, *bar) for name, bar in BARS.items() if (value := _value(summary, name)) is not None
    }
    return summary


def _rows(config: StudyConfig, parts: Parts, stream: str) -> dict[str, dict[str, Any]]:
    """delta -> policy -> its row."""
    own = [part for part in parts.values() if part["stream"] == stream]
    hits, errors = statics(parts, stream)
    found: dict[str, dict[str, Any]] = {}
    for delta in config.deltas:
        key = f"{delta:g}"
        best, threshold = best_static(hits, errors, delta)
        found[key] = {"best_static": {"hits": best, "threshold": threshold}}
        for name in (OURS, PAPER, *(OTHERS if delta == config.headline else ())):
            runs = [part["runs"][name][key] for part in own if name in part["runs"]]
            row = {figure: float(np.mean([run[figure] for run in runs])) for figure in ("hits", "error", "labels")}
            error = np.array([run["error"] for run in runs])
            half = 1.96 * float(error.std(ddof=1)) / math.sqrt(len(error)) if len(error) > 1 else 0.0
            row |= {"error_half_width": half, "error_worst_seed": float(error.max())}
            if "estimate" in runs[0]:
                row["estimate"] = float(np.mean([run["estimate"] for run in runs]))
            equal = hits_at_error(hits, errors, row["error"])
            alike = error_at_hits(hits, errors, row["hits"])
            found[key][name] = row | {
                "hit_gain_best_static": row["hits"] / best if best else None,
                "hit_gain_equal_error": row["hits"] / equal if equal else None,
                "error_reduction_equal_hits": 1 - row["error"] / alike if alike else None,
                "violated": row["error"] - half > delta,
            }
    return found


def _violations(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], name: str) -> int:
    return sum(row[name]["violated"] for by_delta in rows.values() for row in by_delta.values())


def _largest(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], figure: str) -> dict[str, float | None]:
    found = {}
    for name in (OURS, PAPER):
        values = [row[name][figure] for by_delta in rows.values() for row in by_delta.values()]
        found[name] = max((value for value in values if value is not None), default=None)
    return found


def _value(summary: Mapping[str, Any], name: str) -> Any:
    value: Any = summary
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _holds(value: float, how: str, bar: float) -> bool:
    return value <= bar if how == "<=" else value >= bar


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def text(config: StudyConfig, summary: Mapping[str, Any]) -> str:
    """The report."""
    lines = ["VectorQ: answers from a semantic cache, with an error that is promised", "", "ours, and the bar:"]
    for name, (how, bar) in BARS.items():
        value = _value(summary, name)
        mark = "" if name not in summary["bars"] else "ok" if summary["bars"][name] else "NOT MET"
        lines.append(f"  {name:<32} {_number(value):>8}   {how} {bar:<5g} {mark}")
    lines += ["", "the paper:", *(f"  {name:<16} {claim}" for name, claim in CLAIMS.items())]
    lines += [
        "", f"{summary['seeds']} seeds, {summary['requests']} requests each; {len(THRESHOLDS)} static thresholds", "",
        "hits / error by bound (! = the bound is violated); the best static threshold with error <= delta",
        f"  {'stream':<10}{'delta':>6}{'ours':>18}{'estimate':>10}{'paper rule':>18}{'best static':>18}",
    ]  # fmt: skip
    for stream, by_delta in summary["rows"].items():
        for delta, row in by_delta.items():
            best = row["best_static"]
            shown = "none" if best["threshold"] is None else f"{best['hits']:.3f} ({best['threshold']:g})"
            cells = f"{_cell(row[OURS]):>18}{row[OURS]['estimate']:>10.4f}{_cell(row[PAPER]):>18}{shown:>18}"
            lines.append(f"  {stream:<10}{delta:>6}{cells}")
    lines += ["", f"at delta {config.headline:g}: over the best static threshold, over the frontier at equal error, "
              "errors saved at equal hits (ours; the paper's rule)"]  # fmt: skip
    for stream in summary["rows"]:
        gains = [
            f"{_number(summary[figure][stream])}; {_number(summary['paper_rule_' + figure][stream])}"
            for figure in ("hit_gain_best_static", "hit_gain_equal_error", "error_reduction_equal_hits")
        ]
        lines.append(f"  {stream:<10}" + "".join(f"{gain:>20}" for gain in gains))
    lines += ["", f"other rules at delta {config.headline:g}, the first two seeds: hits / error"]
    lines.append("  " + f"{'stream':<10}" + "".join(f"{TITLES[name]:>21}" for name in OTHERS))
    for stream, by_delta in summary["rows"].items():
        row = by_delta[f"{config.headline:g}"]
        lines.append(f"  {stream:<10}" + "".join(f"{_cell(row[name]):>21}" for name in OTHERS))
    return "\n".join([*lines, "", DEFINITIONS])


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['hits']:.3f} / {row['error']:.4f}{'!' if row['violated'] else ' '}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
