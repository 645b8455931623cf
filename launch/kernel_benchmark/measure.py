"""Errors and times of a case, and the machine's copy bandwidth."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels import platforms
from launch.kernel_benchmark.case import Case, Form

Row = dict[str, Any]

# Calls that an accelerator is asked for together.
_AT_ONCE = 20


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy too large for any cache, on all that XLA takes."""
    on_cpu = platforms.platform() == "cpu"
    # On a CPU short enough to catch a quiet moment; an accelerator is given several at once.
    size, at_once = (48 << 20, 1) if on_cpu else (2 << 30, _AT_ONCE)
    source = jnp.zeros(size // 4, jnp.float32)
    copy = jax.jit(lambda to, x: to.at[:].set(x + 1), donate_argnums=0)
    to, least = jnp.zeros_like(source), float("inf")
    for _ in range(80 if on_cpu else 10):
        to.block_until_ready()
        start = time.perf_counter()
        for _ in range(at_once):
            to = copy(to, source)
        to.block_until_ready()
        least = min(least, (time.perf_counter() - start) / at_once)
    return 2 * size / least


def rows_of(case: Case, seconds: float, copy_bytes_per_s: float) -> Iterator[Row]:
    """One row of the table for each form of the case."""
    errors = {name: case.error(form) for name, form in case.forms.items()}
    times = least_seconds(case.forms, seconds) if case.timed else {}
    for name, form in case.forms.items():
        least = times.get(name)
        yield {
            "op": case.op,
            "case": case.label,
            "implementation": name,
            "error": None if errors[name] is None else float(f"{errors[name]:.1e}"),
            "ms": least and round(least * 1e3, 4),
            "gf_per_s": round(case.flops / least / 1e9, 1) if least and case.flops else None,
            "gb_per_s": least and round(form.moved_bytes / least / 1e9, 2),
            "share_of_limit": least and round(form.moved_bytes / least / copy_bytes_per_s, 3),
        }


def least_seconds(forms: dict[str, Form], seconds: float) -> dict[str, float]:
    """The least time of one call of each form. Forms take turns, so that a busy machine disturbs all alike, and so do
    the inputs, so that they come from memory.

    An accelerator is asked for several calls before it is waited for: the asking takes longer than the shortest of
    them, whose times it then is.
    """
    at_once = 1 if platforms.platform() == "cpu" else _AT_ONCE
    inputs = {name: [list(some) for some in form.inputs] for name, form in forms.items()}
    least = dict.fromkeys(forms, float("inf"))
    turn, deadline = 0, time.perf_counter() + seconds
    while turn < 3 or time.perf_counter() < deadline:
        for name, form in forms.items():
            start = time.perf_counter()
            for i in range(at_once):
                result = form.function(*inputs[name][(turn + i) % len(inputs[name])])
                if form.carried:
                    for others in inputs[name]:
                        others[0] = result
            jax.block_until_ready(result)
            least[name] = min(least[name], (time.perf_counter() - start) / at_once)
        turn += 1
    return least
