"""The study: one base model, many cells, one table.

    config = study_config("relay")
    result = run_study(config, Path("work/longcot"))

Each (perturbation, fraction, seed) is a folder of the workdir. A study that was killed and is started again goes on
with the cell it was at, from that cell's last checkpoint, and does none twice.
"""

import dataclasses
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

from jaxstack.reasoning.longcot.config import BASE, Cell, StudyConfig
from jaxstack.reasoning.longcot.report import analyse, report_text, study_plot
from jaxstack.reasoning.longcot.results import read_summary
from jaxstack.reasoning.longcot.workers import Worker, core_shares, usable_cores
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import read_rows, write_atomically, write_summary
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import StopFlag, WorkdirLock

_MOST_WORKERS = 4
_POLL_S = 0.5
# Fields that may differ between two starts: they choose which cells are run and how, not what a cell is.
_FREE = ("cells", "seeds", "workers")


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """What a study found.

    Attributes:
      summary: as in `summary.json`.
      table: the report's text.
      finished: False if it was stopped before its end; the summary then says how far it came.
    """

    summary: dict[str, Any]
    table: str
    finished: bool


def run_study(
    config: StudyConfig, workdir: str | Path, stop: threading.Event | None = None, *, progress: bool = True
) -> StudyResult:
    """Runs, or goes on with, a study.

    The workdir gets a folder for each cell, `study.json`, `summary.json`, `report.md` and `longcot.png`.

    Args:
      config: see `study_config`.
      workdir: created when missing, locked while running.
      stop: ends the study early, as the first SIGTERM or SIGINT does: running cells keep a checkpoint.
      progress: a bar with the time left on stderr.

    Raises:
      UserError: the workdir holds another study, or a cell failed; finished cells stay.
    """
    workdir = Path(workdir)
    with WorkdirLock(workdir), StopFlag(stop) as flag:
        _check_same_study(config, workdir)
        return _Study(config, workdir, flag, progress).run()


class _Study:
    def __init__(self, config: StudyConfig, workdir: Path, stop: StopFlag, progress: bool):
        self.config, self.workdir, self.stop = config, workdir, stop
        self.started = time.perf_counter()
        self.cells = config.with_seeds()
        self.total = config.base_steps + len(self.cells) * config.sft_steps
        self.shown = sum(self._steps(cell) for cell in (BASE, *self.cells))
        self.bar = Progress(self.total, f"{config.task} study", initial=self.shown, enabled=progress)
        self.replies: queue.Queue[tuple[Worker, dict[str, Any] | None]] = queue.Queue()
        self.workers: list[Worker] = []
        self.wall_s: dict[str, float] = {}

    def run(self) -> StudyResult:
        try:
            with self.bar:
                if self.config.workers == 1:  # one process for all, which compiles once
                    finished = self._run_cells([BASE, *self.cells], 1)
                else:
                    finished = self._run_cells([BASE], 1)
                    finished = finished and self._run_cells(list(self.cells), self._worker_count())
        finally:
            for worker in self.workers:  # only after an error; what still runs keeps a checkpoint
                worker.interrupt()
                worker.close()
        if not finished:
            done = [cell.folder for cell in (BASE, *self.cells) if self._done(cell)]
            summary: dict[str, Any] = {
                "task": self.config.task,
                "stopped_by": self.stop.reason,
                "cells_done": len(done),
            }
            return StudyResult(summary, f"stopped; {len(done)} of {len(self.cells) + 1} cells are done", False)
        summary = analyse(self.config, self.workdir)
        summary["wall_s"] = {
            **{phase: round(seconds, 1) for phase, seconds in self.wall_s.items()},
            "all": round(time.perf_counter() - self.started, 1),
        }
        table = report_text(summary)
        write_atomically(self.workdir / "report.md", table)
        study_plot(summary, self.workdir / "longcot.png")
        write_summary(self.workdir, summary)
        return StudyResult(summary, table, True)

    def _run_cells(self, cells: list[Cell], worker_count: int) -> bool:
        """Runs those not done, side by side; whether all are."""
        began = time.perf_counter()
        waiting = [cell for cell in cells if not self._done(cell)]
        logs = self.workdir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        count = min(worker_count, len(waiting))
        for number, cores in enumerate(core_shares(count)):
            worker = Worker(self.config, self.workdir, cores, logs / f"worker{number}.log", self.replies)
            self.workers.append(worker)
            worker.give(waiting.pop(0))
        asked = False
        while self.workers:
            if self.stop and not asked:
                asked = True
                waiting = []
                for worker in self.workers:
                    worker.interrupt()
            try:
                worker, reply = self.replies.get(timeout=_POLL_S)
            except queue.Empty:
                self._show()
                continue
            if worker not in self.workers:
                continue  # its end, after `close`
            if reply is None and not asked:
                raise worker.failure()
            if reply is not None and "error" in reply:
                raise UserError(f"cell {worker.cell.folder if worker.cell else ''}: {reply['error']}")
            if reply is not None and "summary" in reply and worker.cell is not None:
                figures = reply["summary"]
                self.bar.say(
                    f"{worker.cell.folder}: greedy {figures['greedy']:.3f}, T=1 {figures['t1']:.3f} "
                    f"(train {figures['train_s']:.0f} s, evaluate {figures['evaluate_s']:.0f} s)"
                )
            if waiting and reply is not None:
                worker.give(waiting.pop(0))
            else:
                self.workers.remove(worker)
                worker.close()
        self._show()
        self.wall_s["base" if cells == [BASE] else "cells"] = time.perf_counter() - began  # of this start
        return all(self._done(cell) for cell in cells)

    def _worker_count(self) -> int:
        wanted = self.config.workers or min(_MOST_WORKERS, usable_cores())
        if wanted > 1 and (read_summary(self.workdir / BASE.folder) or {})["backend"] != "cpu":
            return 1  # a process takes an accelerator's memory for itself
        return wanted

    def _done(self, cell: Cell) -> bool:
        return (self.workdir / cell.folder / "summary.json").exists()

    def _steps(self, cell: Cell) -> int:
        """Steps that a cell has trained, finished or not."""
        if self._done(cell):
            return self.config.base_steps if cell == BASE else self.config.sft_steps
        rows = read_rows(self.workdir / cell.folder / "train" / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def _show(self) -> None:
        now = sum(self._steps(cell) for cell in (BASE, *self.cells))
        if now > self.shown:
            self.bar.advance(now - self.shown)
            self.shown = now


def _check_same_study(config: StudyConfig, workdir: Path) -> None:
    """Remembers what a study is, and refuses to go on with another one in its folder."""
    file = workdir / "study.json"
    now = json.loads(json.dumps(config.as_json()))
    if file.exists():
        before = json.loads(file.read_text())
        differing = [
            f"{name}: {before.get(name)!r} -> {now[name]!r}"
            for name in now
            if name not in _FREE and before.get(name) != now[name]
        ]
        if differing:
            raise UserError(
                f"{workdir} holds another study ({'; '.join(differing)}); expected the same, or another workdir"
            )
    write_atomically(file, json.dumps(now, indent=2) + "\n")
