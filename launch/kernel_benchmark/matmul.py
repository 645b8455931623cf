"""Dense products: `x @ w`, plain, stacked and packed."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels import platforms
from kernels.matmul import StackedWeight, available, matmul, pack
from launch.kernel_benchmark.case import COLD_BYTES, Case, Cases, Form, Scale, normal

# What Qwen2.5-0.5B multiplies by; then Llama 3 8B.
SHAPES: dict[Scale, list[str]] = {
    "default": ["896x1152", "896x4864", "4864x896", "896x151936"],
    "full": ["4096x6144", "4096x28672", "14336x4096", "4096x128256"],
}
ROWS: dict[Scale, list[int]] = {"default": [1, 8, 32, 256], "full": [1, 16, 64, 512, 4096]}


def cases(shapes: list[tuple[int, int]], rows: list[int]) -> Cases:
    """Forms: "xla" a plain matrix, "cpu" the compiled kernel with packed ones, in two dtypes on a CPU; "pallas_gpu" a
    matrix of a stack.
    """
    on_cpu = platforms.platform() == "cpu"
    dtypes = [jnp.float32, jnp.bfloat16] if on_cpu else [jnp.bfloat16]
    rng = np.random.default_rng(0)
    yield _case(rng, 37, 130, [5], dtypes, on_cpu, timed=False)[0]
    for depth, columns in shapes:
        yield from _case(rng, depth, columns, rows, dtypes, on_cpu)


def _case(rng, depth, columns, rows, dtypes, on_cpu, timed=True):
    size = 4 * depth * columns
    count = max(1, min(8, (1 << 30) // size), COLD_BYTES // size) if timed else 1
    plain = [normal(rng, depth, columns) for _ in range(count)]
    weights: dict[str, list] = {}
    for dtype in dtypes:
        name = "" if dtype == jnp.float32 else " bf16"
        # XLA's bfloat16 products on a CPU: measured, but only where they do not take all day.
        if dtype == jnp.float32 or not on_cpu:
            weights["xla" + name] = [w.astype(dtype) for w in plain]
        if on_cpu and available():
            weights["cpu" + name] = [pack(w, dtype) for w in plain]
        if not platforms.why_not("pallas_gpu"):
            stack = StackedWeight(jnp.stack(plain).astype(dtype))
            weights["pallas_gpu" + name] = [stack.at_layer(i) for i in range(count)]
    found = []
    for n in rows:
        x = normal(rng, n, depth)
        forms = {}
        for name, some in weights.items():
            dtype = some[0].dtype
            inputs = [(x.astype(dtype), w) for w in some]
            moved = (n * depth + depth * columns) * dtype.itemsize + 4 * n * columns
            forms[name] = Form(jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32)), inputs, moved)
        reference = lambda x=x: matmul(x, plain[0], implementation="ref")  # noqa: E731
        label = f"{depth}x{columns}, {n} rows"
        found.append(Case("matmul", label, forms, reference, timed, flops=2 * n * depth * columns))
    return found
