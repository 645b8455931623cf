"""The study's pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from jaxstack.engine.memory.schedule_sim import simulate
from jaxstack.engine.memory.swap import CacheShape, Rates, capacity_tokens
from jaxstack.engine.memory.swap.ring import swap_schedule
from launch.pie_study.simulated import DROP_S, GH200, KV_BYTES, LINKS, MODELS, RATES, loaded

Parts = Mapping[str, Mapping[str, Any]]

_COLOURS = {"base": "tab:gray", "k16": "tab:blue", "adaptive": "tab:green"}
_NAMES = {"base": "k = 0", "k16": "k = 16", "adaptive": "adaptive"}


def draw(parts: Parts, summary: Mapping[str, Any], workdir: Path) -> list[Path]:
    """Draws all of them into `workdir`; returns the files."""
    files = {
        "gain.png": _gain(parts, summary),
        "timeline.png": _timeline(),
        "warm_up.png": _warm_up(parts),
        "latency.png": _latency(parts),
        "link.png": _link(parts),
    }
    for name, figure in files.items():
        figure.savefig(workdir / name, dpi=110)
    return [workdir / name for name in files]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _gain(parts: Parts, summary: Mapping[str, Any]) -> Figure:
    """Throughput over that without swapping, against k, for the three placements."""
    figure = _figure(8, 4.4)
    ax = figure.subplots()
    base = parts["r-base-0"]["rate"]
    ks = range(1, 32)
    ax.plot([0, *ks], [1, *[parts[f"fixed-{k}"]["rate"] / base for k in ks]], ".-", color="tab:green", label="pages")
    for placement, colour, label in (("static_layers", "tab:blue", "layers"), ("ring", "tab:red", "ring of layers")):
        found = [(k, parts[f"{placement}-{k}"]["rate"] / base) for k in (4, 8, 12, 16, 20, 24, 28)]
        ax.plot(*zip((0, 1.0), *found), ".-", color=colour, label=label)
    shape, empty = MODELS["llama3_8b"], capacity_tokens(MODELS["llama3_8b"], KV_BYTES, 0.0)
    bound = [capacity_tokens(shape, KV_BYTES, k / 32) / empty for k in range(28)]
    ax.plot(range(28), bound, ":", color="black", linewidth=1, label="capacity, pages")
    ax.axvline(summary["k_max"], color="gray", linestyle="--", linewidth=1)
    ax.annotate(f"k_max {summary['k_max']:.1f}", (summary["k_max"], 0.1), rotation=90, ha="right", color="gray")
    ax.axhline(summary["adaptive_gain"], color="tab:green", linewidth=0.8, linestyle="-.")
    ax.annotate(f"adaptive, k = {summary['adaptive_k']:.0f}", (0.2, summary["adaptive_gain"] + 0.06), color="tab:green")
    ax.set_xlabel("k: layers' worth of keys and values on the host, of 32")
    ax.set_ylabel("throughput over k = 0")
    ax.set_ylim(0, 4)
    ax.set_title("Llama-3-8B, 0.75 GB for keys and values, GH200, simulated")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, 0.72))
    return figure


def _timeline() -> Figure:
    """Some layers of a step with half of the pages on the host: link and device, page-striped and with a barrier."""
    figure = _figure(11, 3.6)
    tokens = capacity_tokens(MODELS["llama3_8b"], KV_BYTES, 0.75)
    layer_s, moving_s = _times(MODELS["llama3_8b"], GH200, tokens)
    axes = figure.subplots(2, 1, sharex=True)
    for ax, staging, title in (
        (axes[0], 2, "two places: a segment arrives while a layer runs"),
        (axes[1], 1, "one place: they take turns"),
    ):
        timeline = simulate(swap_schedule(32, 2, layer_s, 0.75 * moving_s, staging=staging))
        runs: dict[Any, Any] = {
            task.id: span for task, *span in zip(timeline.schedule.tasks, timeline.starts, timeline.ends)
        }
        begin = min(start for task, (start, _) in runs.items() if task.kind == "layer" and _position(task) == 32)
        for task, (start, end) in runs.items():
            if not 32 <= _position(task) < 44:
                continue
            y, colours = (0.1, ("tab:green", "tab:olive")) if task.kind == "layer" else (1.1, ("tab:blue", "tab:cyan"))
            colour = colours[_position(task) % 2]
            ax.broken_barh([((start - begin) * 1e6, (end - start) * 1e6)], (y, 0.8), color=colour)
        ax.set_yticks([0.5, 1.5], ["layers", "link"])
        ax.set_title(title, loc="left", fontsize=10)
    axes[1].set_xlabel("microseconds of the second step (24 of 32 layers' worth on the host)")
    return figure


def _position(task: Any) -> int:
    return task.step * 32 + task.layer


def _times(shape: CacheShape, rates: Rates, tokens: float) -> tuple[float, float]:
    return rates.layer_s(shape, tokens), rates.moving_s(shape, tokens)


def _warm_up(parts: Parts) -> Figure:
    """k and throughput over time: from an empty host, and while the link is slow for a while."""
    figure = _figure(11, 6)
    ((top, right), (bottom, below)) = figure.subplots(2, 2, sharex="col")
    runs = {"adaptive": "r-adaptive-0", "k = 8": "fixed-8", "k = 16": "fixed-16", "k = 24": "fixed-24"}
    runs["k = 30"] = "fixed-30"
    for name, part in runs.items():
        _trace(top, bottom, parts[part]["samples"], name, bold=name == "adaptive")
    for name, part in {"adaptive": "drop-adaptive", "k = 19": "drop-k19"}.items():
        _trace(right, below, parts[part]["samples"], name, bold=name == "adaptive")
    for ax in (right, below):
        ax.axvspan(*DROP_S, color="tab:red", alpha=0.1)
    top.set_title("warm-up: everything on the device at first")
    right.set_title("the link at 100 instead of 419 GB/s for a while")
    top.set_ylabel("k aimed at")
    bottom.set_ylabel("output tokens per second")
    for ax in (bottom, below):
        ax.set_xlabel("seconds")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8)
    for ax in (top, right, bottom, below):
        ax.grid(alpha=0.3)
    return figure


def _trace(upper: Any, lower: Any, samples: list, name: str, *, bold: bool) -> None:
    times = [s[0] for s in samples]
    width = 2.0 if bold else 1.0
    upper.plot(times, [32 * s[2] for s in samples], label=name, linewidth=width)
    step = max(1, len(samples) // 60)
    ends = range(step, len(samples), step)
    rates = [(samples[i][1] - samples[i - step][1]) / (samples[i][0] - samples[i - step][0]) for i in ends]
    lower.plot([samples[i][0] for i in ends], rates, label=name, linewidth=width)


def _latency(parts: Parts) -> Figure:
    """Seconds per output token against the rate of requests: mean, and P99 dashed."""
    figure = _figure(7, 4.2)
    ax = figure.subplots()
    for name, colour in _COLOURS.items():
        mean, worst = ([1e3 * loaded(parts, rate, name, key) for rate in RATES] for key in ("latency", "latency_p99"))
        ax.plot(RATES, mean, ".-", color=colour, label=_NAMES[name])
        ax.plot(RATES, worst, ".--", color=colour, alpha=0.6, linewidth=1)
    ax.set_yscale("log")
    ax.set_xlabel("requests a second")
    ax.set_ylabel("ms per output token, mean (P99 dashed)")
    ax.set_title("Llama-3-8B, 1 GB for keys and values, GH200, simulated")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    return figure


def _link(parts: Parts) -> Figure:
    """The gain against the link's bandwidth: adaptive, and a fixed half."""
    figure = _figure(7, 4.2)
    ax = figure.subplots()
    base = parts["r-base-0"]["rate"]
    for name, colour in (("adaptive", "tab:green"), ("k16", "tab:blue")):
        gains = [parts[f"link-{link / 1e9:g}-{name}"]["rate"] / base for link in LINKS]
        ax.plot([link / 1e9 for link in LINKS], gains, ".-", color=colour, label=_NAMES[name])
    for link in LINKS:
        row = parts[f"link-{link / 1e9:g}-adaptive"]
        ax.annotate(f"k = {32 * row['share']:.0f}", (link / 1e9, row["rate"] / base + 0.08), fontsize=8, ha="center")
    ax.axhline(1, color="gray", linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xticks([link / 1e9 for link in LINKS], [f"{link / 1e9:g}" for link in LINKS])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("link, GB/s")
    ax.set_ylabel("throughput over k = 0")
    ax.set_ylim(0, 3.4)
    ax.set_title("PCIe 4 is 20 to 25, PCIe 5 about 50, NVLink-C2C 419 GB/s", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure
