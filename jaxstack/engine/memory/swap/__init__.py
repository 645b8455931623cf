"""Keys and values of running requests beyond the device's memory: pages in the host's memory that every step streams
past the layers, in time, so that nobody waits (Xu et al., "Pie: Pooling CPU Memory for LLM Inference", arXiv
2411.09317; its body could not be had, so what goes beyond the abstract is defined here).

`capacity.py` has the laws: how many tokens fit, and when streaming hides behind computing. `controller.py` decides how
much to keep on the host, from what a window of steps has measured. `placement.py` knows where each page is, `ring.py`
in which order segments come and go, `sim.py` runs whole workloads under a virtual clock. Plain Python, no jax; the
arrays are moved by `jaxstack.engine.swapping_runner`.
"""

from jaxstack.engine.memory.swap.capacity import CacheShape, Rates, capacity_tokens, gain, k_max, step_seconds
from jaxstack.engine.memory.swap.config import Placement, SwapConfig
from jaxstack.engine.memory.swap.controller import ExpansionController, Target, Window
from jaxstack.engine.memory.swap.placement import PageSpaces
from jaxstack.engine.memory.swap.ring import SegmentRing

__all__ = [
    "CacheShape",
    "ExpansionController",
    "PageSpaces",
    "Placement",
    "Rates",
    "SegmentRing",
    "SwapConfig",
    "Target",
    "Window",
    "capacity_tokens",
    "gain",
    "k_max",
    "step_seconds",
]
