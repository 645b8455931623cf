"""What the parts of the study say together: the ratios that are claimed, beside the paper's, and the tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from launch.dlpm_study.config import POLICIES, StudyConfig
from launch.serve_benchmark.machine import FOREIGN_LIMIT

PAPER: Mapping[str, str] = {
    "source": "arXiv 2501.14312; Llama-3.1-8B on up to 8 A100, Llama-3.2-3B on A10G",
    "throughput over VTC": "up to 2.87x",
    "throughput over RR + LPM": "up to 2.22x",
    "well-behaved latency, Preble / RR + LPM / VTC over D2LPM": "up to 7.18x / 9.55x / 7.96x",
    "Jain": "VTC about 1, LPM about 0.4, D2LPM 0.83 to 0.86",
}
"""What the paper reports; it stands beside our figures and never enters them."""

GATES: Mapping[str, tuple[float, bool]] = {
    "dlpm_over_vtc_throughput": (1.3, True),
    "dlpm_over_vtc_throughput_equal": (1.8, True),
    "dlpm_over_vtc_requests": (1.15, True),
    "d2lpm_over_vtc_throughput": (1.5, True),
    "gap_over_bound": (1.0, False),
}
"""A figure of the summary -> its bound, and whether that is a least one."""

Parts = Mapping[str, Mapping[str, Any]]


def summarise(study: StudyConfig, parts: Parts, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The summary, JSON-ready."""
    costs = calibration["costs"]
    live = {workload: _live_rows(parts, workload) for workload in ("mixed", "equal")}
    simulated = {
        workload: {policy: parts[f"sim-{workload}-{policy}"]["row"] for policy in POLICIES}
        for workload in ("mixed", "equal", "trees", "trees-equal", "trees-s2")
    }
    fleet = {workload: _fleet_rows(parts, workload) for workload in ("mixed", "equal")}
    summary: dict[str, Any] = {
        "dlpm_over_vtc_throughput": _spans_ratio(parts, "mixed", "service_rate"),
        "dlpm_over_vtc_throughput_equal": _spans_ratio(parts, "equal", "service_rate"),
        "dlpm_over_vtc_requests": _spans_ratio(parts, "mixed", "requests_per_s"),
        "gap_over_bound": _worst_gap(parts),
        "d2lpm_over_vtc_throughput": _fleet_ratio(fleet["mixed"], "service_rate"),
        "d2lpm_over_vtc_requests": _fleet_ratio(fleet["mixed"], "requests_per_s"),
        "d2lpm_over_vtc_throughput_equal": _fleet_ratio(fleet["equal"], "service_rate"),
        "d2lpm_over_vtc_throughput_live": _live_fleet_ratio(parts),
        "dlpm_over_vtc_per_cpu_second": _cpu_ratio(parts, "mixed"),
        "dlpm_over_vtc_per_cpu_second_equal": _cpu_ratio(parts, "equal"),
        "foreign_cores": max((part.get("foreign_cores", 0.0) for part in parts.values()), default=0.0),
        "fcfs_over_vtc_throughput": _ratio(live["mixed"], "fcfs", "service_rate"),
        "fcfs_over_vtc_throughput_equal": _ratio(live["equal"], "fcfs", "service_rate"),
        "step_cost": {
            "base_ms": round(1e3 * costs["base_s"], 3),
            "token_us": round(1e6 * costs["token_s"], 3),
            "context_token_ns": round(1e9 * costs["context_token_s"], 3),
            "pair_ns": round(1e9 * costs["pair_s"], 3),
            # A cold request's prompt of 540 tokens, attention in it included, over what any step costs.
            "prefill_over_base": _quotient(
                540 * (costs["token_s"] + costs["context_token_s"] + 270 * costs["pair_s"]), costs["base_s"]
            ),
            "scale": calibration["scale"],
            "error": calibration["error"],
        },
        "predicted": {
            workload: {
                "dlpm_over_vtc_throughput": _ratio(simulated[workload], "dlpm", "service_rate"),
                "dlpm_over_vtc_requests": _ratio(simulated[workload], "dlpm", "requests_per_s"),
                "simulated_over_live": {
                    policy: _quotient(row["service_rate"], live[workload][policy]["service_rate"])
                    for policy, row in simulated[workload].items()
                },
            }
            for workload in ("mixed", "equal")
        },
        "trees": {
            kind: {
                "dlpm_over_vtc_throughput": _ratio(simulated[kind], "dlpm", "service_rate"),
                "dlpm_over_vtc_requests": _ratio(simulated[kind], "dlpm", "requests_per_s"),
                "programs": {policy: parts[f"sim-{kind}-{policy}"]["programs"] for policy in POLICIES},
            }
            for kind in ("trees", "trees-equal", "trees-s2")
        },
        "long": {
            "dlpm_over_vtc_throughput": _quotient(
                parts["sim-long-dlpm"]["row"]["service_rate"], parts["sim-long-vtc"]["row"]["service_rate"]
            )
        },
        "quanta": {
            str(quantum): {
                name: parts[f"sim-pareto-{quantum}"]["row"][name]
                for name in ("requests_per_s", "service_rate", "jain", "gap_over_bound", "hit_rate")
            }
            for quantum in study.quanta
        },
        "live": live,
        "simulated": simulated,
        "fleet": {"replicas": study.replicas, **fleet},
        "recompilations": sum(part.get("recompilations", 0) for part in parts.values()),
        "paper": dict(PAPER),
    }
    summary["acceptance"] = [
        {
            "figure": name,
            "value": summary[name],
            "expected": f"{'>=' if least else '<='} {bound:g}",
            "met": summary[name] is not None and (summary[name] >= bound if least else summary[name] <= bound),
        }
        for name, (bound, least) in GATES.items()
    ]
    summary["conclusive"] = summary["foreign_cores"] <= FOREIGN_LIMIT
    return {**summary, "accepted": all(gate["met"] for gate in summary["acceptance"])}


def _quotient(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else round(ours / theirs, 4)


def _ratio(rows: Mapping[str, Mapping[str, Any]], policy: str, figure: str) -> float | None:
    return _quotient(rows[policy][figure], rows["vtc"][figure])


def _visits(parts: Parts, prefix: str) -> list[Mapping[str, Any]]:
    return [part for name, part in parts.items() if name.rpartition("-")[0] == prefix]


def _spans_ratio(parts: Parts, workload: str, figure: str) -> float | None:
    """The median of DLPM's live spans over that of VTC's."""
    medians = {
        policy: statistics.median(
            span[figure] for visit in _visits(parts, f"live-{workload}-{policy}") for span in visit["spans"]
        )
        for policy in ("dlpm", "vtc")
    }
    return _quotient(medians["dlpm"], medians["vtc"])


def _cpu_ratio(parts: Parts, workload: str) -> float | None:
    """DLPM's service for a second of this process's time over VTC's: what others do to the machine matters less."""
    means = {
        policy: statistics.fmean(v["service_per_cpu_s"] for v in _visits(parts, f"live-{workload}-{policy}"))
        for policy in ("dlpm", "vtc")
    }
    return _quotient(means["dlpm"], means["vtc"])


def _live_rows(parts: Parts, workload: str) -> dict[str, dict[str, Any]]:
    """Each policy's row, the mean of its visits; the gap is the worst of them."""
    return {policy: _mean_row(_visits(parts, f"live-{workload}-{policy}")) for policy in POLICIES}


def _mean_row(visits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [visit["row"] for visit in visits]
    mean: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        mean[name] = None if not values else round(statistics.fmean(values), 4)
    ratios = [row["gap_over_bound"] for row in rows if row["gap_over_bound"] is not None]
    return mean | {"gap_over_bound": max(ratios, default=None)}


def _worst_gap(parts: Parts) -> float | None:
    """The largest gap over its bound, live and simulated, of all runs under a policy that has one."""
    ratios = [part["row"]["gap_over_bound"] for part in parts.values() if "row" in part]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _fleet_rows(parts: Parts, workload: str) -> dict[str, dict[str, Any]]:
    names = sorted({name.removeprefix(f"sim-fleet-{workload}-").rpartition("-")[0] for name in parts
                    if name.startswith(f"sim-fleet-{workload}-")})  # fmt: skip
    return {name: _mean_row(_visits(parts, f"sim-fleet-{workload}-{name}")) for name in names}


def _fleet_ratio(rows: Mapping[str, Mapping[str, Any]], figure: str) -> float | None:
    """D2LPM over the better way to run VTC on a fleet."""
    best = max(rows[name][figure] for name in ("vtc+client_round_robin", "vtc+least_load"))
    return _quotient(rows["d2lpm"][figure], best)


def _live_fleet_ratio(parts: Parts) -> float | None:
    ours, theirs = (_visits(parts, f"live-fleet-{pair}") for pair in ("d2lpm", "vtc+client_round_robin"))
    if not ours or not theirs:
        return None
    return _quotient(_mean_row(ours)["service_rate"], _mean_row(theirs)["service_rate"])


def text(summary: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    cost = summary["step_cost"]
    error = cost["error"]
    lines = [
        "# Locality and fairness: DLPM and D2LPM beside VTC, LPM and FCFS",
        "",
        f"A step of the live engine: {cost['base_ms']:.2f} ms + {cost['token_us']:.1f} us a row + "
        f"{cost['context_token_ns']:.1f} ns a token of context + {cost['pair_ns']:.2f} ns a pair; relative error "
        f"median {error['median']:.1%}, P90 {error['p90']:.1%} of {error['samples']} steps that it was not fitted to. "
        f"A cold prompt costs {_number(cost['prefill_over_base'], 1)} times what any step does.",
        "",
        "| figure | ours | expected | met |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {gate['figure']} | {_number(gate['value'], 3)} | {gate['expected']} | {'yes' if gate['met'] else 'NO'} |"
        for gate in summary["acceptance"]
    ]
    if not summary["conclusive"]:
        lines += [
            "",
            f"Other programs used up to {summary['foreign_cores']:.1f} cores: live rates say little. For a second of "
            f"processor time DLPM served {_number(summary['dlpm_over_vtc_per_cpu_second'], 2)} times what VTC did on "
            f"mixed, {_number(summary['dlpm_over_vtc_per_cpu_second_equal'], 2)} times on equal.",
        ]
    lines += ["", "The paper: " + "; ".join(f"{name}: {value}" for name, value in summary["paper"].items()) + "."]
    for workload in ("mixed", "equal"):
        lines += ["", f"## {workload}, live (simulated in brackets)", "", *_table(summary, workload)]
    for kind, title in (
        ("trees", "trees of thoughts, four clients with trees of 340 requests (S1)"),
        ("trees-equal", "trees of thoughts, everybody alike"),
        ("trees-s2", "trees of thoughts, four clients with ten times longer questions (S2)"),
    ):
        lines += ["", f"## {title}, simulated", "", *_rows(summary["simulated"][kind])]
    lines += ["", "## DLPM's quantum, mixed, simulated", ""]
    lines += ["| quantum | service rate | requests/s | hit | Jain | gap / bound |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {quantum} | {row['service_rate']:.0f} | {row['requests_per_s']:.1f} | {row['hit_rate']:.2f} "
        f"| {row['jain']:.3f} | {_number(row['gap_over_bound'], 2)} |"
        for quantum, row in summary["quanta"].items()
    ]
    for workload in ("mixed", "equal"):
        title = f"## {summary['fleet']['replicas']} replicas, {workload}, simulated"
        lines += ["", title, "", *_rows(summary["fleet"][workload])]
    lines += ["", f"Live, two replicas: D2LPM over VTC {_number(summary['d2lpm_over_vtc_throughput_live'], 2)}."]
    return "\n".join(lines)


_HEAD = "| policy | requests/s | service rate | actual | hit | Jain | gap / bound | TTFT P50, P99 | end-to-end s |"


def _table(summary: Mapping[str, Any], workload: str) -> list[str]:
    live, simulated = summary["live"][workload], summary["simulated"][workload]
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|---|"]
    for policy in POLICIES:
        ours, theirs = live[policy], simulated[policy]
        cells = [
            f"{ours['requests_per_s']:.1f} ({theirs['requests_per_s']:.1f})",
            f"{ours['service_rate']:.0f} ({theirs['service_rate']:.0f})",
            f"{ours['actual_service']:.0f} ({theirs['actual_service']:.0f})",
            f"{ours['hit_rate']:.2f} ({theirs['hit_rate']:.2f})",
            f"{ours['jain']:.3f} ({theirs['jain']:.3f})",
            f"{_number(ours['gap_over_bound'], 2)} ({_number(theirs['gap_over_bound'], 2)})",
            _latency(ours, "ttft"),
            _latency(ours, "e2e"),
        ]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return lines


def _rows(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [_HEAD, "|---|---|---|---|---|---|---|---|---|"]
    for policy, row in rows.items():
        cells = [
            f"{row['requests_per_s']:.1f}",
            f"{row['service_rate']:.0f}",
            f"{row['actual_service']:.0f}",
            f"{row['hit_rate']:.2f}",
            f"{row['jain']:.3f}",
            _number(row["gap_over_bound"], 2),
            _latency(row, "ttft"),
            _latency(row, "e2e"),
        ]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return lines


def _latency(row: Mapping[str, Any], kind: str) -> str:
    """P50 and P99 of the well-behaved clients; with how many of them were answered at all, where some were not."""
    missing = row["clients"] - row["clients_served"]
    note = f" ({missing:.0f} of {row['clients']:.0f} clients: never)" if missing else ""
    return f"{_number(row[f'{kind}_p50_s'], 2)}, {_number(row[f'{kind}_p99_s'], 2)}{note}"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
