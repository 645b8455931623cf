"""From measured runs to figures: medians of ratios, the summary, the plot."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.engine import EngineStats
from jaxstack.engine.request import RequestTiming
from launch.serve_benchmark.agreement import Agreement
from launch.serve_benchmark.contest import PeerMode, Run
from launch.serve_benchmark.machine import FOREIGN_LIMIT
from launch.serve_benchmark.matmul_limit import MatmulTimes

Round = dict[str, Run]

OURS = ("http", "in_process")
"""Our contestants; the first is the one that counts."""


def speedup(rounds: Sequence[Round], ours: str, theirs: str, *, of: str = "wall_s") -> float:
    """Median over the rounds of their seconds over ours."""
    return statistics.median(getattr(r[theirs].measured, of) / getattr(r[ours].measured, of) for r in rounds)


def medians(rounds: Sequence[Round], name: str) -> dict[str, Any]:
    """Medians of one contestant, and its wall time in every round."""
    runs = [r[name].measured for r in rounds]
    wall = statistics.median(run.wall_s for run in runs)
    return {
        "wall_s": round(wall, 3),
        "cpu_s": round(statistics.median(run.cpu_s for run in runs), 3),
        "tokens_per_s": round(sum(map(len, runs[0].tokens)) / wall, 1),
        "wall_s_by_round": [round(run.wall_s, 3) for run in runs],
    }


def latencies(timings: Sequence[RequestTiming]) -> dict[str, float | None]:
    """Median seconds from arrival at the engine to the first token, and (mean of a request) from one to the next."""
    first = [t.first_token_s - t.arrival_s for t in timings]
    each = [
        (t.token_times[-1] - t.token_times[0]) / (len(t.token_times) - 1) for t in timings if len(t.token_times) > 1
    ]
    return {
        "ttft_p50_s": round(float(np.median(first)), 4) if first else None,
        "tpot_p50_s": round(float(np.median(each)), 5) if each else None,
    }


def best_peer(rounds: Sequence[Round], ours: str, modes: dict[str, PeerMode]) -> str:
    """The peer's kind of mode that leaves `ours` least ahead."""
    return min(modes, key=lambda kind: speedup(rounds, ours, kind))


def speedup_over_best(rounds: Sequence[Round], ours: str, modes: dict[str, PeerMode]) -> float:
    """`speedup` over the best peer mode."""
    return round(speedup(rounds, ours, best_peer(rounds, ours, modes)), 3)


def speedups(peer: str, rounds: Sequence[Round], modes: dict[str, PeerMode]) -> dict[str, Any]:
    """Every ratio; where none of ours is named the first of `OURS` is meant."""
    found: dict[str, Any] = {}
    for name in OURS:
        suffix = "" if name == OURS[0] else f"_{name}"
        found[f"speedup_vs_{peer}{suffix}"] = speedup_over_best(rounds, name, modes)
        for kind in modes:
            found[f"speedup_vs_{kind}{suffix}"] = round(speedup(rounds, name, kind), 3)
    for kind in modes:
        found[f"cpu_ratio_vs_{kind}"] = round(speedup(rounds, OURS[0], kind, of="cpu_s"), 3)
    found["best_peer_mode"] = modes[best_peer(rounds, OURS[0], modes)].label
    return found


def our_figures(rounds: Sequence[Round], limits: Sequence[MatmulTimes]) -> dict[str, Any]:
    """Throughput, latency and `matmul_share`: CPU seconds over those of the same steps' bare products, medians.

    Args:
      limits: the products' times, as they were around each round.
    """
    counted = OURS[0]
    shares = {
        name: statistics.median(
            r[name].measured.cpu_s / limit.limit(r[name].measured.steps)
            for r, limit in zip(rounds, limits, strict=True)
        )
        for name in OURS
    }
    return {
        "tokens_per_s": medians(rounds, counted)["tokens_per_s"],
        **latencies([timing for r in rounds for timing in r[counted].measured.timings]),
        "matmul_share": round(shares[counted], 3),
        **{f"matmul_share_{name}": round(shares[name], 3) for name in OURS[1:]},
        "matmul_limit_cpu_s": round(
            statistics.median(limit.limit(r[counted].measured.steps) for r, limit in zip(rounds, limits, strict=True)),
            3,
        ),
    }


def agreement_figures(agreement: Agreement) -> dict[str, Any]:
    """Whether both sides did equal work, and where they parted."""
    return {
        "equal_output_counts": agreement.counts_equal,
        "tokens_agree": agreement.tokens_agree,
        "answers_compared": agreement.compared,
        "answers_equal": agreement.equal,
        "differences": [dataclasses.asdict(difference) for difference in agreement.differences],
    }


def contestants(rounds: Sequence[Round], modes: dict[str, PeerMode]) -> dict[str, dict[str, Any]]:
    """`medians` of everyone, with the setting that peers ran in."""
    return {f"ours_{name}": medians(rounds, name) for name in OURS} | {
        kind: medians(rounds, kind) | {"mode": mode.label} for kind, mode in modes.items()
    }


def disturbance(rounds: Sequence[Round], foreign_before: float) -> dict[str, Any]:
    """Whether the wall times may be compared: `conclusive`, and what speaks against it."""
    runs = [run for r in rounds for run in r.values()]
    worst = max(run.foreign_cores for run in runs)
    found: dict[str, Any] = {
        "conclusive": max(worst, foreign_before) <= FOREIGN_LIMIT,
        "foreign_cores_before": round(foreign_before, 3),
        "foreign_cores": round(worst, 3),
        "our_cores_while_peers_work": round(max(run.idle_cores for run in runs), 3),
    }
    if not found["conclusive"]:
        found["why_not_conclusive"] = (
            f"other programs used {foreign_before:.1f} cores before and up to {worst:.1f} during the rounds, more than "
            f"{FOREIGN_LIMIT}: ratios of wall times say little, CPU seconds say more"
        )
    return found


def overhead(rounds: Sequence[Round], stats: EngineStats) -> dict[str, float]:
    """What a step costs beside its computation, in milliseconds: the engine's Python, and the HTTP side's CPU time."""
    http = [
        (r["http"].measured.cpu_s - r["in_process"].measured.cpu_s) / max(1, len(r["http"].measured.steps))
        for r in rounds
    ]
    return {
        "engine_ms_per_step": round(1e3 * stats.host_seconds / max(1, stats.steps), 3),
        "http_cpu_ms_per_step": round(1e3 * statistics.median(http), 3),
    }


def figures(
    peer: str,
    rounds: Sequence[Round],
    modes: dict[str, PeerMode],
    limits: Sequence[MatmulTimes],
    agreement: Agreement,
    foreign_before: float,
) -> dict[str, Any]:
    """Everything that follows from the measured rounds.

    Args:
      peer: its name.
      modes: the peer's mode of each kind that took part.
      foreign_before: cores that other programs used before the start.
    """
    return {
        **speedups(peer, rounds, modes),
        **disturbance(rounds, foreign_before),
        **our_figures(rounds, limits),
        **agreement_figures(agreement),
        "contestants": contestants(rounds, modes),
    }


def plot(found: dict[str, dict[str, Any]], title: str, file: Path) -> None:
    """Bars: seconds of each of `contestants` (dots: every round) and its tokens per second, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = list(found)
    colours = ["tab:blue" if name.startswith("ours") else "tab:grey" for name in names]
    bars = left.bar(names, [found[name]["wall_s"] for name in names], color=colours)
    left.bar_label(bars, fmt="%.1f")
    for i, name in enumerate(names):
        walls = found[name]["wall_s_by_round"]
        left.plot([i] * len(walls), walls, "k.", markersize=4)
    left.set(ylabel="seconds", title="all requests answered (median; dots: rounds)")
    bars = right.bar(names, [found[name]["tokens_per_s"] for name in names], color=colours)
    right.bar_label(bars, fmt="%.0f")
    right.set(ylabel="tokens/s", title="generated tokens per second")
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def title(summary: dict[str, Any]) -> str:
    """What the plot shows, and whether to believe it."""
    doubt = "" if summary["conclusive"] else " (NOT CONCLUSIVE: other programs ran)"
    return (
        f"{summary['scale']}, {summary['workload']['requests']} requests, {summary['dtype']}, {summary['cpu']}{doubt}"
    )


def text(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{'':16}{'seconds':>9}{'CPU s':>9}{'tokens/s':>10}"]
    for name, one in summary["contestants"].items():
        lines.append(f"{name:16}{one['wall_s']:9.2f}{one['cpu_s']:9.2f}{one['tokens_per_s']:10.1f}")
    rows = [
        (
            "speed-up",
            f"{summary['speedup_vs_' + summary['peer']]:.2f} over the peer's best mode: {summary['best_peer_mode']}",
        ),
        ("matmul share", f"{summary['matmul_share']:.2f} of our CPU time over the bare products'"),
        (
            "overhead a step",
            f"engine {summary['engine_ms_per_step']} ms, HTTP {summary['http_cpu_ms_per_step']} CPU ms",
        ),
        ("TTFT / TPOT p50", f"{summary['ttft_p50_s']} / {summary['tpot_p50_s']} s"),
        (
            "same tokens",
            f"{summary['answers_equal']} of {summary['answers_compared']} answers, agree: {summary['tokens_agree']}",
        ),
        ("recompilations", str(summary["recompilations"])),
        ("model", summary["scale"]),
    ]
    if not summary["conclusive"]:
        rows.append(("NOT CONCLUSIVE", summary["why_not_conclusive"]))
    return "\n".join(["", *lines, *(f"{name:18}{value}" for name, value in rows)])
