"""Who takes part in a contest: methods of ours, and DeepXDE in its own environment. Each run is one row of the same
kind (`jaxstack.pde.compare.time_to_error`)."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from jaxstack.pde.compare import Case, Entrant, time_to_error
from jaxstack.pde.estimate import held_out
from jaxstack.pde.methods import MethodConfig
from jaxstack.pde.npdg import NpdgConfig
from jaxstack.runtime.errors import UserError
from launch.peers import PeerProcess

Say = Callable[[str], None]
Side = Callable[[Case, int, float, Say], dict[str, Any]]
"""(case, seed, run seconds allowed, where to tell how it goes) -> the row of one run."""

PROGRAM = Path(__file__).parent.parent / "peers" / "deepxde_pde.py"
_THREADS = 2
# Of run time, between two signs of life.
_SLICE_S = 2.0


def method_side(label: str, method: str, config: MethodConfig | None = None) -> Side:
    """A method of ours with its settings."""

    def run(case: Case, seed: int, budget_s: float, say: Say) -> dict[str, Any]:
        return time_to_error(case, Entrant(label, method, config), seed=seed, budget_s=budget_s)

    return run


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to use DeepXDE: its own settings, as its program takes them.

    Attributes:
      title: how reports call it.
      inside, boundary: numbers of training points.
      distribution: of these points: DeepXDE's default, a quasi-random sequence, or "pseudo".
      weight: of the boundary's loss.
      resample: iterations after which it draws new points, on jax inside only; 0 keeps them.
      autodiff: how it differentiates: reverse over reverse, its default, or "forward".
      lbfgs_after: share of the budget after which L-BFGS takes over from Adam; None never.
    """

    title: str
    inside: int
    boundary: int
    distribution: str = "Hammersley"
    weight: float = 1.0
    resample: int = 0
    autodiff: str = "reverse"
    lbfgs_after: float | None = None

    def arguments(self, budget_s: float) -> dict[str, Any]:
        """What its program takes for a run of so many seconds."""
        fields = dataclasses.asdict(self)
        share = fields.pop("lbfgs_after")
        del fields["title"]
        return fields | {"lbfgs_after_s": None if share is None else share * budget_s}


def modes(backend: str, inside: int, boundary: int) -> list[Mode]:
    """What is tried of DeepXDE, with so many points: its defaults (Adam 1e-3, fixed points, equal weights); what its
    documentation advises, 100 on the boundary and points drawn anew by its callback every 100 iterations; and that with
    forward over forward differentiation, a switch of its own, also with half the points, which makes iterations
    cheaper. With PyTorch its L-BFGS, too, on fixed points, from the start and after Adam.
    """
    advised = Mode("advised", inside, boundary, "pseudo", 100.0, 100)
    forward = dataclasses.replace(advised, title="advised, forward", autodiff="forward")
    half = dataclasses.replace(
        forward, title="advised, forward, half the points", inside=-(-inside // 2), boundary=-(-boundary // 2)
    )
    found = [Mode("defaults", inside, boundary), advised, forward, half]
    if backend == "pytorch":
        fixed = dataclasses.replace(advised, resample=0)
        found += [
            dataclasses.replace(fixed, title="advised, L-BFGS", lbfgs_after=0.0),
            dataclasses.replace(fixed, title="advised, Adam then L-BFGS", lbfgs_after=0.3),
        ]
    return found


def write_held_out(case: Case, folder: Path) -> Path:
    """The points on which both sides are judged, with the exact solution there, as a file."""
    points = held_out(case.problem)
    path = folder / f"{case.name}.npz"
    np.savez(path, x=np.asarray(points.x), value=np.asarray(points.value))
    return path


class DeepXde:
    """DeepXDE's program, running. `with DeepXde(...) as peer: peer.side(mode)`.

    Args:
      interpreter: of its environment.
      backend: jax or pytorch.
      workdir: where its log, points and compiled programs go.
      network: settings of ours, whose network's sizes it takes.
    """

    def __init__(self, interpreter: Path, backend: str, workdir: Path, network: NpdgConfig):
        self.backend, self.network, self._workdir = backend, network, workdir
        if network.activation != "tanh":
            raise UserError(f"network activation={network.activation}: the peer's program has tanh alone")
        workdir.mkdir(parents=True, exist_ok=True)
        self._peer = PeerProcess(
            [interpreter, PROGRAM],
            log_file=workdir / f"deepxde-{backend}.log",
            environment={
                "DDE_BACKEND": backend,
                "OMP_NUM_THREADS": str(_THREADS),
                # A seed's run compiles what the one before it has compiled.
                "JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled-deepxde").resolve()),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            },
            name="deepxde",
            target="peer-deepxde",
        )
        try:
            self.about = self._peer.ask("load", threads=_THREADS)
            ours, theirs = jax.default_backend(), self.about["platform"]
            if ours != theirs:
                raise UserError(f"deepxde runs on {theirs}, ours on {ours}: expected the same; JAX_PLATFORMS chooses")
        except BaseException:
            self._peer.close()
            raise
        self._peer.freeze()

    @property
    def process(self) -> psutil.Process:
        return self._peer.process

    def side(self, mode: Mode) -> Side:
        """Runs of one mode."""
        return functools.partial(self._run, mode)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[PeerProcess]:
        self._peer.thaw()
        try:
            yield self._peer
        finally:
            self._peer.freeze()

    def begin(self, mode: Mode, case: Case, seed: int, budget_s: float) -> dict[str, Any]:
        """A fresh network, compiled."""
        with self._awake() as peer:
            return peer.ask(
                "begin",
                dim=case.dim,
                held_out=str(write_held_out(case, self._workdir).resolve()),
                seed=seed,
                width=self.network.width,
                depth=self.network.depth,
                mode=mode.arguments(budget_s),
            )

    def losses(self) -> dict[str, Any]:
        """The terms of its loss, and where it takes them."""
        with self._awake() as peer:
            return peer.ask("losses")

    def _run(self, mode: Mode, case: Case, seed: int, budget_s: float, say: Say) -> dict[str, Any]:
        if case.equation != "poisson":
            raise UserError(f"deepxde on {case.name}: its program knows poisson alone")
        say("compiling")
        begun = self.begin(mode, case, seed, budget_s)
        history: list[tuple[float, float]] = []
        iterations, ended, told = 0, False, time.perf_counter()
        with self._awake() as peer:
            seconds = 0.0
            while seconds < budget_s and not ended:
                found = peer.ask("advance", until_s=min(budget_s, seconds + _SLICE_S), target=case.target)
                history += [(float(s), float(c)) for s, c in found["rows"]]
                seconds, iterations, ended = found["seconds"], found["iterations"], found["ended"]
                if time.perf_counter() - told > 5.0:
                    told = time.perf_counter()
                    say(f"{seconds:.0f} s of {budget_s:.0f}, {iterations} iterations, error {history[-1][1]:.3g}")
        return run_row(case, mode.title, seed, budget_s, history) | {
            "iterations": iterations,
            "cpu_s": round(found["cpu_s"], 2),
            "compile_s": round(begun["compile_s"], 2),
        }

    def close(self) -> None:
        self._peer.close()

    def __enter__(self) -> "DeepXde":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._peer.__exit__(kind, error, trace)


def run_row(case: Case, label: str, seed: int, budget_s: float, history: list[tuple[float, float]]) -> dict[str, Any]:
    """A run by its history of (run seconds, centred error), as `time_to_error` gives it."""
    arrived = next((s for s, c in history if c <= case.target), None)
    errors = [c for _, c in history if math.isfinite(c)]
    kept = [(round(s, 3), c) for s, c in history]
    return {
        "case": case.name, "label": label, "seed": seed,
        "status": "target_reached" if arrived is not None else
                  "budget_exhausted" if history and math.isfinite(history[-1][1]) else "diverged",
        "seconds": budget_s if arrived is None else arrived, "censored": arrived is None,
        "c_l2": history[-1][1] if history else math.nan, "best_c_l2": min(errors, default=None),
        "history": kept[:: max(1, len(kept) // 100)] + kept[-1:],
    }  # fmt: skip
