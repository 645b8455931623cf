"""Schedules under a virtual clock: periods of the same policy in different orders, and of our policies under ours."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from jaxstack.engine.memory import hrm, laws
from jaxstack.engine.memory.batching import Waiting, decode_steps
from jaxstack.engine.memory.hrm import MODELS
from jaxstack.engine.memory.offload_plan import Policy, Workload
from jaxstack.engine.memory.policy_search import Limits, search
from jaxstack.engine.memory.schedule_build import BUILDERS, ScheduleShape
from jaxstack.engine.memory.schedule_sim import Dispatch, Timeline, simulate
from jaxstack.runtime.machine import PROFILES
from launch.offload_study import published
from launch.offload_study.published import Setting

_FEW = 4

SCHEDULES = ("S1", "S2", "S3", "S4", "S4_synced")

ON_HOST = Limits(attention_on_device=(False,), ffn_on_device=(True,))
"""What CGOPipe runs: attention on the host, experts on the device."""


def timeline(
    setting: Setting,
    schedule: str,
    *,
    look_ahead: int = 2,
    drain: bool = True,
    dispatch: Dispatch = "fixed",
    steps: int = 4,
    pages: int | None = None,
    layers: int | None = None,
) -> Timeline:
    """Four steps of a setting. By default in the paper's order: two micro-batches ahead, each step drained.

    Args:
      layers: None: the model's. What is not drained has the same period with fewer.
    """
    policy = dataclasses.replace(setting.policy, attention_on_device=schedule.startswith("S4"))
    times = hrm.policy_times(setting.machine, setting.model, setting.workload, policy)
    sizes = hrm.slot_bytes(setting.model, setting.workload, policy)
    shape = ScheduleShape(
        layers or setting.model.layers,
        policy.n_micro_batches,
        steps,
        look_ahead=look_ahead,
        drain=drain and schedule == "S1",
        pages=0 if policy.weight_resident == 1 else pages,
        buffer_share=policy.buffer_share,
    )
    return simulate(BUILDERS[schedule](shape, times, sizes), dispatch)


def tokens_per_s(setting: Setting, period_s: float) -> dict[str, float]:
    """Of decoding alone, and with the prefill."""
    policy, model, workload = setting.policy, setting.model, setting.workload
    prefill = hrm.prefill_seconds(
        setting.machine,
        model,
        workload,
        micro_batch=policy.micro_batch,
        n_micro_batches=policy.n_micro_batches,
        weight_resident=policy.weight_resident,
        kv_resident=0.0,
    )
    return {
        "decode": float(hrm.decode_rate("full", model, workload, policy.requests, period_s)),
        "end_to_end": float(hrm.end_to_end_rate(model, workload, policy.requests, period_s, prefill)),
    }


def compare_schedules(setting: Setting) -> dict[str, Any]:
    """Periods of all schedules under one policy, in seconds, and what S1 leaves idle."""
    periods, found = {}, {}
    for name in SCHEDULES:
        line = timeline(setting, name)
        periods[name] = line.period
        if name == "S1":
            busy = line.busy(line.window)
            found = {"busy": busy, "device_waits_for": line.idle("device", line.window)}
            found["peak_gib"] = {space: size / 2**30 for space, size in line.peak_bytes().items()}
    ratios = {f"s1_over_{name.lower()}": periods[name] / periods["S1"] for name in SCHEDULES if name != "S1"}
    rates = {name: tokens_per_s(setting, period) for name, period in periods.items()}
    return {"period_s": periods, "tokens_per_s": rates, **ratios, **found}


def compare_policies(setting: Setting) -> dict[str, Any]:
    """The published policy and ours: by the artifact's own formulas, and simulated as each is run."""
    found: dict[str, Any] = {}
    theirs = hrm.predict(setting.machine, setting.model, setting.workload, setting.policy, "paper")
    executed = hrm.predict(setting.machine, setting.model, setting.workload, setting.executed.policy, "paper")
    ours = search(setting.machine, setting.model, setting.workload, objective="decode", terms="paper")
    assert ours.policy is not None and ours.prediction is not None, "a policy was published, so that one exists"
    found["paper_terms"] = {
        "published": _priced(setting.policy, theirs.decode_tokens_per_s),
        "executed": _priced(setting.executed.policy, executed.decode_tokens_per_s),
        "ours": _priced(ours.policy, ours.prediction.decode_tokens_per_s) | {"seconds": round(ours.seconds, 3)},
        "reason": ours.reason,
    }
    best = search(setting.machine, setting.model, setting.workload, objective="decode", terms="full", limits=ON_HOST)
    assert best.policy is not None
    mine = dataclasses.replace(setting, policy=best.policy)
    look_ahead = best.policy.look_ahead or 2
    period = timeline(mine, "S1", look_ahead=look_ahead, drain=False, dispatch="paced", layers=_FEW).period
    found["simulated"] = {
        "ours": _priced(best.policy, tokens_per_s(mine, period)["decode"]) | {"look_ahead": look_ahead},
        "published": _priced(setting.policy, tokens_per_s(setting, timeline(setting, "S1").period)["decode"]),
        "executed": _priced(
            setting.executed.policy,
            tokens_per_s(setting.executed, timeline(setting.executed, "S1").period)["decode"],
        ),
    }
    return found


def _priced(policy: Policy, rate: float) -> dict[str, Any]:
    cut = f"{policy.micro_batch} x {policy.n_micro_batches}"
    return {"policy": cut, "weight_resident": round(policy.weight_resident, 4), "tokens_per_s": rate}


def ratios(parts: Iterable[Mapping[str, Any]], ours: str, theirs: str, terms: str) -> list[float]:
    """Of tokens/s, a part of `compare_policies` each."""
    return [part[terms][ours]["tokens_per_s"] / part[terms][theirs]["tokens_per_s"] for part in parts]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Geometric mean and the smallest."""
    found = list(values)
    return {"mean": statistics.geometric_mean(found), "min": min(found)}


def mtbench_row(name: str, generated: int, *, padded: bool) -> dict[str, Any]:
    """A bar of figure 7: our policy for the setting, under S1 and, the same one, under what S3 and S4 do."""
    machine_name, devices, model = published.SETTINGS[name]
    machine = PROFILES[machine_name].with_devices(devices)
    prompt = published.MTBENCH_LONGEST if padded else published.MTBENCH_TOKENS
    workload = Workload(prompt, generated)
    found = search(machine, MODELS[model], workload, limits=ON_HOST)
    if found.policy is None or found.prediction is None:
        return {"reason": found.reason}
    setting = Setting(name, machine, MODELS[model], workload, found.policy)
    row = _priced(found.policy, found.prediction.end_to_end_tokens_per_s) | {"binding": found.binding_resource}
    times = hrm.policy_times(machine, MODELS[model], workload, found.policy)
    row["MoE-Lightning"] = tokens_per_s(setting, float(laws.s1_period(times, found.policy.n_micro_batches)))[
        "end_to_end"
    ]
    for system, schedule in (("FlexGen(c)", "S3"), ("FlexGen", "S4")):
        row[system] = tokens_per_s(setting, timeline(setting, schedule, layers=_FEW).period)["end_to_end"]
    return row


def ablation() -> dict[str, dict[str, Any]]:
    """Table 5: the rows' policies under the schedules that they were run with."""
    setting = published.padded_settings()[0]
    found = {}
    for row, (mu, n, rate) in published.ABLATION.items():
        schedule = "S1" if row.startswith("MoE") else "S4"
        share = min(0.06, published.most_resident(setting.machine, setting.model, setting.workload, mu, n))
        policy = Policy(mu, n, weight_resident=max(0.0, share))
        mine = dataclasses.replace(setting, policy=policy)
        found[row] = {
            "policy": f"{mu} x {n}",
            "paper": rate,
            "ours": tokens_per_s(mine, timeline(mine, schedule, drain=False, layers=_FEW).period)["end_to_end"],
        }
        if schedule == "S4":
            found[row]["ours, with barriers"] = tokens_per_s(mine, timeline(mine, "S4_synced", layers=_FEW).period)[
                "end_to_end"
            ]
    return found


def helm_rows() -> dict[str, dict[str, Any]]:
    """Table 4 at the published cuts of MoE-Lightning: S1, and S3 and S4 with the same policy."""
    rows = {}
    for setting in published.padded_settings()[1:]:
        found = {
            system: tokens_per_s(setting, timeline(setting, schedule, drain=False, layers=_FEW).period)["end_to_end"]
            for system, schedule in (("MoE-Lightning (p)", "S1"), ("FlexGen(c)", "S3"), ("FlexGen", "S4"))
        }
        rows[setting.name] = {
            "ours": found,
            "paper": {system: published.HELM[system][setting.name][0] for system in found},
        }
    return rows


def refill_row(seed: int = 0) -> dict[str, Any]:
    """Steps that 2,000 requests take whose answers end where they end: batches of one length, and slots refilled."""
    import random

    rng = random.Random(seed)
    requests = [Waiting(i, rng.randint(20, 400), 128) for i in range(2000)]
    answers = [min(128, 1 + int(rng.expovariate(1 / 64))) for _ in requests]
    shape = {"n_micro_batches": 14, "micro_batch": 36, "cache_tokens": 36 * 546}
    fixed = decode_steps(requests, answers, refill=False, **shape)
    refilled = decode_steps(requests, answers, refill=True, **shape)
    best = -(-sum(answers) // (14 * 36))
    return {"batches_of_one_length": fixed, "refilled": refilled, "at_least": best, "ratio": fixed / refilled}
