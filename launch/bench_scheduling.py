"""What a scheduling decision costs the host: milliseconds a step, by policy and by how many requests wait.

    python -m launch.bench_scheduling                        # 400 and 4,000 waiting
    python -m launch.bench_scheduling --waiting=1000 --document_tokens=4096

The engine's own scheduler runs in the simulator, so nothing but planning is measured: CPU time of this process, the
median over steps in which requests come and go. `match_ms` is what it takes to know how much of each waiting request is
cached, after the changes of one step; its peer, run beside it on the same state, walks the prefix tree page by page for
every request, as SGLang does token by token. `over_fcfs` is what a policy adds to a step.
"""

import contextlib
import statistics
import sys
import time
from typing import Any

from absl import flags

from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import drive
from jaxstack.engine.scheduling.simulator import SimulatedReplica, StepCostModel
from jaxstack.engine.scheduling.workloads import DocumentClient, Documents
from launch import job

_WAITING = flags.DEFINE_list("waiting", ["400", "4000"], "how many requests wait")
_POLICIES = flags.DEFINE_list("policies", ["fcfs", "lpm", "vtc", "dlpm"], "which policies")
_DOCUMENT = flags.DEFINE_integer("document_tokens", 1024, "of each prompt's prefix", lower_bound=16)
_CLIENTS = flags.DEFINE_integer("clients", 16, "who share the requests", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 150, "measured, after as many that are not", lower_bound=3)
_SEED = flags.DEFINE_integer("seed", 0, "of the requests")


def measure(policy: str, waiting: int) -> dict[str, float]:
    """CPU milliseconds of a step and of matching, in a loop that keeps `waiting` requests waiting."""
    backlog = -(-waiting // _CLIENTS.value)
    clients = [DocumentClient(f"client-{i:02}", _DOCUMENT.value, backlog=backlog) for i in range(_CLIENTS.value)]
    load = Documents(clients, seed=_SEED.value)
    pages = 16 * (2 * _DOCUMENT.value // 16)
    options = {"quantum": 2048} if policy == "dlpm" else {}
    replica = SimulatedReplica.of(
        policy_named(policy, **options), StepCostModel(0.002, 25e-6), num_pages=pages, certify=False
    )
    steps: list[float] = []
    matches: list[float] = []
    walks: list[float] = []
    plan = replica.scheduler.plan

    def timed_plan():
        scheduler = replica.scheduler
        begin = time.process_time()
        scheduler.prefix_lengths(scheduler.waiting)
        after = time.process_time()
        if len(steps) % 10 == 0:
            for sequence in scheduler.waiting:
                scheduler.cached_tokens(sequence)
            walks.append(time.process_time() - after)
        matches.append(after - begin)
        begin = time.process_time()
        planned = plan()
        steps.append(time.process_time() - begin)
        return planned

    setattr(replica.scheduler, "plan", timed_plan)  # noqa: B010 - mypy will not have a method replaced
    wanted = 2 * _STEPS.value

    class Enough(Exception):
        pass

    def stop() -> None:
        if len(steps) >= wanted:
            raise Enough

    with contextlib.suppress(Enough):
        drive(replica, load, on_turn=stop)
    half = len(steps) // 2
    milliseconds = lambda values: round(1e3 * statistics.median(values), 4)  # noqa: E731
    return {
        "plan_ms": milliseconds(steps[half:]),
        "match_ms": milliseconds(matches[half:]),
        "walk_ms": milliseconds(walks[len(walks) // 2 :]),
    }


def run() -> dict[str, Any]:
    try:
        sizes = [int(text) for text in _WAITING.value]
        if min(sizes) < 32:
            raise ValueError
    except ValueError:
        raise job.BadUsage(f"--waiting: found {','.join(_WAITING.value)!r}, expected integers >= 32") from None
    summary: dict[str, Any] = {}
    for size in sizes:
        rows = {}
        for policy in _POLICIES.value:
            rows[policy] = measure(policy, size)
            found = rows[policy]
            print(
                f"{size} waiting, {policy}: plan {found['plan_ms']:.3f} ms, match {found['match_ms']:.3f} ms, "
                f"page walk {found['walk_ms']:.2f} ms",
                file=sys.stderr,
                flush=True,
            )
        if "fcfs" in rows:
            for row in rows.values():
                row["over_fcfs_ms"] = round(row["plan_ms"] - rows["fcfs"]["plan_ms"], 4)
        speedups = [row["walk_ms"] / max(row["match_ms"], 1e-6) for row in rows.values()]
        summary[str(size)] = rows
        summary[f"match_speedup_over_walk_{size}"] = round(statistics.median(speedups), 1)
    return summary


if __name__ == "__main__":
    job.main(run)
