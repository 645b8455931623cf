"""One vector for a prompt: its final hidden states pooled, as the chunks of it are computed."""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32

from jaxstack.runtime.errors import UserError

Pooling = Literal["mean", "last"]


class Pooled:
    """Gathers the hidden states of a prompt.

    Args:
      kind: the mean over the prompt, or its last token's.

    Attributes:
      vector: the result, once the prompt's last token has been computed.

    Raises:
      UserError: another kind.
    """

    def __init__(self, kind: Pooling):
        if kind not in get_args(Pooling):
            raise UserError(f"pooling: found {kind!r}, expected one of {', '.join(get_args(Pooling))}")
        self.kind = kind
        self.vector: Float32[np.ndarray, " D"] | None = None
        self._total: Float[np.ndarray, " D"] | None = None

    @property
    def whole(self) -> bool:
        """Whether every token has to be computed: nothing may come from the prefix cache."""
        return self.kind == "mean"

    def add(self, start: int, hidden: Float[np.ndarray, "count D"], *, last: bool) -> None:
        """Tokens `[start, start + count)`, in order; from 0 again after a preemption. `last`: the prompt ends there."""
        if self.kind == "mean":
            total = hidden.sum(axis=0, dtype=np.float64)
            self._total = total if start == 0 or self._total is None else self._total + total
            if last:
                self.vector = (self._total / (start + len(hidden))).astype(np.float32)
        elif last:
            self.vector = hidden[-1].astype(np.float32)
