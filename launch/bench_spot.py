"""How fast a serving policy is simulated: ticks a second of one core, by policy, beside the same thing said naively.

    python -m launch.bench_spot                      # a day of each set, with cold starts of 2 and of 20 minutes
    python -m launch.bench_spot --artifact=FOLDER    # also the published simulator, where it has been fetched

`naive` looks at every replica at every tick and sorts them out of a list; `windowed` has the ready replicas from the
least that each zone held over a cold start, anew at every tick, as the published simulator does, and decides nothing.
All run on the same made-up traces and must agree; CPU time of this process, the least of some runs.
`--artifact` names a folder with a file `spot_simulator.py` that has `run(capacity, target, extra, cold_ticks)`: a
wrapper around the published loop is for whoever may use it to write.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from jaxstack.fleet.spot.evaluation import POLICIES, synthetic_windows
from jaxstack.fleet.spot.omniscient import solve_omniscient
from jaxstack.fleet.spot.reference import ready_by_windowed_minimum, simulate_plainly
from jaxstack.fleet.spot.simulator import TICK_S, simulate
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.runtime.errors import UserError
from launch import job

_SETS = flags.DEFINE_list("sets", ["aws1", "aws2", "aws3"], "which sets of made-up traces")
_BENCH_POLICIES = flags.DEFINE_list("policies", ["ours", "paper", "round_robin"], "which policies")
_COLD = flags.DEFINE_list("cold_start_s", ["120", "1200"], "cold starts, seconds")
_TARGET = flags.DEFINE_integer("target", 3, "replicas that should be ready", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 3, "of each, the fastest counts", lower_bound=1)
_BOUND = flags.DEFINE_bool("bound", True, "also what the least possible cost takes to solve")
_ARTIFACT = flags.DEFINE_string("artifact", None, "folder of a wrapper around the published simulator")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The least CPU seconds of some runs, and what the last returned."""
    best = np.inf
    for _ in range(_RUNS.value):
        begin = time.process_time()
        found = run()
        best = min(best, time.process_time() - begin)
    return best, found


def measure(trace: SpotTrace, name: str, cold_start_s: float) -> dict[str, Any]:
    """One policy on one trace."""
    make = lambda: POLICIES[name](trace, _TARGET.value, 1)  # noqa: E731
    cold_ticks = math.ceil(cold_start_s / TICK_S - 1e-9)  # as the simulator rounds
    ours_s, ours = timed(lambda: simulate(trace, make(), cold_start_s=cold_start_s))
    naive_s, naive = timed(lambda: simulate_plainly(trace, make(), tick_s=TICK_S, cold_ticks=cold_ticks))
    windowed_s, _ = timed(lambda: ready_by_windowed_minimum(ours.spot_by_zone, cold_ticks))
    if (naive["ready"] != ours.ready).any():
        raise AssertionError(f"{trace.name}, {name}: the simulator and the naive loop disagree")
    ticks = len(ours.ready)
    return {
        "ticks_per_s": round(ticks / ours_s),
        "over_naive": round(naive_s / ours_s, 2),
        "over_windowed": round(windowed_s / ours_s, 2),
    }


def artifact_ticks_per_s(trace: SpotTrace, cold_start_s: float) -> float | None:
    """The published loop through the user's wrapper."""
    if _ARTIFACT.value is None:
        return None
    file = Path(_ARTIFACT.value) / "spot_simulator.py"
    spec = importlib.util.spec_from_file_location("spot_simulator", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"--artifact={_ARTIFACT.value}: found no spot_simulator.py in it, expected a file with run()")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capacity = trace.ticks(TICK_S)
    taken_s, _ = timed(lambda: module.run(capacity, _TARGET.value, 1, math.ceil(cold_start_s / TICK_S - 1e-9)))
    return capacity.shape[1] / taken_s


def _cold_starts() -> list[float]:
    try:
        found = [float(text) for text in _COLD.value]
    except ValueError:
        found = [math.nan]
    if not all(0 < seconds < math.inf for seconds in found):
        raise job.BadUsage(f"--cold_start_s: found {','.join(_COLD.value)!r}, expected numbers of seconds > 0")
    return found


def run() -> dict[str, Any]:
    unknown = set(_BENCH_POLICIES.value) - POLICIES.keys()
    if unknown:
        raise job.BadUsage(f"--policies: found {sorted(unknown)[0]!r}, expected some of {', '.join(POLICIES)}")
    cold_starts = _cold_starts()
    if not (_SETS.value and _BENCH_POLICIES.value and cold_starts):
        raise job.BadUsage("--sets, --policies, --cold_start_s: found none, expected at least one of each")
    summary: dict[str, Any] = {}
    print(f"{'set':<8}{'policy':<14}{'cold s':>8}{'ticks/s':>12}{'x naive':>10}{'x windowed':>12}", file=sys.stderr)
    for traces in _SETS.value:
        (trace,) = synthetic_windows(traces, 1)
        for cold in cold_starts:
            for name in _BENCH_POLICIES.value:
                row = measure(trace, name, cold)
                summary[f"{traces}, {name}, {cold:g} s"] = row
                print(
                    f"{traces:<8}{name:<14}{cold:>8g}{row['ticks_per_s']:>12,}{row['over_naive']:>10.1f}"
                    f"{row['over_windowed']:>12.1f}",
                    file=sys.stderr,
                )
            if (theirs := artifact_ticks_per_s(trace, cold)) is not None:
                ours = summary[f"{traces}, {_BENCH_POLICIES.value[0]}, {cold:g} s"]
                ours["over_artifact"] = round(ours["ticks_per_s"] / theirs, 2)
                print(f"{traces:<8}{'published':<14}{cold:>8g}{theirs:>12,.0f}", file=sys.stderr)
        if _BOUND.value:
            found = solve_omniscient(trace, _TARGET.value)
            summary[f"{traces}, bound"] = {"status": found.status, "time_s": round(found.time_s, 2)}
            print(f"{traces:<8}{'least cost':<14}{'120':>8}   solved in {found.time_s:.1f} s", file=sys.stderr)
    rows = [row for row in summary.values() if "over_naive" in row]
    logs = np.log([row["over_naive"] for row in rows])
    summary["over_naive_geometric_mean"] = round(float(np.exp(logs.mean())), 2)
    return summary


if __name__ == "__main__":
    job.main(run)
