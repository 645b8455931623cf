"""The memory spaces of a device: its own, and host memory that it can copy from by itself.

JAX calls them memory kinds. A CPU has the same kinds as a GPU or a TPU, so what moves arrays between spaces can be
tested without either. The space is part of an array's type: an operation whose operands lie in different spaces is
refused while it is traced. On a GPU nothing may compute on arrays in host space (XLA's scatter and slice updates abort
there), so whole arrays are moved, and computed on where they arrive.
"""

import dataclasses
import enum
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import compute_on as _compute_on_module
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from jaxstack.runtime.emulation import ALIGNMENT
from jaxstack.runtime.errors import UserError

log = logging.getLogger(__name__)


class Space(enum.Enum):
    """Where an array lives."""

    DEVICE = "device"
    HOST = "host"


@dataclasses.dataclass(frozen=True)
class Spaces:
    """What memory one device has. `probe_spaces` finds it out.

    Attributes:
      device: which one.
      kinds: the memory kind of each space, as JAX names it.
      pinned: host arrays are page-locked: the device copies them at full speed, and while it computes.
    """

    device: jax.Device
    kinds: dict[Space, str]
    pinned: bool

    def sharding(self, space: Space) -> SingleDeviceSharding:
        return SingleDeviceSharding(self.device, memory_kind=self.kinds[space])

    def put(self, x: Any, space: Space) -> Array:
        """`x` (an array of any space, or numpy's) in `space`. Returns before it has arrived."""
        return jax.device_put(x, self.sharding(space))

    def struct(self, shape: tuple[int, ...], dtype: Any, space: Space) -> jax.ShapeDtypeStruct:
        """What a program is told of an array in `space`."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(space))

    def space_of(self, x: Array) -> Space | None:
        """Where an array lives; None on another device."""
        if x.sharding.device_set != {self.device}:
            return None
        return next((space for space, kind in self.kinds.items() if kind == x.sharding.memory_kind), None)


def probe_spaces(device: jax.Device | None = None) -> Spaces:
    """The spaces of a device, each tried with a small array; by default of the one where new arrays go.

    Where page-locked memory cannot be had (a low RLIMIT_MEMLOCK, say) the host space is ordinary memory, and the log
    has a warning: the system then copies twice, at a fraction of the link's speed, and the device waits meanwhile.

    Raises:
      RuntimeError: the device cannot address host memory of any kind.
    """
    if device is None:
        (device,) = jax.device_put(0).devices()
    own = device.default_memory().kind
    offered = [memory.kind for memory in device.addressable_memories()]
    failures = []
    for kind in ("pinned_host", "unpinned_host"):
        if kind not in offered:
            continue
        try:
            there = jax.device_put(np.arange(8, dtype=np.int32), SingleDeviceSharding(device, memory_kind=kind))
            back = jax.device_put(there, SingleDeviceSharding(device, memory_kind=own))
            if there.sharding.memory_kind != kind or not np.array_equal(np.asarray(back), np.arange(8)):
                raise RuntimeError("a copy there and back gave something else")
        except Exception as error:  # whatever a backend raises, the next kind may do
            failures.append(f"{kind}: {error}")
            continue
        if failures:
            log.warning(
                "no page-locked host memory on %s (%s): copies pass through the system's own buffers, at a fraction of "
                "the link's bandwidth",
                device,
                failures[0],
            )
        return Spaces(device, {Space.DEVICE: own, Space.HOST: kind}, pinned=kind == "pinned_host")
    raise RuntimeError(f"{device} offers no host memory: found {', '.join(offered)}; {'; '.join(failures)}")


def host_processor() -> jax.Device:
    """JAX's device for computing on the host.

    Raises:
      UserError: JAX was told to leave it out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("JAX's CPU backend is not there; leave JAX_PLATFORMS unset, or add cpu to it") from error


def alias(x: np.ndarray) -> Array:
    """A JAX array on the CPU that reads numpy's memory in place: what is written there later shows.

    Args:
      x: contiguous, beginning on a multiple of `ALIGNMENT` bytes (`aligned_empty` makes such). It must not change while
        a computation reads it, and must outlive the result.

    Raises:
      ValueError: JAX would copy it.
    """
    if x.ctypes.data % ALIGNMENT or not x.flags.c_contiguous:
        raise ValueError(f"alias: expected a contiguous array aligned to {ALIGNMENT} bytes")
    out = jax.device_put(x, host_processor(), may_alias=True)
    if out.unsafe_buffer_pointer() != x.ctypes.data:
        raise ValueError("alias: this version of JAX copies the array")
    return out


def compute_on_host(function: Callable) -> Callable:
    """`function`, to be called inside a jitted one, computed by the host's processor; results in host space.

    All that it takes must be in host space. (JAX 0.12 replaced the context manager `compute_on` by a function, which
    0.10 calls `compute_on2`.)
    """
    form: Any = getattr(_compute_on_module, "compute_on2", None) or _compute_on_module.compute_on
    if "out_memory_spaces" not in inspect.signature(form).parameters:
        raise RuntimeError("this version of JAX has no compute_on with out_memory_spaces")
    wrapped = form(function, compute_type="device_host", out_memory_spaces=jax.memory.Space.Host)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return wrapped(*arguments)

    return run
