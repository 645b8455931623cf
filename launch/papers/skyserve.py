"""Mao et al., "SkyServe: Serving AI Models across Regions and Clouds with Spot Instances" (arXiv 2411.01438), in
miniature: SpotHedge and what it is compared with on made-up spot traces, the least possible cost beside them, the
latency of requests, and a local fleet whose replicas are killed under load.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from launch.skyserve_study.simulated import Settings
from launch.skyserve_study.study import run_study

_DEFAULT = Settings()
_WINDOWS = flags.DEFINE_integer("windows", _DEFAULT.windows, "of each set of traces", lower_bound=1)
_HOURS = flags.DEFINE_float("hours", _DEFAULT.hours, "of each window")
_TRACE_DIR = flags.DEFINE_string("trace_dir", None, "folder with a folder of trace files for each set; else made up")
_LOCAL = flags.DEFINE_bool("skyserve_local", True, "also a minute of a local fleet whose replicas are killed")
_SKYSERVE_WORKERS = flags.DEFINE_integer("skyserve_workers", 2, "simulations side by side", lower_bound=1)


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it. Returns the summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    if scale == "full":
        from launch.skyserve_study import full_scale

        return full_scale.run(workdir)
    count = _WINDOWS.value
    settings = Settings(
        count,
        _HOURS.value,
        min(count, _DEFAULT.omniscient_windows),
        _TRACE_DIR.value,
    )
    return run_study(settings, workdir, workers=_SKYSERVE_WORKERS.value, local=_LOCAL.value)
