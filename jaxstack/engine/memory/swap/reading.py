"""What swapping does, for metrics and pages."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class SwapReading:
    """Totals are since the start.

    Attributes:
      pages: by space: "device", "host", and "free" for nowhere yet.
      stall_s, compute_s: of the steps that were timed (all but on a GPU, where one in a window is).
      bytes: moved, by direction: "to_device", "to_host".
      share: phi, of a full cache, that is aimed at.
      host_share: of the pages in use that are on the host now.
      link_bytes_per_s: host to device, as known.
      decisions: of the controller, by kind; `reason` of the last.
      device_peak_bytes, device_budget_bytes: of keys and values.
      launch_s: what the host takes to launch a step in groups of layers without waiting for the device; 0 where it
        always waits, or there was none yet.
    """

    pages: Mapping[str, int]
    stall_s: float
    compute_s: float
    bytes: Mapping[str, int]
    share: float
    host_share: float
    link_bytes_per_s: float
    decisions: Mapping[str, int]
    reason: str
    device_peak_bytes: int
    device_budget_bytes: int
    launch_s: float = 0.0
