"""Which processor this is, and how much of it others use while something is measured."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

# Instruction sets that decide float32 and bfloat16 products, as /proc/cpuinfo spells them.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_tile")

# Cores of foreign work beyond which a comparison of wall times says nothing.
FOREIGN_LIMIT = 0.3


def describe() -> dict[str, Any]:
    """`cpu`, `cpu_flags`, `cores`, as far as the system tells."""
    name, flags = "unknown", set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    return {"cpu": name, "cpu_flags": [flag for flag in _FLAGS if flag in flags], "cores": os.cpu_count()}


def load1() -> float:
    """Load average of the last minute; 0 where the system has none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


class LoadMeter:
    """Measures a span of time: `with meter: ...`, then the attributes.

    Args:
      own: gives the processes whose work is not foreign; this process is always one of them.

    Attributes:
      wall_s: seconds of the span.
      own_cpu_s: CPU seconds of this process, all its threads.
      foreign_cores: processor time per second that neither this process nor `own` used: other programs, the kernel's
        own work, and time the hypervisor gave to someone else. Where the system tells (Linux).
    """

    def __init__(self, own: Callable[[], Sequence[psutil.Process]] = lambda: ()):
        self._own = own
        self.wall_s = self.own_cpu_s = self.foreign_cores = 0.0

    def __enter__(self) -> "LoadMeter":
        self._began = self._reading()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        wall, busy, mine, others = (now - then for now, then in zip(self._reading(), self._began))
        self.wall_s, self.own_cpu_s = wall, mine
        self.foreign_cores = max(0.0, (busy - mine - others) / wall)

    def _reading(self) -> tuple[float, float, float, float]:
        times = psutil.cpu_times()
        # Guest time is counted in user time already.
        idle = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "guest", 0.0)
        busy = sum(times) - idle - getattr(times, "guest_nice", 0.0)
        others = 0.0
        for process in self._own():
            try:
                used = process.cpu_times()
                others += used.user + used.system
            except psutil.Error:
                continue
        return time.perf_counter(), busy, time.process_time(), others


def foreign_now(seconds: float) -> float:
    """Foreign cores over the next `seconds`, in which this process sleeps."""
    with LoadMeter() as meter:
        time.sleep(seconds)
    return meter.foreign_cores
