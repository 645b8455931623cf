"""Griggs et al., "Melange: Cost Efficient Large Language Model Serving by Exploiting GPU Heterogeneity" (arXiv
2404.14527), in miniature: the cheapest mix of accelerators for a workload, by a program solved to proof, beside each
type alone; plans replayed step by step; routing rules; the solver beside the paper's. Four types by their data sheets.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch.dlpm_study.config import Parts
from launch.melange_study import costs, plots, replays, report
from launch.melange_study.race import instances, open_peer, race
from launch.melange_study.workloads import WORKLOADS, StudyConfig
from launch.peers.process import DEFAULT_INTERPRETER

_DEFAULT = StudyConfig()
_REPLAY_S = flags.DEFINE_float("melange_replay_s", _DEFAULT.replay_s, "virtual seconds of each replay")
_SEEDS = flags.DEFINE_integer("melange_seeds", _DEFAULT.seeds, "of arrivals, where routing is compared", lower_bound=1)
_RACE = flags.DEFINE_bool("melange_race", True, "also race PuLP with CBC (`make peers` installs them)")
_LIMIT = flags.DEFINE_float("melange_cbc_limit_s", _DEFAULT.cbc_limit_s, "processor seconds after which CBC is stopped")
_PYTHON = flags.DEFINE_string("melange_peer_python", DEFAULT_INTERPRETER, "interpreter of the peers' environment")


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it. Returns the summary."""
    if scale == "full":
        raise UserError(
            "--scale=full: measure a profile of every type with `python -m launch.profile_endpoint`, and plan with "
            "`python -m launch.allocate --config.profile=FILES`: there is no full run in one command"
        )
    study = StudyConfig(
        replay_s=_REPLAY_S.value,
        warmup_s=min(_DEFAULT.warmup_s, _REPLAY_S.value / 4),
        seeds=_SEEDS.value,
        race=_RACE.value,
        cbc_limit_s=_LIMIT.value,
    )
    return run_study(study, workdir, interpreter=_PYTHON.value)


def parts_of(study: StudyConfig) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every part of the study but the race, by name."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {"example": costs.example}
    for tpot_s in study.tpots_s:
        label = f"{1e3 * tpot_s:.0f}ms"
        parts[f"sizes-{label}"] = lambda tpot_s=tpot_s: costs.best_types(tpot_s)  # type: ignore[misc]
        for name in WORKLOADS:
            parts[f"costs-{name}-{label}"] = lambda n=name, t=tpot_s: costs.cost_curve(study, n, t)  # type: ignore[misc]
    for name, rate in (("short", 8.0), ("short", 32.0), ("long", 4.0), ("mixed", 8.0)):
        parts[f"attainment-{name}-{rate:g}"] = lambda n=name, r=rate: replays.attainment(study, n, r)  # type: ignore[misc]
    for name, rate in replays.TIGHT:
        parts[f"tight-{name}-{rate:g}"] = lambda n=name, r=rate: replays.tighter(study, n, r)  # type: ignore[misc]
    for name, rate in replays.ROUTED:
        parts[f"routing-{name}-{rate:g}"] = lambda n=name, r=rate: replays.routing(study, n, r)  # type: ignore[misc]
    parts["robustness"] = lambda: replays.robustness(study, "mixed", 4.0)
    return parts


def run_study(study: StudyConfig, workdir: Path, *, interpreter: str = DEFAULT_INTERPRETER) -> dict[str, Any]:
    """Every part that is not finished yet, then the report."""
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    settings = dataclasses.asdict(study)
    del settings["race"], settings["cbc_limit_s"]
    parts = Parts(workdir, settings | {"rates_rps": list(study.rates_rps), "tpots_s": list(study.tpots_s)})
    todo = parts_of(study)
    raced = list(instances()) if study.race else []
    with Progress(len(todo) + len(raced), "melange", unit="part") as progress:
        for name, compute in todo.items():
            if parts.get(name) is None:
                progress.say(name)
            parts.make(name, compute)
            progress.advance()
        rows = _race(study, parts, raced, workdir, interpreter, progress) if raced else {"reason": "left out"}
    found: dict[str, Any] = {name: parts.get(name) for name in todo} | {"race": rows}
    summary = report.summarise(study, found) | {"wall_s": round(time.perf_counter() - began, 1)}
    write_summary(workdir, summary)
    said = report.text(summary, study, found)
    (workdir / "report.md").write_text(said + "\n")
    plots.draw(study, found, workdir)
    print(said, file=sys.stderr)
    return summary


def _race(
    study: StudyConfig, parts: Parts, raced: list[Any], workdir: Path, interpreter: str, progress: Progress
) -> dict[str, Any]:
    """The races that have not been run; where the peer cannot be had, why."""
    names = {instance.name: f"race-{number}" for number, instance in enumerate(raced)}
    if any(parts.get(name) is None for name in names.values()):
        try:
            peer = open_peer(interpreter, workdir / "pulp.log")
        except UserError as error:
            progress.advance(len(raced))
            return {"reason": str(error)}
        with peer:
            for instance in raced:
                if parts.get(names[instance.name]) is None:
                    progress.say(f"race: {instance.name}")
                parts.make(names[instance.name], lambda i=instance: race(i, peer, cbc_limit_s=study.cbc_limit_s))
                progress.advance()
    else:
        progress.advance(len(raced))
    return {"rows": [parts.get(name) for name in names.values()]}
