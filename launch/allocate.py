"""Which accelerators to rent, and how many, for requests of given lengths, rate and latency objective.

    python -m launch.allocate                                                        # the example: chat, 8 requests/s
    python -m launch.allocate --config.rate_rps=32 --config.caps=A100-80GB=1,H100=1 --workdir=work/plan
    python -m launch.allocate --config.lengths=lengths.csv --config.profile=l4.json,a100.json --config.ttft_s=none

The lengths are a CSV of two columns (input and output tokens of requests that you have seen); the profiles are files
of launch.profile_endpoint, or of AIBrix, or by default the data sheets of four types. The plan is the cheapest there
is, with a proof; it is tried on simulated replicas before it is shown, and made larger until it keeps the objective.
What is printed: the mix; what each type alone would cost; what more traffic or other prices would change.

The workdir gets plan.json, routing.json (for launch.route --routing_table), plan.png and summary.json. Where nothing
can do, the reasons are named, and the exit code is 1.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxstack.fleet.plan_job import PlanConfig, PlanOutcome, as_json, run_plan, write_routing
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically, write_summary
from launch import job

_CONFIG = job.config_flag(PlanConfig, "configs/allocation/example.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", "work/allocate", "where plan.json, routing.json, plan.png and summary.json go"
)


def run() -> dict[str, Any]:
    config, workdir = _CONFIG.get(), Path(_WORKDIR.value)
    outcome = run_plan(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "plan.json", json.dumps(as_json(outcome), indent=1) + "\n")
    plan = outcome.checked.allocation
    if not plan.found:
        reasons = (
            plan.infeasibility.reasons if plan.infeasibility else (f"nothing was found in {config.time_limit_s} s",)
        )
        raise UserError(f"no plan: {'; '.join(reasons)}")
    if outcome.checked.problem.profile.concurrency is not None and plan.instances:
        write_routing(workdir / "routing.json", outcome)
    _draw(outcome).savefig(workdir / "plan.png", dpi=110)
    print(table(outcome))
    summary = summarise(outcome)
    write_summary(workdir, summary)
    return summary


def summarise(outcome: PlanOutcome) -> dict[str, Any]:
    plan, report = outcome.checked.allocation, outcome.checked.report
    return {
        "status": plan.status,
        "counts": {name: count for name, count in plan.counts.items() if count},
        "cost_usd_per_hour": round(plan.cost_usd_per_hour, 4),
        "lower_bound_usd_per_hour": round(plan.lower_bound_usd_per_hour, 4),
        "gap": round(plan.gap, 6),
        "headroom": round(outcome.checked.problem.headroom, 4),
        "solve_time_s": round(plan.solve_time_s, 4),
        "single_type_cost_usd_per_hour": dict(plan.single_type_cost_usd_per_hour),
        "attainment": report and round(report.attainment, 5),
        "met": report and report.met,
        "ttft_p99_s": report and round(report.ttft_s[2], 4),
        "tpot_p99_s": report and round(report.tpot_s[2], 4),
    }


def table(outcome: PlanOutcome) -> str:
    """The plan in words."""
    checked = outcome.checked
    plan, problem, report = checked.allocation, checked.problem, checked.report
    lines = [f"{'type':<14} {'count':>5} {'$/h':>8} {'utilised':>9}  serves"]
    for g, kind in enumerate(problem.types):
        count = plan.counts[kind.name]
        if count:
            lines.append(
                f"{kind.name:<14} {count:>5} {count * kind.price_usd_per_hour:>8.2f} "
                f"{plan.utilisation[kind.name]:>8.0%}   {_served(plan.shares[..., g], outcome)}"
            )
    proof = "proven cheapest" if plan.status == "optimal" else f"at most {plan.gap:.1%} above the cheapest"
    lines += [
        f"{'in all':<14} {plan.instances:>5} {plan.cost_usd_per_hour:>8.2f}            {proof}; fractions of replicas "
        f"would cost {plan.fractional_bound_usd_per_hour:.2f}",
        "",
    ]
    for name, cost in plan.single_type_cost_usd_per_hour.items():
        saved = "" if not cost else f" ({1 - plan.cost_usd_per_hour / cost:.0%} saved)"
        lines.append(f"{name} alone: {'cannot serve everything' if cost is None else f'{cost:.2f} $/h{saved}'}")
    for baseline in outcome.baselines[1:]:
        cost = baseline.cost_usd_per_hour
        lines.append(f"{baseline.name}: {'no plan' if cost is None else f'{cost:.2f} $/h'}")
    if report is not None:
        lines += [
            "",
            f"replayed: {report.attainment:.2%} of {report.requests} requests keep the objective, "
            f"{'which is enough' if report.met else 'which is NOT enough'}; TTFT P50 {report.ttft_s[0]:.3f} s, P99 "
            f"{report.ttft_s[2]:.3f} s; TPOT P50 {1e3 * report.tpot_s[0]:.1f} ms, P99 {1e3 * report.tpot_s[2]:.1f} ms",
        ]
    if outcome.by_rate:
        lines.append("")
    for factor, found in outcome.by_rate.items():
        said = "no plan"
        if found is not None:
            said = f"{found[0]:.2f} $/h: " + ", ".join(f"{count} {name}" for name, count in found[1].items() if count)
        lines.append(f"{factor:g} times the traffic: {said}")
    for flip in outcome.flips:
        price = next(t.price_usd_per_hour for t in problem.types if t.name == flip.name) * flip.factor
        lines.append(f"with {flip.name} at {price:.2f} $/h ({flip.factor:.2f} x): {' and '.join(flip.types)}")
    return "\n".join(lines)


def _served(shares: np.ndarray, outcome: PlanOutcome) -> str:
    """Which sizes a type serves: the share of all requests, and the ranges that these are of."""
    workload = outcome.checked.problem.workload
    share = float((shares * workload.distribution).sum())
    rows, columns = np.nonzero((shares > 0.005) & (workload.distribution > 0))
    if not len(rows):
        return "nothing"
    inputs, outputs = workload.grid.input_edges_tokens, workload.grid.output_edges_tokens
    return (
        f"{share:.0%} of the requests, inputs to {inputs[rows.max()]} and outputs "
        f"{outputs[columns.min() - 1] + 1 if columns.min() else 1} to {outputs[columns.max()]} tokens"
    )


def _draw(outcome: PlanOutcome) -> Figure:
    """Who serves what, and cost against the rate."""
    problem, plan = outcome.checked.problem, outcome.checked.allocation
    rented = [(g, name) for g, name in enumerate(problem.names) if plan.counts[name]]
    panels = len(rented) + bool(outcome.by_rate)
    figure = Figure(figsize=(4.4 * max(1, panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, panels), squeeze=False)[0]
    grid = problem.workload.grid
    for ax, (g, name) in zip(axes, rented):
        shown = np.where(problem.workload.distribution > 0, plan.shares[..., g], np.nan)
        ax.imshow(shown, vmin=0, vmax=1, cmap="Greens", aspect="auto")
        ax.set_xticks(range(grid.shape[1]), [str(edge) for edge in grid.output_edges_tokens], fontsize=7)
        ax.set_yticks(range(grid.shape[0]), [str(edge) for edge in grid.input_edges_tokens], fontsize=7)
        ax.set(xlabel="output tokens, at most", ylabel="input tokens, at most")
        ax.set_title(f"{plan.counts[name]} {name}: share of each size", fontsize=10)
    if outcome.by_rate:
        points = [(factor * problem.workload.rate_rps, found[0]) for factor, found in outcome.by_rate.items() if found]
        axes[-1].plot(*zip(*points), marker="o", color="black")
        axes[-1].set(xlabel="requests/s", ylabel="$/h", ylim=(0, None))
        axes[-1].set_title("cost of the plan for other rates", fontsize=10)
        axes[-1].grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    job.main(run)
