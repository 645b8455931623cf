"""Settings of swapping, checked on construction."""

import dataclasses
from typing import Literal, get_args

from jaxstack.runtime.errors import UserError

Placement = Literal["page_striped", "static_layers", "ring"]
"""What lies on the host: pages of all layers; some whole layers; or whichever layers a FIFO over the layers has sent
there."""

LARGEST_SHARE = 0.97


@dataclasses.dataclass(frozen=True)
class SwapConfig:
    """How keys and values share the device's and the host's memory.

    Args:
      host_bytes: what they may take of the host's memory.
      placement: "page_striped" is what the engine does; the others exist for the simulator.
      staging_segments: layers whose host pages may be on the device at once, d; with 2 one arrives while one is read.
      chunk_pages: pages that move as one array, at most.
      layers_per_program: layers that are launched, and whose pages arrive, together: more of them make fewer launches
        and take more of the device for segments. Divides the model's layers; None: chosen by the device.
      adaptive: the controller chooses the host's share; else it is `host_share`.
      host_share: phi, the share of keys and values that a full cache has on the host; None: as large as `host_bytes`
        allows.
      window_steps: steps between two decisions.
      grow_below, shrink_above: stall over compute in a window, below and above which the share may grow and shrinks.
      margin: of a layer's time that moving may be predicted to take.
      step: share by which it grows.

    Raises:
      UserError: a value out of its range.
    """

    host_bytes: int
    placement: Placement = "page_striped"
    staging_segments: int = 2
    chunk_pages: int = 64
    layers_per_program: int | None = None
    adaptive: bool = True
    host_share: float | None = None
    window_steps: int = 16
    grow_below: float = 0.005
    shrink_above: float = 0.02
    margin: float = 0.97
    step: float = 1 / 32

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise UserError(f"placement: found {self.placement!r}, expected one of {', '.join(get_args(Placement))}")
        for name, least in (("host_bytes", 0), ("staging_segments", 1), ("chunk_pages", 1), ("window_steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}, expected an integer >= {least}")
        if self.layers_per_program is not None and self.layers_per_program < 1:
            raise UserError(f"layers_per_program: found {self.layers_per_program}, expected an integer >= 1")
        if self.host_share is not None and not 0 <= self.host_share <= LARGEST_SHARE:
            raise UserError(f"host_share: found {self.host_share}, expected a number from 0 to {LARGEST_SHARE}")
        if not 0 <= self.grow_below < self.shrink_above:
            raise UserError(
                f"grow_below: found {self.grow_below}, expected at least 0 and less than shrink_above = "
                f"{self.shrink_above}"
            )
        for name in ("margin", "step"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected a number in (0, 1]")
