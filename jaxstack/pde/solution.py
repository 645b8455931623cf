"""What a solve returns: the solution as a function, how it came about, and how good it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.pde.networks import Mlp, value_and_gradient
from jaxstack.pde.problem import Problem
from jaxstack.pde.transport import OptimalTransport
from jaxstack.runtime.errors import UserError

Status = Literal["target_reached", "budget_exhausted", "stalled", "diverged", "interrupted"]


@dataclasses.dataclass(frozen=True)
class StageReport:
    """A method's part in a solve.

    Attributes:
      method: its name. iterations, run_s, compile_s: what it took.
      indicator: of its outcome. kept: whether its outcome was better than what it started from.
    """

    method: str
    iterations: int
    run_s: float
    compile_s: float
    indicator: float
    kept: bool


@dataclasses.dataclass(frozen=True)
class Solution:
    """A solved problem.

    Attributes:
      problem: the equation.
      net, theta: the network and its parameters.
      status: target_reached; budget_exhausted; stalled (the budget was used up, and the indicator had not moved by two
        per cent over its second half); diverged (the last good parameters are here); interrupted.
      errors: `c_l2`, `rel_l2`, `rel_h1` on held-out points, where the exact solution is known; of a map, those of
        `Transport.evaluator`.
      indicator: the estimated error in the energy seminorm; not a bound (see `estimate.Indicator`).
      history: a row for each evaluation: iteration, seconds, loss, errors, indicator.
      stages: the methods that made it, in order.
      seed: of the run.
      recompilations: programs compiled after the first chunk; zero is what is promised.
    """

    problem: Problem | OptimalTransport
    net: Mlp
    theta: Float[np.ndarray, " parameters"]
    status: Status
    errors: dict[str, float] | None
    indicator: float
    history: list[dict[str, Any]]
    stages: tuple[StageReport, ...]
    seed: int
    recompilations: int = 0

    def __call__(self, x: Float[Array, "points dim"]) -> Float[Array, " points"]:
        """u at points.

        Raises:
          UserError: points of another dimension.
        """
        return _values(self.net, jnp.asarray(self.theta), self._points(x))

    def gradient(self, x: Float[Array, "points dim"]) -> Float[Array, "points dim"]:
        """grad u at points."""
        return _gradients(self.net, jnp.asarray(self.theta), self._points(x))

    def _points(self, x: Any) -> Array:
        x = jnp.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.net.dim:
            raise UserError(f"points of shape {x.shape}: expected (points, {self.net.dim})")
        return x

    @property
    def iterations(self) -> int:
        return sum(stage.iterations for stage in self.stages)

    @property
    def run_s(self) -> float:
        """Seconds of iterating, without compiling and evaluating."""
        return sum(stage.run_s for stage in self.stages)

    @property
    def compile_s(self) -> float:
        return sum(stage.compile_s for stage in self.stages)

    def time_to(self, c_l2: float) -> float | None:
        """Run seconds at the first evaluation at or below an error; None if it was never reached."""
        for row in self.history:
            if row.get("c_l2") is not None and row["c_l2"] <= c_l2:
                return row["seconds"]
        return None

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.problem.name}: {self.status} after {self.iterations} iterations, {self.run_s:.1f} s "
            f"(and {self.compile_s:.1f} s compiling)"
        ]
        for stage in self.stages:
            verdict = "" if stage.kept else ", not kept: what it started from is better"
            lines.append(
                f"  {stage.method}: {stage.iterations} iterations in {stage.run_s:.1f} s, "
                f"indicator {stage.indicator:.3g}{verdict}"
            )
        if self.errors is not None:
            shown = ", ".join(f"{name} {value:.3g}" for name, value in self.errors.items())
            lines.append(f"  errors on held-out points: {shown}")
        lines.append(f"  error indicator (energy seminorm, an estimate and not a bound): {self.indicator:.3g}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The summary as numbers."""
        return {
            "problem": self.problem.name,
            "dim": self.problem.dim,
            "status": self.status,
            "iterations": self.iterations,
            "run_s": round(self.run_s, 3),
            "compile_s": round(self.compile_s, 3),
            "errors": self.errors,
            "indicator": self.indicator,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seed": self.seed,
            "recompilations": self.recompilations,
        }

    def save(self, path: str | Path) -> None:
        """Writes network, parameters and report into one .npz file; the problem's functions are not in it."""
        record = self.as_json() | {"network": dataclasses.asdict(self.net), "history": self.history}
        np.savez(path, theta=self.theta, record=np.frombuffer(json.dumps(record).encode(), np.uint8))

    @classmethod
    def load(cls, path: str | Path, problem: Problem | OptimalTransport) -> "Solution":
        """Reads what `save` wrote, for the problem that it solves.

        Raises:
          UserError: no such file, another file, or a problem of another dimension.
        """
        try:
            with np.load(path) as file:
                theta, record = file["theta"], json.loads(file["record"].tobytes())
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{str(path)!r} is no saved solution: {error}") from error
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["network"].items()}
        net = Mlp(**fields)
        if net.dim != problem.dim:
            raise UserError(f"{str(path)!r} solves a problem of dimension {net.dim}, expected {problem.dim}")
        return cls(
            problem, net, theta, record["status"], record["errors"], record["indicator"], record["history"],
            tuple(StageReport(**stage) for stage in record["stages"]), record["seed"], record["recompilations"],
        )  # fmt: skip


def _values_of(net: Mlp, theta: Array, x: Array) -> Array:
    return net(theta, x)


def _gradients_of(net: Mlp, theta: Array, x: Array) -> Array:
    return value_and_gradient(lambda p: net(theta, p), x)[1]


_values = jax.jit(_values_of, static_argnums=0)
_gradients = jax.jit(_gradients_of, static_argnums=0)
