"""A solve as a job: a named equation, a method and its settings in; solution, plots and a summary in a folder."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxstack.pde import equations, transport
from jaxstack.pde.baselines.first_order import TrainConfig
from jaxstack.pde.baselines.second_order import CurvatureConfig
from jaxstack.pde.evolution import Evolution
from jaxstack.pde.marching import EvolutionSolution, MarchConfig, solve_evolution
from jaxstack.pde.methods import METHODS, MethodConfig
from jaxstack.pde.npdg import NpdgConfig
from jaxstack.pde.plots import plot_errors, plot_evolution, plot_solution
from jaxstack.pde.problem import Problem, point_values
from jaxstack.pde.references import implicit_euler_1d, implicit_euler_2d
from jaxstack.pde.solve import Stage, automatic_stages, solve
from jaxstack.pde.transport import OptimalTransport, TransportConfig
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.signals import StopFlag, WorkdirLock

Anything = Problem | Evolution | OptimalTransport

EQUATIONS: Mapping[str, Callable[[int], Anything]] = {
    "poisson": equations.poisson,
    "variable": equations.variable_coefficient,
    "semilinear": equations.semilinear,
    "allen_cahn": equations.allen_cahn,
    "transport_mixture": lambda dim: transport.mixture_1d(),
    "transport_gaussians": transport.gaussians,
    "transport_circle": transport.circle_mixture,
}
"""The paper's equations by name, as functions of the dimension."""


@dataclasses.dataclass(frozen=True)
class PdeJob:
    """What `python -m launch.pde` runs.

    Attributes:
      equation: a name of `EQUATIONS`; dim: its dimension.
      method: "auto" or a name of `methods.METHODS`. Time-dependent equations are solved by the primal-dual method.
      budget_s, max_iterations, target, seed: as in `solve`.
      npdg, train, curvature, transport, march: settings of the methods that are used.
    """

    equation: str = "poisson"
    dim: int = 10
    method: str = "auto"
    budget_s: float | None = 60.0
    max_iterations: int | None = None
    target: float | None = None
    seed: int = 0
    npdg: NpdgConfig = dataclasses.field(default_factory=NpdgConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    curvature: CurvatureConfig = dataclasses.field(default_factory=CurvatureConfig)
    transport: TransportConfig = dataclasses.field(default_factory=TransportConfig)
    march: MarchConfig = dataclasses.field(default_factory=MarchConfig)

    def __post_init__(self) -> None:
        if self.equation not in EQUATIONS:
            raise UserError(f"equation={self.equation!r}: expected one of {', '.join(EQUATIONS)}")
        if self.method != "auto" and self.method not in METHODS:
            raise UserError(f"method={self.method!r}: expected auto or one of {', '.join(METHODS)}")
        if self.dim < 1:
            raise UserError(f"dim={self.dim}: expected at least 1")

    def settings(self, method: str) -> MethodConfig:
        """Those of a method."""
        kind = METHODS[method].config
        return next(c for c in (self.npdg, self.train, self.curvature, self.transport) if isinstance(c, kind))

    def stages(self, problem: Problem | OptimalTransport) -> tuple[Stage, ...]:
        """The method with its settings, or what "auto" means; settings other than the defaults replace its own."""
        if self.method != "auto":
            return (Stage(self.method, self.settings(self.method)),)
        if isinstance(problem, OptimalTransport):
            return automatic_stages(problem, self.transport)
        found = automatic_stages(problem, None if self.npdg == NpdgConfig() else self.npdg)
        if self.curvature == CurvatureConfig():
            return found
        return tuple(s if s.method == "npdg" else dataclasses.replace(s, config=self.curvature) for s in found)


def run_job(
    job: PdeJob,
    workdir: str | Path,
    problem: Anything | None = None,
    *,
    checkpoint_every_s: float = 30.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Solves, and fills the workdir: checkpoints/, metrics.jsonl, tensorboard/, solution.npz, error.png, solution.png,
    summary.json. A run found there is continued.

    Args:
      job: what to do.
      workdir: where everything goes.
      problem: instead of the job's equation.
      checkpoint_every_s: wall seconds between checkpoints.
      progress: show a bar.

    Returns:
      the summary.
    """
    problem = EQUATIONS[job.equation](job.dim) if problem is None else problem
    workdir = Path(workdir)
    with WorkdirLock(workdir), StopFlag() as stop:
        if isinstance(problem, Evolution):
            march = solve_evolution(
                problem,
                job.march,
                seed=job.seed,
                workdir=workdir,
                checkpoint_every_s=checkpoint_every_s,
                stop=stop,
                progress=progress,
            )
            summary = march.as_json() | {"method": "npdg", "errors": errors_to_reference(march)}
            np.savez(workdir / "solution.npz", thetas=march.thetas, times=march.times)
            plot_errors(workdir / "error.png", {"npdg": march.history}, fields=("residual",))
            plot_evolution(workdir / "solution.png", march)
        else:
            solution = solve(
                problem,
                job.stages(problem),
                budget_s=job.budget_s,
                max_iterations=job.max_iterations,
                target=job.target,
                seed=job.seed,
                workdir=workdir,
                checkpoint_every_s=checkpoint_every_s,
                stop=stop,
                progress=progress,
            )
            summary = solution.as_json() | {"method": job.method}
            solution.save(workdir / "solution.npz")
            fields = ("c_l2", "rel_h1", "indicator") if problem.exact is not None else ("indicator", "sliced_w2")
            plot_errors(workdir / "error.png", {job.method: solution.history}, fields=fields)
            plot_solution(workdir / "solution.png", solution)
    summary = json.loads(json.dumps(summary), parse_constant=lambda _: None)
    write_summary(workdir, summary)
    return summary


def errors_to_reference(solution: EvolutionSolution) -> dict[str, list[float]] | None:
    """RMS differences of an Allen-Cahn march from implicit finite differences: with the march's time step, which is
    what it approximates, and with a hundredth of it, which is nearly the exact flow. None for other equations.
    """
    evolution = solution.evolution
    known = {"allen-cahn-1": (1, 0.01, 100.0), "allen-cahn-2": (2, 0.1, 10.0)}
    if evolution.problem.name not in known:
        return None
    dim, diffusion, rate = known[evolution.problem.name]
    grid = np.linspace(0.0, 2.0, 101)
    points = np.stack([g.ravel() for g in np.meshgrid(*[grid] * dim, indexing="ij")], axis=1)
    initial = np.asarray(point_values(evolution.initial, jnp.asarray(points)), float).reshape((101,) * dim)
    march = implicit_euler_1d if dim == 1 else implicit_euler_2d
    steps = len(solution.times) - 1
    if not steps:
        return {"implicit_euler": [], "exact_flow": []}
    common = {"length": 2.0, "diffusion": diffusion, "rate": rate}
    coarse = march(initial, **common, step=evolution.step, steps=steps)
    fine = march(initial, **common, step=evolution.step / 100, steps=100 * steps)[99::100]
    found: dict[str, list[float]] = {"implicit_euler": [], "exact_flow": []}
    for index in range(steps):
        u = np.asarray(solution(jnp.asarray(points), index + 1)).reshape(coarse[index].shape)
        found["implicit_euler"].append(float(np.sqrt(np.mean((u - coarse[index]) ** 2))))
        found["exact_flow"].append(float(np.sqrt(np.mean((u - fine[index]) ** 2))))
    return found
