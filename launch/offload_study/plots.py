"""The study's pictures: a layer of each schedule, rooflines, tokens/s beside the paper's, placements by machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from jaxstack.engine.memory import hrm
from jaxstack.engine.memory.schedule import TaskId
from jaxstack.engine.memory.schedule_sim import Timeline
from jaxstack.runtime.machine import PROFILES
from launch.offload_study import published
from launch.offload_study.policies import HOST_SCALES, LINKS_GB

COLOURS = {
    "A": "tab:blue",
    "B": "tab:orange",
    "C": "tab:green",
    "D1": "tab:cyan",
    "D2": "tab:red",
    "W": "tab:gray",
    "L": "tab:purple",
    "S": "tab:pink",
}
WORDS = {
    "A": "QKV (A)",
    "B": "attention (B)",
    "C": "output and experts (C)",
    "D1": "QKV to host (D1)",
    "D2": "attention's output to device (D2)",
    "W": "weights to device",
    "L": "KV to device",
    "S": "new KV to host",
}
_LANES = {"device": "device", "host": "host", "to_device": "link, to device", "to_host": "link, to host"}
_SYSTEMS = {"FlexGen(c)": "tab:orange", "FlexGen": "tab:red", "DeepSpeed": "tab:gray", "MoE-Lightning": "tab:green"}


def draw(summary: Mapping[str, Any], timelines: Mapping[str, Timeline], workdir: Path) -> list[Path]:
    """Draws all of them into `workdir`; returns the files."""
    files = {
        "timeline.png": timelines_figure(timelines),
        "roofline.png": _rooflines(),
        "schedules.png": _schedules(summary),
    }
    if summary["tables"]["mtbench"]:
        files |= {"throughput.png": _throughput(summary), "placement.png": _placement(summary)}
    for name, figure in files.items():
        figure.savefig(workdir / name, dpi=110)
    return [workdir / name for name in files]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def timelines_figure(timelines: Mapping[str, Timeline]) -> Figure:
    """About one layer of each schedule in the steady state, a row for each lane."""
    figure = _figure(13, 1.9 * len(timelines) + 0.9)
    panels = np.atleast_1d(figure.subplots(len(timelines), 1, sharex=True))
    span = 1.15 * max(line.period for line in timelines.values())
    kinds = set()
    for ax, (name, line) in zip(panels, timelines.items()):
        kinds |= _lanes(ax, line, span)
        ax.set_title(f"{name}: {1e3 * line.period:.0f} ms a layer", loc="left", fontsize=10)
    panels[-1].set_xlabel("milliseconds since a layer's first micro-batch started on the device")
    handles = [panels[0].barh([0], [0], color=COLOURS[kind], label=WORDS[kind]) for kind in COLOURS if kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _lanes(ax: Axes, line: Timeline, span: float) -> set[str]:
    schedule = line.schedule
    middle = schedule.layers // 2
    start = next(begins for task, begins in zip(schedule.tasks, line.starts) if task.id == TaskId("C", 1, middle, 0))
    rows = {lane: row for row, lane in enumerate(reversed(schedule.lanes))}
    seen = set()
    for task, begins, ends in zip(schedule.tasks, line.starts, line.ends):
        if ends <= start or begins >= start + span:
            continue
        assert isinstance(task.id, TaskId)
        kind, layer = task.id.kind, task.id.layer
        seen.add(kind)
        left, right = max(begins, start), min(ends, start + span)
        # Layers alternate in strength, so that one can be told from the next. What is too short to see gets a line.
        short = right - left < span / 400
        ax.barh(
            rows[task.lane],
            1e3 * (right - left),
            left=1e3 * (left - start),
            height=0.8,
            color=COLOURS[kind],
            alpha=1.0 if layer % 2 == middle % 2 else 0.55,
            edgecolor=COLOURS[kind] if short else "white",
            linewidth=1.0 if short else 0.3,
            zorder=3 if short else 2,
        )
    ax.axvline(1e3 * line.period, color="black", linewidth=0.8, linestyle="--")
    ax.set_yticks(list(rows.values()), [_LANES.get(lane, lane) for lane in rows], fontsize=8)
    ax.set_xlim(0, 1e3 * span)
    return seen


def _rooflines() -> Figure:
    """Figures 4 and 5: attention and the experts of Mixtral 8x7B on an L4 and its host."""
    machine, model = PROFILES["l4"], hrm.MODELS["mixtral_8x7b"]
    figure = _figure(13, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    x = np.geomspace(0.3, 3e4, 300)
    for ax in (left, right):
        ax.plot(x, hrm.attainable(machine, x), color="tab:green", label="device, its memory")
        ax.plot(x, hrm.attainable_on_host(machine, x), color="tab:orange", label="host, its memory")
        link = np.minimum(machine.device.flops_per_s, machine.link.to_device_bytes_per_s * x)
        ax.plot(x, link, color="tab:blue", label="device, over the link")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("FLOPs for each byte")
        ax.grid(alpha=0.3, which="both")
    left.set_ylabel("FLOP/s")
    for name, kv_bytes, colour in (("float16 KV", 2, "black"), ("int4 KV", 0.5, "tab:red")):
        sized = hrm.Model("", 1, 4096, 14336, 32, 8, kv_bytes=kv_bytes)
        at = hrm.attention_intensity(sized)
        left.axvline(at, color=colour, linestyle=":", label=f"attention, {name}: {at:g}")
    stay = hrm.turning_points(machine, 4.0).stay_below
    left.axvline(stay, color="tab:orange", linestyle="--", label=f"P1, below it stay on the host: {stay:.0f}")
    left.set_title("Decode attention (figure 4): left of P1 whatever the batch", fontsize=10)
    for mu, colour in ((32, "tab:purple"), (128, "tab:brown"), (512, "tab:pink")):
        on_device = float(hrm.ffn_intensity(model, mu))
        reached = float(hrm.attainable(machine, on_device))
        point = hrm.turning_points(machine, on_device).link_bound_below
        right.axhline(reached, color=colour, linewidth=0.8, linestyle="--")
        needed = point / float(hrm.ffn_intensity(model, 1))
        right.plot([point], [reached], "o", color=colour, label=f"micro-batch {mu}: link-bound below N = {needed:,.0f}")
    right.axvline(stay, color="tab:orange", linestyle="--", label="P1")
    right.set_title("Experts (figure 5): the more tokens a pass, the further right", fontsize=10)
    for ax in (left, right):
        ax.legend(fontsize=8, loc="lower right")
    return figure


def _throughput(summary: Mapping[str, Any]) -> Figure:
    """Figure 7: tokens/s, the paper's measurements as outlines and our simulation filled."""
    rows = summary["tables"]["mtbench"]
    figure = _figure(13, 7)
    panels = figure.subplots(2, 3).ravel()
    cases = [("S1", True), ("S2", True), ("S6", True), ("S7", True), ("S1", False), ("S2", False)]
    for ax, (name, padded) in zip(panels, cases):
        systems = ["FlexGen(c)", "FlexGen", "MoE-Lightning"]
        if padded:
            systems.insert(2, "DeepSpeed")
        width = 0.8 / len(systems)
        for number, system in enumerate(systems):
            places = [i + (number - (len(systems) - 1) / 2) * width for i in range(len(published.GENERATED))]
            paper = published.MTBENCH.get("MoE-Lightning (p)" if padded and system == "MoE-Lightning" else system, {})
            if name in paper and (padded or system == "MoE-Lightning"):
                ax.bar(places, paper[name], width, facecolor="none", edgecolor="black", linewidth=1.2, zorder=3)
            found = [rows[f"{name}{' (p)' if padded else ''}, {n}"].get(system, 0.0) for n in published.GENERATED]
            ax.bar(places, found, width, color=_SYSTEMS[system], alpha=0.8, zorder=2)
        ax.set_xticks(range(len(published.GENERATED)), [str(n) for n in published.GENERATED])
        ax.set_title(f"{name}, {'padded to 418' if padded else 'not padded'}", fontsize=10)
        ax.grid(alpha=0.3, axis="y")
    for ax in panels[3:]:
        ax.set_xlabel("generated tokens")
    panels[0].set_ylabel("tokens/s")
    panels[3].set_ylabel("tokens/s")
    handles = [
        panels[0].bar([0], [0], color=colour, label=f"{system}'s schedule, simulated, our policy")
        for system, colour in _SYSTEMS.items()
        if system != "DeepSpeed"
    ]
    outline = "the paper, measured; the third outline of four is DeepSpeed"
    handles.append(panels[0].bar([0], [0], facecolor="none", edgecolor="black", label=outline))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(
        "Figure 7: tokens/s of prefill and decoding; the simulation knows no overhead but the machine's limits"
    )
    return figure


def _placement(summary: Mapping[str, Any]) -> Figure:
    """Figure 10: where attention is best, and what share of the experts stays; figure 9 beside it."""
    figure = _figure(13, 4.2)
    left, middle, right = figure.subplots(1, 3)
    points = summary["tables"]["placement"]
    where = np.array(
        [[points[f"{link}, {scale}"]["attention_on_device"] for link in LINKS_GB] for scale in HOST_SCALES]
    )
    share = np.array([[points[f"{link}, {scale}"]["weight_resident"] for link in LINKS_GB] for scale in HOST_SCALES])
    left.imshow(where, origin="lower", cmap=ListedColormap(["tab:orange", "tab:green"]), vmin=0, vmax=1, aspect="auto")
    image = middle.imshow(share, origin="lower", cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=middle)
    for ax, values, form in ((left, where, None), (middle, share, "{:.2f}")):
        ax.set_xticks(range(len(LINKS_GB)), [str(link) for link in LINKS_GB])
        ax.set_yticks(range(len(HOST_SCALES)), [str(scale) for scale in HOST_SCALES])
        ax.set_xlabel("link, GB/s")
        ax.set_ylabel("host, times the base")
        for row in range(len(HOST_SCALES)):
            for column in range(len(LINKS_GB)):
                value = values[row][column]
                text = form.format(value) if form else ("device" if value else "host")
                colour = "black" if form is None or value > 0.5 else "white"
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    left.set_title("Attention runs on (figure 10)", fontsize=10)
    middle.set_title("Share of the experts on the device", fontsize=10)
    names = list(published.ATTENTION_MS)
    ours = summary["tables"]["attention_ms"]
    for shift, heights, colour, label in (
        (-0.2, [published.ATTENTION_MS[name] for name in names], "none", "the paper, measured"),
        (0.2, [ours[name] for name in names], "tab:green", "by the model of the machine"),
    ):
        places = [i + shift for i in range(len(names))]
        right.bar(places, heights, 0.38, facecolor=colour, edgecolor="black", label=label)
    right.set_xticks(range(len(names)), names, fontsize=8)
    right.set_ylabel("milliseconds")
    right.set_title("Micro-batch 128, context 512, L4 (figure 9)", fontsize=10)
    right.set_ylim(0, 28)
    right.legend(fontsize=8, loc="upper right")
    return figure


def _schedules(summary: Mapping[str, Any]) -> Figure:
    """The periods of S2, S3 and S4 over S1's in every setting."""
    rows = summary["tables"]["schedules"]
    figure = _figure(13, 4)
    ax = figure.subplots()
    for number, name in enumerate(("s2", "s3", "s4")):
        values = [row[f"s1_over_{name}"] for row in rows.values()]
        places = [i + (number - 1) * 0.27 for i in range(len(values))]
        ax.bar(places, values, 0.26, label=f"{name.upper()}, mean {summary[f's1_over_{name}']:.2f}")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=8)
    ax.set_ylabel("period over S1's")
    ax.set_title("Same policy, other schedule: simulated periods", fontsize=10)
    ax.set_ylim(0, 1.15 * max(row[f"s1_over_{name}"] for row in rows.values() for name in ("s2", "s3", "s4")))
    ax.legend(fontsize=8, ncols=3, loc="upper right")
    ax.grid(alpha=0.3, axis="y")
    return figure
