"""What the Laplacian of a network costs: forward, by nested differentiation, and the parameters' gradient of each."""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.pde.networks import Mlp
from jaxstack.pde.operators import forward_laplacian, jvp_laplacian, nested_laplacian


def forms(net: Mlp) -> dict[str, Callable[[Array, Array], Array]]:
    """The Laplacian of a network at points, by name."""
    return {
        "forward": lambda p, x: forward_laplacian(net, p, x).second,
        "jvp_of_grad": lambda p, x: jvp_laplacian(lambda y: net(p, y), x),
        "nested_hessian": lambda p, x: nested_laplacian(lambda y: net(p, y[None])[0], x),
    }


def laplacian(dim: int, *, points: int, width: int, repeats: int, timed: bool = True) -> dict[str, Any]:
    """Each form's gradient: agreement with the forward one, milliseconds and scratch memory."""
    net = Mlp.of(dim, width, 4)
    flat = net.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (points, dim))
    rows: dict[str, Any] = {}
    reference: np.ndarray | None = None
    for name, form in forms(net).items():
        gradient = jax.jit(jax.grad(lambda p, f=form: jnp.mean(f(p, x) ** 2))).lower(flat).compile()
        found = np.asarray(gradient(flat))
        reference = found if reference is None else reference
        row: dict[str, Any] = {"difference": float(np.abs(found - reference).max() / np.abs(reference).max())}
        if timed:
            times = []
            for _ in range(repeats):
                begin = time.process_time()
                jax.block_until_ready(gradient(flat))
                times.append(time.process_time() - begin)
            row["cpu_ms"] = round(1e3 * min(times), 3)
            memory = gradient.memory_analysis()
            row["scratch_mb"] = None if memory is None else round(memory.temp_size_in_bytes / 1e6, 2)
        rows[name] = row
        print(f"d={dim} {name}: {row}", file=sys.stderr, flush=True)
    if timed:
        ours = rows["forward"]
        for name in ("jvp_of_grad", "nested_hessian"):
            rows[f"speedup_over_{name}"] = round(rows[name]["cpu_ms"] / max(ours["cpu_ms"], 1e-9), 2)
            if ours["scratch_mb"]:
                rows[f"memory_of_{name}_over_ours"] = round(rows[name]["scratch_mb"] / ours["scratch_mb"], 2)
    return rows
