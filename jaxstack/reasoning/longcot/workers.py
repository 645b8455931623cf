"""Processes that run cells side by side, each on its own processor cores.

One cell's model is too small to keep two cores busy, and two cells on one core each finish sooner than one after the
other on both. So a worker is a process of its own (`worker.py`), tied to its cores before jax starts.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxstack.reasoning.longcot.config import Cell, StudyConfig
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.memory import with_huge_pages


class Worker:
    """One process, and the cell that it is at.

    Args:
      config, workdir: of the study.
      cores: processor cores to stay on; empty for all.
      log: file that gets what the process prints.
      replies: where the worker puts itself with each reply, None where the process has ended.
    """

    def __init__(
        self,
        config: StudyConfig,
        workdir: Path,
        cores: Sequence[int],
        log: Path,
        replies: "queue.Queue[tuple[Worker, dict[str, Any] | None]]",
    ):
        self.cell: Cell | None = None
        self.log = log
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jaxstack.reasoning.longcot.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=with_huge_pages({**os.environ, "PYTHONPATH": path}),
                start_new_session=True,  # a terminal's Ctrl-C is for the study, which passes it on
            )
        self._tell({"workdir": str(workdir), "study": config.as_json(), "cores": list(cores)})
        threading.Thread(target=self._listen, args=(replies,), daemon=True).start()

    def give(self, cell: Cell) -> None:
        self.cell = cell
        self._tell(dataclasses.asdict(cell))

    def interrupt(self) -> None:
        """Asks for a checkpoint and an end; between two cells it ends at once."""
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Ends the process, which must be idle or have ended."""
        self._tell({"done": True})
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def failure(self) -> UserError:
        """Why the process is gone, as one line."""
        code = self._process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1][:200] if lines else "it printed nothing"
        at = f"in cell {self.cell.folder}" if self.cell else "at its start"
        return UserError(f"a worker of the study ended {at} with code {code}: {last} (all of it in {self.log})")

    def _tell(self, job: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the listener says so

    def _listen(self, replies: "queue.Queue[tuple[Worker, dict[str, Any] | None]]") -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                replies.put((self, json.loads(line)))
        replies.put((self, None))


def core_shares(workers: int) -> list[list[int]]:
    """The cores that this process may use, dealt out to so many workers; nothing where the system cannot tie them."""
    if not hasattr(os, "sched_getaffinity") or workers < 2:
        return [[]] * workers
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < workers:
        return [[cores[number % len(cores)]] for number in range(workers)]
    return [cores[number::workers] for number in range(workers)]


def usable_cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
