"""Kills replicas of a live fleet at random, and its controller, while clients ask: no request may notice.

    python -m launch.fleet_soak --seconds=120 --kills=10

Three real servers in virtual zones of this machine, a tiny float32 model, answers of every kind (greedy and seeded
streams, penalties, stop strings, characters of many bytes, a chat, whole answers). In the end every accepted request
must have been answered, with the tokens, the text and the usage of an undisturbed answer, and no process may be left.
"""

import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from launch import job
from launch.skyserve_study.local import run_local

_SECONDS = flags.DEFINE_float("seconds", 120.0, "of load", lower_bound=1.0)
_KILLS = flags.DEFINE_integer("kills", 10, "replicas killed", lower_bound=0)
_CONTROLLERS = flags.DEFINE_integer("controller_kills", 1, "controllers killed", lower_bound=0)
_STREAMS = flags.DEFINE_integer("streams", 80, "answers at least", lower_bound=1)
_CLIENTS = flags.DEFINE_integer("clients", 6, "requests under way at a time", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of who is killed when")
_WORKDIR = flags.DEFINE_string("workdir", "work/fleet_soak", "where the fleet's files and summary.json go")


def run() -> dict[str, Any]:
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    workdir = Path(_WORKDIR.value)
    summary = run_local(
        workdir,
        seconds=_SECONDS.value,
        kills=_KILLS.value,
        streams=_STREAMS.value,
        progress=tell,
        controller_kills=_CONTROLLERS.value,
        clients=_CLIENTS.value,
        seed=_SEED.value,
    )
    write_summary(workdir, summary)
    wrong = [
        f"{name} is {summary[name]}, expected {good}"
        for name, good in (
            ("local_failed_requests", 0),
            ("local_lost_or_repeated_tokens", 0),
            ("local_streams_identical", 1.0),
            ("local_orphans", 0),
        )
        if summary[name] != good
    ]
    if wrong:
        raise UserError("; ".join(wrong))
    return summary


if __name__ == "__main__":
    job.main(run)
