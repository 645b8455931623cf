"""The flags of a launcher that can serve a model larger than its device, and the policy that follows from them."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxstack.engine import Engine
from jaxstack.engine.config import EngineConfig, sizes
from jaxstack.engine.memory.hrm import DEVICE_SHARE
from jaxstack.engine.memory.offload_plan import Model, Policy, Workload
from jaxstack.engine.memory.policy_search import Limits, SearchResult, search
from jaxstack.engine.offload import (
    OffloadConfig,
    kv_cache_bytes,
    layouts_for,
    refuse_unsupported,
    resident_share,
    total_page_bytes,
)
from jaxstack.engine.pipelined_runner import PipelinedRunner
from jaxstack.engine.weights import served_dtype
from jaxstack.models.decoder_config import DecoderConfig
from jaxstack.models.hf_config import config_from_folder
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.machine import HardwareProfile, load_profile
from launch import job
from launch.hardware_probe import measure

_OFFLOAD: Any = flags.DEFINE_enum(
    "offload",
    "none",
    ["auto", "none", "cgopipe"],
    "cgopipe keeps experts or MLPs on the host and streams them, with attention there too (MoE-Lightning); auto "
    "does so, or places them as is predicted to be fastest, if the model does not fit",
)
_BUDGET = flags.DEFINE_float(
    "device_budget_gb", None, "what the device may hold with --offload; by default nine tenths of its memory"
)
_MACHINE = flags.DEFINE_string(
    "machine",
    "probe",
    "what --offload plans for: a profile's name, a file that launch.probe_hardware wrote, or probe to measure now",
)

# What a plan assumes of requests that nobody has seen yet: a part of the longest.
_PROMPT_SHARE, _ANSWER_SHARE = 0.25, 0.25
_MICRO_BATCHES = 4
_PROBE_SECONDS = 8.0


def with_offload(settings: EngineConfig, folder: Path) -> tuple[EngineConfig, str | None]:
    """The settings with what the flags ask for, and a line that says what that is and why; None if nothing was asked.

    Raises:
      UserError: a budget below the floor, an unknown machine, or a model that cannot be streamed.
    """
    if _OFFLOAD.value == "none":
        if _BUDGET.value is not None:
            raise job.BadUsage("--device_budget_gb: found it without --offload, expected --offload=auto or cgopipe")
        return settings, None
    budget = _budget_bytes()
    model = config_from_folder(folder)
    dtype = served_dtype(settings)
    chosen = sizes(settings, model, dtype.itemsize)
    kv_bytes = kv_cache_bytes(model, chosen.num_pages, settings.page_size, dtype.itemsize)
    resident = OffloadConfig(budget, Policy(1, 1, attention_on_device=True, weight_resident=1.0, kv_resident=1.0))
    pages = total_page_bytes(model, layouts_for(model, resident), dtype)
    if _OFFLOAD.value == "auto":
        options: dict[str, Any] = {"itemsize": dtype.itemsize, "kv_bytes": kv_bytes}
        whole = dataclasses.replace(resident, fill=False)
        try:
            _, plan = resident_share(model, whole, layouts_for(model, whole), chosen.shapes, **options)
            return settings, f"offload: none, all {plan.total / 1e9:.3g} GB fit into {budget / 1e9:.3g} GB"
        except UserError:
            pass
    refuse_unsupported(model)
    found = _search(_machine(), model, settings, budget, chosen.max_model_len, dtype.itemsize)
    policy = _policy(found, settings.max_sequences)
    offload = OffloadConfig(budget, policy)
    settings = dataclasses.replace(settings, offload=offload)
    chosen = sizes(settings, model, dtype.itemsize)
    kv_bytes = kv_cache_bytes(model, chosen.num_pages, settings.page_size, dtype.itemsize)
    share, plan = resident_share(
        model, offload, layouts_for(model, offload), chosen.shapes, itemsize=dtype.itemsize, kv_bytes=kv_bytes
    )
    return settings, _line(offload, found, share, plan.total, round(pages * (1 - share)))


def _budget_bytes() -> int:
    if _BUDGET.value is not None:
        if not _BUDGET.value > 0:
            raise job.BadUsage(f"--device_budget_gb: found {_BUDGET.value:g}, expected a number > 0")
        return round(_BUDGET.value * 1e9)
    device = jax.local_devices()[0]
    memory = None if device.platform == "cpu" else device.memory_stats()
    if memory is None:
        raise job.BadUsage("--device_budget_gb: found none, expected one: this device does not say what it has")
    return round(0.9 * memory["bytes_limit"])


def _machine() -> HardwareProfile:
    if _MACHINE.value != "probe":
        return load_profile(_MACHINE.value)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    profile, _ = measure(None, seconds=_PROBE_SECONDS, mib=None, say=say)
    return profile


def _search(
    machine: HardwareProfile, model: DecoderConfig, settings: EngineConfig, budget: int, window: int, itemsize: int
) -> SearchResult:
    moe = model.moe
    sizes_ = Model(
        model.architecture,
        model.num_layers,
        model.hidden_size,
        moe.intermediate_size if moe else model.intermediate_size,
        model.num_heads,
        model.num_kv_heads,
        moe.num_experts if moe else 1,
        moe.experts_per_token if moe else 1,
        model.head_dim,
        itemsize,
        itemsize,
    )
    # The search fills only a share of a memory; the budget is what may be filled.
    machine = machine.with_memory(device_bytes=round(budget / DEVICE_SHARE))
    prompt, answer = (max(1, round(share * window)) for share in (_PROMPT_SHARE, _ANSWER_SHARE))
    workload = Workload(prompt, answer, settings.max_sequences)
    limits = Limits(max_requests=settings.max_sequences)
    if _OFFLOAD.value == "cgopipe":  # which is a placement, too
        limits = dataclasses.replace(limits, attention_on_device=(False,), ffn_on_device=(True,))
    return search(machine, sizes_, workload, limits=limits)


def _policy(found: SearchResult, sequences: int) -> Policy:
    """What was found, in the terms that a runner knows."""
    if found.policy is None:  # the model of the machine is coarser than the runner: that one says what fits
        n = min(_MICRO_BATCHES, sequences)
        return Policy(-(-sequences // n), n)
    policy = found.policy
    kv = 1.0 if policy.attention_on_device and policy.kv_resident >= 1 else 0.0
    weights = policy.weight_resident if policy.ffn_on_device else 0.0
    return dataclasses.replace(policy, kv_resident=kv, weight_resident=weights)


def _line(offload: OffloadConfig, found: SearchResult, share: float, device: int, host: int) -> str:
    policy = offload.policy
    where = lambda on_device: "the device" if on_device else "the host"  # noqa: E731
    if found.prediction is None:
        why = f"no prediction ({found.reason})"
    else:
        rate = found.prediction.decode_tokens_per_s
        why = f"{rate:.3g} tokens/s predicted, bound by {found.binding_resource}"
    return (
        f"offload: {offload.schedule_name} in {policy.n_micro_batches} micro-batches, attention on "
        f"{where(policy.attention_on_device)}, feed-forward on {where(policy.ffn_on_device)}, {share:.0%} of its pages "
        f"stay; {why}; device {device / 1e9:.3g} of {offload.device_budget_bytes / 1e9:.3g} GB, weights on the host "
        f"{host / 1e9:.3g} GB"
    )


def summary(engine: Engine) -> dict[str, Any]:
    """What the device held at the most, for an engine that streams its weights; nothing for another."""
    if not isinstance(engine.runner, PipelinedRunner):
        return {}
    ledger = engine.runner.ledger
    return {
        "device_peak_bytes": ledger.peak("device"),
        "device_budget_bytes": ledger.budget("device"),
        "weight_pages_resident": engine.runner.weight_resident,
    }
