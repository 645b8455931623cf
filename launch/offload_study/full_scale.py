"""What to expect of an accelerator: models several times its memory on an H100 over PCIe 5, and on a GH200.

Nothing is run here: the searched policy, how busy it keeps the link, and what the schedule is worth, simulated with the
machine's profile. `launch.bench_offload` measures the same on such a machine.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxstack.engine.memory.hrm import MODELS
from jaxstack.engine.memory.offload_plan import Workload
from jaxstack.engine.memory.policy_search import search
from jaxstack.runtime.machine import PROFILES
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch.offload_study.published import Setting
from launch.offload_study.simulated import ON_HOST, timeline, tokens_per_s

CASES = tuple(
    (machine, model, budget_gb)
    for machine, budgets in (("h100_pcie", (30, 50, 70)), ("gh200", (30, 90)))
    for model in ("mixtral_8x22b", "dbrx")
    for budget_gb in budgets
)
"""Machine, model, GB of the device that may be used."""

WORKLOAD = Workload(512, 128)


def expect(machine_name: str, model: str, budget_gb: int) -> dict[str, Any]:
    """The best policy of CGOPipe, its simulation, S4's with the same, and the best of all placements."""
    machine = PROFILES[machine_name].with_memory(device_bytes=budget_gb * 10**9)
    found = search(machine, MODELS[model], WORKLOAD, limits=ON_HOST)
    if found.policy is None or found.prediction is None:
        return {"reason": found.reason}
    setting = Setting(model, machine, MODELS[model], WORKLOAD, found.policy)
    ahead = found.policy.look_ahead or 2
    line = timeline(setting, "S1", look_ahead=ahead, drain=False, dispatch="paced", layers=4)
    best = search(machine, MODELS[model], WORKLOAD)
    assert best.policy is not None and best.prediction is not None, "one of them is CGOPipe's"
    return {
        "policy": f"{found.policy.micro_batch} x {found.policy.n_micro_batches}",
        "weight_resident": round(found.policy.weight_resident, 4),
        "link_busy": round(line.busy(line.window)["to_device"], 4),
        "s1_over_s4": round(timeline(setting, "S4", layers=4).period / line.period, 4),
        "tokens_per_s": round(tokens_per_s(setting, line.period)["end_to_end"], 2),
        "reason": found.reason,
        "best_of_all": {
            "attention_on_device": best.policy.attention_on_device,
            "ffn_on_device": best.policy.ffn_on_device,
            "weight_resident": round(best.policy.weight_resident, 4),
            "tokens_per_s": round(best.prediction.end_to_end_tokens_per_s, 2),
        },
    }


def run(workdir: Path) -> Mapping[str, Any]:
    """All cases. Returns the summary."""
    began = time.perf_counter()
    rows = {}
    with Progress(len(CASES), "moe_lightning", unit="case") as progress:
        for machine, model, budget_gb in CASES:
            rows[f"{machine}, {model}, {budget_gb} GB"] = expect(machine, model, budget_gb)
            progress.advance()
    summary = {
        "workload": {"prompt_tokens": WORKLOAD.prompt_tokens, "generated_tokens": WORKLOAD.generated_tokens},
        "expected": rows,
        "goals": {"link_busy": 0.95, "s1_over_s4": 1.35},
        "measure_with": "python -m launch.bench_offload --peer=self_s4",
        "wall_s": round(time.perf_counter() - began, 1),
    }
    write_summary(workdir, summary)
    print(text(rows), file=sys.stderr)
    return summary


def text(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        "| machine, model, budget | mu x n | resident | link busy | S1 over S4 | tokens/s | best of all placements |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if "policy" not in row:
            lines.append(f"| {name} | none: {row['reason']} | | | | | |")
            continue
        best = row["best_of_all"]
        sides = [
            f"{what} on the {'device' if best[key] else 'host'}"
            for what, key in (("attention", "attention_on_device"), ("experts", "ffn_on_device"))
        ]
        lines.append(
            f"| {name} | {row['policy']} | {row['weight_resident']:.0%} | {row['link_busy']:.0%} "
            f"| {row['s1_over_s4']:.2f} | {row['tokens_per_s']:.1f} | {best['tokens_per_s']:.1f}, {', '.join(sides)} |"
        )
    return "\n".join(lines)
