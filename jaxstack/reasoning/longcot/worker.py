"""A process that runs cells: `python -m jaxstack.reasoning.longcot.worker`, started by `workers.py` and by nobody else.

It reads one JSON object a line from stdin: first the study and the processor cores to use, then cells; it answers each
cell with one line on stdout. Where stdin ends before it says so, whoever started it has died, and it dies as well: a
cell that nobody waits for would hold its folder's lock.
"""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr  # whatever a library prints is no answer
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            job = json.loads(line)
            jobs.put(job)
            if job.get("done"):
                return
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    first = jobs.get()
    if first["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, first["cores"])  # before jax starts its threads: it makes one a core

    from jaxstack.reasoning.longcot.cells import CellRunner
    from jaxstack.reasoning.longcot.config import Cell, StudyConfig
    from jaxstack.runtime.compilation import use_compilation_cache
    from jaxstack.runtime.errors import UserError

    workdir = Path(first["workdir"])
    use_compilation_cache(workdir / "compiled")
    runner = CellRunner(StudyConfig.from_json(first["study"]), workdir)
    while not (job := jobs.get()).get("done"):
        try:
            summary = runner.run(Cell(**job))
            answer: dict[str, Any] = {"stopped": True} if summary is None else {"summary": summary}
        except UserError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
