"""What the parts of the study say together: the ratios that are claimed, their bars, and tables beside the paper's."""

from collections.abc import Mapping
from typing import Any

from launch.offload_study import published
from launch.offload_study.simulated import ratios, spread

PAPER: Mapping[str, str] = {
    "source": "arXiv 2411.11217; Mixtral 8x7B, 8x22B and DBRX on one to four T4 or an L4",
    "headline": "10.3x FlexGen (S1, 128 tokens, not padded against padded); padded 3.5x, 5x FlexGen(c), 6.7x DeepSpeed",
    "same policy, other schedule": "30.1 / 16.8 = 1.79 (S4 over S1, table 5)",
}
"""What the paper reports; it stands beside our figures and never enters them."""

GATES: Mapping[str, float] = {
    "s1_over_s2": 1.35,
    "s1_over_s3": 1.35,
    "s1_over_s4": 1.35,
    "hrm_vs_authors": 1.02,
    "hrm_vs_authors_executed": 1.05,
    "ours_over_s1": 1.05,
}
"""A figure of the summary -> the least that it should be."""

MEASURED_GATES: Mapping[str, float] = {"s1_over_s2": 1.35, "s1_over_s3": 1.35, "s1_over_s4": 1.35}
SIMULATED_VS_MEASURED_LIMIT = 0.10

Parts = Mapping[str, Mapping[str, Any]]


def summarise(parts: Parts) -> dict[str, Any]:
    """The summary, JSON-ready."""
    schedules = _under(parts, "schedules-")
    policies = list(_under(parts, "policies-").values())
    summary: dict[str, Any] = {}
    for name in ("s2", "s3", "s4", "s4_synced"):
        found = spread(row[f"s1_over_{name}"] for row in schedules.values())
        summary[f"s1_over_{name}"] = round(found["mean"], 4)
        summary[f"s1_over_{name}_min"] = round(found["min"], 4)
    for key, ours, theirs, terms in (
        ("hrm_vs_authors", "ours", "published", "paper_terms"),
        ("hrm_vs_authors_executed", "ours", "executed", "paper_terms"),
        ("ours_over_s1", "ours", "executed", "simulated"),
        ("ours_over_s1_fractional", "ours", "published", "simulated"),
    ):
        found = spread(ratios(policies, ours, theirs, terms))
        summary[key], summary[f"{key}_min"] = round(found["mean"], 4), round(found["min"], 4)
    measured = parts.get("measured")
    summary["measured"] = measured
    summary["simulated_vs_measured"] = measured["simulated_vs_measured"] if measured else None
    padded = schedules.get("S1 padded, 128")
    summary["paper"] = dict(PAPER) | {"same policy, simulated": round(padded["s1_over_s4"], 3) if padded else None}
    summary["tables"] = {
        "schedules": schedules,
        "policies": _under(parts, "policies-"),
        "mtbench": _under(parts, "mtbench-"),
        "helm": parts["helm"],
        "ablation": parts["ablation"],
        "attention_ms": parts["attention"],
        "placement": _under(parts, "placement-"),
        "roofline": parts["roofline"],
        "refill": parts["refill"],
        "plans": parts["plans"],
    }
    summary["acceptance"] = _gates(summary, measured)
    return {**summary, "accepted": all(gate["met"] for gate in summary["acceptance"])}


def _under(parts: Parts, prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}


def _gates(summary: Mapping[str, Any], measured: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    gates = [_gate(name, summary[name], bound) for name, bound in GATES.items()]
    return gates + measured_gates(measured) if measured else gates


def measured_gates(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a race on the emulated machine has to show."""
    off, limit = measured["simulated_vs_measured"], SIMULATED_VS_MEASURED_LIMIT
    return [
        *(_gate(f"measured.{name}", measured[name], bound) for name, bound in MEASURED_GATES.items()),
        {"figure": "simulated_vs_measured", "value": off, "expected": f"<= {limit:g}", "met": off <= limit},
    ]


def _gate(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"figure": name, "value": value, "expected": f">= {bound:g}", "met": value >= bound}


def text(summary: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    tables = summary["tables"]
    lines = [
        "# MoE-Lightning: CGOPipe and the hierarchical roofline",
        "",
        "S1 is CGOPipe, S2 moves weights in one piece, S3 overlaps no micro-batches, S4 has attention on the device. "
        "Ratios are geometric means of periods, of the same policy.",
        "",
        "| figure | ours | least | expected | met |",
        "|---|---|---|---|---|",
    ]
    for gate in summary["acceptance"]:
        least = summary.get(f"{gate['figure']}_min")
        cells = [gate["figure"], f"{gate['value']:.3f}", "" if least is None else f"{least:.3f}", gate["expected"]]
        lines.append(f"| {' | '.join(cells)} | {'yes' if gate['met'] else 'NO'} |")
    lines += [
        "",
        f"With fractional residency granted to the published policies, ours over S1 is "
        f"{summary['ours_over_s1_fractional']:.3f}, at least {summary['ours_over_s1_fractional_min']:.3f}. S4 with a "
        f"barrier after every micro-batch, as FlexGen was released: {summary['s1_over_s4_synced']:.2f}.",
    ]
    measured = summary["measured"]
    if measured:
        lines += ["", "## On the emulated machine", "", *measured_lines(measured)]
    lines += ["", "The paper: " + "; ".join(f"{name}: {value}" for name, value in summary["paper"].items()) + "."]
    lines += ["", "## Schedules under the same policy, milliseconds of a layer", "", *_schedules(tables["schedules"])]
    lines += ["", "## Policies: tokens/s of decoding", "", *_policies(tables["policies"])]
    lines += ["", "## MTBench (figure 7), tokens/s with prefill: simulated (the paper, measured)", ""]
    lines += _mtbench(tables["mtbench"])
    lines += ["", "## HELM (table 4), tokens/s: simulated at the published policy (the paper, measured)", ""]
    lines += ["| workload | FlexGen(c), S3 | FlexGen, S4 | MoE-Lightning (p), S1 |", "|---|---|---|---|"]
    for name, row in tables["helm"].items():
        cells = [
            f"{row['ours'][system]:.1f} ({row['paper'][system]:g})"
            for system in ("FlexGen(c)", "FlexGen", "MoE-Lightning (p)")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## Ablation (table 5), tokens/s", ""]
    lines += ["| row | mu x n | simulated | with barriers | paper | over the first: ours | paper |"]
    lines += ["|---|---|---|---|---|---|---|"]
    first = next(iter(tables["ablation"].values()))
    for name, row in tables["ablation"].items():
        barriers = row.get("ours, with barriers")
        lines.append(
            f"| {name} | {row['policy']} | {row['ours']:.1f} | {'' if barriers is None else f'{barriers:.1f}'} "
            f"| {row['paper']:g} | {row['ours'] / first['ours']:.2f} | {row['paper'] / first['paper']:.2f} |"
        )
    lines += ["", "## Attention on the host or over the link (figure 9), milliseconds: ours (paper)", ""]
    lines += [
        f"- {name}: {value:.1f} ({published.ATTENTION_MS[name]:g})" for name, value in tables["attention_ms"].items()
    ]
    lines += ["", "## Weights or KV: one search over both, attention on the device", ""]
    lines += ["| machine, model | mu x n | MLPs streamed | KV streamed | tokens/s | why |", "|---|---|---|---|---|---|"]
    for name, row in tables["plans"].items():
        if "policy" not in row:
            lines.append(f"| {name} | none | | | | {row['reason']} |")
            continue
        lines.append(
            f"| {name} | {row['policy']} | {row['weights_streamed']:.0%} | {row['kv_streamed']:.0%} "
            f"| {row['tokens_per_s']:,.0f} | {row['reason']} |"
        )
    refill = tables["refill"]
    lines += [
        "",
        "## Continuous refill",
        "",
        f"2,000 requests whose answers end by themselves: {refill['batches_of_one_length']} steps in batches of one "
        f"length, {refill['refilled']} with slots refilled ({refill['ratio']:.2f} times fewer; at least "
        f"{refill['at_least']} are needed).",
    ]
    return "\n".join(lines)


def measured_lines(measured: Mapping[str, Any]) -> list[str]:
    """A table of the race, and whether it says anything."""
    lines = ["| schedule | ms a layer, measured | simulated | S1 over it |", "|---|---|---|---|"]
    for name, row in measured["schedules"].items():
        ratio = measured.get(f"s1_over_{name.lower()}")
        lines.append(
            f"| {name} | {1e3 * row['measured_s']:.1f} | {1e3 * row['simulated_s']:.1f} "
            f"| {'' if ratio is None else f'{ratio:.2f}'} |"
        )
    if not measured["conclusive"]:
        lines += ["", f"Other programs used up to {measured['foreign_cores']:.1f} cores: threads woke late."]
    return lines


def _schedules(rows: Mapping[str, Any]) -> list[str]:
    lines = ["| setting | S1 | S2 | S3 | S4 | S4 synced | S2/S1 | S3/S1 | S4/S1 | S1's device waits for |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        periods = [f"{1e3 * row['period_s'][each]:.1f}" for each in ("S1", "S2", "S3", "S4", "S4_synced")]
        over = [f"{row[f's1_over_{each}']:.2f}" for each in ("s2", "s3", "s4")]
        waits = sorted(row["device_waits_for"].items(), key=lambda each: -each[1])
        waits_text = ", ".join(f"{kind} {share:.0%}" for kind, share in waits[:2] if share >= 0.005) or "nothing"
        lines.append(f"| {name} | {' | '.join(periods + over)} | {waits_text} |")
    return lines


def _policies(rows: Mapping[str, Any]) -> list[str]:
    lines = ["| setting | published | its rate, paper's terms | ours | its rate | search, s "]
    lines[0] += "| published, S1 | executed, S1 | ours |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        by_paper, simulated = row["paper_terms"], row["simulated"]
        cells = [
            by_paper["published"]["policy"],
            f"{by_paper['published']['tokens_per_s']:.1f}",
            by_paper["ours"]["policy"],
            f"{by_paper['ours']['tokens_per_s']:.1f}",
            f"{by_paper['ours']['seconds']:.2f}",
            f"{simulated['published']['tokens_per_s']:.1f}",
            f"{simulated['executed']['tokens_per_s']:.1f}",
            f"{simulated['ours']['tokens_per_s']:.1f} ({simulated['ours']['policy']}, "
            f"{simulated['ours']['look_ahead']} ahead)",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _mtbench(rows: Mapping[str, Any]) -> list[str]:
    lines = ["| setting, generated | our policy | FlexGen(c)'s S3 | FlexGen's S4 | MoE-Lightning's S1 | binds |"]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if "policy" not in row:
            lines.append(f"| {name} | none: {row['reason']} | | | | |")
            continue
        head, generated = name.split(", ")
        setting, padded = head.split()[0], head.endswith("(p)")
        column = published.GENERATED.index(int(generated))
        cells = [row["policy"]]
        for system in ("FlexGen(c)", "FlexGen", "MoE-Lightning"):
            shown = "MoE-Lightning (p)" if padded and system == "MoE-Lightning" else system
            paper = published.MTBENCH[shown].get(setting) if padded or system == "MoE-Lightning" else None
            cells.append(f"{row[system]:.1f}" + (f" ({paper[column]:g})" if paper else ""))
        lines.append(f"| {name} | {' | '.join(cells)} | {row['binding']} |")
    return lines
