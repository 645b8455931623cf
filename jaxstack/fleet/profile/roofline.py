"""Profiles from a data sheet, so that planning and replaying work where no accelerator is.

A decode step of B requests with C tokens of context in all reads the weights and the cache, or computes, whichever
takes longer; a prompt is computed once; every step has a fixed overhead:

    decode(B, C) = max(2 P B / (u F), (W + kv C) / (v BW)) + t0        prefill(n) = 2 P n / (u F)

The same law prices the steps of the replay (`fleet/simulator/replica.py`), so that a replay of such a profile tests
queueing and routing, not the law.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective, ThroughputProfile
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.machine import Processor


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What of a decoder decides how fast it is served.

    Args:
      parameters: that a token is multiplied with.
      weight_bytes: of all weights.
      kv_bytes_per_token: keys and values of all layers.
    """

    name: str
    parameters: float
    weight_bytes: float
    kv_bytes_per_token: float

    def __post_init__(self) -> None:
        for field in ("parameters", "weight_bytes", "kv_bytes_per_token"):
            if not getattr(self, field) > 0:
                raise UserError(f"{self.name}: {field}: found {getattr(self, field)}, expected a positive number")


MODELS: Mapping[str, ServedModel] = {
    "llama-2-7b": ServedModel("llama-2-7b", 6.74e9, 2 * 6.74e9, 2 * 32 * 4096 * 2),
    "llama-2-70b": ServedModel("llama-2-70b", 68.98e9, 2 * 68.98e9, 2 * 80 * 1024 * 2),
    "llama-3.1-8b": ServedModel("llama-3.1-8b", 8.03e9, 2 * 8.03e9, 2 * 32 * 1024 * 2),
}
"""In bfloat16, by name."""


@dataclasses.dataclass(frozen=True)
class Roofline:
    """How long the steps of one replica take, and how much it holds.

    Args:
      compute_share, bandwidth_share: of the data sheet, that kernels attain.
      memory_share: of the device's, that weights and cache may take.
      overhead_s: of every step.
      max_batch: requests in a step.
    """

    device: Processor
    model: ServedModel
    compute_share: float = 0.5
    bandwidth_share: float = 0.8
    memory_share: float = 0.9
    overhead_s: float = 0.003
    max_batch: int = 256

    @property
    def kv_tokens(self) -> int:
        """Tokens of cache that fit beside the weights; 0 where these do not fit."""
        free = self.memory_share * self.device.memory_bytes - self.model.weight_bytes
        return max(0, int(free / self.model.kv_bytes_per_token))

    @property
    def s_per_token(self) -> float:
        """Of computing, for a token of a prompt or of a batch."""
        return 2 * self.model.parameters / (self.compute_share * self.device.flops_per_s)

    @property
    def read_weights_s(self) -> float:
        return self.model.weight_bytes / (self.bandwidth_share * self.device.bytes_per_s)

    @property
    def read_token_s(self) -> float:
        """Of reading a token of cache."""
        return self.model.kv_bytes_per_token / (self.bandwidth_share * self.device.bytes_per_s)

    def decode_s(self, batch, context_tokens):
        """A step that decodes `batch` requests with `context_tokens` in all; numbers or arrays."""
        compute = self.s_per_token * batch
        memory = self.read_weights_s + self.read_token_s * context_tokens
        return np.maximum(compute, memory) + self.overhead_s

    def best(
        self, inputs: Float[np.ndarray, "..."], outputs: Float[np.ndarray, "..."], objective: LatencyObjective
    ) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """The highest steady rate of requests of these lengths within the objective, and how many are under way then.

        Of every batch size B that memory holds: a request brings one prompt for every `output` steps, so that a step
        takes decode + (B / output) (prefill + t0), on average, and B / (output x step) requests end in a second.
        """
        batch = np.arange(1, self.max_batch + 1, dtype=float)
        read, written = inputs[..., None], np.maximum(outputs[..., None], 1.0)
        prefill_s = self.s_per_token * read + self.overhead_s
        step_s = self.decode_s(batch, batch * (read + written / 2)) + batch / written * prefill_s
        fits = batch <= np.floor(self.kv_tokens / (read + written))
        fits &= step_s <= objective.tpot_s
        if objective.ttft_s is not None:
            fits &= prefill_s <= objective.ttft_s
        rate = np.where(fits, batch / (written * step_s), 0.0)
        best = rate.argmax(axis=-1)
        top = np.take_along_axis(rate, best[..., None], axis=-1)[..., 0]
        return top, np.where(top > 0, batch[best], 0.0)


@dataclasses.dataclass(frozen=True)
class Datasheet:
    """An accelerator that can be rented: what it does, and what a replica of `devices` costs."""

    name: str
    device: Processor
    price_usd_per_hour: float
    devices: int = 1

    def accelerator(self, max_count: int | None = None) -> AcceleratorType:
        return AcceleratorType(self.name, self.price_usd_per_hour, max_count, self.devices)

    def times(self, devices: int) -> "Datasheet":
        """A replica over so many of them, as fast as all together: an upper limit for tensor parallelism."""
        one = self.device
        many = Processor(one.flops_per_s * devices, one.bytes_per_s * devices, one.memory_bytes * devices)
        return Datasheet(f"{devices}x{self.name}", many, self.price_usd_per_hour * devices, self.devices * devices)


def _datasheet(name: str, gb: float, gb_per_s: float, tflops: float, price: float) -> Datasheet:
    return Datasheet(name, Processor(tflops * 1e12, gb_per_s * 1e9, round(gb * 1e9)), price)


DATASHEETS: Mapping[str, Datasheet] = {
    sheet.name: sheet
    for sheet in (
        _datasheet("L4", 24, 300, 121, 0.70),
        _datasheet("A10G", 24, 600, 70, 1.01),
        _datasheet("A100-80GB", 80, 1935, 312, 3.67),
        _datasheet("H100", 80, 3350, 989, 7.516),
    )
}
"""The types of Melange's study, with the prices it used: the H100's is a marketplace's, scaled to a cloud's A100."""


def throughput_from_datasheet(
    sheets: Sequence[Datasheet],
    model: ServedModel,
    grid: LengthGrid,
    objective: LatencyObjective,
    points: tuple[Float[np.ndarray, "inputs outputs"], Float[np.ndarray, "inputs outputs"]] | None = None,
) -> ThroughputProfile:
    """What the roofline says of each type.

    Args:
      points: input and output lengths at which each bucket is looked at; its upper corner by default.
    """
    inputs, outputs = points or grid.upper_corners()
    rates, concurrency = {}, {}
    for sheet in sheets:
        rates[sheet.name], concurrency[sheet.name] = Roofline(sheet.device, model).best(inputs, outputs, objective)
    where = "upper corners" if points is None else "given lengths"
    return ThroughputProfile(
        grid, rates, objective, concurrency, "datasheet", {"model": model.name, "law": "roofline", "points": where}
    )
