"""Did both sides do the same work: equally many tokens, and the same ones up to the first that rounding may decide."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxstack.models.attention import dense_attention
from jaxstack.models.checkpoint import load_decoder

# Two logits closer than this may change places between two correct programs, by the dtype of weights and activations:
# bfloat16 keeps 8 bits, and the logits of these models are of order 1.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.1}

MarginAt = Callable[[Sequence[int]], float]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first place where the answers to one request part; `margin` between our two best logits there."""

    request: int
    position: int
    ours: int
    theirs: int
    margin: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What a comparison of two sets of answers found.

    Attributes:
      counts_equal: every request got the number of tokens asked for, on both sides.
      compared, equal: requests compared, and those with the same tokens throughout.
      differences: one for each request that is not equal.
      near_tie: margin below which a difference is rounding's.
    """

    counts_equal: bool = True
    compared: int = 0
    equal: int = 0
    differences: tuple[Difference, ...] = ()
    near_tie: float = NEAR_TIE["float32"]

    @property
    def tokens_agree(self) -> bool:
        """Every difference is at a near-tie."""
        return self.counts_equal and all(d.margin < self.near_tie for d in self.differences)

    def __add__(self, other: "Agreement") -> "Agreement":
        return Agreement(
            self.counts_equal and other.counts_equal,
            self.compared + other.compared,
            self.equal + other.equal,
            self.differences + other.differences,
            self.near_tie,
        )


def compare(
    prompts: Sequence[Sequence[int]],
    max_tokens: Sequence[int],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    margin_at: MarginAt,
) -> Agreement:
    """Compares answers request by request, token by token. After a difference the two follow different texts, so it
    ends there.

    Args:
      margin_at: difference of the two best logits after the given tokens.
    """
    counts_equal = all(len(mine) == len(other) == n for mine, other, n in zip(ours, theirs, max_tokens, strict=True))
    differences = []
    for i, (mine, other) in enumerate(zip(ours, theirs)):
        at = next((k for k, (a, b) in enumerate(zip(mine, other)) if a != b), None)
        if at is not None:
            margin = margin_at([*prompts[i], *mine[:at]])
            differences.append(Difference(i, at, mine[at], other[at], margin))
    return Agreement(counts_equal, len(ours), len(ours) - len(differences), tuple(differences))


class PlainForward:
    """`margin_at` by one whole forward pass with dense attention and plain weights, loaded on first use."""

    def __init__(self, folder: Path, window: int):
        self._folder, self._window = folder, window
        self._best_two: Callable | None = None

    def __call__(self, tokens: Sequence[int]) -> float:
        if self._best_two is None:
            self._best_two = self._compile()
        padded = np.zeros(self._window, np.int32)
        padded[: len(tokens)] = tokens
        best = self._best_two(padded, len(tokens))
        return float(best[0] - best[1])

    def _compile(self) -> Callable:
        graph, weights = nnx.split(load_decoder(self._folder, progress=False))

        @jax.jit
        def best_two(weights: nnx.State, tokens: jax.Array, length: jax.Array) -> jax.Array:
            decoder = nnx.merge(graph, weights)
            positions = jnp.arange(self._window)
            attend = dense_attention((positions < length).astype(jnp.int32), positions)
            hidden, _ = decoder.hidden(tokens, positions, attend)
            return jax.lax.top_k(decoder.logits(hidden[length - 1]), 2)[0]

        return partial(best_two, weights)
