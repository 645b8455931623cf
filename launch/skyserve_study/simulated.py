"""The simulated parts of the study, each a name and what computes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxstack.fleet.spot.evaluation import (
    POLICIES,
    Load,
    Scenario,
    evaluate,
    latencies,
    omniscient_costs,
    random_window,
    risk_window,
    run_policy,
    starved_zone_trace,
    synthetic_windows,
)
from jaxstack.fleet.spot.latency import OnPreempted
from jaxstack.fleet.spot.synthetic import PROFILES
from jaxstack.fleet.spot.traces import SpotTrace, load_trace_dir
from jaxstack.runtime.errors import UserError

SETS = tuple(PROFILES)
BOTH_EXTRAS = ("round_robin", "even_spread", "spot_pool", "scaling_group")
"""Policies that are shown with and without an extra replica."""
WAITING = ("on_demand", "ours", "paper", "round_robin", "even_spread", "two_zones", "spot_pool", "scaling_group")
"""Policies whose latency is simulated; `two_zones` is even spread over the first two zones only."""
EXTRAS, COLD_STARTS_S = (0, 1, 2, 3), (60.0, 120.0, 240.0, 480.0)
SWEPT = ("aws1", "aws2")
RISK_S = (0.0, 600.0, 1800.0, 7200.0)
_LOAD = Load()
HOWS: tuple[OnPreempted, ...] = ("restart", "resume")
LONG = Load(rate_rps=0.025, service_s=60.0, timeout_s=900.0)


@dataclass(frozen=True)
class Settings:
    """How much is simulated.

    Args:
      windows: of each set of traces.
      hours: of each window.
      omniscient_windows: of those, the first so many, for the bound.
      trace_dir: folder with a folder of trace files for each set; None makes traces up.
    """

    windows: int = 10
    hours: float = 24.0
    omniscient_windows: int = 2
    trace_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.hours > 0.5:
            raise UserError(f"--hours: found {self.hours}, expected a number > 0.5")

    @property
    def sets(self) -> tuple[str, ...]:
        return SETS if self.trace_dir is None else tuple(sorted(_folders(self.trace_dir)))

    @property
    def swept(self) -> tuple[str, ...]:
        """The sets that sweeps are run on."""
        return SWEPT if self.trace_dir is None else self.sets


@dataclass(frozen=True)
class Task:
    """One part, ready to be sent to another process."""

    kind: str
    settings: Settings
    traces: str = ""
    policy: str = ""
    extra: int = 1
    cold_start_s: float = 120.0
    risk_s: float = 0.0
    load: Load = _LOAD


def tasks(settings: Settings) -> dict[str, Task]:
    """Name of a part -> what it is, the longest first."""
    found = {f"omniscient-{traces}": Task("omniscient", settings, traces) for traces in settings.sets}
    if settings.trace_dir is None:
        found["joint"] = Task("joint", settings)
    found["starvation"] = Task("starvation", settings)
    for traces in settings.sets:
        for policy in POLICIES:
            for extra in (0, 1) if policy in BOTH_EXTRAS else (1,):
                found[f"scores-{traces}-{policy}-{extra}"] = Task("scores", settings, traces, policy, extra)
        for policy in WAITING:
            found[f"latency-{traces}-{policy}"] = Task("latency", settings, traces, policy)
    for traces in settings.swept:
        for extra in EXTRAS:
            for cold_start_s in COLD_STARTS_S:
                name = f"sweep-{traces}-{extra}-{cold_start_s:g}"
                found[name] = Task("scores", settings, traces, "ours", extra, cold_start_s)
        for how in HOWS:
            load = replace(LONG, on_preempted=how)
            found[f"long-{traces}-{how}"] = Task("latency", settings, traces, "ours", load=load)
        for risk_s in RISK_S:
            found[f"risk-{traces}-{risk_s:g}"] = Task("risk", settings, traces, risk_s=risk_s)
    return found


def weight(task: Task) -> int:
    """About how long a part takes, in simulated days; the least possible cost of one is worth many."""
    if task.kind == "starvation":
        return 4
    if task.kind == "joint":
        return 1000
    return 250 * task.settings.omniscient_windows if task.kind == "omniscient" else task.settings.windows


def run_task(task: Task) -> dict[str, Any]:
    """Computes a part."""
    scenario = Scenario(overprovision=task.extra, cold_start_s=task.cold_start_s)
    settings = task.settings
    if task.kind == "starvation":
        return _starvation()
    if task.kind == "joint":
        from launch.skyserve_study.joint import JointSettings, compare  # the rest does without profiles and loads

        scale = min(1.0, settings.hours / 24)  # of a shortened study
        return compare(
            JointSettings(
                windows=6 * settings.windows, hours=settings.hours, history=3 * settings.windows,
                max_replicas=max(2, round(6 * scale)), request_s=1800 * scale,
            )
        )  # fmt: skip
    if task.kind == "scores":
        return evaluate(windows(settings, task.traces, settings.windows), POLICIES[task.policy], scenario)
    if task.kind == "risk":
        return evaluate(windows(settings, task.traces, settings.windows), risk_window(task.risk_s), scenario)
    if task.kind == "omniscient":
        chosen = windows(settings, task.traces, settings.omniscient_windows)
        ours = evaluate(chosen, POLICIES["ours"], scenario)["windows"]["cost"]
        return {"rows": omniscient_costs(chosen, scenario), "ours": ours}
    chosen = windows(settings, task.traces, settings.windows)
    if task.policy == "two_zones":
        return latencies([w.only(w.zones[:2]) for w in chosen], POLICIES["even_spread"], scenario, task.load)
    return latencies(chosen, POLICIES[task.policy], scenario, task.load)


def _starvation() -> dict[str, Any]:
    trace = starved_zone_trace()
    rows = {}
    for name in ("ours", "paper"):
        result = run_policy(trace, POLICIES[name], Scenario())
        rows[name] = {"cost": result.cost, "failures": result.failures, "spot": int(result.spot[-1])}
    return rows


def windows(settings: Settings, traces: str, count: int) -> Sequence[SpotTrace]:
    if settings.trace_dir is None:
        return synthetic_windows(traces, count, duration_s=3600 * settings.hours)
    whole = load_trace_dir(_folders(settings.trace_dir)[traces])
    return [random_window(whole, 3600 * settings.hours, seed) for seed in range(count)]


def _folders(trace_dir: str) -> Mapping[str, Path]:
    """Folders with trace files by name; the folder itself if the files are in it."""
    root = Path(trace_dir)
    if any(root.glob("*.json")):
        return {root.resolve().name: root}
    found = {each.name: each for each in root.iterdir() if any(each.glob("*.json"))} if root.is_dir() else {}
    if not found:
        raise UserError(f"--trace_dir={trace_dir}: found no folder with *.json, expected one for each set of traces")
    return found
