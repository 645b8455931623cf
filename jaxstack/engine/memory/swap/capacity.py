"""How many tokens fit, how long a step takes, and when moving keys and values hides behind computing.

L layers; kappa bytes of keys and values a token and layer; M device bytes for them; d staging segments; X tokens of the
running batch. phi is the share of a full cache that lies on the host, k = phi L the same in layers' worth. A layer
computes for t_l seconds; to move the whole batch's keys and values of one layer takes t_in = X kappa / link.

    page_striped    a layer takes  max(t_l, phi t_in, (phi t_in + t_l) / d)     T = M / (kappa (L (1 - phi) + d phi))
    static_layers   a step takes   max(L t_l, k t_in, k (t_in + t_l) / d)       T = M / (kappa (L - k + d))
    ring            a layer takes  max(t_l, t_in, (2 t_in + t_l) / (L - k))     T = M / (kappa (L - k))

Striped pages: every layer streams its slice of the same pages, through d segments. Where g layers stream together,
computing and moving take g times as long, so times are as above, and memory is d g where it is d. Static layers: k of
them, evenly spaced, stream through d slots; exact where k divides L, else a lower bound by less than one layer. The
ring is a FIFO of L - k slots over the layers, which a cyclic scan misses every time: each layer is written out and read
back in every step, however few do not fit.
"""

import dataclasses
from typing import Any

from jaxstack.engine.memory.swap.config import Placement
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """What a model asks of memory and processor.

    Args:
      layers: L.
      kv_bytes: kappa, of one token in one layer: 2 * kv_heads * head_dim * bytes of a number.
      weight_bytes: W, read in every step.
      parameters: P, of which each takes two FLOPs a token.
    """

    layers: int
    kv_bytes: int
    weight_bytes: float
    parameters: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError(f"{field.name}: found {getattr(self, field.name)}, expected a number > 0")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Args:
      device_bytes_per_s: b_h, of the device's memory.
      link_bytes_per_s: b_l, host to device.
      flops_per_s: p_g.
      layer_overhead_s: what a layer takes however little it computes.
    """

    device_bytes_per_s: float
    link_bytes_per_s: float
    flops_per_s: float
    layer_overhead_s: float = 0.0

    @classmethod
    def of(cls, machine: Any, *, layer_overhead_s: float = 0.0) -> "Rates":
        """Those of a `jaxstack.runtime.machine.HardwareProfile`, for all its devices and their one link."""
        device = machine.all_devices
        link = machine.link.to_device_bytes_per_s
        return cls(device.bytes_per_s, link, device.flops_per_s, layer_overhead_s)

    def layer_s(self, shape: CacheShape, kv_tokens: float, new_tokens: float = 0.0) -> float:
        """t_l: the roofline time of a layer that computes `new_tokens` and attends to `kv_tokens`."""
        reading = (shape.weight_bytes / shape.layers + kv_tokens * shape.kv_bytes) / self.device_bytes_per_s
        computing = new_tokens * 2 * shape.parameters / (shape.layers * self.flops_per_s)
        return max(reading, computing) + self.layer_overhead_s

    def moving_s(self, shape: CacheShape, kv_tokens: float) -> float:
        """t_in: `kv_tokens` of one layer, host to device."""
        return kv_tokens * shape.kv_bytes / self.link_bytes_per_s


def capacity_tokens(
    shape: CacheShape, kv_device_bytes: float, share: float, *, placement: Placement = "page_striped", staging: int = 2
) -> float:
    """T: the tokens that fit, on device and host together.

    Args:
      share: phi, 0 to 1. With static layers and the ring phi L should be whole.
      staging: d, times the layers that stream together; without a share on the host none is needed.

    Raises:
      UserError: a ring without a slot.
    """
    layers, on_host = shape.layers, share * shape.layers
    if on_host == 0:
        held = float(layers)
    elif placement == "page_striped":
        held = layers - on_host + staging * share
    elif placement == "static_layers":
        held = layers - on_host + staging
    else:
        held = layers - on_host
        if held < 1:
            raise UserError(f"ring: found {on_host:g} of {layers} layers on the host, expected at least one slot")
    return kv_device_bytes / (shape.kv_bytes * held)


def step_seconds(
    layers: int, k: float, layer_s: float, moving_s: float, *, placement: Placement = "page_striped", staging: int = 2
) -> float:
    """The steady time of a step; `layers * layer_s` where moving hides.

    Args:
      k: layers' worth on the host: for striped pages any number, else a whole one.
      layer_s, moving_s: t_l and t_in.
    """
    if k == 0:
        return layers * layer_s
    if placement == "page_striped":
        part = k / layers * moving_s
        return layers * max(layer_s, part, (part + layer_s) / staging)
    if placement == "static_layers":
        return max(layers * layer_s, k * moving_s, k * (moving_s + layer_s) / staging)
    return layers * max(layer_s, moving_s, (2 * moving_s + layer_s) / (layers - k))


def hides(
    layers: int, k: float, layer_s: float, moving_s: float, *, placement: Placement = "page_striped", staging: int = 2
) -> bool:
    """Whether a step takes no longer than with everything on the device."""
    whole = step_seconds(layers, k, layer_s, moving_s, placement=placement, staging=staging)
    return whole <= layers * layer_s * (1 + 1e-12)


def k_max(rates: Rates, shape: CacheShape, kv_device_bytes: float, *, staging: int = 2, group: int = 1) -> float:
    """The largest k, in layers' worth of striped pages, that hides with a full cache. Less than 1: it does not pay.

    phi t_in grows with phi and so does t_l, but slower where there is a limit at all: found by bisection.
    """
    if staging < 2:
        return 0.0

    def fits(share: float) -> bool:
        tokens = capacity_tokens(shape, kv_device_bytes, share, staging=staging * group)
        return share * rates.moving_s(shape, tokens) <= rates.layer_s(shape, tokens)

    low, high = 0.0, 1.0
    if fits(high):
        return float(shape.layers)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * shape.layers


def k_max_roofline(rates: Rates, shape: CacheShape, kv_device_bytes: float, *, staging: int = 2) -> float:
    """`k_max` in closed form, without overhead and where the memory bounds a step: L t_l = k t_in solved for k,

    k = r (W L / M + L) / (1 + r (W / M) (1 - d / L)),  r = link / device memory.
    """
    ratio, layers = rates.link_bytes_per_s / rates.device_bytes_per_s, shape.layers
    weights = shape.weight_bytes / kv_device_bytes
    return ratio * (weights * layers + layers) / (1 + ratio * weights * (1 - staging / layers))


def gain(
    rates: Rates, shape: CacheShape, kv_device_bytes: float, k: float, *, staging: int = 2, group: int = 1
) -> float:
    """Tokens a second of a full cache with k layers' worth on the host, over that with none: so many more sequences
    in a step, which takes longer for them and for what does not hide.
    """

    def rate(share: float) -> float:
        tokens = capacity_tokens(shape, kv_device_bytes, share, staging=staging * group)
        times = rates.layer_s(shape, tokens), rates.moving_s(shape, tokens)
        return tokens / step_seconds(shape.layers, share * shape.layers, *times, staging=staging)

    return rate(k / shape.layers) / rate(0.0)
