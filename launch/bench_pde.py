"""What the solver's parts cost: the forward Laplacian against nested differentiation, and methods' seconds to an error.

    python -m launch.bench_pde                               # the Laplacian's gradient at 20 and 50 dimensions
    python -m launch.bench_pde --what=methods --dims=10,20   # npdg beside --peer on Poisson's equation
    python -m launch.bench_pde --what=methods --dims=2 --peer=pinn_engd

The Laplacian: the gradient by the parameters of the mean squared Laplacian of a network, which is what a residual
  method
pays in each iteration; processor milliseconds, the least of many, and the program's scratch memory as its compiler
plans it. `--check` compares values only. Methods run in turn with the same network and sample sizes; one that does not
reach the error within `--budget_s` counts as that, and is flagged.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array

from jaxstack.pde.compare import Case, Entrant, ratios, time_to_error
from jaxstack.pde.methods import METHODS
from jaxstack.pde.networks import Mlp
from jaxstack.pde.operators import forward_laplacian, jvp_laplacian, nested_laplacian
from launch import job

_WHAT = flags.DEFINE_enum("what", "laplacian", ["laplacian", "methods"], "which comparison")
_DIMS = flags.DEFINE_list("dims", None, "dimensions; by default 20,50 for the Laplacian and 10,20 for methods")
_POINTS = flags.DEFINE_integer("points", 256, "of a Laplacian", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 64, "of the network", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 30, "timed calls of each form", lower_bound=1)
_PEER = flags.DEFINE_enum("peer", "pinn_adam", sorted(set(METHODS) - {"npdg", "transport"}), "npdg's")
_TARGET = flags.DEFINE_float("target", 0.1, "centred relative L2 error that methods are to reach", lower_bound=1e-6)
_BUDGET_S = flags.DEFINE_float("budget_s", 30.0, "run seconds of a method", lower_bound=0.1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "of the methods", lower_bound=1)
_CHECK = flags.DEFINE_bool("check", False, "compare values and time nothing")


def forms(net: Mlp) -> dict[str, Callable[[Array, Array], Array]]:
    """The Laplacian of a network at points, by name."""
    return {
        "forward": lambda p, x: forward_laplacian(net, p, x).second,
        "jvp_of_grad": lambda p, x: jvp_laplacian(lambda y: net(p, y), x),
        "nested_hessian": lambda p, x: nested_laplacian(lambda y: net(p, y[None])[0], x),
    }


def laplacian(dim: int) -> dict[str, Any]:
    """Each form's gradient: agreement with the forward one, milliseconds and scratch memory."""
    net = Mlp.of(dim, _WIDTH.value, 4)
    flat = net.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (_POINTS.value, dim))
    rows: dict[str, Any] = {}
    reference: np.ndarray | None = None
    for name, form in forms(net).items():
        gradient = jax.jit(jax.grad(lambda p, f=form: jnp.mean(f(p, x) ** 2))).lower(flat).compile()
        found = np.asarray(gradient(flat))
        reference = found if reference is None else reference
        row: dict[str, Any] = {"difference": float(np.abs(found - reference).max() / np.abs(reference).max())}
        if not _CHECK.value:
            times = []
            for _ in range(_REPEATS.value):
                begin = time.process_time()
                jax.block_until_ready(gradient(flat))
                times.append(time.process_time() - begin)
            row["cpu_ms"] = round(1e3 * min(times), 3)
            memory = gradient.memory_analysis()
            row["scratch_mb"] = None if memory is None else round(memory.temp_size_in_bytes / 1e6, 2)
        rows[name] = row
        print(f"d={dim} {name}: {row}", file=sys.stderr, flush=True)
    if not _CHECK.value:
        ours = rows["forward"]
        for name in ("jvp_of_grad", "nested_hessian"):
            rows[f"speedup_over_{name}"] = round(rows[name]["cpu_ms"] / max(ours["cpu_ms"], 1e-9), 2)
            if ours["scratch_mb"]:
                rows[f"memory_of_{name}_over_ours"] = round(rows[name]["scratch_mb"] / ours["scratch_mb"], 2)
    return rows


def methods(dims: list[int]) -> dict[str, Any]:
    """Seconds to the error by method, dimension and seed."""
    runs = []
    for dim in dims:
        case = Case("poisson", dim, _TARGET.value)
        for seed in range(_SEEDS.value):
            for name in ("npdg", _PEER.value):
                found = time_to_error(case, Entrant(name, name), seed=seed, budget_s=_BUDGET_S.value)
                mark = ">" if found["censored"] else ""
                print(
                    f"{case.name} seed {seed} {name}: {mark}{found['seconds']:.2f} s, best {found['best_c_l2']:.3g}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                runs.append({k: v for k, v in found.items() if k != "history"})
    by_case = ratios(runs, "npdg", _PEER.value)
    ratio = statistics.median(row["ratio"] for row in by_case.values())
    return {"peer": _PEER.value, "time_to_error_ratio": ratio, "time_to_error_ratio_by_problem": by_case, "runs": runs}


def run() -> dict[str, Any]:
    text = _DIMS.value or (["20", "50"] if _WHAT.value == "laplacian" else ["10", "20"])
    try:
        dims = [int(t) for t in text]
        if min(dims) < 1:
            raise ValueError
    except ValueError:
        raise job.BadUsage(f"--dims: found {','.join(text)!r}, expected integers above 0") from None
    if _WHAT.value == "methods":
        return methods(dims)
    return {"platform": jax.default_backend()} | {f"d{dim}": laplacian(dim) for dim in dims}


if __name__ == "__main__":
    job.main(run)
