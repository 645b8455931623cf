"""How fast our side could be if it did nothing but its matrix products: the denominator of `matmul_share`.

The limit of a run is the sum over its steps of the CPU seconds of the products of that step, each measured alone: the
four products of every layer for the rows of the step that carry a token of a request (padding rows are our own waste
and not counted), and the output matrix for the rows that draw a token. Alone means: packed weights,
`kernels.matmul.matmul`, one compiled loop through all layers of the model's own sizes, so that the weights come from as
far away as they do in a step; the least CPU time of several passes. Between the row counts measured the time is
interpolated. CPU seconds, not wall: they say the same on a machine that others use. Memory and clock of a machine still
move by a fifth within minutes, so the products are measured before and after every round, and a round is held against
the mean of the two.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.models.decoder import DecoderConfig
from kernels import matmul

Weight = jax.Array | matmul.PackedWeight

_ROWS = (1, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class MatmulTimes:
    """CPU seconds of the products alone: of all layers, and of the output matrix, at each of `rows`."""

    rows: tuple[int, ...]
    layers_s: tuple[float, ...]
    head_s: tuple[float, ...]

    def limit(self, steps: Iterable[tuple[int, int]]) -> float:
        """CPU seconds of the products of `steps`, each `(rows, sampled)`; linear between the row counts measured."""
        return sum(
            _interpolated(rows, self.rows, self.layers_s) + _interpolated(sampled, self.rows, self.head_s)
            for rows, sampled in steps
        )


def _interpolated(rows: int, known: Sequence[int], seconds: Sequence[float]) -> float:
    if rows == 0:
        return 0.0
    if rows > known[-1]:
        return seconds[-1] * rows / known[-1]
    return float(np.interp(rows, known, seconds))


def mean(times: Sequence[MatmulTimes]) -> MatmulTimes:
    """Of measurements at the same row counts."""
    return MatmulTimes(
        times[0].rows,
        tuple(map(statistics.fmean, zip(*(t.layers_s for t in times), strict=True))),
        tuple(map(statistics.fmean, zip(*(t.head_s for t in times), strict=True))),
    )


class Products:
    """The products of a model of `config`, compiled at row counts up to `max_rows` and ready to be timed.

    Args:
      dtype: of weights and rows.
    """

    def __init__(self, config: DecoderConfig, max_rows: int, *, dtype: str = "float32"):
        heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        width, inner = config.hidden_size, config.intermediate_size
        shapes = [(width, heads + 2 * keys), (heads, width), (width, 2 * inner), (inner, width)]

        def weights(shape: tuple[int, ...]) -> Weight:
            # Any normal numbers do: the time of a product does not depend on them. Packed exactly where the engine
            # packs.
            plain = jnp.full(shape, 1e-3, dtype)
            return matmul.pack(plain, dtype) if matmul.available() else plain

        stacks = [weights((config.num_layers, *shape)) for shape in shapes]
        head = weights((width, config.vocab_size))
        self._rows = (*(n for n in _ROWS if n < max_rows), max_rows)
        self._layers, self._heads = [], []
        for n in self._rows:
            x = tuple(jnp.ones((n, shape[0]), dtype) for shape in shapes)
            self._layers.append(_compiled(_through_layers, x, stacks))
            self._heads.append(_compiled(matmul.matmul, x[0], head))

    def measure(self, seconds_each: float = 0.5) -> MatmulTimes:
        """Their times now; each row count is repeated for `seconds_each` seconds, at least three times."""
        return MatmulTimes(
            self._rows,
            tuple(_cpu_seconds(run, seconds_each) for run in self._layers),
            tuple(_cpu_seconds(run, seconds_each / 3) for run in self._heads),
        )


def _through_layers(x: Sequence[jax.Array], stacks: Sequence[Weight]) -> Sequence[jax.Array]:
    """The products of every layer, one layer after the other."""

    def layer(index: jax.Array, outputs: Sequence[jax.Array]) -> Sequence[jax.Array]:
        chosen = [s.at_layer(index) if isinstance(s, matmul.PackedWeight) else s[index] for s in stacks]
        return tuple(matmul.matmul(rows, weight) for rows, weight in zip(x, chosen))

    nothing = tuple(jnp.zeros((rows.shape[0], stack.shape[-1]), jnp.float32) for rows, stack in zip(x, stacks))
    return jax.lax.fori_loop(0, stacks[0].shape[0], layer, nothing)


def _compiled(function: Callable, *arguments: Any) -> Callable[[], object]:
    """A call that computes `function` of `arguments` and waits for it; it has run once."""
    compiled = jax.jit(function).lower(*arguments).compile()

    def run() -> object:
        return jax.block_until_ready(compiled(*arguments))

    run()
    return run


def _cpu_seconds(run: Callable[[], object], seconds: float) -> float:
    best, repeats, until = float("inf"), 0, time.perf_counter() + seconds
    while repeats < 3 or time.perf_counter() < until:
        cpu = time.process_time()
        run()
        best = min(best, time.process_time() - cpu)
        repeats += 1
    return best
