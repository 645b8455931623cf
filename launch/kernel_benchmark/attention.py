"""Attention over the paged cache, and writing into it."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels import kv_write as kv_write_package
from kernels import paged_attention as paged_attention_package
from kernels import platforms
from kernels.kv_write import kv_write
from kernels.paged_attention import paged_attention, ragged
from launch.kernel_benchmark.case import Case, Cases, Scale, forms_of, layers_to_stay_cold, nbytes, normal

# Heads, KV heads, head_dim, page_size: Qwen3-0.6B's on a CPU, Llama 3 8B's on an accelerator.
_HEADS: dict[Scale, tuple[int, int, int, int]] = {"default": (16, 8, 128, 16), "full": (32, 8, 128, 64)}
# (decode rows, context); (new tokens of one sequence, earlier ones).
_DECODES: dict[Scale, list[tuple[int, int]]] = {"default": [(1, 512), (32, 512)], "full": [(1, 2048), (64, 2048)]}
_CHUNKS: dict[Scale, list[tuple[int, int]]] = {"default": [(256, 256)], "full": [(2048, 2048)]}


def _dtype():
    return jnp.float32 if platforms.platform() == "cpu" else jnp.bfloat16


def attention_cases(scale: Scale) -> Cases:
    """Decode steps of equal contexts, and chunks of a prompt after an earlier part of it."""
    yield _attention("ragged", [5, 37], [(3, 0), (70, 9)], (4, 2, 128, 16), timed=False)
    heads = _HEADS[scale]
    for rows, context in _DECODES[scale]:
        yield _attention(f"decode, {rows} x {context} tokens", [context] * rows, [], heads)
    for new, earlier in _CHUNKS[scale]:
        yield _attention(f"chunk of {new} after {earlier}", [], [(new, earlier)], heads)


def _attention(label, decodes, chunks, shape, timed=True):
    heads, kv_heads, head_dim, page = shape
    rng = np.random.default_rng(0)
    new = [1] * len(decodes) + [n for n, _ in chunks]
    total = [*decodes, *(n + earlier for n, earlier in chunks)]
    pages = -(-max(total) // page)
    rows = len(new) if not chunks else -(-sum(new) // 64) * 64
    tables = rng.permutation(len(new) * pages).reshape(len(new), pages)
    as32 = lambda values: jnp.asarray(values, jnp.int32)  # noqa: E731
    batch = ragged(as32(tables), as32(total), as32(np.cumsum([0, *new])), jnp.int32(len(decodes)), rows=rows)
    dtype = _dtype()
    read = sum(total) * 2 * kv_heads * head_dim * jnp.dtype(dtype).itemsize
    layers = layers_to_stay_cold(read) if timed else 1
    kv = normal(rng, layers, len(new) * pages, page, 2 * kv_heads, head_dim, dtype=dtype)
    q = normal(rng, rows, heads, head_dim, dtype=dtype)

    def call(q, kv, layer, batch, implementation):
        out = paged_attention(q, kv, layer, batch, scale=head_dim**-0.5, implementation=implementation)
        # Rows past the batch mean nothing.
        return jnp.where(jnp.arange(rows)[:, None, None] < sum(new), out, 0)

    inputs = [(q, kv, jnp.int32(layer), batch) for layer in range(layers)]
    pairs = sum(n * (t - n) + n * (n + 1) // 2 for n, t in zip(new, total))
    return Case(
        "paged_attention",
        label,
        forms_of(paged_attention_package, call, inputs, read + 2 * nbytes(q), interpret=not timed),
        # The oracle gathers every row's whole context.
        functools.partial(call, *inputs[0], implementation="ref") if not chunks or not timed else None,
        timed,
        flops=4 * pairs * heads * head_dim,
    )


def kv_write_cases(scale: Scale) -> Cases:
    """Rows to slots all over the cache."""
    yield _kv_write(5, 2, (4, 2, 128, 16), timed=False)
    for rows in (32, 512) if scale == "default" else (64, 4096):
        yield _kv_write(rows, 4, _HEADS[scale])


def _kv_write(rows, layers, shape, timed=True):
    _, kv_heads, head_dim, page = shape
    rng = np.random.default_rng(0)
    pages = max(64, -(-2 * rows // page))
    dtype = _dtype()
    cache = normal(rng, layers, pages, page, 2 * kv_heads, head_dim, dtype=dtype)
    k, v = (normal(rng, rows, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    slots = jnp.asarray(rng.permutation(pages * page)[:rows], jnp.int32)
    inputs = [(cache, k, v, jnp.int32(layer), slots) for layer in range(layers)]
    call = lambda *arguments, implementation: kv_write(*arguments, implementation=implementation)  # noqa: E731
    forms = forms_of(kv_write_package, call, inputs, 2 * nbytes(k, v), interpret=not timed, donated=True)
    return Case("kv_write", f"{rows} rows", forms, functools.partial(call, *inputs[0], implementation="ref"), timed)
