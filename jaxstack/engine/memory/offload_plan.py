"""What a plan of offloading is about: a model's sizes, a workload, and a policy."""

import dataclasses
from collections.abc import Mapping

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a decoder; dense ones have one expert. `weight_bytes` and `kv_bytes` are of one element."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    experts: int = 1
    experts_per_token: int = 1
    head_dim: int | None = None
    weight_bytes: float = 2
    kv_bytes: float = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "name" or (field.name == "head_dim" and value is None):
                continue
            if not value > 0:
                raise UserError(f"model {self.name!r}: {field.name}: found {value}, expected a number > 0")
        if self.experts_per_token > self.experts:
            raise UserError(
                f"model {self.name!r}: experts_per_token: found {self.experts_per_token}, expected at most the "
                f"{self.experts} experts"
            )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def q_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def expert_layer_bytes(self) -> float:
        """W: all experts of a layer."""
        return 3 * self.hidden * self.intermediate * self.experts * self.weight_bytes

    @property
    def attention_layer_bytes(self) -> float:
        """The four projections of a layer, which stay on the device."""
        return 2 * self.hidden * (self.q_width + self.kv_width) * self.weight_bytes

    @property
    def kv_token_layer_bytes(self) -> float:
        """KV of one token in one layer."""
        return 2 * self.kv_width * self.kv_bytes


MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("mixtral_8x7b", 32, 4096, 14336, 32, 8, 8, 2),
        Model("mixtral_8x22b", 56, 6144, 16384, 48, 8, 8, 2),
        Model("dbrx", 40, 6144, 10752, 48, 8, 16, 4),
        Model("llama3_8b", 32, 4096, 14336, 32, 8),
    )
}
"""Models by name: those of the paper, and a dense one."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests alike.

    Args:
      prompt_tokens: the mean, or the longest where all are padded to it.
      generated_tokens: of each.
      requests: that there are; None: as many as fit.
    """

    prompt_tokens: int
    generated_tokens: int
    requests: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "generated_tokens", "requests"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise UserError(f"{name}: found {value}, expected at least 1")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a pass over many requests is cut and placed.

    Args:
      micro_batch: requests that compute together (mu).
      n_micro_batches: of a pass; N is their product.
      attention_on_device, ffn_on_device: A_g and F_g.
      weight_resident, kv_resident: shares of the experts' weights and of KV that stay on the device (r_w and r_c). With
        `ffn_on_device` the other weights are streamed; without it each side computes the experts that it has.
      look_ahead: see `ScheduleShape`; None: by the rule.
      buffer_share: see `ScheduleShape`.
    """

    micro_batch: int
    n_micro_batches: int
    attention_on_device: bool = False
    ffn_on_device: bool = True
    weight_resident: float = 0.0
    kv_resident: float = 0.0
    look_ahead: int | None = None
    buffer_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("micro_batch", "n_micro_batches"):
            if not getattr(self, name) >= 1:
                raise UserError(f"policy: {name}: found {getattr(self, name)}, expected at least 1")
        for name in ("weight_resident", "kv_resident", "buffer_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"policy: {name}: found {getattr(self, name)}, expected a share in 0..1")

    @property
    def requests(self) -> int:
        """N."""
        return self.micro_batch * self.n_micro_batches
