"""The study's pictures."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxstack.fleet.spot.evaluation import POLICIES, Scenario, run_policy
from jaxstack.fleet.spot.traces import flat_prices
from launch.skyserve_study.report import JOINT_TITLES, PAPER_SETS, TITLES, scores_of
from launch.skyserve_study.simulated import BOTH_EXTRAS, COLD_STARTS_S, EXTRAS, RISK_S, WAITING, Settings, windows

Parts = Mapping[str, Mapping[str, Any]]

_COLOURS = {
    "ours": "tab:green", "paper": "tab:red", "artifact": "tab:olive", "round_robin": "tab:blue",
    "even_spread": "tab:orange", "spot_pool": "tab:purple", "scaling_group": "tab:pink", "on_demand": "tab:gray",
    "two_zones": "tab:brown",
}  # fmt: skip


def draw(settings: Settings, found: Parts, workdir: Path) -> list[Path]:
    """Draws all of them into `workdir`; returns the files."""
    files = {
        "cost.png": _cost(settings, found),
        "sweep.png": _sweep(settings, found),
        "latency.png": _latency(settings, found),
        "timeline.png": _timeline(settings),
    }
    if "joint" in found:
        files["joint.png"] = _joint(found["joint"])
    for name, figure in files.items():
        figure.savefig(workdir / name, dpi=110)
    return [workdir / name for name in files]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _cost(settings: Settings, found: Parts) -> Figure:
    """Availability against cost, each policy a point; the paper's hollow, the least possible cost a line."""
    count = len(settings.sets)
    figure = _figure(4 * count, 4.2)
    for ax, traces in zip(np.atleast_1d(figure.subplots(1, count, sharey=True)), settings.sets):
        for policy in POLICIES:
            row = scores_of(found, traces, policy, 0 if policy in BOTH_EXTRAS else 1)
            ax.plot(row["cost"], row["availability"], "o", color=_COLOURS[policy], label=TITLES[policy])
        for policy, (availability, cost) in PAPER_SETS.get(traces, {}).items():
            if policy in _COLOURS:
                ax.plot(cost / 100, availability / 100, "o", mfc="none", color=_COLOURS[policy])
        rows = found[f"omniscient-{traces}"]["rows"]
        if solved := [row["cost"] for row in rows if row["status"] == "optimal"]:
            ax.axvline(np.mean(solved), color="black", linestyle=":", linewidth=1)
        for policy in ("even_spread", "round_robin"):
            row = scores_of(found, traces, policy, 1)
            ax.plot(row["cost"], row["availability"], "s", color=_COLOURS[policy], markersize=4)
        ax.set_title(traces)
        ax.set_xlabel("cost over on-demand")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("availability")
    figure.axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle("filled: ours, square: one extra; hollow: the paper's; dotted: the least possible cost", fontsize=9)
    return figure


def _sweep(settings: Settings, found: Parts) -> Figure:
    """Availability and cost of ours by extra replicas and cold start; and by the risk window."""
    sets = settings.swept
    figure = _figure(11, 3.4 * len(sets))
    for row, traces in zip(figure.subplots(len(sets), 3, squeeze=False), sets):
        for extra in EXTRAS:
            parts = [found[f"sweep-{traces}-{extra}-{cold:g}"] for cold in COLD_STARTS_S]
            for ax, name in zip(row, ("availability", "cost")):
                ax.plot(COLD_STARTS_S, [part[name] for part in parts], "o-", label=f"{extra} extra")
                ax.set_xlabel("cold start, s")
                ax.set_title(f"{traces}: {name}", fontsize=10)
        row[0].legend(fontsize=8)
        risks = [found[f"risk-{traces}-{risk:g}"] for risk in RISK_S]
        row[2].plot([part["cost"] for part in risks], [part["availability"] for part in risks], "o-")
        for risk, part in zip(RISK_S, risks):
            row[2].annotate(f"{risk:g} s", (part["cost"], part["availability"]), fontsize=8)
        row[2].set_title(f"{traces}: risk window", fontsize=10)
        row[2].set_xlabel("cost")
        row[2].set_ylabel("availability")
        for ax in row:
            ax.grid(alpha=0.3)
    return figure


def _latency(settings: Settings, found: Parts) -> Figure:
    """P50, P90 and P99 of each policy."""
    figure = _figure(4 * len(settings.sets), 4)
    for ax, traces in zip(np.atleast_1d(figure.subplots(1, len(settings.sets), sharey=True)), settings.sets):
        for place, policy in enumerate(WAITING):
            part = found[f"latency-{traces}-{policy}"]
            ax.plot([place] * 3, [part[q] for q in ("p50", "p90", "p99")], "_-", color=_COLOURS[policy], markersize=12)
        ax.set_xticks(range(len(WAITING)), [TITLES[policy] for policy in WAITING], rotation=90, fontsize=7)
        ax.set_title(traces)
        ax.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("seconds: P50, P90, P99")
    return figure


def _joint(part: Mapping[str, Any]) -> Figure:
    """Dollars an hour of each plan, as planned and as it came out; and by how much of the time it should be whole."""
    figure = _figure(11, 3.8)
    left, right = figure.subplots(1, 2)
    plans = {name: row for name, row in part["plans"].items() if "usd_per_hour" in row}
    places = np.arange(len(plans))
    left.bar(places - 0.2, [row["planned_usd_per_hour"] for row in plans.values()], 0.4, label="planned")
    left.bar(places + 0.2, [row["usd_per_hour"] for row in plans.values()], 0.4, label="on other days")
    for place, row in zip(places, plans.values()):
        left.annotate(f"{100 * row['whole']:.1f} %", (place, row["usd_per_hour"]), ha="left", va="bottom", fontsize=8)
    left.set_xticks(places, [JOINT_TITLES[name].replace(", ", ",\n") for name in plans], fontsize=8)
    left.set_ylabel("$/h; share of time whole")
    left.legend(fontsize=8)
    found = [(float(share), row) for share, row in part["curve"].items() if "usd_per_hour" in row]
    curve = sorted(found, key=lambda pair: pair[0])
    right.plot(
        [row["planned_usd_per_hour"] for _, row in curve], [100 * share for share, _ in curve], "o-", label="asked"
    )
    right.plot(
        [row["usd_per_hour"] for _, row in curve], [100 * row["whole"] for _, row in curve], "x--", label="found"
    )
    right.set_xlabel("$/h, all at once")
    right.set_ylabel("% of time whole")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure


def _timeline(settings: Settings) -> Figure:
    """A day of the most volatile set: what zones have, and what ours holds there."""
    traces = "aws2" if "aws2" in settings.sets else settings.sets[0]
    (trace,) = windows(settings, traces, 1)
    scenario = Scenario()
    result = run_policy(replace(trace, prices=flat_prices(trace.zones)), POLICIES["ours"], scenario)
    hours = np.arange(len(result.ready)) * scenario.tick_s / 3600
    figure = _figure(11, 1.0 * len(trace.zones) + 3)
    axes = figure.subplots(len(trace.zones) + 1, 1, sharex=True)
    for ax, zone, held, room in zip(axes, trace.zones, result.spot_by_zone, trace.ticks(scenario.tick_s)):
        ax.fill_between(hours, np.minimum(room, 5), step="post", alpha=0.25, color="tab:gray", label="room")
        ax.step(hours, held, where="post", color="tab:green", linewidth=1, label="spot replicas")
        ax.set_ylabel(zone, rotation=0, ha="right", fontsize=8)
        ax.set_yticks([0, 5])
    axes[0].legend(fontsize=7, loc="upper right", ncols=2)
    axes[-1].step(hours, result.ready, where="post", color="black", linewidth=1, label="ready")
    axes[-1].step(hours, result.on_demand, where="post", color="tab:red", linewidth=1, label="on-demand")
    axes[-1].axhline(scenario.target, color="gray", linestyle=":", linewidth=1)
    axes[-1].legend(fontsize=7, loc="upper right", ncols=2)
    axes[-1].set_xlabel(f"hours of a day of {traces}")
    return figure
