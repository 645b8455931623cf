"""Runs the parts of the study that are not finished, and reports."""

import concurrent.futures
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch.dlpm_study.config import Parts
from launch.skyserve_study import plots, report
from launch.skyserve_study.simulated import Settings, Task, run_task, tasks, weight

LOCAL_S = 60


def run_study(settings: Settings, workdir: Path, *, workers: int, local: bool = True) -> dict[str, Any]:
    """Every part that is not finished yet, then the report."""
    began = time.perf_counter()
    planned = tasks(settings)
    parts = Parts(workdir, dataclasses.asdict(settings))
    simulate_all(planned, parts, workers)
    if local and parts.get("local") is None:
        parts.put("local", kill_all(workdir))
    names = [*planned, *(["local"] if local else [])]
    found = {name: part for name in names if (part := parts.get(name))}
    summary = report.summarise(settings, found) | {"wall_s": round(time.perf_counter() - began, 1)}
    write_summary(workdir, summary)
    (workdir / "report.md").write_text(report.text(summary) + "\n")
    plots.draw(settings, found, workdir)
    print(report.text(summary), file=sys.stderr)
    return summary


def simulate_all(planned: Mapping[str, Task], parts: Parts, workers: int) -> None:
    """The parts that are not done, some side by side in processes of their own."""
    todo = {name: task for name, task in planned.items() if parts.get(name) is None}
    if not todo:
        return
    with Progress(sum(map(weight, todo.values())), "skyserve: simulating", unit="run") as progress:

        def done(name: str, part: dict[str, Any]) -> None:
            parts.put(name, part)
            progress.figures(last=name)
            progress.advance(weight(todo[name]))

        if workers == 1:
            for name, task in todo.items():
                done(name, run_task(task))
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(run_task, task): name for name, task in todo.items()}
            try:
                for future in concurrent.futures.as_completed(futures):
                    done(futures[future], future.result())
            finally:
                pool.shutdown(cancel_futures=True)


def kill_all(workdir: Path) -> dict[str, Any]:
    """A minute of a local fleet whose replicas are killed while they answer."""
    from launch.skyserve_study.local import run_local  # simulations do without jax

    with Progress(LOCAL_S, "skyserve: a local fleet", unit="s") as progress:
        return run_local(workdir / "local", seconds=LOCAL_S, kills=6, streams=40, progress=progress)
