"""Xu, Mao, Mo et al., "Pie: Pooling CPU Memory for LLM Inference" (arXiv 2411.09317), in miniature: keys and values of
running requests in the host's memory, streamed past the layers so that nobody waits. Workloads on a simulated GH200;
and a small live model on an emulated one, whose real pages are copied, with the wall clock.
"""

import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch.dlpm_study.config import Parts
from launch.pie_study import plots, report
from launch.pie_study.simulated import run_part, runs

_SEEDS = flags.DEFINE_integer("pie_seeds", 5, "of the simulated gains", lower_bound=1)
_PIE_WORKERS = flags.DEFINE_integer("pie_workers", 2, "simulations side by side", lower_bound=1)
_MEASURED = flags.DEFINE_bool("pie_measured", True, "also measure on the emulated machine, two minutes")
_LAYER_MS = flags.DEFINE_float("pie_layer_ms", 16.0, "of the emulated machine: what a layer takes", lower_bound=0.1)
_STEPS = flags.DEFINE_integer("pie_steps", 30, "timed steps of each emulated run", lower_bound=4, upper_bound=40)


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it. Returns the summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    if scale == "full":
        from launch.pie_study import accelerator

        return accelerator.run(workdir)
    began = time.perf_counter()
    seeds = _SEEDS.value
    parts = Parts(workdir, {"seeds": seeds, "layer_ms": _LAYER_MS.value, "steps": _STEPS.value})
    simulations = runs(seeds)
    simulate_all(simulations, parts)
    if _MEASURED.value and parts.get("measured") is None:
        parts.put("measured", measure_all())
    names = [*simulations, *(["measured"] if _MEASURED.value else [])]
    found = {name: part for name in names if (part := parts.get(name))}
    summary = report.summarise(found, seeds) | {"wall_s": round(time.perf_counter() - began, 1)}
    write_summary(workdir, summary)
    (workdir / "report.md").write_text(report.text(summary) + "\n")
    plots.draw(found, summary, workdir)
    print(report.text(summary), file=sys.stderr)
    return summary


def simulate_all(simulations: Mapping[str, Any], parts: Parts) -> None:
    """The simulations that are not done, some side by side in processes of their own."""
    todo = {name: what for name, what in simulations.items() if parts.get(name) is None}
    if not todo:
        return
    context = multiprocessing.get_context("spawn")
    with (
        Progress(len(todo), "pie: simulating", unit="run") as progress,
        concurrent.futures.ProcessPoolExecutor(_PIE_WORKERS.value, mp_context=context) as pool,
    ):
        futures = {pool.submit(run_part, what): name for name, what in todo.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                parts.put(futures[future], future.result())
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)


def measure_all() -> dict[str, Any]:
    """The runs on the emulated machine."""
    from launch.pie_study.measured import MeasuredConfig, measure, timed_steps  # simulations do without jax

    config = MeasuredConfig(layer_s=1e-3 * _LAYER_MS.value, steps=_STEPS.value)
    with Progress(timed_steps(config), "pie: measuring") as progress:
        return measure(config, progress.say, progress.advance)
