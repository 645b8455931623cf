"""What would have happened under another policy? Replays a recorded trace in the simulator, under several.

    python -m launch.serve --record_trace=work/trace.jsonl ...          # records: no text, no tokens
    python -m launch.replay --trace=work/trace.jsonl --policies=fcfs,lpm,vtc,dlpm

The replica is the one that was recorded (pages, sequences, budget of a step) unless flags say otherwise. A step's cost
is fitted to the recorded steps, or read from a JSON file with base_s, token_s, context_token_s and pair_s (--costs).
Requests arrive when they arrived; those that were given up are given up after as long. `--speed=2` makes them arrive
twice as fast.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import OpenLoop, drive
from jaxstack.engine.scheduling.measuring import Meter
from jaxstack.engine.scheduling.simulator import SimulatedReplica
from jaxstack.engine.scheduling.step_cost import StepCostModel
from jaxstack.engine.scheduling.trace import Trace, read_trace
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from launch import job
from launch.dlpm_study.simulated import costs_of, fairness, model_of

_TRACE = flags.DEFINE_string("trace", None, "the recorded trace")
_POLICIES = flags.DEFINE_list("policies", ["fcfs", "lpm", "vtc", "dlpm"], "under which policies")
_QUANTUM = flags.DEFINE_integer("quantum", None, "of dlpm; by default chosen from the requests", lower_bound=1)
_COSTS = flags.DEFINE_string("costs", None, "JSON file with what a step costs; by default fitted to the trace")
_SPEED = flags.DEFINE_float("speed", 1.0, "arrivals come so many times faster", lower_bound=1e-3)
_PAGES = flags.DEFINE_integer("pages", None, "pages of the KV cache instead of those recorded", lower_bound=2)
_SEQUENCES = flags.DEFINE_integer("max_sequences", None, "answers at once instead of those recorded", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "where summary.json goes; nowhere by default")


def read_costs(path: str) -> StepCostModel:
    """A step's cost from a calibration's file.

    Raises:
      UserError: there is no such file, or other things are in it.
    """
    try:
        found = json.loads(Path(path).read_text())
        return model_of(found.get("costs", found))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--costs: found {path!r} ({error}), expected a JSON file with base_s, token_s, ...") from None


def replay(trace: Trace, policy: str, costs: StepCostModel, *, speed: float = 1.0, **sizes: int) -> dict[str, Any]:
    """One policy's row."""
    options = {"quantum": _QUANTUM.value} if policy == "dlpm" and _QUANTUM.value else {}
    settings = {n: getattr(trace, n) for n in ("num_pages", "page_size", "max_sequences", "max_batch_tokens")}
    replica = SimulatedReplica.of(policy_named(policy, **options), costs, **{**settings, **sizes})
    arrivals = trace.workload().start()
    if speed != 1.0:
        arrivals = [dataclasses.replace(a, at_s=a.at_s / speed) for a in arrivals]
    meter = Meter()
    replica.observers.append(meter)
    drive(replica, OpenLoop(arrivals), on_outcome=meter.on_outcome)
    gap, bound = fairness(replica.scheduler)
    return meter.row(0.0, replica.now_s, gap=gap, bound=bound).as_json()


def run() -> dict[str, Any]:
    if not _TRACE.value:
        raise job.BadUsage("--trace is missing; expected a file that a server wrote with --record_trace")
    trace = read_trace(_TRACE.value)
    if not trace.requests:
        raise UserError(f"{_TRACE.value}: found no requests, expected some")
    fitted = None
    if _COSTS.value:
        costs = read_costs(_COSTS.value)
    else:
        costs, error = trace.costs()
        fitted = error.as_json()
        print(f"a step's cost: relative error median {error.median:.1%}, P90 {error.p90:.1%}", file=sys.stderr)
    sizes = {n: v for n, v in (("num_pages", _PAGES.value), ("max_sequences", _SEQUENCES.value)) if v is not None}
    rows = {}
    titles = (f"{'policy':>8} {'requests/s':>11} {'service/s':>10} {'hit':>5} {'Jain':>6}", f"{'TTFT P50, P99':>16}")
    print(*titles, f"{'gap/bound':>10}", file=sys.stderr)
    for policy in _POLICIES.value:
        row = rows[policy] = replay(trace, policy, costs, speed=_SPEED.value, **sizes)
        gap = "none" if row["gap_over_bound"] is None else f"{row['gap_over_bound']:.2f}"
        tail = ", ".join("none" if row[k] is None else f"{row[k]:.2f}" for k in ("ttft_p50_s", "ttft_p99_s"))
        print(
            f"{policy:>8} {row['requests_per_s']:>11.2f} {row['service_rate']:>10.0f} {row['hit_rate']:>5.2f} "
            f"{row['jain']:>6.3f} {tail:>16} {gap:>10}",
            file=sys.stderr,
            flush=True,
        )
    summary = {
        "requests": len(trace.requests),
        "recorded_s": round(trace.seconds, 3),
        "step_cost": costs_of(costs),
        "step_cost_error": fitted,
        "policies": rows,
    }
    if _WORKDIR.value:
        Path(_WORKDIR.value).mkdir(parents=True, exist_ok=True)
        write_summary(_WORKDIR.value, summary)
    return summary


if __name__ == "__main__":
    job.main(run)
