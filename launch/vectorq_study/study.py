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
from launch.vectorq_study import plots, report
from launch.vectorq_study.tasks import StudyConfig, Task, run_task, tasks


def run_study(config: StudyConfig, workdir: Path, *, workers: int) -> dict[str, Any]:
    """Every part that is not finished yet, then the report."""
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    planned = tasks(config)
    settings = dataclasses.asdict(config)
    parts = Parts(workdir, {name: list(value) if isinstance(value, tuple) else value
                            for name, value in settings.items()})  # fmt: skip
    replay_all(planned, parts, workers)
    found = {name: part for name in planned if (part := parts.get(name)) is not None}
    summary = report.summarise(config, found) | {"wall_s": round(time.perf_counter() - began, 1)}
    write_summary(workdir, summary)
    said = report.text(config, summary)
    (workdir / "report.md").write_text(said + "\n")
    plots.draw(config, found, summary, workdir)
    print(said, file=sys.stderr)
    return summary


def replay_all(planned: Mapping[str, Task], parts: Parts, workers: int) -> None:
    """The parts that are not done, some side by side in processes of their own."""
    todo = {name: task for name, task in planned.items() if parts.get(name) is None}
    if not todo:
        return
    with Progress(len(todo), "vectorq: replaying", unit="stream") as progress:

        def done(name: str, part: dict[str, Any]) -> None:
            parts.put(name, part)
            progress.figures(last=name)
            progress.advance()

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
