"""The hierarchical roofline, and what a policy of offloading takes by it (MoE-Lightning, arXiv 2411.11217).

A level computes at P FLOP/s and reads its memory at B bytes/s; a link moves bytes between levels. An operation does
I_x FLOPs for each byte that it touches on a level. Times follow by taking the slowest of what an operation needs.

Two sets of terms. `paper` is what the authors' artifact computes: attention's FLOPs are half of what they are, and
neither projections nor activations on the link take time. `full` has all of them, and times each task of a schedule.
Policies are ranked well by both; seconds are seconds of the model of a machine, not of the machine.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from jaxstack.engine.memory import laws
from jaxstack.engine.memory.offload_plan import MODELS as MODELS
from jaxstack.engine.memory.offload_plan import Model, Policy, Workload
from jaxstack.engine.memory.schedule_build import SlotBytes, TaskTimes
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.machine import HardwareProfile, Processor

Terms = Literal["paper", "full"]

Number = Any
"""A number, or an array of them: a search asks for many policies at once."""

DEVICE_SHARE, HOST_SHARE = 0.86, 0.80
"""Of a memory, what a plan may fill; the rest is the authors' allowance for allocators, programs and the system."""


# The roofline.


@dataclasses.dataclass(frozen=True)
class TurningPoints:
    """FLOPs for each byte of an operation's data on the host, where the best way to run it changes.

    Args:
      stay_below: P1 (equation 9): below it moving the data costs more than computing where it is. 0: never.
      link_bound_below: P2 (equation 10): below it, run on the device, the operation waits for the link.
    """

    stay_below: float
    link_bound_below: float


def attainable(machine: HardwareProfile, device_intensity: Number, host_intensity: Number | None = None) -> Number:
    """FLOP/s on the device (equations 7 and 8): with data from the host where `host_intensity` is given."""
    device = machine.all_devices
    reached = np.minimum(device.flops_per_s, device.bytes_per_s * device_intensity)
    if host_intensity is not None:
        reached = np.minimum(reached, machine.link.to_device_bytes_per_s * host_intensity)
    return reached


def attainable_on_host(machine: HardwareProfile, intensity: Number) -> Number:
    """FLOP/s on the host (equation 8)."""
    return np.minimum(machine.host.flops_per_s, machine.host.bytes_per_s * intensity)


def turning_points(machine: HardwareProfile, device_intensity: float) -> TurningPoints:
    """Both, for an operation that does `device_intensity` FLOPs for each byte that it touches on the device.

    P1 depends on the intensity itself where the host waits for its memory; there the host wins whenever its memory is
    faster than the link, whatever the intensity, so that the point is where the host's FLOP/s are what the link feeds.
    """
    link = machine.link.to_device_bytes_per_s
    stays = machine.host.flops_per_s / link if machine.host.bytes_per_s >= link else 0.0
    return TurningPoints(stays, float(attainable(machine, device_intensity)) / link)


def balance_point(machine: HardwareProfile, device_intensity: float) -> float:
    """The FLOPs for each byte on the host at which the link keeps the device's memory busy (equation 11)."""
    return machine.all_devices.bytes_per_s * device_intensity / machine.link.to_device_bytes_per_s


def attention_intensity(model: Model) -> float:
    """FLOPs of decode attention for each byte of KV: no batch raises it, shared KV heads and narrow KV do."""
    return 4 * model.q_width / model.kv_token_layer_bytes


def ffn_intensity(model: Model, tokens: Number) -> Number:
    """FLOPs of the experts for each byte of their weights, all of which are read once for so many tokens."""
    return 6 * tokens * model.hidden * model.intermediate * model.experts_per_token / model.expert_layer_bytes


# Times of tasks.


def _time(at: Processor, flops: Number, size_bytes: Number) -> Number:
    return np.maximum(flops / at.flops_per_s, size_bytes / at.bytes_per_s)


def _ffn(at: Processor, model: Model, mu: Number) -> Number:
    """The experts on `mu` tokens, all of their weights read."""
    flops = 6 * mu * model.hidden * model.intermediate * model.experts_per_token
    size = model.weight_bytes * mu * (model.hidden + model.intermediate) + model.expert_layer_bytes
    return _time(at, flops, size)


def _attention(at: Processor, model: Model, mu: Number, context: float, flops_each: float) -> Number:
    flops = mu * context * model.heads * flops_each
    size = mu * (2 * 2 * model.q_width + context * model.kv_token_layer_bytes)
    return _time(at, flops, size)


def task_times(
    machine: HardwareProfile,
    model: Model,
    workload: Workload,
    *,
    micro_batch: Number,
    weight_resident: Number = 0.0,
    kv_resident: Number = 0.0,
    attention_on_device: bool = False,
) -> TaskTimes:
    """The `full` times of a micro-batch's tasks in a layer, halfway through the answers; the FFN is on the device."""
    mu, device, link = micro_batch, machine.all_devices, machine.link
    h1, width = model.hidden, model.weight_bytes
    context = workload.prompt_tokens + workload.generated_tokens / 2
    qkv = model.q_width + 2 * model.kv_width
    before = _time(device, 2 * mu * h1 * qkv, width * h1 * qkv + 4 * mu * h1)
    output = _time(device, 2 * mu * h1 * model.q_width, width * h1 * model.q_width)
    at = device if attention_on_device else machine.host
    kv = mu * model.kv_token_layer_bytes
    return TaskTimes(
        before=before,
        attention=_attention(at, model, mu, context, 4 * model.head_size + 2),
        after=output + _ffn(device, model, mu),
        weights=model.expert_layer_bytes * (1 - weight_resident) / link.to_device_bytes_per_s,
        qkv_to_host=2 * mu * qkv / link.to_host_bytes_per_s,
        output_to_device=2 * mu * model.q_width / link.to_device_bytes_per_s,
        load_kv=kv * context * (1 - kv_resident) / link.to_device_bytes_per_s,
        store_kv=kv * (1 - kv_resident) / link.to_host_bytes_per_s,
    )


def policy_times(machine: HardwareProfile, model: Model, workload: Workload, policy: Policy) -> TaskTimes:
    """The `full` times of a policy's tasks."""
    times = task_times(
        machine,
        model,
        workload,
        micro_batch=policy.micro_batch,
        weight_resident=policy.weight_resident,
        kv_resident=policy.kv_resident,
        attention_on_device=policy.attention_on_device,
    )
    return TaskTimes(*(float(seconds) for seconds in dataclasses.astuple(times)))


def slot_bytes(model: Model, workload: Workload, policy: Policy) -> SlotBytes:
    """The sizes of a policy's slots, for the longest context."""
    mu, width = policy.micro_batch, 2
    context = workload.prompt_tokens + workload.generated_tokens
    return SlotBytes(
        hidden=width * mu * model.hidden,
        qkv=width * mu * (model.q_width + 2 * model.kv_width),
        output=width * mu * model.q_width,
        kv=round(mu * context * model.kv_token_layer_bytes * (1 - policy.kv_resident)),
        new_kv=round(mu * model.kv_token_layer_bytes),
        weights=round(model.expert_layer_bytes * (1 - policy.weight_resident)),
    )


# What a layer takes.


def layer_terms(
    machine: HardwareProfile,
    model: Model,
    workload: Workload,
    terms: Terms,
    *,
    micro_batch: Number,
    n_micro_batches: Number,
    attention_on_device: bool,
    ffn_on_device: bool,
    weight_resident: Number,
    kv_resident: Number,
    buffer_share: float = 1.0,
) -> dict[str, Number]:
    """Seconds that each resource works for one decode step of one layer, all micro-batches; the period is the largest.

    With `full` terms `chain` is one micro-batch from end to end, where that can bind, and `late` what too few spare
    pages cost.
    """
    mu, n = micro_batch, n_micro_batches
    if terms == "paper":
        return _paper_terms(
            machine, model, workload, mu, n, attention_on_device, ffn_on_device, weight_resident, kv_resident
        )
    times = task_times(
        machine,
        model,
        workload,
        micro_batch=mu,
        weight_resident=weight_resident if ffn_on_device else 1.0,
        kv_resident=kv_resident,
        attention_on_device=attention_on_device,
    )
    if ffn_on_device:
        found = laws.s4_paged_terms(times, n) if attention_on_device else laws.s1_terms(times, n)
        if buffer_share < 1:
            found["late"] = laws.late_pages(times, n, buffer_share)
        return found
    # Each side computes the experts that it has; the hidden states cross the link and come back.
    experts = _ffn(machine.all_devices, model, mu)
    on_device, on_host = weight_resident * experts, (1 - weight_resident) * _ffn(machine.host, model, mu)
    hidden = 2 * mu * model.hidden
    back = hidden / machine.link.to_device_bytes_per_s
    out = hidden / machine.link.to_host_bytes_per_s
    others = times.before + times.after - experts
    if attention_on_device:
        to_device, to_host = times.load_kv + back, times.store_kv + out
        device, host = others + times.attention + on_device, on_host
    else:
        to_device, to_host = times.output_to_device + back, times.qkv_to_host + out
        device, host = others + on_device, times.attention + on_host
    chain = to_device + to_host + others + times.attention + np.maximum(on_device, on_host)
    return {"to_device": n * to_device, "device": n * device, "host": n * host, "to_host": n * to_host, "chain": chain}


def _paper_terms(
    machine: HardwareProfile,
    model: Model,
    workload: Workload,
    mu: Number,
    n: Number,
    attention_on_device: bool,
    ffn_on_device: bool,
    weight_resident: Number,
    kv_resident: Number,
) -> dict[str, Number]:
    """As in the artifact: KV moves at the mean context, attention computes at the final one."""
    s, out = workload.prompt_tokens, workload.generated_tokens
    device, host = machine.all_devices, machine.host
    moved = 0.0 * mu
    if ffn_on_device:
        moved = moved + model.expert_layer_bytes * (1 - weight_resident)
    if attention_on_device:
        moved = moved + model.kv_token_layer_bytes * (s + out / 2) * mu * n * (1 - kv_resident)
    each = 2 * model.head_size + 2
    attention = n * _attention(device if attention_on_device else host, model, mu, s + out, each)
    ffn = n * _ffn(device if ffn_on_device else host, model, mu)
    nothing = 0.0 * attention
    return {
        "to_device": moved / machine.link.to_device_bytes_per_s,
        "device": (attention if attention_on_device else nothing) + (ffn if ffn_on_device else nothing),
        "host": (nothing if attention_on_device else attention) + (nothing if ffn_on_device else ffn),
    }


def prefill_seconds(
    machine: HardwareProfile,
    model: Model,
    workload: Workload,
    *,
    micro_batch: Number,
    n_micro_batches: Number,
    weight_resident: Number,
    kv_resident: Number,
) -> Number:
    """All prompts, layer by layer over all micro-batches, on the device: weights come once, KV goes to the host."""
    s, mu, device = workload.prompt_tokens, micro_batch, machine.all_devices
    tokens = mu * s
    h1, qkv = model.hidden, model.q_width + 2 * model.kv_width
    flops = 2 * tokens * h1 * (qkv + model.q_width) + 2 * tokens * s * model.q_width
    compute = _time(device, flops, model.attention_layer_bytes + 8 * tokens * h1) + _ffn(device, model, tokens)
    weights = model.expert_layer_bytes * (1 - weight_resident) / machine.link.to_device_bytes_per_s
    kv = n_micro_batches * tokens * model.kv_token_layer_bytes * (1 - kv_resident) / machine.link.to_host_bytes_per_s
    layer = np.maximum.reduce(np.broadcast_arrays(n_micro_batches * compute, weights, kv))
    return model.layers * layer + weights


# Memory.


@dataclasses.dataclass(frozen=True)
class LinearBytes:
    """`fixed + weights * weight_resident + kv * kv_resident` bytes."""

    fixed: Number
    weights: Number
    kv: Number

    def at(self, weight_resident: Number, kv_resident: Number) -> Number:
        return self.fixed + self.weights * weight_resident + self.kv * kv_resident


def memory_parts(
    machine: HardwareProfile,
    model: Model,
    workload: Workload,
    *,
    micro_batch: Number,
    n_micro_batches: Number,
    attention_on_device: bool,
    ffn_on_device: bool,
    buffer_share: float = 1.0,
) -> tuple[dict[str, LinearBytes], dict[str, LinearBytes]]:
    """What fills the device (all devices) and the host, prefill included, by the model of the artifact."""
    s, tp, layers, mu, width = workload.prompt_tokens, machine.devices, model.layers, micro_batch, 2
    n = mu * n_micro_batches
    h1, experts = model.hidden, model.expert_layer_bytes
    kv_token = model.kv_token_layer_bytes
    kv = kv_token * (s + workload.generated_tokens) * n * layers
    decode = 2 * width * h1 * n * tp
    prefill = tp * width * (2 * h1 * mu * s + h1 * n * s) + 2 * kv_token * s * mu
    device = {
        "attention weights": LinearBytes(model.attention_layer_bytes * layers, 0.0, 0.0),
        "resident experts": LinearBytes(0.0, experts * layers, 0.0),
        "activations": LinearBytes(np.maximum(decode, prefill), 0.0, 0.0),
        "experts' activations": LinearBytes(
            2.4 * s * mu * model.experts_per_token * (h1 * tp + 3 * model.intermediate), 0.0, 0.0
        ),
    }
    host = {"activations of the prompts": LinearBytes(width * h1 * n * s * tp, 0.0, 0.0)}
    if ffn_on_device:
        buffers = (1 + buffer_share) * experts
        device["page buffers"] = LinearBytes(buffers, -buffers, 0.0)
        host["experts"] = LinearBytes(experts * (layers + 2), -experts * (layers + 2), 0.0)
    else:
        host["experts"] = LinearBytes(experts * layers, -experts * layers, 0.0)
    if attention_on_device:
        segments = 2 * kv_token * (s + workload.generated_tokens) * mu
        device["resident KV"] = LinearBytes(0.0, 0.0, kv)
        device["KV buffers"] = LinearBytes(segments, 0.0, -segments)
        host["KV"] = LinearBytes(kv, 0.0, -kv)
    else:
        host["KV"] = LinearBytes(kv, 0.0, 0.0)
    return device, host


def total(parts: Mapping[str, LinearBytes]) -> LinearBytes:
    """The sum of all."""
    found = LinearBytes(0.0, 0.0, 0.0)
    for part in parts.values():
        found = LinearBytes(found.fixed + part.fixed, found.weights + part.weights, found.kv + part.kv)
    return found


# A prediction.


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a policy is expected to take.

    Args:
      seconds: that each resource works for a layer in a decode step.
      period_s: of a layer in a decode step, the largest of them.
      binding: the name of that one.
      decode_tokens_per_s: of all requests; with `paper` terms by the artifact's formula, which counts the first token.
      prefill_s: of all prompts.
      end_to_end_tokens_per_s: generated tokens over prefill and decode.
      device_bytes, host_bytes: at the fullest.
      fits: whether both are within the shares that a plan may fill.
    """

    seconds: Mapping[str, float]
    period_s: float
    binding: str
    decode_tokens_per_s: float
    prefill_s: float
    end_to_end_tokens_per_s: float
    device_bytes: int
    host_bytes: int
    fits: bool


def predict(
    machine: HardwareProfile, model: Model, workload: Workload, policy: Policy, terms: Terms = "full"
) -> Prediction:
    """Prices one policy.

    Raises:
      UserError: `paper` terms for a single generated token: the artifact divides by the steps after the first.
    """
    _check_terms(terms, workload)
    cut: dict[str, Any] = {"micro_batch": policy.micro_batch, "n_micro_batches": policy.n_micro_batches}
    placed: dict[str, Any] = {
        "attention_on_device": policy.attention_on_device,
        "ffn_on_device": policy.ffn_on_device,
        "buffer_share": policy.buffer_share,
    }
    share: dict[str, Any] = {"weight_resident": policy.weight_resident, "kv_resident": policy.kv_resident}
    seconds = {
        name: float(value)
        for name, value in layer_terms(machine, model, workload, terms, **cut, **placed, **share).items()
    }
    binding = max(seconds, key=lambda name: seconds[name])
    period = seconds[binding]
    prefill = float(prefill_seconds(machine, model, workload, **cut, **share))
    device, host = (total(parts) for parts in memory_parts(machine, model, workload, **cut, **placed))
    device_bytes = float(device.at(policy.weight_resident, policy.kv_resident))
    host_bytes = float(host.at(policy.weight_resident, policy.kv_resident))
    return Prediction(
        seconds,
        period,
        binding,
        float(decode_rate(terms, model, workload, policy.requests, period)),
        prefill,
        float(end_to_end_rate(model, workload, policy.requests, period, prefill)),
        round(device_bytes),
        round(host_bytes),
        # A policy at the edge of the memory fits, rounding or not.
        device_bytes <= device_limit(machine) * (1 + 1e-9) and host_bytes <= host_limit(machine) * (1 + 1e-9),
    )


def decode_rate(terms: Terms, model: Model, workload: Workload, requests: Number, period: Number) -> Number:
    """Tokens/s of decoding."""
    counted = workload.generated_tokens / (workload.generated_tokens - 1) if terms == "paper" else 1.0
    return counted * requests / (model.layers * period)


def end_to_end_rate(model: Model, workload: Workload, requests: Number, period: Number, prefill: Number) -> Number:
    """Tokens/s of prefill and decoding; the first token comes of the prefill."""
    steps = workload.generated_tokens - 1
    return requests * workload.generated_tokens / (prefill + steps * model.layers * period)


def device_limit(machine: HardwareProfile) -> float:
    """Bytes of all devices that a plan may fill."""
    return DEVICE_SHARE * machine.all_devices.memory_bytes


def host_limit(machine: HardwareProfile) -> float:
    """Bytes of the host that a plan may fill."""
    return HOST_SHARE * machine.host.memory_bytes


def _check_terms(terms: str, workload: Workload) -> None:
    if terms not in ("paper", "full"):
        raise UserError(f"terms: found {terms!r}, expected 'paper' or 'full'")
    if terms == "paper" and workload.generated_tokens < 2:
        raise UserError("generated_tokens: found 1, expected at least 2 with the paper's terms")
