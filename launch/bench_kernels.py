"""How fast the kernels are here, each implementation beside the others: `python -m launch.bench_kernels --ops=matmul`.

For every case and every implementation that can run here: the largest error against the oracle ("ref"), the least time
of many calls, and the share of the memory limit: bytes that the operation must move, over the time, over the bandwidth
of a copy measured in the same run. (Products of many rows are bound by arithmetic, and their share says nothing.)
Each operation begins with a small ragged case that has no times, with Pallas's interpreter among the implementations.
Implementations take turns call by call, so that a busy machine disturbs all alike.

`--scale=full` takes the shapes of an 8B model, for an accelerator. Writes summary.json and bench_kernels.png.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import jax
from absl import flags
from tqdm import tqdm

from kernels import matmul as matmul_package
from kernels import platforms
from launch import job
from launch.kernel_benchmark import attention, heads_and_rows, matmul, measure, mixture, report
from launch.kernel_benchmark.case import Cases, Scale
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe

OPS = {
    "matmul": lambda scale: _matmul_cases(scale),
    "paged_attention": attention.attention_cases,
    "kv_write": attention.kv_write_cases,
    "grouped_matmul": mixture.grouped_matmul_cases,
    "lora_matmul": mixture.lora_matmul_cases,
    "sample_threshold": heads_and_rows.sample_threshold_cases,
    "rms_norm": heads_and_rows.rms_norm_cases,
    "rms_norm_rope": heads_and_rows.rms_norm_rope_cases,
}

_OPS = flags.DEFINE_list("ops", list(OPS), f"which operations to measure, among {', '.join(OPS)}")
_SCALE = flags.DEFINE_enum("scale", "default", ["default", "full"], "shapes: of a 0.5B model, or of an 8B model")
_ROWS = flags.DEFINE_list("rows", None, "matmul only: numbers of rows (tokens) per call")
_SHAPES = flags.DEFINE_list("shapes", None, "matmul only: weight shapes, KxN")
_SECONDS = flags.DEFINE_float("seconds", 0.6, "time to measure each case", lower_bound=0.0)
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_kernels", "where summary.json and bench_kernels.png go")


def run() -> dict[str, Any]:
    for op in _OPS.value:
        if op not in OPS:
            raise job.BadUsage(f"--ops: unknown operation {op!r}; expected some of {', '.join(OPS)}")
    if not _OPS.value:
        raise job.BadUsage(f"--ops: found none, expected some of {', '.join(OPS)}")
    _matmul_choice(cast(Scale, _SCALE.value))  # a wrong number shows before anything is measured
    workdir = Path(_WORKDIR.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise job.BadUsage(f"--workdir: {workdir}: {error.strerror}") from error

    rows: list[measure.Row] = []
    with LoadMeter() as meter:
        copy = measure.copy_bandwidth()
        print(f"copy bandwidth {copy / 1e9:.1f} GB/s (bytes read + written)", file=sys.stderr)
        for op in _OPS.value:
            for case in tqdm(OPS[op](_SCALE.value), op, leave=False, unit=" cases"):
                rows += measure.rows_of(case, _SECONDS.value, copy)
    print(report.table(rows), file=sys.stderr)
    device = jax.devices()[0].device_kind
    quiet = meter.foreign_cores < FOREIGN_LIMIT
    if not quiet:
        print(f"other programs used {meter.foreign_cores:.1f} cores: do not believe the times", file=sys.stderr)
    summary = {
        "device": describe()["cpu"] if platforms.platform() == "cpu" else device,
        "jax": jax.__version__,
        "scale": _SCALE.value,
        "copy_gb_per_s": round(copy / 1e9, 2),
        "compiled_kernels": matmul_package.why_not() or "available",
        "foreign_cores": round(meter.foreign_cores, 2),
        "conclusive": quiet,
        "workdir": str(workdir),
        "results": rows,
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    title = f"{summary['device']}, copy {copy / 1e9:.1f} GB/s, jax {jax.__version__}"
    report.plot(
        rows, title if quiet else f"{title} (NOT CONCLUSIVE: other programs ran)", workdir / "bench_kernels.png"
    )
    return summary


def _matmul_cases(scale: Scale) -> Cases:
    return matmul.cases(*_matmul_choice(scale))


def _matmul_choice(scale: Scale) -> tuple[list[tuple[int, int]], list[int]]:
    shapes = [_shape(text) for text in _SHAPES.value or matmul.SHAPES[scale]]
    return shapes, [_positive(text, "--rows") for text in _ROWS.value or map(str, matmul.ROWS[scale])]


def _shape(text: str) -> tuple[int, int]:
    depth, cross, columns = text.partition("x")
    if not cross:
        raise job.BadUsage(f"--shapes: found {text!r}, expected KxN such as 896x4864")
    return _positive(depth, "--shapes"), _positive(columns, "--shapes")


def _positive(text: str, flag: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise job.BadUsage(f"{flag}: found {text!r}, expected a positive whole number")
    return int(text)


if __name__ == "__main__":
    job.main(run)
