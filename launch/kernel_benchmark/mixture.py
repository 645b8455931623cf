"""Products with a matrix a row: experts, and low-rank adapters."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels import grouped_matmul as grouped_matmul_package
from kernels import lora_matmul as lora_matmul_package
from kernels import platforms
from kernels.grouped_matmul import grouped_matmul
from kernels.lora_matmul import lora_matmul
from launch.kernel_benchmark.case import Case, Cases, Scale, forms_of, layers_to_stay_cold, nbytes, normal


def _dtype():
    return jnp.float32 if platforms.platform() == "cpu" else jnp.bfloat16


def grouped_matmul_cases(scale: Scale) -> Cases:
    """Rows spread over the experts at random; full: Qwen3-30B-A3B's experts, 8 of 128 a token."""
    yield _grouped(29, 5, 40, 200, timed=False)
    experts, depth, columns = (32, 768, 768) if scale == "default" else (128, 2048, 768)
    for rows in (32, 256, 2048) if scale == "default" else (8, 512, 16384):
        yield _grouped(rows, experts, depth, columns)


def _grouped(rows, experts, depth, columns, timed=True):
    rng = np.random.default_rng(0)
    # The last rows belong to nobody, as in a bucket that is not full.
    sizes = rng.multinomial(rows - rows // 16, np.ones(experts) / experts)
    dtype = _dtype()
    one = depth * columns * jnp.dtype(dtype).itemsize
    layers = layers_to_stay_cold(experts * one) if timed else 2
    w = normal(rng, layers, experts, depth, columns, dtype=dtype)
    x = normal(rng, rows, depth, dtype=dtype)
    inputs = [(x, w, jnp.asarray(sizes, jnp.int32), jnp.int32(layer)) for layer in range(layers)]

    def call(x, w, sizes, layer, implementation):
        return grouped_matmul(x, w, sizes, layer=layer, implementation=implementation)

    moved = int((sizes > 0).sum()) * one + nbytes(x) + rows * columns * jnp.dtype(dtype).itemsize
    return Case(
        "grouped_matmul",
        f"{experts} x {depth}x{columns}, {rows} rows",
        forms_of(grouped_matmul_package, call, inputs, moved, interpret=not timed),
        functools.partial(call, *inputs[0], implementation="ref") if rows * experts * columns < 1 << 28 else None,
        timed,
        flops=2 * int(sizes.sum()) * depth * columns,
    )


def lora_matmul_cases(scale: Scale) -> Cases:
    """Eight adapters and none, at random over the rows, sorted as the engine sorts them."""
    yield _lora(21, 5, 100, 6, 130, timed=False)
    depth, rank, columns = (896, 16, 4864) if scale == "default" else (4096, 16, 6144)
    for rows in (32, 256) if scale == "default" else (64, 4096):
        yield _lora(rows, 9, depth, rank, columns)


def _lora(rows, adapters, depth, rank, columns, timed=True):
    rng = np.random.default_rng(0)
    of_row = np.sort(rng.integers(0, adapters, rows))
    dtype = _dtype()
    used = len(set(of_row.tolist()) - {0}) * (depth + columns) * rank * jnp.dtype(dtype).itemsize
    layers = layers_to_stay_cold(used, most=24) if timed else 2
    a, b = (
        normal(rng, layers, adapters, depth, rank, dtype=dtype),
        normal(rng, layers, adapters, rank, columns, dtype=dtype),
    )
    x, scales = normal(rng, rows, depth, dtype=dtype), jnp.ones((layers, adapters), dtype)
    inputs = [(x, a, b, scales, jnp.asarray(of_row, jnp.int32), jnp.int32(layer)) for layer in range(layers)]

    def call(x, a, b, scales, of_row, layer, implementation):
        return lora_matmul(x, a, b, scales, of_row, layer=layer, implementation=implementation)

    moved = used + nbytes(x) + rows * columns * jnp.dtype(dtype).itemsize
    return Case(
        "lora_matmul",
        f"{adapters - 1} of rank {rank}, {depth}x{columns}, {rows} rows",
        forms_of(lora_matmul_package, call, inputs, moved, interpret=not timed),
        # The oracle gathers two factors a row.
        functools.partial(call, *inputs[0], implementation="ref")
        if rows * (depth + columns) * rank < 1 << 28
        else None,
        timed,
        flops=2 * int((of_row > 0).sum()) * (depth + columns) * rank,
    )
