"""The study's pictures: service of each client over time, throughput against fairness, latency of each client."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from launch.dlpm_study.config import POLICIES, StudyConfig

Parts = Mapping[str, Mapping[str, Any]]

_COLOURS = {"fcfs": "tab:gray", "lpm": "tab:orange", "vtc": "tab:blue", "dlpm": "tab:green"}
_NAMES = {"fcfs": "FCFS", "lpm": "LPM", "vtc": "VTC", "dlpm": "DLPM"}


def draw(study: StudyConfig, parts: Parts, summary: Mapping[str, Any], workdir: Path) -> list[Path]:
    """Draws all of them into `workdir`; returns the files."""
    files = {
        "service.png": _service(parts),
        "pareto.png": _pareto(study, parts, summary),
        "latency.png": _latency(parts),
    }
    for name, figure in files.items():
        figure.savefig(workdir / name, dpi=110)
    return [workdir / name for name in files]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _service(parts: Parts) -> Figure:
    """Live, `mixed`: what each client has been given, by policy."""
    figure = _figure(12, 3.6)
    axes = figure.subplots(1, len(POLICIES), sharey=True)
    for policy, ax in zip(POLICIES, axes):
        part = parts[f"live-mixed-{policy}-0"]
        for client, service in part["service"].items():
            flood = client.startswith("flood")
            ax.plot(part["times_s"], service, color="tab:red" if flood else "tab:blue", alpha=0.7, linewidth=1)
        ax.set_title(_NAMES[policy])
        ax.set_xlabel("seconds")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("service given (read 1, written 2)")
    for colour, label in (("tab:blue", "well-behaved clients"), ("tab:red", "flooding clients")):
        axes[0].plot([], [], color=colour, label=label)
    axes[0].legend(loc="upper left", fontsize=8)
    figure.suptitle("Live engine, workload 'mixed': service of each client over time")
    return figure


def _pareto(study: StudyConfig, parts: Parts, summary: Mapping[str, Any]) -> Figure:
    """Throughput against Jain's index: one replica, and the fleet."""
    figure = _figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    for policy in POLICIES:
        live, simulated = summary["live"]["mixed"][policy], summary["simulated"]["mixed"][policy]
        colour = _COLOURS[policy]
        left.scatter(live["jain"], live["service_rate"], color=colour, s=60, zorder=3, label=f"{_NAMES[policy]}, live")
        left.scatter(simulated["jain"], simulated["service_rate"], s=60, facecolors="none", edgecolors=colour, zorder=3)
    points = [parts[f"sim-pareto-{quantum}"]["row"] for quantum in study.quanta]
    jains, rates = [p["jain"] for p in points], [p["service_rate"] for p in points]
    label = f"DLPM, quantum {study.quanta[0]} to {study.quanta[-1]}"
    left.plot(jains, rates, ".-", color="tab:green", alpha=0.6, label=label)
    left.scatter([], [], s=60, facecolors="none", edgecolors="black", label="simulated")
    left.set_title("One replica, 'mixed'")
    left.legend(fontsize=8, loc="best")
    for number, (name, row) in enumerate(summary["fleet"]["mixed"].items()):
        right.scatter(row["jain"], row["service_rate"], s=60, color=f"C{number}", label=name, zorder=3)
    right.set_title(f"{study.replicas} replicas, 'mixed', simulated")
    right.legend(fontsize=8, loc="best")
    for ax in (left, right):
        ax.set_xlabel("Jain's index of the clients' services")
        ax.set_ylabel("service rate (read 1, written 2, a second)")
        ax.set_xlim(0, 1.05)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    return figure


def _latency(parts: Parts) -> Figure:
    """Live: the latency of each client, P50 as a bar and P99 as a tick."""
    figure = _figure(12, 6)
    for ax, workload in zip(figure.subplots(2, 1), ("mixed", "equal")):
        _bars(ax, {policy: parts[f"live-{workload}-{policy}-0"] for policy in POLICIES})
        what = "end-to-end latency of each client, P50 (bar) and P99 (tick); x: nothing was answered"
        ax.set_title(f"Live, '{workload}': {what}", loc="left", fontsize=10)
    return figure


def _bars(ax: Axes, parts: Parts) -> None:
    clients = sorted({client for part in parts.values() for client in part["service"]})
    width = 0.8 / len(parts)
    for number, (policy, part) in enumerate(parts.items()):
        places = [i + (number - (len(parts) - 1) / 2) * width for i in range(len(clients))]
        found = [part["latency"].get(client) for client in clients]
        heights = [each[0] if each else 0.0 for each in found]
        ax.bar(places, heights, width, color=_COLOURS[policy], label=_NAMES[policy])
        ticks = [(place, each[1]) for place, each in zip(places, found) if each]
        ax.scatter([place for place, _ in ticks], [tail for _, tail in ticks], marker="_", color="black", s=18)
        for place, each in zip(places, found):
            if each is None:
                ax.text(place, 0, "x", ha="center", va="bottom", color=_COLOURS[policy], fontsize=9)
    ax.set_xticks(range(len(clients)), clients, rotation=30, ha="right", fontsize=8)
    ax.set_ylabel("seconds")
    ax.set_ylim(bottom=0)
    ax.margins(x=0.01)
    ax.grid(alpha=0.3, axis="y")
    ax.legend(fontsize=8, ncols=len(parts), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)
