"""The PDE solver against others: seconds to an error against DeepXDE and against methods of ours, and what the forward
Laplacian saves.

    python -m launch.bench_pde --peer=deepxde                # Poisson's equation, 10 and 20 dimensions; about 6 minutes
    python -m launch.bench_pde --peer=deepxde --peer_backend=pytorch      # with its L-BFGS, too
    python -m launch.bench_pde --peer=pinn_adam --dims=10,20 # npdg beside another method of ours
    python -m launch.bench_pde --peer=engd --dims=2          # where natural gradients of the residual are quicker
    python -m launch.bench_pde                               # the Laplacian's gradient at 20 and 50 dimensions

DeepXDE runs in an environment of its own (`make peer-deepxde`), in float32, with a network of the same widths, Adam
with a rate of 1e-3, as many training points as ours draws for an iteration, and its Laplacian as its examples write it,
the sum of d second derivatives. Modes: its defaults (fixed points, equal weights); its documented advice (100 on the
boundary, points drawn anew by its callback); that with its forward differentiation, also on half the points; with
PyTorch L-BFGS, too. All are tried with the first seed, the best one of each problem counts and runs with the others.

    time_to_error_ratio             median over problems of the best mode's seconds over ours, both to `--target` on the
                                    same held-out points (centred relative L2 error: a constant has 1); a median over
                                    seeds of ratios of runs side by side. Seconds of iterating: neither compiling nor
                                    looking at the error counts, on either side
    time_to_error_ratio_by_problem  the same by problem, with the mode
    error_at_the_end_by_problem     where each side stood when it arrived or its `--budget_s` was over
    conclusive                      whether the machine was free before: see foreign_cores, of others while it ran

A run that does not arrive counts as `--budget_s` and is flagged: the ratio then is a lower bound. Sides run in turn,
seed by seed. Besides summary.json, error.png shows error against seconds.

The Laplacian: the gradient by the parameters of the mean squared Laplacian of a network, which is what a residual
method pays in each iteration; processor milliseconds, the least of many, and the program's scratch memory as its
compiler plans it. `--check` compares values only.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from jaxstack.pde.compare import Case
from jaxstack.pde.methods import METHODS
from jaxstack.pde.npdg import NpdgConfig
from jaxstack.runtime.compilation import use_compilation_cache
from jaxstack.runtime.metrics import write_summary
from launch import job
from launch.pde_benchmark.contest import contest, report, summarise
from launch.pde_benchmark.laplacian import laplacian
from launch.pde_benchmark.plot import draw
from launch.pde_benchmark.sides import DeepXde, Side, method_side, modes
from launch.peers import find_interpreter
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe, foreign_now

_OURS = "npdg"
_METHODS = sorted(set(METHODS) - {_OURS, "transport"})
_SHORT = {name.removeprefix("pinn_"): name for name in _METHODS}

_WHAT = flags.DEFINE_enum("what", None, ["laplacian", "methods"], "which comparison; methods where --peer is given")
_DIMS = flags.DEFINE_list("dims", None, "dimensions; by default 20,50 for the Laplacian and 10,20 for methods")
_POINTS = flags.DEFINE_integer("points", 256, "of a Laplacian", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 64, "of a Laplacian's network", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 30, "timed calls of each form of a Laplacian", lower_bound=1)
_CHECK = flags.DEFINE_bool("check", False, "compare values of a Laplacian and time nothing")
_PEER = flags.DEFINE_enum(
    "peer", None, ["deepxde", *sorted({*_METHODS, *_SHORT})], "whom npdg is compared with; pinn_adam by default"
)
_BACKEND = flags.DEFINE_enum("peer_backend", "jax", ["jax", "pytorch"], "of DeepXDE; pytorch has L-BFGS")
_PEER_PYTHON = flags.DEFINE_string("peer_python", ".venv-deepxde/bin/python", "DeepXDE's (`make peer-deepxde`)")
_PEER_POINTS = flags.DEFINE_list(
    "peer_points", None, "DeepXDE's training points inside and on the boundary; by default as many as ours"
)
_TARGET = flags.DEFINE_float(
    "target", None, "centred relative L2 error to reach; 0.05 against DeepXDE, else 0.1", lower_bound=1e-6
)
_BUDGET_S = flags.DEFINE_float("budget_s", None, "run seconds of a run; 25 against DeepXDE, else 30", lower_bound=0.1)
_SEEDS = flags.DEFINE_integer("seeds", None, "2 against DeepXDE, else 1", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_pde", "where summary.json and error.png of methods go")


def run() -> dict[str, Any]:
    what = _WHAT.value or ("laplacian" if _PEER.value is None else "methods")
    dims = _integers("dims", _DIMS.value or (["20", "50"] if what == "laplacian" else ["10", "20"]))
    if what == "methods":
        return methods(dims, _PEER.value or "pinn_adam")
    if _PEER.value is not None:
        raise job.BadUsage(f"--what=laplacian --peer={_PEER.value}: a Laplacian has no peer; expected one of the two")
    found = {
        f"d{dim}": laplacian(
            dim, points=_POINTS.value, width=_WIDTH.value, repeats=_REPEATS.value, timed=not _CHECK.value
        )
        for dim in dims
    }
    return {"platform": jax.default_backend()} | found


def methods(dims: list[int], peer: str) -> dict[str, Any]:
    """npdg and the peer, or its modes, on Poisson's equation."""
    outside = peer == "deepxde"
    target = _TARGET.value or (0.05 if outside else 0.1)
    seeds, budget_s = _SEEDS.value or (2 if outside else 1), _BUDGET_S.value or (25.0 if outside else 30.0)
    cases = [Case("poisson", dim, target) for dim in dims]
    config, others = NpdgConfig(), dict[str, Side]()
    ours = {_OURS: method_side(_OURS, _OURS, config)}
    interpreter = find_interpreter(_PEER_PYTHON.value, "peer-deepxde") if outside else None
    given = _PEER_POINTS.value or [str(config.interior_samples), str(config.boundary_samples)]
    points = _integers("peer_points", given, count=2)
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    use_compilation_cache(workdir / "compiled")
    before = foreign_now(2.0)
    with contextlib.ExitStack() as stack, LoadMeter() as meter:
        about: dict[str, Any] = {}
        processes = []
        if interpreter is not None:
            other = stack.enter_context(DeepXde(interpreter, _BACKEND.value, workdir, config))
            processes.append(other.process)
            tried = modes(_BACKEND.value, *points)
            others |= {mode.title: other.side(mode) for mode in tried}
            about = {"backend": _BACKEND.value, "versions": other.about["versions"], "peer_points": points}
        else:
            name = _SHORT.get(peer, peer)
            others[name] = method_side(name, name)
        runs = contest(cases, ours, others, seeds=seeds, budget_s=budget_s, processes=lambda: processes)
    found = summarise(runs, _OURS, list(others))
    summary = {"benchmark": "bench_pde", "peer": peer, "target": target, "seeds": seeds, "budget_s": budget_s}
    summary |= about | found | {
        "conclusive": before <= FOREIGN_LIMIT and found["foreign_cores"] <= FOREIGN_LIMIT,
        "foreign_cores_before": round(before, 3),
        "platform": jax.default_backend(),
        "dtype": "float32",
        "jax": jax.__version__,
        **describe(),
        "wall_s": round(meter.wall_s, 1),
    }  # fmt: skip
    write_summary(workdir, summary)
    draw(workdir / "error.png", runs, {case.name: case.target for case in cases})
    print(report(summary), file=sys.stderr)
    return summary


def _integers(name: str, text: list[str], count: int | None = None) -> list[int]:
    wanted = "integers above 0" if count is None else f"{count} integers above 0"
    try:
        values = [int(t) for t in text]
        if min(values) < 1 or (count is not None and len(values) != count):
            raise ValueError
    except ValueError:
        raise job.BadUsage(f"--{name}: found {','.join(text)!r}, expected {wanted}") from None
    return values


if __name__ == "__main__":
    job.main(run)
