"""From a problem to a solution: stages of methods on one clock, evaluated, checkpointed, stopped and resumed.

The clock counts iterating only: a run's seconds are those of its compiled chunks. What a resumed run computes is, to
the bit, what an undisturbed one would have: samples come from the iteration's number, and chunks begin where they
would have.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.pde.baselines.second_order import CurvatureConfig
from jaxstack.pde.estimate import Indicator, errors, held_out
from jaxstack.pde.forms import Form
from jaxstack.pde.methods import METHODS, Method, MethodConfig, chunk_of, make_method
from jaxstack.pde.minres import StopReason
from jaxstack.pde.network_config import NetworkConfig
from jaxstack.pde.npdg import NpdgConfig
from jaxstack.pde.problem import Problem
from jaxstack.pde.solution import Solution, StageReport, Status
from jaxstack.pde.transport import OptimalTransport, Transport
from jaxstack.runtime.checkpoint import Checkpointer, SaveFailed
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import MetricWriter
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import StopFlag

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A method's share of the budget, started from the parameters before it."""

    method: str
    config: MethodConfig | None = None
    share: float = 1.0


def automatic_stages(problem: Problem | OptimalTransport, config: MethodConfig | None = None) -> tuple[Stage, ...]:
    """What `method="auto"` means, by measurements: natural gradients of the strong residual where the dimension is low;
    else the primal-dual method, which falls fastest, and then a polish by natural gradients of the residual, whose mean
    ends lower from there than from anywhere else. In the highest dimensions these see too few of their samples'
    directions in an iteration to be of use.
    """
    if isinstance(problem, OptimalTransport):
        return (Stage("transport", config),)
    if problem.dim <= 3:
        return (Stage("pinn_engd"),)
    if config is None:
        config = NpdgConfig() if problem.dim < 8 else _high_dimensional(problem.dim)
    first = Stage("npdg", config, 0.1)
    if problem.dim > 32 or not isinstance(config, NpdgConfig):
        return (first,)
    network = {f.name: getattr(config, f.name) for f in dataclasses.fields(NetworkConfig)}
    return (first, Stage("pinn_engd", CurvatureConfig(averaging=0.8, **network), 0.9))


def _high_dimensional(dim: int) -> NpdgConfig:
    """Few points inside, many on the boundary; units that start with one coordinate each, which is as good where the
    solution does not know the axes, and five times as good where it does.
    """
    return NpdgConfig(
        width=128, depth=3, inputs_per_unit=1, phi_width=64, boundary_weight=30.0,
        interior_samples=100 if dim > 32 else 200, boundary_samples=400,
    )  # fmt: skip


@dataclasses.dataclass
class _Progress:
    """All of a run that is not in a method's state; saved with it."""

    stage: int = 0
    iteration: int = 0
    done: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_indicator: float = math.inf
    next_evaluation: float = 0.0
    status: str | None = None


def solve(
    problem: Problem | OptimalTransport,
    method: str | tuple[Stage, ...] = "auto",
    *,
    config: MethodConfig | None = None,
    budget_s: float | None = None,
    max_iterations: int | None = None,
    target: float | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    resume: bool = True,
    evaluate_every: float | None = None,
    indicator: bool = True,
    checkpoint_every_s: float = 30.0,
    chunk_steps: int | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    stop: StopFlag | None = None,
    progress: bool = True,
) -> Solution:
    """Solves a boundary value problem, or one of optimal transport.

    Args:
      problem: the equation.
      method: "auto", a name of `methods.METHODS`, or stages.
      config: the method's settings; of "auto", those of its npdg stage.
      budget_s: run seconds, shared by the stages. 60 where neither this nor `max_iterations` is given.
      max_iterations: of all stages together, shared in the same way.
      target: end when `c_l2` is at most this (the exact solution must be known).
      seed: of networks and samples.
      workdir: where checkpoints and metrics.jsonl go; None keeps nothing.
      resume: go on from a checkpoint found there; False refuses a folder that has one.
      evaluate_every: run seconds (iterations, where only those are limited) between evaluations; a fiftieth of the
        budget by default. 0: after each chunk.
      indicator: estimate the error at each evaluation; needed to keep the best parameters of a long run.
      checkpoint_every_s: wall seconds between checkpoints.
      chunk_steps: iterations of one compiled call.
      callback: given each row of the history as it is made.
      stop: ends the run at the next chunk, saved, with status "interrupted".
      progress: show a bar.

    Raises:
      UserError: an unknown method, settings that do not fit, a problem whose functions fail (`Problem.check_values`),
        or a workdir of another run (the differing fields).
    """
    if isinstance(method, str):
        stages = automatic_stages(problem, config) if method == "auto" else (Stage(method, config),)
    else:
        stages = tuple(method)
    if not stages or any(not stage.share > 0 for stage in stages):
        raise UserError("stages: expected at least one, each with a share above 0")
    if target is not None and problem.exact is None:
        raise UserError(f"target={target} on {problem.name}, whose exact solution is not known: expected none")
    for name, limit in (("budget_s", budget_s), ("max_iterations", max_iterations)):
        if limit is not None and not limit > 0:
            raise UserError(f"{name}={limit}: expected more than 0")
    if budget_s is None and max_iterations is None:
        budget_s = 60.0
    problem.check_values()
    methods = [make_method(stage.method, problem, stage.config) for stage in stages]
    for one in methods[1:]:
        if one.u != methods[0].u:
            raise UserError(
                f"stages: {one.name}'s network is {one.u.sizes}, expected {methods[0].u.sizes} as before it"
            )
    run = _Run(problem, stages, methods, seed, budget_s, max_iterations, target, chunk_steps, indicator)
    whole = budget_s if budget_s is not None else float(max_iterations or 0)
    run.evaluate_every = whole / 50 if evaluate_every is None else evaluate_every
    run.callback, run.checkpoint_every_s = callback, checkpoint_every_s
    # One that is given is its owner's to enter.
    scope: contextlib.AbstractContextManager[StopFlag] = StopFlag() if stop is None else contextlib.nullcontext(stop)
    with scope as flag:
        return run.run(None if workdir is None else Path(workdir), resume, flag, progress)


def _judges(
    method: Method, indicator: bool
) -> tuple[Callable[[Array], dict[str, Array]] | None, Callable[[Array], Array] | None]:
    """What judges parameters, compiled: errors on held-out points (None where nothing is known), and the indicator."""
    if isinstance(method, Transport):
        return jax.jit(method.evaluator()), None
    problem, net = method.problem, method.u
    points = held_out(problem)
    known = jax.jit(lambda theta: errors(net, theta, points)._asdict()) if problem.exact is not None else None
    if problem.takes_previous or not indicator:
        return known, None
    form = Form(problem, boundary_weight=method.config.boundary_weight)
    return known, jax.jit(Indicator(form, net))


class _Run:
    """One solve."""

    def __init__(
        self,
        problem: Problem | OptimalTransport,
        stages: tuple[Stage, ...],
        methods: list[Method],
        seed: int,
        budget_s: float | None,
        max_iterations: int | None,
        target: float | None,
        chunk_steps: int | None,
        indicator: bool,
    ):
        self.problem, self.stages, self.methods, self.seed = problem, stages, methods, seed
        self.budget_s, self.max_iterations, self.target, self.chunk_steps = (
            budget_s,
            max_iterations,
            target,
            chunk_steps,
        )
        self.evaluate_every, self.checkpoint_every_s = 1.0, 30.0
        self.callback: Callable[[dict[str, Any]], None] | None = None
        self.at = _Progress()
        self._errors, self._indicator = _judges(methods[0], indicator)
        self._warned = False
        total = sum(stage.share for stage in stages)
        self._ends = np.cumsum([stage.share / total for stage in stages])

    @property
    def indicate(self) -> bool:
        return self._indicator is not None

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        record: dict[str, Any] = {"problem": self.problem.name, "dim": self.problem.dim, "seed": self.seed}
        for index, method in enumerate(self.methods):
            record[f"stage{index}.method"] = method.name
            record |= {f"stage{index}.{k}": v for k, v in dataclasses.asdict(method.config).items()}
        return record

    def run(self, workdir: Path | None, resume: bool, stop: StopFlag, show: bool) -> Solution:
        checkpointer = None if workdir is None else Checkpointer(workdir / "checkpoints")
        try:
            return self._run(workdir, checkpointer, resume, stop, show)
        finally:
            if checkpointer is not None:
                checkpointer.close()

    def _run(
        self, workdir: Path | None, checkpointer: Checkpointer | None, resume: bool, stop: StopFlag, show: bool
    ) -> Solution:
        keys = jax.random.split(jax.random.key(self.seed), len(self.methods))
        at = self.at
        metadata = checkpointer.latest_metadata() if checkpointer is not None else None
        if metadata is not None:
            self._check_same(metadata["job"], resume, workdir)
            at = self.at = _Progress(**metadata["run"])
        state = jax.jit(self.methods[at.stage].init)(keys[at.stage])
        best = np.asarray(state.theta)
        if metadata is not None:
            assert checkpointer is not None
            found = checkpointer.restore_latest({"state": _leaves(state), "best": jnp.asarray(best)})
            assert found is not None
            at = self.at = _Progress(**found.metadata["run"])
            state, best = _from_leaves(found.arrays["state"], state), np.asarray(found.arrays["best"])
        at.status = None
        self._state, self._best = state, best
        self._checkpointer, self._stop = checkpointer, stop
        self._writer = MetricWriter(workdir, resume_step=at.done) if workdir is not None else None
        total = self.max_iterations if self.budget_s is None else math.ceil(self.budget_s)
        unit = "iteration" if self.budget_s is None else "s"
        counted = at.done if self.budget_s is None else int(at.seconds)
        bar = Progress(total, self.problem.name, unit=unit, initial=counted, enabled=show)
        if metadata is not None:
            bar.say(f"resumed at iteration {at.done}, {at.seconds:.1f} s")
        recompilations = 0
        self._compile_s = 0.0
        try:
            while at.stage < len(self.methods):
                recompilations += self._run_stage(bar)
                if at.status is not None or at.stage + 1 == len(self.methods):
                    break
                theta = jnp.asarray(self._best)
                at.stage, at.iteration, at.stage_seconds = at.stage + 1, 0, 0.0
                self._compile_s = 0.0
                self._state = jax.jit(self.methods[at.stage].init)(keys[at.stage], theta)
            self._save()
            if checkpointer is not None:
                checkpointer.wait()
        finally:
            bar.close()
            if self._writer is not None:
                self._writer.close()
        final = self._evaluate(self._best, {})
        return Solution(
            problem=self.problem,
            net=self.methods[0].u,
            theta=self._best,
            status=self._status(),
            errors=final or None,
            indicator=self._estimate(self._best) if self.indicate else math.nan,
            history=at.history,
            stages=tuple(StageReport(**stage) for stage in at.stages),
            seed=self.seed,
            recompilations=recompilations,
        )

    def _check_same(self, found: dict[str, Any], resume: bool, workdir: Path | None) -> None:
        if not resume:
            raise UserError(f"workdir {str(workdir)!r} holds a run already: choose another, or resume it")
        expected = self.fingerprint()
        differing = [k for k in {**expected, **found} if expected.get(k) != found.get(k)]
        if differing:
            shown = ", ".join(f"{k} {found.get(k)!r} there, {expected.get(k)!r} here" for k in differing[:4])
            raise UserError(f"workdir {str(workdir)!r} holds another run: {shown}")

    # -------------------------------------------------------------------------------------------------------- a stage

    def _run_stage(self, bar: Progress) -> int:
        """Runs the present stage to its end, the run's, or a stop. Returns how many programs were compiled after its
        first chunk."""
        at, method = self.at, self.methods[self.at.stage]
        entry = METHODS[method.name]
        steps = self.chunk_steps or entry.chunk
        if self.max_iterations is not None:
            steps = min(steps, self.max_iterations)
        began = time.perf_counter()
        compiled = jax.jit(chunk_of(method, steps), donate_argnums=0).lower(self._state).compile()
        start_theta = self._best.copy()
        # These two are compiled now, off the clock.
        self._evaluate(start_theta, {})
        if self.indicate:
            self._estimate(start_theta)
        self._compile_s += time.perf_counter() - began
        counter = CompileCounter()
        end = float(self._ends[at.stage])
        last_save = time.perf_counter()
        limit_s = None if self.budget_s is None else end * self.budget_s
        limit_n = None if self.max_iterations is None else end * self.max_iterations
        while True:
            over = (limit_s is not None and at.seconds >= limit_s) or (limit_n is not None and at.done >= limit_n)
            if over or self._stop:
                break
            began = time.perf_counter()
            self._state, report = compiled(self._state)
            jax.block_until_ready(self._state)
            elapsed = time.perf_counter() - began
            before = int(at.seconds)
            at.seconds += elapsed
            at.stage_seconds += elapsed
            at.iteration += steps
            at.done += steps
            bar.advance(steps if self.budget_s is None else int(at.seconds) - before)
            row = self._figures(method, jax.device_get(report))
            diverged = int(self._state.rejected_in_row) >= entry.patience
            clock = at.seconds if self.budget_s is not None else at.done
            if clock >= at.next_evaluation or diverged:
                at.next_evaluation = clock + self.evaluate_every
                row = self._evaluate(self._state.theta, row)
                if self.indicate:
                    row["indicator"] = self._estimate(self._state.theta)
                    if row["indicator"] < at.best_indicator:
                        at.best_indicator, self._best = row["indicator"], np.asarray(self._state.theta)
                at.history.append(row)
                if self._writer is not None:
                    self._writer.write(at.done, row)
                if self.callback is not None:
                    self.callback(row)
                if self.target is not None and row["c_l2"] <= self.target:
                    at.status, self._best = "target_reached", np.asarray(self._state.theta)
                    break
            shown = {k: row[k] for k in ("loss", "minres", "c_l2", "indicator") if row.get(k) is not None}
            bar.figures(method=method.name, **shown)
            if diverged:
                at.status = "diverged"
                break
            if time.perf_counter() - last_save > self.checkpoint_every_s:
                self._save()
                last_save = time.perf_counter()
        recompilations = counter.count
        if self._stop and at.status is None:
            at.status = "interrupted"
        if at.status != "target_reached":
            self._take_better()
        report = StageReport(
            method=method.name,
            iterations=at.iteration,
            run_s=at.stage_seconds,
            compile_s=self._compile_s,
            indicator=at.best_indicator if self.indicate else math.nan,
            kept=at.stage == 0 or not np.array_equal(self._best, start_theta),
        )
        # A stage that is continued after an interruption has one report.
        at.stages = [*at.stages[: at.stage], dataclasses.asdict(report)]
        return recompilations

    def _take_better(self) -> None:
        """The stage's last parameters where they are the best, or nothing judges them."""
        theta = np.asarray(self._state.theta)
        if not self.indicate:
            self._best = theta
            return
        found = self._estimate(theta)
        if found <= self.at.best_indicator:
            self.at.best_indicator, self._best = found, theta

    # --------------------------------------------------------------------------------------------------- bookkeeping

    def _figures(self, method: Method, report: Any) -> dict[str, Any]:
        at = self.at
        row: dict[str, Any] = {
            "iteration": at.done, "seconds": at.seconds, "stage": method.name, "loss": float(report.loss[-1]),
            "rejected": int(np.sum(~report.accepted)),
        }  # fmt: skip
        if hasattr(report, "minres_iterations"):
            row["minres"] = "/".join(str(round(v)) for v in report.minres_iterations.mean(axis=0))
            row["misfit"] = float(report.misfit[-1])
            capped = (report.stop_reasons == int(StopReason.ITERATION_LIMIT)).mean(axis=0)
            if capped.max() > 0.5 and not self._warned:
                self._warned = True
                player = ("phi", "psi", "u")[int(capped.argmax())]
                _log.warning(
                    "MINRES reaches its limit of %d iterations in most solves of %s: raise minres_max_iterations or "
                    "minres_rtol", method.config.minres_max_iterations, player,
                )  # fmt: skip
        return row

    def _evaluate(self, theta: Any, row: dict[str, Any]) -> dict[str, Any]:
        if self._errors is None:
            return row
        found = jax.device_get(self._errors(jnp.asarray(theta)))
        return row | {name: float(value) for name, value in found.items()}

    def _estimate(self, theta: Any) -> float:
        return math.nan if self._indicator is None else float(self._indicator(jnp.asarray(theta)))

    def _status(self) -> Status:
        at = self.at
        if at.status is not None:
            return at.status  # type: ignore[return-value]
        marks = [row["indicator"] for row in at.history if row.get("indicator") is not None]
        half = len(marks) // 2
        if half >= 4 and min(marks[half:]) > 0.98 * min(marks[:half]):
            return "stalled"
        return "budget_exhausted"

    def _save(self) -> None:
        if self._checkpointer is None:
            return
        metadata = {"job": self.fingerprint(), "run": dataclasses.asdict(self.at)}
        arrays = {"state": _leaves(self._state), "best": jnp.asarray(self._best)}
        try:
            self._checkpointer.save(self.at.done, arrays, metadata)
        except SaveFailed as error:
            _log.warning("%s; the run goes on without it", error)


def _leaves(state: Any) -> dict[str, Array]:
    """A state's arrays by their path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _from_leaves(leaves: dict[str, Array], like: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(leaves[jax.tree_util.keystr(path)]), like)
