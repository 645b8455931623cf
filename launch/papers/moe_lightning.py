"""Cao, Liu, Griggs et al., "MoE-Lightning: High-Throughput MoE Inference on Memory-constrained GPUs" (arXiv
2411.11217), in miniature: its schedule against the others under a virtual clock, its policies against an exhaustive
search, and its tables beside what the machines' limits allow.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.machine import PROFILES
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch.dlpm_study.config import Parts
from launch.offload_study import full_scale, plots, policies, published, report, simulated

_STUDY_SETTINGS = flags.DEFINE_integer("settings", 13, "of the 13 settings, so many, evenly", 1, 13)
_TABLES = flags.DEFINE_bool("tables", True, "also figures 7 and 10 across all machines")
_MEASURED = flags.DEFINE_bool("measured", True, "also race the schedules on the emulated machine")


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it. Returns the summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    if scale == "full":
        return full_scale.run(workdir)
    return run_study(workdir, settings=_STUDY_SETTINGS.value, tables=_TABLES.value, measured=_MEASURED.value)


def run_study(workdir: Path, *, settings: int = 13, tables: bool = True, measured: bool = True) -> dict[str, Any]:
    """Every part that is not finished yet, then the report."""
    began = time.perf_counter()
    parts = Parts(workdir, {"settings": settings, "tables": tables, "measured": measured})
    todo = work(settings, tables)
    found: dict[str, Any] = {}
    with Progress(len(todo) + measured, "moe_lightning", unit="part") as progress:
        if measured:
            found["measured"] = parts.make("measured", lambda: _race(progress.say))
            progress.advance()
        for name, compute in todo.items():
            found[name] = parts.make(name, compute)
            progress.figures(last=name)
            progress.advance()
    summary = report.summarise(found) | {"wall_s": round(time.perf_counter() - began, 1)}
    write_summary(workdir, summary)
    (workdir / "report.md").write_text(report.text(summary) + "\n")
    setting = next(each for each in published.mtbench_settings() if each.name == "S1, 128")
    lines = {name: simulated.timeline(setting, name, drain=False, layers=4) for name in ("S1", "S2", "S3", "S4")}
    plots.draw(summary, lines, workdir)
    print(report.text(summary), file=sys.stderr)
    return summary


def work(settings: int, tables: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of a part -> what computes it."""
    mtbench, padded = published.mtbench_settings(), published.padded_settings()
    every = [*mtbench, *padded]
    chosen = {round(i * (len(every) - 1) / max(1, settings - 1)) for i in range(settings)}
    todo: dict[str, Callable[[], dict[str, Any]]] = {}
    for place in sorted(chosen):
        todo[f"schedules-{every[place].name}"] = _later(simulated.compare_schedules, every[place])
    for place in sorted(chosen):
        if place < len(mtbench):
            todo[f"policies-{every[place].name}"] = _later(simulated.compare_policies, every[place])
    todo["roofline"] = _later(policies.roofline_points, PROFILES["l4"])
    todo["attention"] = policies.attention_row
    todo["plans"] = policies.plans
    todo["ablation"] = simulated.ablation
    todo["helm"] = simulated.helm_rows
    todo["refill"] = simulated.refill_row
    if tables:
        for name in published.SETTINGS:
            for generated in published.GENERATED:
                both = (True, False) if name in ("S1", "S2") else ((False,) if name in ("S8", "S9") else (True,))
                for padding in both:
                    label = f"{name}{' (p)' if padding else ''}, {generated}"
                    todo[f"mtbench-{label}"] = _later(simulated.mtbench_row, name, generated, padded=padding)
        for link in policies.LINKS_GB:
            for host in policies.HOST_SCALES:
                todo[f"placement-{link}, {host}"] = _later(policies.placement, link, host)
    return todo


def _race(say: Callable[[str], None]) -> dict[str, Any]:
    # Before jax starts: tasks of the device and of the host run side by side, and must not take each other's core.
    flags_before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags_before} --xla_cpu_multi_thread_eigen=false".strip()
    from launch.offload_study.measured import race  # simulations do without jax

    say("racing the schedules on the emulated machine, about a minute")
    return race(say)


def _later(function: Callable[..., dict[str, Any]], *arguments: Any, **named: Any) -> Callable[[], dict[str, Any]]:
    return lambda: function(*arguments, **named)
