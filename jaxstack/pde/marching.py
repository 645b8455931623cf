"""Time steps one after the other: an initial value problem solved by the primal-dual method.

u starts each step from the last one's parameters; phi and psi start afresh. All steps run the same compiled program:
the earlier solution's parameters are part of its state.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxstack.pde.evolution import Evolution
from jaxstack.pde.forms import Fields
from jaxstack.pde.gram import Linearized
from jaxstack.pde.minres import StopReason
from jaxstack.pde.networks import Mlp
from jaxstack.pde.npdg import DIVERGED_AFTER, Npdg, NpdgConfig, NpdgState, StepReport
from jaxstack.pde.problem import point_values
from jaxstack.runtime.checkpoint import Checkpointer, SaveFailed
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import MetricWriter
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import StopFlag

_log = logging.getLogger(__name__)


_REACTION: dict[str, Any] = {"strong_penalty": True, "preconditioner": "reaction_large", "boundary_weight": 1.0}


@dataclasses.dataclass(frozen=True)
class MarchConfig:
    """Settings of a march.

    Attributes:
      npdg: of the method. Its u player minimises the strong residual as well, as in the paper's reaction-diffusion
        runs.
      iterations: of a time step, at most.
      tolerance: a step ends when the root mean square of its strong residual on held-out points is at most this.
      fit_iterations: natural-gradient steps that fit the network to the initial value before the first time step.
    """

    npdg: NpdgConfig = dataclasses.field(default_factory=lambda: NpdgConfig(**_REACTION))
    iterations: int = 400
    tolerance: float | None = None
    fit_iterations: int = 200

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.fit_iterations < 0:
            raise UserError(
                f"iterations={self.iterations}, fit_iterations={self.fit_iterations}: expected at least 1 and 0"
            )
        if self.tolerance is not None and not self.tolerance > 0:
            raise UserError(f"tolerance={self.tolerance}: expected more than 0, or none")


@dataclasses.dataclass(frozen=True)
class EvolutionSolution:
    """A solved initial value problem.

    Attributes:
      evolution: the problem. net: the network.
      thetas: its parameters, a row for each time; the first row is the fitted initial value.
      times: of the rows.
      status: budget_exhausted (every step used its iterations), tolerance_reached, diverged or interrupted.
      history: a row for each evaluation.
      iterations, run_s, compile_s, recompilations: as in `Solution`.
    """

    evolution: Evolution
    net: Mlp
    thetas: Float[np.ndarray, "times parameters"]
    times: Float[np.ndarray, " times"]
    status: str
    history: list[dict[str, Any]]
    iterations: int
    run_s: float
    compile_s: float
    recompilations: int

    def __call__(self, x: Float[Array, "points dim"], step: int = -1) -> Float[Array, " points"]:
        """u at points, after a time step (the last one by default)."""
        x = jnp.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.net.dim:
            raise UserError(f"points of shape {x.shape}: expected (points, {self.net.dim})")
        return self.net(jnp.asarray(self.thetas[step]), x)

    def summary(self) -> str:
        last = self.history[-1]["residual"] if self.history else float("nan")
        return (
            f"{self.evolution.problem.name}: {self.status}, time {self.times[-1]:g} after {self.iterations} "
            f"iterations, {self.run_s:.1f} s (and {self.compile_s:.1f} s compiling); last residual {last:.3g}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "problem": self.evolution.problem.name, "dim": self.net.dim, "status": self.status,
            "times": self.times.tolist(), "iterations": self.iterations, "run_s": round(self.run_s, 3),
            "compile_s": round(self.compile_s, 3), "recompilations": self.recompilations,
            "residual": self.history[-1]["residual"] if self.history else None,
        }  # fmt: skip


class _MarchState(NamedTuple):
    npdg: NpdgState
    previous: Float[Array, " parameters"]
    first: Bool[Array, ""]


class March:
    """The time steps of a problem as one compiled program."""

    def __init__(self, evolution: Evolution, config: MarchConfig):
        self.evolution, self.config = evolution, config
        self.problem = evolution.step_problem()
        self.solver = Npdg(self.problem, config.npdg)
        self.u = self.solver.u

    def previous(self, state: _MarchState) -> Callable[[Array], Array]:
        """The earlier solution: the initial value itself in the first step."""

        def function(x: Array) -> Array:
            return jnp.where(state.first, point_values(self.evolution.initial, x), self.u(state.previous, x))

        return function

    def step(self, state: _MarchState) -> tuple[_MarchState, StepReport]:
        """One iteration of the present time step."""
        npdg, report = self.solver.step(state.npdg, self.previous(state))
        return state._replace(npdg=npdg), report

    def begin(self, key: Array, theta: Array, index: Array | int) -> _MarchState:
        """The first state of a time step."""
        npdg = self.solver.init(jax.random.fold_in(key, index), theta)
        return _MarchState(npdg, jnp.array(theta), jnp.asarray(index == 0))

    def residual(self, state: _MarchState) -> Float[Array, ""]:
        """Root mean square of the strong residual on held-out points."""
        form = self.solver.form
        samples = form.samples(jax.random.key(11), 2000, 10, previous=self.previous(state), strong=True)
        return jnp.sqrt(jnp.mean(form.net_residual(self.u, state.npdg.theta, samples) ** 2))

    def fitted(self, key: Array) -> tuple[Array, Array]:
        """Parameters whose function is the initial value, by natural gradients in L2, and its RMS error."""
        domain, initial = self.problem.domain, self.evolution.initial
        samples = self.config.npdg.interior_samples

        def error(theta: Array, k: Array, n: int) -> Linearized:
            x = domain.sample_interior(k, n)
            return Linearized(lambda p: Fields(self.u(p, x) - point_values(initial, x)), theta)

        def step(theta: Array, k: Array) -> tuple[Array, None]:
            lin = error(theta, k, samples)
            square = lambda f: 0.5 * jnp.mean(f.value**2)  # noqa: E731
            found = lin.natural_gradient(lin.gradient(square), square, rtol=1e-5, max_iterations=100)
            good = found.stop_reason != StopReason.NOT_FINITE
            return theta - 0.5 * jnp.where(good, found.x, 0.0), None

        start, points, last = jax.random.split(key, 3)
        theta, _ = jax.lax.scan(step, self.u.init(start), jax.random.split(points, max(1, self.config.fit_iterations)))
        return theta, jnp.sqrt(jnp.mean(error(theta, last, 4000).fields.value ** 2))


_CHUNK = 10


def solve_evolution(
    evolution: Evolution,
    config: MarchConfig | None = None,
    *,
    seed: int = 0,
    workdir: str | Path | None = None,
    checkpoint_every_s: float = 30.0,
    callback: Callable[[dict[str, Any]], None] | None = None,
    stop: StopFlag | None = None,
    progress: bool = True,
) -> EvolutionSolution:
    """Solves an initial value problem, a time step after the other.

    Args:
      evolution, config: the problem and the settings.
      seed: of networks and samples.
      workdir: where checkpoints and metrics.jsonl go; a run found there is continued. None keeps nothing.
      checkpoint_every_s: wall seconds between checkpoints.
      callback: given each row of the history.
      stop: ends the run at the next chunk, saved.
      progress: show a bar.

    Raises:
      UserError: a workdir of another run, or functions that fail.
    """
    config = config or MarchConfig()
    evolution.problem.check_values()
    march = March(evolution, config)
    job = {
        "problem": evolution.problem.name, "step": evolution.step, "final_time": evolution.final_time, "seed": seed,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }  # fmt: skip
    # One that is given is its owner's to enter.
    scope: contextlib.AbstractContextManager[StopFlag] = StopFlag() if stop is None else contextlib.nullcontext(stop)
    with scope as flag:
        return _march(march, job, seed, workdir, checkpoint_every_s, callback, flag, progress)


def _march(
    march: March,
    job: dict[str, Any],
    seed: int,
    workdir: str | Path | None,
    checkpoint_every_s: float,
    callback: Callable[[dict[str, Any]], None] | None,
    stop: StopFlag,
    show: bool,
) -> EvolutionSolution:
    config, evolution = march.config, march.evolution
    key = jax.random.key(seed)
    steps, chunk = evolution.steps, min(_CHUNK, config.iterations)
    checkpointer = None if workdir is None else Checkpointer(Path(workdir) / "checkpoints")
    at: dict[str, Any] = {"index": 0, "iteration": 0, "done": 0, "seconds": 0.0, "history": [], "reached": []}
    bar = Progress(steps * config.iterations, evolution.problem.name, unit="iteration", enabled=show)
    began = time.perf_counter()
    begin = jax.jit(march.begin)  # compiled, so that no two arrays of a state share a buffer: they are donated
    state = begin(key, jnp.zeros(march.u.parameter_count), 0)
    thetas = np.zeros((steps + 1, march.u.parameter_count), np.asarray(state.npdg.theta).dtype)
    found = None
    if checkpointer is not None and (metadata := checkpointer.latest_metadata()) is not None:
        if differing := [k for k in job if job[k] != metadata["job"].get(k)]:
            raise UserError(f"workdir {str(workdir)!r} holds another run: {', '.join(differing)} differ")
        found = checkpointer.restore_latest({"state": _leaves(state), "thetas": jnp.asarray(thetas)})
    if found is not None:
        at, thetas, leaves = dict(found.metadata["run"]), np.array(found.arrays["thetas"]), found.arrays["state"]
        state = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(leaves[jax.tree_util.keystr(path)]), state)
    else:
        theta, error = jax.jit(march.fitted)(jax.random.fold_in(key, 1_000_000))
        bar.say(f"initial value fitted to {float(error):.3g}")
        thetas[0] = np.asarray(theta)
        state = begin(key, theta, 0)
    writer = MetricWriter(workdir, resume_step=at["done"]) if workdir is not None else None
    run = jax.jit(
        lambda s: jax.lax.scan(lambda c, _: march.step(c), s, length=chunk), donate_argnums=0
    ).lower(state).compile()  # fmt: skip
    residual = jax.jit(march.residual)
    residual(state).block_until_ready()
    compile_s, counter, last_save = time.perf_counter() - began, CompileCounter(), time.perf_counter()
    bar.advance(at["done"])
    status = "budget_exhausted"

    def save() -> None:
        if checkpointer is not None:
            try:
                arrays = {"state": _leaves(state), "thetas": jnp.asarray(thetas)}
                checkpointer.save(at["done"], arrays, {"job": job, "run": at})
            except SaveFailed as error:
                _log.warning("%s; the run goes on without it", error)

    try:
        while at["index"] < steps:
            while at["iteration"] < config.iterations and not stop:
                began = time.perf_counter()
                state, report = run(state)
                jax.block_until_ready(state)
                at["seconds"] += time.perf_counter() - began
                report = jax.device_get(report)
                at["iteration"] += chunk
                at["done"] += chunk
                row = {
                    "step": at["index"], "iteration": at["done"], "seconds": at["seconds"],
                    "loss": float(report.loss[-1]), "residual": float(residual(state)),
                    "misfit": float(report.misfit[-1]),
                    "minres": "/".join(str(round(float(v))) for v in report.minres_iterations.mean(axis=0)),
                }  # fmt: skip
                at["history"].append(row)
                if writer is not None:
                    writer.write(at["done"], {k: v for k, v in row.items() if k != "step"} | {"time_step": at["index"]})
                if callback is not None:
                    callback(row)
                bar.advance(chunk)
                bar.figures(time_step=at["index"] + 1, residual=row["residual"], minres=row["minres"])
                if int(state.npdg.rejected_in_row) >= DIVERGED_AFTER:
                    status = "diverged"
                    break
                if config.tolerance is not None and row["residual"] <= config.tolerance:
                    at["reached"].append(at["index"])
                    break
                if time.perf_counter() - last_save > checkpoint_every_s:
                    save()
                    last_save = time.perf_counter()
            if stop and status != "diverged":
                status = "interrupted"
                break
            at["index"], at["iteration"] = at["index"] + 1, 0
            thetas[at["index"]] = np.asarray(state.npdg.theta)
            if status == "diverged":
                break
            if at["index"] < steps:
                state = begin(key, state.npdg.theta, at["index"])
        save()
        if checkpointer is not None:
            checkpointer.wait()
    finally:
        bar.close()
        if writer is not None:
            writer.close()
        if checkpointer is not None:
            checkpointer.close()
    if status == "budget_exhausted" and len(at["reached"]) == steps:
        status = "tolerance_reached"
    kept = at["index"] + 1
    return EvolutionSolution(
        evolution, march.u, thetas[:kept], evolution.step * np.arange(kept), status, at["history"], at["done"],
        at["seconds"], compile_s, counter.count,
    )  # fmt: skip


def _leaves(state: Any) -> dict[str, Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
