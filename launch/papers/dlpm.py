"""Cao, Wang, Mao et al., "Locality-aware Fair Scheduling in LLM Serving" (arXiv 2501.14312), in miniature: what
fairness costs in throughput when it ignores cached prefixes (VTC), when it minds them (DLPM, D2LPM), and what locality
alone does to those who wait (LPM). A live engine on a small random model, its step cost fitted and simulated, a fleet
of four.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine.scheduling.step_cost import StepCostModel, StepSample, StepShapes
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch.dlpm_study import full_scale, plots, report
from launch.dlpm_study.config import POLICIES, Parts, StudyConfig
from launch.dlpm_study.simulated import Simulation, costs_of, simulate

_DEFAULT = StudyConfig()
_QUANTUM = flags.DEFINE_integer("dlpm_quantum", _DEFAULT.quantum, "DLPM's, in service: a token read 1, one written 2")
_ROUTER_QUANTUM = flags.DEFINE_integer("d2lpm_quantum", _DEFAULT.router_quantum, "D2LPM's for a client and replica")
_SPAN_S = flags.DEFINE_float("span_s", _DEFAULT.span_s, "seconds of a live span; a visit has 4 and a warm-up as long")
_SIMULATED_S = flags.DEFINE_float("simulated_s", _DEFAULT.simulated_s, "seconds of virtual time that count")
_REPLICAS = flags.DEFINE_integer("simulated_replicas", _DEFAULT.replicas, "of the simulated fleet")
_WORKERS = flags.DEFINE_integer("simulations", _DEFAULT.workers, "simulations side by side", lower_bound=1)
_STUDY_LIVE_FLEET = flags.DEFINE_bool("live_fleet", True, "also run two live replicas behind the router's policies")

flags.adopt_module_key_flags(full_scale)

LIVE_WORKLOADS = ("mixed", "equal")
# What a simulation takes on one core, in seconds, until some have been timed.
_SIMULATION_S, _LIVE_START_S = 8.0, 45.0


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it. Returns the summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    if scale == "full":
        return full_scale.run(workdir, workers=_WORKERS.value)
    study = StudyConfig(
        quantum=_QUANTUM.value,
        router_quantum=_ROUTER_QUANTUM.value,
        warm_s=_SPAN_S.value,
        span_s=_SPAN_S.value,
        simulated_s=_SIMULATED_S.value,
        replicas=_REPLICAS.value,
        workers=_WORKERS.value,
    )
    return run_study(study, workdir, live_fleet=_STUDY_LIVE_FLEET.value)


def run_study(study: StudyConfig, workdir: Path, *, live_fleet: bool = True) -> dict[str, Any]:
    """Every part that is not finished yet, then the report."""
    began = time.perf_counter()
    settings = dataclasses.asdict(study)
    del settings["workers"]
    parts = Parts(workdir, settings | {"quanta": list(study.quanta)})
    visits = live_visits(study)
    runs = simulations(study, {})
    fleet = fleet_visits(study) if live_fleet else []
    todo = sum(v.seconds(study) for v in visits if parts.get(v.name) is None)
    todo += sum(study.warm_s + study.spans * study.span_s / 2 for v in fleet if parts.get(v.name) is None)
    todo += _LIVE_START_S * any(parts.get(v.name) is None for v in visits)
    todo += 2 * _LIVE_START_S / 3 * any(parts.get(v.name) is None for v in fleet)
    waiting = sum(parts.get(name) is None for name in runs)
    todo += _SIMULATION_S * waiting / study.workers
    progress = Progress(max(1, round(todo)), "dlpm", unit="s")
    clock = _Clock(progress)
    try:
        live(study, visits, parts, clock)
        calibration = parts.make("calibration", lambda: calibrate([parts.get(v.name) or {} for v in visits]))
        runs = simulations(study, calibration["costs"])
        simulate_all(runs, parts, clock, study.workers)
        if fleet:
            live_fleet_visits(study, fleet, parts, clock)
    finally:
        progress.close()
    names = [v.name for v in visits] + [v.name for v in fleet] + list(runs)
    found = {name: part for name in names if (part := parts.get(name))}
    summary = report.summarise(study, found, calibration) | {"wall_s": round(time.perf_counter() - began, 1)}
    write_summary(workdir, summary)
    (workdir / "report.md").write_text(report.text(summary) + "\n")
    plots.draw(study, found, summary, workdir)
    print(report.text(summary), file=sys.stderr)
    return summary


class _Clock:
    """Moves the bar by whole seconds of work."""

    def __init__(self, progress: Progress):
        self._progress, self._seconds = progress, 0.0

    def __call__(self, seconds: float) -> None:
        self._seconds += seconds
        whole = int(self._seconds)
        self._progress.advance(whole)
        self._seconds -= whole

    def say(self, line: str) -> None:
        self._progress.say(line)


# The live engine.


@dataclasses.dataclass(frozen=True)
class Visit:
    """A policy's visit to the live engine."""

    workload: str
    policy: str
    number: int
    spans: int

    @property
    def name(self) -> str:
        return f"live-{self.workload}-{self.policy}-{self.number}"

    def seconds(self, study: StudyConfig) -> float:
        return study.warm_s + self.spans * study.span_s


def live_visits(study: StudyConfig) -> list[Visit]:
    """VTC and DLPM in ABBA order, the others in between."""
    visits = []
    for workload in LIVE_WORKLOADS:
        order = ["vtc", "dlpm"]
        for number in range(study.visits):
            visits += [Visit(workload, policy, number, study.spans) for policy in order]
            order.reverse()
            if number == 0:
                visits += [Visit(workload, policy, 0, study.short_spans) for policy in ("fcfs", "lpm")]
    return visits


def live(study: StudyConfig, visits: Sequence[Visit], parts: Parts, clock: _Clock) -> None:
    """The visits that have not been made."""
    if all(parts.get(visit.name) is not None for visit in visits):
        return
    from launch.dlpm_study.live import LiveStudy  # simulations do without jax

    runner = LiveStudy(study, clock)
    clock(_LIVE_START_S)
    parts.put("shapes", dataclasses.asdict(runner.shapes))
    for visit in visits:
        if parts.get(visit.name) is None:
            clock.say(f"live: {visit.workload} under {visit.policy}")
            found = runner.visit(visit.workload, visit.policy, seed=visit.number, spans=visit.spans)
            parts.put(visit.name, found | {"shapes": dataclasses.asdict(runner.shapes)})


def calibrate(visits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A step's cost, fitted to half of the live steps of all visits, and its error on the other half.

    Where others use the machine, most steps are a little late and some very much. The fit goes by the typical step, and
    is then scaled so that all steps together take what they took, which is what throughput depends on.
    """
    samples = [StepSample(*sample) for visit in visits for sample in visit["samples"]]
    shapes = StepShapes(**{kind: tuple(sizes) for kind, sizes in visits[0]["shapes"].items()})
    model = StepCostModel.fit(samples[::2], shapes)
    scale = 1 / (1 + model.error(samples[::2]).total)
    model = model.scaled(scale)
    return {"costs": costs_of(model), "error": model.error(samples[1::2]).as_json(), "scale": round(scale, 4)}


# The simulator.


def simulations(study: StudyConfig, costs: Mapping[str, Any]) -> dict[str, Simulation]:
    """Every simulated run, by the name of its part."""
    common: dict[str, Any] = {
        "costs": costs,
        "sizes": study.sizes,
        "warm_s": study.simulated_warm_s,
        "span_s": study.simulated_s,
    }
    runs: dict[str, Simulation] = {}

    def add(name: str, workload: str, policy: str, **more: Any) -> None:
        options = more.pop("policy_options", study.policy_options(policy))
        runs[f"sim-{name}"] = Simulation(workload, policy, policy_options=options, **(common | more))

    for workload in LIVE_WORKLOADS:  # as live: the prediction
        for policy in POLICIES:
            add(f"{workload}-{policy}", workload, policy, options={"vocab": 131})
    for quantum in study.quanta:
        add(f"pareto-{quantum}", "mixed", "dlpm", policy_options={"quantum": quantum}, options={"vocab": 131})
    for policy in ("vtc", "dlpm"):
        add(f"long-{policy}", "long", policy)
    for kind, tree in TREES.items():
        for policy in POLICIES:
            add(f"{kind}-{policy}", "trees", policy, options=tree)
    for workload, load in FLEET_WORKLOADS.items():
        for name, (router, policy) in FLEET_POLICIES.items():
            for seed in range(study.seeds if name in GATED_FLEET else 1):
                router_options = {"quantum": study.router_quantum} if router == "d2lpm" else {}
                policy_options = {"quantum": FLEET_QUANTUM} if policy == "dlpm" else {}
                add(
                    f"fleet-{workload}-{name}-{seed}",
                    workload,
                    policy,
                    options=load,
                    policy_options=policy_options,
                    router=router,
                    router_options=router_options,
                    replicas=study.replicas,
                    seed=seed,
                    warm_s=study.simulated_warm_s / 2,
                    span_s=study.simulated_s / 4,
                )
    return runs


TREES: Mapping[str, Mapping[str, int]] = {
    "trees": {},
    "trees-equal": {"well_behaved": 16, "misbehaving": 0},
    "trees-s2": {"branching": 2, "question_tokens": 1280},
}
"""Trees of thoughts: a client with larger trees (S1), nobody, clients with longer questions (S2)."""

FLEET_WORKLOADS: Mapping[str, Mapping[str, int]] = {
    "mixed": {"backlog": 24, "flood": 120},
    "equal": {"backlog": 24, "open_documents": 4},
}
FLEET_POLICIES: Mapping[str, tuple[str, str]] = {
    "vtc+client_round_robin": ("client_round_robin", "vtc"),
    "vtc+least_load": ("least_load", "vtc"),
    "lpm+round_robin": ("round_robin", "lpm"),
    "lpm+cache_aware": ("cache_aware", "lpm"),
    "vtc+cache_aware": ("cache_aware", "vtc"),
    "lpm+preble": ("preble", "lpm"),
    "d2lpm": ("d2lpm", "dlpm"),
}
"""Name -> the router's policy and the replicas'."""
GATED_FLEET = ("vtc+client_round_robin", "vtc+least_load", "d2lpm")
FLEET_QUANTUM = 1024


def simulate_all(runs: Mapping[str, Simulation], parts: Parts, clock: _Clock, workers: int) -> None:
    """The runs that are not done, some side by side in processes of their own."""
    todo = {name: run for name, run in runs.items() if parts.get(name) is None}
    if not todo:
        return
    clock.say(f"simulating: {len(todo)} runs")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(simulate, run): name for name, run in todo.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                parts.put(futures[future], future.result())
                clock(_SIMULATION_S / workers)
        finally:
            pool.shutdown(cancel_futures=True)


# The live fleet.


@dataclasses.dataclass(frozen=True)
class FleetVisit:
    """A pair of policies' visit to the live fleet."""

    pair: str
    number: int

    @property
    def name(self) -> str:
        return f"live-fleet-{self.pair}-{self.number}"


def fleet_visits(study: StudyConfig) -> list[FleetVisit]:
    pairs = ("vtc+client_round_robin", "d2lpm", "d2lpm", "vtc+client_round_robin")
    return [FleetVisit(pair, i // 2) for i, pair in enumerate(pairs[: 2 * study.visits])]


def live_fleet_visits(study: StudyConfig, visits: Sequence[FleetVisit], parts: Parts, clock: _Clock) -> None:
    if all(parts.get(visit.name) is not None for visit in visits):
        return
    from launch.dlpm_study.live import LiveFleetStudy

    runner = LiveFleetStudy(study, clock)
    clock(2 * _LIVE_START_S / 3)
    options = {"backlog": 12, "flood": 64}
    try:
        for visit in visits:
            if parts.get(visit.name) is None:
                clock.say(f"live, {study.live_replicas} replicas: mixed under {visit.pair}")
                router, policy = FLEET_POLICIES[visit.pair]
                parts.put(visit.name, runner.visit("mixed", policy, router, seed=visit.number, options=options))
    finally:
        runner.close()
