"""The study at the paper's scale, simulated: Llama-3.1-8B on H100s, one to eight replicas, the paper's lengths.

The step cost is worked out from the model's shape and the accelerator's figures unless `--full_costs` names a
calibration of a live engine there. Nothing is claimed of a machine that was not measured; the order of the policies is.
"""

import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch import job
from launch.dlpm_study.config import Parts
from launch.dlpm_study.report import PAPER
from launch.dlpm_study.simulated import Simulation, simulate

_REPLICAS = flags.DEFINE_list("full_replicas", ["1", "4"], "with --scale=full: sizes of the fleet")
_SECONDS = flags.DEFINE_float("full_seconds", 120.0, "with --scale=full: virtual seconds that count", lower_bound=1.0)
_COSTS = flags.DEFINE_string(
    "full_costs",
    None,
    "with --scale=full: JSON file with base_s, token_s, context_token_s and pair_s, as in a calibration",
)

# Llama-3.1-8B in bfloat16 on one H100: parameters, layers, hidden size, key-value bytes of a token.
_PARAMETERS, _LAYERS, _HIDDEN, _KV_BYTES = 8.03e9, 32, 4096, 2 * 32 * 8 * 128 * 2
# Peak of its arithmetic and of its memory, what part of each is reached (estimated), and bytes that hold pages.
_FLOPS, _BANDWIDTH, _FLOPS_PART, _BANDWIDTH_PART, _CACHE_BYTES = 989e12, 3.35e12, 0.5, 0.8, 54e9
# Launching a step and all that does not grow with it, estimated.
_OVERHEAD_S = 2e-3

WORKLOADS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qa-s1": ("long_documents", {"floods": 4.0}),
    "qa-s2": ("long_documents", {"floods": 1.0, "longer": 2.0}),
    "trees-s1": ("trees", {"question_tokens": 128, "programs": 4}),
    "trees-s2": ("trees", {"branching": 2, "question_tokens": 1280, "programs": 4}),
    "judge-s1": ("judge", {"programs": 4}),
    "judge-s2": ("judge", {"dimensions": 2, "extra_tokens": 600, "programs": 4}),
    "chat": ("chat", {"programs": 16}),
}
ONE = {"fcfs": (None, "fcfs"), "lpm": (None, "lpm"), "vtc": (None, "vtc"), "dlpm": (None, "dlpm")}
MANY = {
    "vtc+client_round_robin": ("client_round_robin", "vtc"),
    "lpm+round_robin": ("round_robin", "lpm"),
    "lpm+preble": ("preble", "lpm"),
    "d2lpm": ("d2lpm", "dlpm"),
}
# A cold request of the longest kind costs about 32,000.
_QUANTUM, _ROUTER_QUANTUM = 32_000, 40_000


def costs() -> dict[str, Any]:
    """Seconds of a step: weights are read once, arithmetic grows with rows, attention reads the cache."""
    flops = _FLOPS * _FLOPS_PART
    bandwidth = _BANDWIDTH * _BANDWIDTH_PART
    return {
        "base_s": _OVERHEAD_S + 2 * _PARAMETERS / bandwidth,
        "token_s": 2 * _PARAMETERS / flops,
        "context_token_s": _KV_BYTES / bandwidth,
        "pair_s": 4 * _LAYERS * _HIDDEN / flops,
    }


def given_costs(path: str) -> dict[str, Any]:
    """The costs of a calibration's file.

    Raises:
      UserError: there is no such file, or other things are in it.
    """
    try:
        found = json.loads(Path(path).read_text())
        found = found.get("costs", found)
        return {name: float(found[name]) for name in ("base_s", "token_s", "context_token_s", "pair_s")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--full_costs: found {path!r} ({error!r}), expected a JSON file with the four costs") from None


def simulations(sizes: list[int], seconds: float, step: Mapping[str, Any]) -> dict[str, Simulation]:
    settings = {
        "num_pages": int(_CACHE_BYTES // (16 * _KV_BYTES)),
        "page_size": 16,
        "max_sequences": 128,
        "max_batch_tokens": 2048,
    }
    runs = {}
    for replicas in sizes:
        for name, (workload, options) in WORKLOADS.items():
            scaled = dict(options)
            if workload == "long_documents":
                scaled |= {"rate": 0.25 * replicas}
            else:
                scaled["programs"] *= replicas
            for pair, (router, policy) in (ONE if replicas == 1 else MANY).items():
                runs[f"full-{replicas}-{name}-{pair}"] = Simulation(
                    workload, policy, step, settings, seconds / 4, seconds,
                    options=scaled,
                    policy_options={"quantum": _QUANTUM} if policy == "dlpm" else {},
                    router=router,
                    router_options={"quantum": _ROUTER_QUANTUM} if router == "d2lpm" else {},
                    replicas=replicas,
                )  # fmt: skip
    return runs


def run(workdir: Path, *, workers: int) -> dict[str, Any]:
    """Every run that is not done yet, then the table. Returns the summary."""
    began = time.perf_counter()
    try:
        sizes = [int(text) for text in _REPLICAS.value]
    except ValueError:
        raise job.BadUsage(f"--full_replicas: found {','.join(_REPLICAS.value)!r}, expected integers") from None
    step = given_costs(_COSTS.value) if _COSTS.value else costs()
    parts = Parts(workdir, {"full": sizes, "seconds": _SECONDS.value, "costs": step})
    runs = simulations(sizes, _SECONDS.value, step)
    todo = {name: run for name, run in runs.items() if parts.get(name) is None}
    progress = Progress(len(runs), "dlpm at full scale", unit="run", initial=len(runs) - len(todo))
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(simulate, run): name for name, run in todo.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                parts.put(futures[future], future.result())
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()
    summary = summarise({name: parts.get(name) or {} for name in runs}, sizes)
    summary |= {"step_cost": step, "wall_s": round(time.perf_counter() - began, 1), "paper": dict(PAPER)}
    write_summary(workdir, summary)
    print(text(summary), file=sys.stderr)
    return summary


def summarise(parts: Mapping[str, Mapping[str, Any]], sizes: list[int]) -> dict[str, Any]:
    rows: dict[str, Any] = {str(n): {name: {} for name in WORKLOADS} for n in sizes}
    for name, part in parts.items():
        _, replicas, rest = name.split("-", 2)
        workload = next(w for w in WORKLOADS if rest.startswith(w + "-"))
        rows[replicas][workload][rest.removeprefix(workload + "-")] = part["row"] | {"programs": part.get("programs")}
    ratios = {}
    for replicas, workloads in rows.items():
        ours, theirs = ("dlpm", "vtc") if replicas == "1" else ("d2lpm", "vtc+client_round_robin")
        ratios[replicas] = {
            workload: round(found[ours]["service_rate"] / found[theirs]["service_rate"], 3)
            for workload, found in workloads.items()
            if found[theirs]["service_rate"]
        }
    return {"over_vtc_throughput": ratios, "rows": rows}


def text(summary: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = ["# DLPM and D2LPM at full scale, simulated"]
    for replicas, workloads in summary["rows"].items():
        for workload, rows in workloads.items():
            lines += ["", f"## {replicas} replica(s), {workload}", ""]
            lines += ["| policy | requests/s | service rate | hit | Jain | gap / bound | end-to-end P50, P99 s |"]
            lines += ["|---|---|---|---|---|---|---|"]
            for policy, row in rows.items():
                gap = "none" if row["gap_over_bound"] is None else f"{row['gap_over_bound']:.2f}"
                tail = ", ".join("none" if row[k] is None else f"{row[k]:.2f}" for k in ("e2e_p50_s", "e2e_p99_s"))
                lines.append(
                    f"| {policy} | {row['requests_per_s']:.2f} | {row['service_rate']:.0f} | {row['hit_rate']:.2f} "
                    f"| {row['jain']:.3f} | {gap} | {tail} |"
                )
    return "\n".join(lines)
