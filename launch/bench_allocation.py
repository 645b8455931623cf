"""How fast plans are found, beside PuLP with CBC solving the paper's program: `python -m launch.bench_allocation`.

Fifteen instances: the study's workloads, and random ones of 60 sizes and 4 or 8 types, each cut into slices. `slices`
solves the same problem with the slices of a size counted instead of named, `shares` the one where any share may go
anywhere. All sides build and solve, to no gap; processor seconds are compared (a median of three where short), wall
seconds are printed beside them. CBC, in the peers' environment (`make peers`), is stopped at a limit, and what it took
until then counts; costs say what it had found. The last line is one JSON object.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch import job
from launch.melange_study.race import geometric_mean, instances, open_peer, race
from launch.peers.process import DEFAULT_INTERPRETER
from launch.serve_benchmark.machine import LoadMeter

_LIMIT = flags.DEFINE_float("cbc_limit_s", 30.0, "processor seconds after which CBC is stopped", lower_bound=0.1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each side, where one takes less than a second", lower_bound=1)
_ONLY = flags.DEFINE_string("only", "", "instances whose name has this in it")
_PYTHON = flags.DEFINE_string("peer_python", DEFAULT_INTERPRETER, "interpreter of the peers' environment")
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_allocation", "where summary.json and the peer's log go")


def run() -> dict[str, Any]:
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    chosen = [instance for instance in instances() if _ONLY.value in instance.name]
    if not chosen:
        names = "; ".join(instance.name for instance in instances())
        raise job.BadUsage(f"--only: found {_ONLY.value!r}, expected part of one of these: {names}")
    rows = []
    with (
        open_peer(_PYTHON.value, workdir / "pulp.log") as peer,
        Progress(len(chosen), "allocation", unit="instance") as progress,
        LoadMeter(lambda: [peer.process]) as load,
    ):
        for instance in chosen:
            row = race(instance, peer, cbc_limit_s=_LIMIT.value, repeats=_REPEATS.value)
            rows.append(row)
            progress.advance()
            stopped = " (stopped)" if row["cbc"]["stopped"] else ""
            progress.say(
                f"{row['name']:<34} slices {row['slices']['cpu_s']:7.3f} s, shares {row['shares']['cpu_s']:7.3f} s, "
                f"CBC {row['cbc']['cpu_s']:7.2f} s{stopped}; {row['slices_speedup_cpu_s']:.1f}x, "
                f"{row['shares_speedup_cpu_s']:.1f}x"
            )
    summary: dict[str, Any] = {"foreign_cores": round(load.foreign_cores, 2)}
    for side, name in (("slices", "speedup_vs_pulp_cbc"), ("shares", "speedup_continuous_vs_pulp_cbc")):
        for clock, suffix in (("cpu_s", ""), ("wall_s", "_by_wall_clock")):
            mean = geometric_mean([row[f"{side}_speedup_{clock}"] for row in rows])
            summary[name + suffix] = mean and round(mean, 2)
    summary["cbc_stopped"] = sum(row["cbc"]["stopped"] for row in rows)
    summary["cbc_dearer"] = sum((row["cbc"]["dearer"] or 0) > 1e-6 for row in rows)
    write_summary(workdir, summary | {"rows": rows})
    if summary["cbc_stopped"]:
        print(f"CBC was stopped in {summary['cbc_stopped']} instances: the ratios are at least these", file=sys.stderr)
    return summary


if __name__ == "__main__":
    job.main(run)
