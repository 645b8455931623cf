"""How fast the kernels are here, each implementation beside the others: `python -m launch.bench_kernels --rows=1,32`.

Per shape and number of rows, for every implementation: the largest error against float64 (relative to the largest
value, over the first and last 128 columns), the least time of many calls, and what that is in GF/s, in GB/s of weights,
and as a share of this machine's copy bandwidth measured in the same run. Implementations take turns call by call, so
that a busy machine disturbs all alike, and weights take turns too, so that they come from memory as in a decode step.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from kernels.matmul import available, matmul, pack, why_not
from launch import job

_OPS = flags.DEFINE_list("ops", ["matmul"], "which kernels to measure: matmul")
_ROWS = flags.DEFINE_list("rows", ["1", "8", "32", "256"], "numbers of rows (tokens) per call")
_SHAPES = flags.DEFINE_list(
    "shapes",
    ["896x4864", "4864x896", "896x896", "896x1152", "896x9728", "896x151936"],
    "weight shapes, KxN; the default is what Qwen2.5-0.5B multiplies by",
)
_SECONDS = flags.DEFINE_float("seconds", 1.5, "time to measure per shape and number of rows", lower_bound=0.0)

_COLD_BYTES = 96 << 20  # at least this much weight, and 8 matrices, between two uses of the same matrix
_COPY_BYTES = 48 << 20  # far beyond the caches, short enough to catch a quiet moment

Row = dict[str, Any]


def run() -> dict[str, Any]:
    for op in _OPS.value:
        if op not in BENCHMARKS:
            raise job.BadUsage(f"--ops: unknown kernel {op!r}; expected one of {', '.join(BENCHMARKS)}")
    rows = [_positive(text, "--rows") for text in _ROWS.value]
    shapes = [_shape(text) for text in _SHAPES.value]
    copy = _copy_bandwidth()
    print(f"copy bandwidth {copy / 1e9:.1f} GB/s (bytes read + written)", file=sys.stderr)
    results: list[Row] = []
    for op in _OPS.value:
        results += tqdm(BENCHMARKS[op](rows, shapes, copy), op, len(rows) * len(shapes) * 2, leave=False)
    print(_table(results), file=sys.stderr)
    return {"copy_gb_per_s": round(copy / 1e9, 2), "compiled_kernel": why_not() or "available", "results": results}


def _matmul(rows: Sequence[int], shapes: Sequence[tuple[int, int]], copy_bytes_per_s: float) -> Iterator[Row]:
    for depth, columns in shapes:
        # Cold in every case: the head alone is larger than any cache, and its copies would not fit small machines.
        count = max(1, min(8, (1 << 30) // (4 * depth * columns)))
        count = max(count, _COLD_BYTES // (4 * depth * columns))
        rng = np.random.default_rng(0)
        plain = [jnp.asarray(rng.standard_normal((depth, columns), dtype=np.float32)) for _ in range(count)]
        forms: dict[str, tuple[Callable, list]] = {"xla": (jax.jit(matmul), plain)}
        if available():
            forms["cpu"] = (jax.jit(matmul), [pack(w) for w in plain])
        for n in rows:
            x = jnp.asarray(rng.standard_normal((n, depth), dtype=np.float32))
            sample = np.r_[: min(128, columns), max(0, columns - 128) : columns]
            wanted = np.asarray(x, np.float64) @ np.asarray(plain[0])[:, sample]
            errors = {
                name: float(np.abs(np.asarray(f(x, w[0]))[:, sample] - wanted).max() / np.abs(wanted).max())
                for name, (f, w) in forms.items()
            }
            for name, seconds in _least_seconds(forms, x, count).items():
                work, size = 2 * n * depth * columns, 4 * depth * columns
                yield {
                    "op": "matmul",
                    "shape": f"{depth}x{columns}",
                    "rows": n,
                    "implementation": name,
                    "error": float(f"{errors[name]:.1e}"),
                    "ms": round(seconds * 1e3, 4),
                    "gf_per_s": round(work / seconds / 1e9, 1),
                    "weight_gb_per_s": round(size / seconds / 1e9, 2),
                    "share_of_copy": round(size / seconds / copy_bytes_per_s, 3),
                }


def _least_seconds(forms: dict[str, tuple[Callable, list]], x: jax.Array, count: int) -> dict[str, float]:
    """The least time of one call of each form, the forms and the weights taking turns."""
    least = dict.fromkeys(forms, float("inf"))
    calls, deadline = 0, time.perf_counter() + _SECONDS.value
    while calls < 3 or time.perf_counter() < deadline:
        for name, (function, weights) in forms.items():
            start = time.perf_counter()
            function(x, weights[calls % count]).block_until_ready()
            least[name] = min(least[name], time.perf_counter() - start)
        calls += 1
    return least


def _copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy too large for any cache, on as many threads as XLA takes."""
    source = jnp.zeros(_COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda to, x: to.at[:].set(x + 1), donate_argnums=0)
    to, least = jnp.zeros_like(source), float("inf")
    for _ in range(80):
        to.block_until_ready()
        start = time.perf_counter()
        to = copy(to, source).block_until_ready()
        least = min(least, time.perf_counter() - start)
    return 2 * _COPY_BYTES / least


def _table(results: Sequence[Row]) -> str:
    columns = list(results[0]) if results else []
    cells = [columns, *([str(row[c]) for c in columns] for row in results)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def _shape(text: str) -> tuple[int, int]:
    depth, cross, columns = text.partition("x")
    if not cross:
        raise job.BadUsage(f"--shapes: found {text!r}, expected KxN such as 896x4864")
    return _positive(depth, "--shapes"), _positive(columns, "--shapes")


def _positive(text: str, flag: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise job.BadUsage(f"{flag}: found {text!r}, expected a positive whole number")
    return int(text)


BENCHMARKS = {"matmul": _matmul}

if __name__ == "__main__":
    job.main(run)
