"""What the search and the roofline say across machines: figures 4, 5, 9 and 10."""

import dataclasses
from typing import Any

from jaxstack.engine.memory import hrm
from jaxstack.engine.memory.hrm import MODELS
from jaxstack.engine.memory.offload_plan import Policy, Workload
from jaxstack.engine.memory.policy_search import Limits, search
from jaxstack.runtime.machine import PROFILES, HardwareProfile, Link, Processor

LINKS_GB = (100, 200, 300, 400, 500)
HOST_SCALES = (1, 2, 4, 7, 10)


def roofline_points(machine: HardwareProfile) -> dict[str, Any]:
    """Figures 4 and 5: where attention and the experts of Mixtral 8x7B lie, in FLOPs for each byte."""
    model = MODELS["mixtral_8x7b"]
    int4 = dataclasses.replace(model, kv_bytes=0.5)
    attention = {"float16 KV": hrm.attention_intensity(model), "int4 KV": hrm.attention_intensity(int4)}
    points = {name: dataclasses.asdict(hrm.turning_points(machine, value)) for name, value in attention.items()}
    experts = {}
    for mu in (32, 128, 512):
        on_device = float(hrm.ffn_intensity(model, mu))
        found = hrm.turning_points(machine, on_device)
        experts[str(mu)] = {
            "device_intensity": on_device,
            "stay_below": found.stay_below,
            "link_bound_below": found.link_bound_below,
            "balance": hrm.balance_point(machine, on_device),
            # The tokens of a pass at which the link no longer binds.
            "balanced_requests": found.link_bound_below / float(hrm.ffn_intensity(model, 1)),
        }
    return {"attention": attention, "turning_points": points, "experts": experts}


def attention_row() -> dict[str, float]:
    """Figure 9: milliseconds of attention on the host, of moving the same KV, and of the experts."""
    machine, model = PROFILES["l4"], MODELS["mixtral_8x7b"]
    workload = Workload(510, 4)  # a context of 512 halfway through
    on_host = hrm.policy_times(machine, model, workload, Policy(128, 1))
    on_device = hrm.policy_times(machine, model, workload, Policy(128, 1, attention_on_device=True))
    return {
        "CPU attention": 1e3 * float(on_host.attention),
        "KV over the link": 1e3 * float(on_device.load_kv),
        "MoE FFN": 1e3 * float(on_host.after),
    }


PLANS = (
    ("gh200", "llama3_8b", 17),
    ("gh200", "llama3_8b", 20),
    ("gh200", "llama3_8b", 24),
    ("h100_pcie", "llama3_8b", 20),
    ("gh200", "mixtral_8x7b", 60),
    ("h100_pcie", "mixtral_8x7b", 60),
)
"""Machine, model, GB of device memory."""


def plans() -> dict[str, dict[str, Any]]:
    """Weights or KV: with attention on the device both may be streamed, and one search decides how much of each.

    Streaming KV is what Pie does, streaming weights what MoE-Lightning does. A byte of device memory saves
    about as much traffic by either; weights a little more, since room for KV is kept for the longest context.
    """
    rows: dict[str, dict[str, Any]] = {}
    for machine_name, model, device_gb in PLANS:
        machine = PROFILES[machine_name].with_memory(device_bytes=device_gb * 10**9)
        limits = Limits(attention_on_device=(True,), ffn_on_device=(True,))
        found = search(machine, MODELS[model], Workload(256, 256), objective="decode", limits=limits)
        name = f"{machine_name} with {device_gb} GB, {model}"
        if found.policy is None or found.prediction is None:
            rows[name] = {"reason": found.reason}
            continue
        rows[name] = {
            "policy": f"{found.policy.micro_batch} x {found.policy.n_micro_batches}",
            "weights_streamed": 1 - found.policy.weight_resident,
            "kv_streamed": 1 - found.policy.kv_resident,
            "tokens_per_s": found.prediction.decode_tokens_per_s,
            "reason": found.reason,
        }
    return rows


def placement(link_gb: float, host_scale: int) -> dict[str, Any]:
    """A point of figure 10: two A100, Mixtral 8x7B, prompts of 512; the host so many times the base, memory and all."""
    base = PROFILES["a100_80gb"].with_devices(2)
    host = Processor(
        base.host.flops_per_s * host_scale, base.host.bytes_per_s * host_scale, base.host.memory_bytes * host_scale
    )
    machine = dataclasses.replace(base, host=host, link=Link(link_gb * 1e9, link_gb * 1e9))
    found = search(machine, MODELS["mixtral_8x7b"], Workload(512, 32), limits=Limits(ffn_on_device=(True,)))
    if found.policy is None or found.prediction is None:
        return {"reason": found.reason}
    return {
        "attention_on_device": found.policy.attention_on_device,
        "weight_resident": found.policy.weight_resident,
        "requests": found.policy.requests,
        "tokens_per_s": found.prediction.end_to_end_tokens_per_s,
        "binding": found.binding_resource,
        "seconds": round(found.seconds, 2),
    }
