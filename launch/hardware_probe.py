"""Measures what this machine can do, for the search over policies. No flags: `launch/probe_hardware.py` has them."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxstack.runtime.machine import HardwareProfile, Link, Processor
from jaxstack.runtime.memory_spaces import Space, Spaces, host_processor, probe_spaces


class Probe:
    """The measurements, each with the same share of the time.

    Args:
      say: is told each figure.
    """

    def __init__(self, spaces: Spaces, *, seconds: float, size_bytes: int, say: Callable[[str], None]):
        self.spaces, self._seconds, self._say = spaces, seconds / 8, say
        self.on_cpu = spaces.device.platform == "cpu"
        self.dtype = jnp.float32 if self.on_cpu else jnp.bfloat16
        self._size = size_bytes

    def best(self, work: Callable[[], Any]) -> float:
        """The least seconds of one call; the first two are for compiling and for touching memory."""
        least, deadline, tries = float("inf"), time.perf_counter() + self._seconds, 0
        while tries < 4 or time.perf_counter() < deadline:
            start = time.perf_counter()
            jax.block_until_ready(work())
            tries += 1
            if tries > 2:
                least = min(least, time.perf_counter() - start)
            elif tries == 2:
                deadline = time.perf_counter() + self._seconds
        return least

    def flops(self, device: jax.Device, dtype: Any, n: int) -> float:
        with jax.default_device(device):
            a = jnp.ones((n, n), dtype)
            rounds = 4 if device.platform == "cpu" else 16
            product = jax.jit(
                lambda x, y: jax.lax.fori_loop(0, rounds, lambda _, z: ((z @ y) * (1 / n)).astype(dtype), x)
            )
            return rounds * 2 * n**3 / self.best(lambda: product(a, a))

    def memory(self, device: jax.Device) -> float:
        """Bytes/s, read plus written."""
        with jax.default_device(device):
            x = jnp.zeros(self._size // 4, jnp.float32)
            step = jax.jit(lambda y: y + 1, donate_argnums=0)
            state = {"x": step(x)}

            def work() -> jax.Array:
                state["x"] = step(state["x"])
                return state["x"]

            return 2 * self._size / self.best(work)

    def link(self) -> tuple[Link, dict[str, float]]:
        """The link, and what a copy to the device reaches while the device computes."""
        put, size = self.spaces.put, self._size
        # A few arrays, so that no copy finds its source in a cache.
        host = [put(np.full(size // 4, i, np.float32), Space.HOST) for i in range(3)]
        device = [put(np.full(size // 4, i, np.float32), Space.DEVICE) for i in range(3)]
        jax.block_until_ready((host, device))
        turn = {"at": 0}

        def one(there: list[jax.Array], space: Space) -> Callable[[], jax.Array]:
            def work() -> jax.Array:
                turn["at"] += 1
                return put(there[turn["at"] % len(there)], space)

            return work

        to_device, to_host = one(host, Space.DEVICE), one(device, Space.HOST)
        down, up = self.best(to_device), self.best(to_host)
        both = self.best(lambda: (to_device(), to_host()))
        n = 512 if self.on_cpu else 8192
        with jax.default_device(self.spaces.device):
            a = jnp.ones((n, n), self.dtype)
            busy = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, z: ((z @ x) * (1 / n)).astype(x.dtype), x))
            alone = self.best(lambda: busy(a))
            together = self.best(lambda: (busy(a), to_device()))
        profile = Link(size / down, size / up, min(2 * size / both, size / down + size / up))
        # 1: computing hides the whole copy; 0: one waits for the other.
        hidden = (alone + down - together) / min(alone, down)
        return profile, {"copy_hidden_under_compute": round(max(0.0, min(1.0, hidden)), 3)}


def device_memory(device: jax.Device) -> int:
    """Bytes that programs may use; on a CPU what the system has available."""
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    return int(psutil.virtual_memory().available)


def probe(
    name: str | None = None,
    *,
    seconds: float = 20.0,
    mib: int | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> HardwareProfile:
    """The profile of this machine."""
    return measure(name, seconds=seconds, mib=mib, say=say)[0]


def measure(
    name: str | None, *, seconds: float, mib: int | None, say: Callable[[str], None]
) -> tuple[HardwareProfile, dict[str, Any]]:
    """Measures everything. Returns the profile, and what has no place in it."""
    spaces = probe_spaces()
    device, host_device = spaces.device, host_processor()
    found = Probe(spaces, seconds=seconds, size_bytes=(mib or (64 if device.platform == "cpu" else 512)) << 20, say=say)

    def measured(what: str, figure: float, scale: float, unit: str) -> float:
        say(f"{what}: {figure / scale:,.4g} {unit}")
        return figure

    n = 1024 if found.on_cpu else 8192
    flops = measured("device, matrix products", found.flops(device, found.dtype, n), 1e12, "TFLOP/s")
    rate = measured("device, memory", found.memory(device), 1e9, "GB/s")
    if found.on_cpu:
        host_flops, host_rate = flops, rate
    else:
        host_flops = measured("host, matrix products", found.flops(host_device, jnp.float32, 1024), 1e12, "TFLOP/s")
        host_rate = measured("host, memory", found.memory(host_device), 1e9, "GB/s")
    link, extra = found.link()
    measured("link, to the device", link.to_device_bytes_per_s, 1e9, "GB/s")
    measured("link, to the host", link.to_host_bytes_per_s, 1e9, "GB/s")
    measured("link, both at once", link.both_bytes_per_s or 0.0, 1e9, "GB/s")
    say(f"copy hidden under computing: {extra['copy_hidden_under_compute']:.0%}")
    host_memory = psutil.virtual_memory()
    kind = "page-locked" if spaces.pinned else "ordinary"
    profile = HardwareProfile(
        name or device.device_kind.lower().replace(" ", "_"),
        Processor(flops, rate, device_memory(device)),
        Processor(host_flops, host_rate, int(host_memory.total)),
        link,
        devices=sum(each.device_kind == device.device_kind for each in jax.local_devices()),
        note=f"measured by launch.probe_hardware on {device.device_kind}, jax {jax.__version__}; {kind} host memory",
    )
    return profile, extra | {"pinned": spaces.pinned, "host_available_bytes": int(host_memory.available)}
