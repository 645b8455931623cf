"""The solver's race: aggregated slices and shares beside the paper's program in PuLP with CBC, on the same instances.

Every side builds its program and solves it to no gap. Processor time is compared, since both sides are waited for by
one core: the median of three runs where one is short, one run where it is long. CBC is stopped at a limit; what it
took by then counts, which is too little. Costs are compared, not statuses: stopped CBC reports "Optimal", too.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.fleet.allocation import AllocationProblem, Workload, solve
from jaxstack.fleet.profile import AcceleratorType, LatencyObjective, LengthGrid, ThroughputProfile
from jaxstack.runtime.errors import UserError
from launch.melange_study.workloads import problem_of
from launch.peers import PeerProcess, find_interpreter

_PROGRAM = Path(__file__).parents[1] / "peers" / "pulp_allocate.py"
# A run that takes longer is not repeated.
_LONG_S = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    name: str
    problem: AllocationProblem

    @property
    def slices(self) -> int:
        assert self.problem.slice_factor is not None
        return self.problem.slice_factor


def instances() -> Iterator[Instance]:
    """Of the study's workloads, and random ones of 60 sizes and 4 or 8 types."""
    for workload, rate, tpot_s, slices in (
        ("short", 8, 0.12, 4),
        ("short", 32, 0.12, 4),
        ("mixed", 16, 0.12, 4),
        ("short", 16, 0.04, 4),
        ("short", 8, 0.12, 1),
        ("short", 32, 0.12, 8),
        ("mixed", 16, 0.12, 8),
    ):
        problem = dataclasses.replace(problem_of(workload, rate, tpot_s), slice_factor=slices)
        yield Instance(f"{workload} {rate}/s {1e3 * tpot_s:.0f} ms S={slices}", problem)
    for types, slices, seed in (*((4, s, seed) for s in (4, 8, 16) for seed in (0, 1)), (8, 4, 0), (8, 8, 0)):
        problem = dataclasses.replace(random_problem(types, seed), slice_factor=slices)
        yield Instance(f"random 60x{types} seed {seed} S={slices}", problem)


def random_problem(types: int, seed: int, shape: tuple[int, int] = (10, 6)) -> AllocationProblem:
    """Sizes, speeds and efficiencies drawn at random; the larger the request, the slower it is everywhere."""
    draw = np.random.default_rng([seed, types])
    size = np.sort(draw.lognormal(0, 1.2, shape[0] * shape[1])).reshape(shape)
    speed = draw.lognormal(0, 0.8, types)
    prices = speed * draw.uniform(0.6, 1.6, types)
    grid = LengthGrid(tuple(range(1, shape[0] + 1)), tuple(range(1, shape[1] + 1)))
    names = [f"type-{g}" for g in range(types)]
    rates = {name: speed[g] / size * draw.uniform(0.6, 1.6, shape) for g, name in enumerate(names)}
    kinds = tuple(AcceleratorType(name, round(float(price), 2) + 0.01) for name, price in zip(names, prices))
    mix = draw.dirichlet(np.full(shape[0] * shape[1], 0.5)).reshape(shape)
    profile = ThroughputProfile(grid, rates, LatencyObjective(0.12))
    return AllocationProblem(Workload(grid, 16.0, mix), kinds, profile)


def open_peer(interpreter: str, log_file: Path) -> PeerProcess:
    """PuLP's process.

    Raises:
      UserError: there is no such interpreter, or it has no PuLP; the message says how to get it.
    """
    peer = PeerProcess([find_interpreter(interpreter), _PROGRAM], log_file=log_file, name="pulp")
    try:
        peer.ask("versions", timeout_s=60)
    except UserError:
        peer.close()
        raise
    return peer


def race(instance: Instance, peer: PeerProcess | None, *, cbc_limit_s: float, repeats: int = 3) -> dict[str, Any]:
    """One instance on all sides; seconds of processor and wall."""
    problem = instance.problem
    sliced = _timed(lambda: solve(problem, time_limit_s=300), repeats)
    shared = _timed(lambda: solve(dataclasses.replace(problem, slice_factor=None), time_limit_s=300), repeats)
    found: dict[str, Any] = {
        "name": instance.name,
        "slices": sliced,
        "shares": shared,
        "integers": {"slices": int(np.isfinite(problem.demand()).sum()) + len(problem.types)},
    }
    if peer is None:
        return found
    loads = [[None if math.isinf(load) else float(load) for load in row] for row in problem.demand()]
    runs: list[dict[str, Any]] = []
    while not runs or (len(runs) < repeats and runs[0]["cpu_s"] < _LONG_S):
        answer = peer.ask(
            "solve", timeout_s=cbc_limit_s * 20 + 60, prices=problem.prices.tolist(), loads=loads,
            slices=instance.slices, limit_s=cbc_limit_s,
        )  # fmt: skip
        runs.append(answer)
    theirs = runs[0] | {name: statistics.median(run[name] for run in runs) for name in ("cpu_s", "wall_s")}
    cost = sliced["cost"]
    found["cbc"] = theirs | {
        "stopped": theirs["cpu_s"] >= 0.95 * cbc_limit_s,
        "dearer": None if theirs["cost"] is None or cost is None else theirs["cost"] / cost - 1,
    }
    for ours in ("slices", "shares"):
        for clock in ("cpu_s", "wall_s"):
            found[f"{ours}_speedup_{clock}"] = theirs[clock] / found[ours][clock]
    found["integers"]["cbc"] = theirs["binaries"]
    return found


def geometric_mean(values: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else None


def _timed(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    cpu: list[float] = []
    wall: list[float] = []
    while not cpu or (len(cpu) < repeats and cpu[0] < _LONG_S):
        began, used = time.perf_counter(), time.process_time()
        plan = run()
        cpu.append(time.process_time() - used)
        wall.append(time.perf_counter() - began)
    return {
        "status": plan.status,
        "cost": plan.cost_usd_per_hour if plan.found else None,
        "gap": plan.gap,
        "cpu_s": statistics.median(cpu),
        "wall_s": statistics.median(wall),
    }
