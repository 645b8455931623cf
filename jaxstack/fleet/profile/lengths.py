"""Buckets of request sizes: input lengths x output lengths, each named by its upper edge."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class LengthGrid:
    """Upper edges of the buckets, strictly increasing, in tokens. Bucket (i, j) has inputs of more than edge i - 1 and
    at most edge i, and outputs likewise.

    Raises:
      UserError: no edges, or edges that do not increase from at least 1.
    """

    input_edges_tokens: tuple[int, ...]
    output_edges_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("input_edges_tokens", "output_edges_tokens"):
            edges = tuple(int(edge) for edge in getattr(self, name))
            if not edges or edges[0] < 1 or any(b <= a for a, b in itertools.pairwise(edges)):
                raise UserError(f"{name}: found {list(edges)}, expected increasing whole numbers of tokens from 1")
            object.__setattr__(self, name, edges)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.input_edges_tokens), len(self.output_edges_tokens)

    def bucket(self, input_tokens: int, output_tokens: int) -> tuple[int, int]:
        """The bucket of one request. Raises UserError beyond the last edges."""
        rows, columns = self.buckets([input_tokens], [output_tokens])
        return int(rows[0]), int(columns[0])

    def buckets(
        self, input_tokens: Sequence[int], output_tokens: Sequence[int]
    ) -> tuple[Int[np.ndarray, "requests"], Int[np.ndarray, "requests"]]:
        """The bucket of each request, as two arrays of indices.

        Raises:
          UserError: lengths beyond the last edge; the message says how many and the longest.
        """
        return (
            _places(input_tokens, self.input_edges_tokens, "input"),
            _places(output_tokens, self.output_edges_tokens, "output"),
        )

    def upper_corners(self) -> tuple[Float[np.ndarray, "inputs outputs"], Float[np.ndarray, "inputs outputs"]]:
        """Input and output lengths of each bucket's largest request."""
        inputs, outputs = np.meshgrid(self.input_edges_tokens, self.output_edges_tokens, indexing="ij")
        return inputs.astype(float), outputs.astype(float)

    def name(self, row: int, column: int) -> str:
        """A bucket in words."""
        return f"input <= {self.input_edges_tokens[row]}, output <= {self.output_edges_tokens[column]} tokens"


PAPER_SIZED_GRID = LengthGrid(
    (25, 100, 250, 500, 1000, 2000, 4000, 8000, 16000, 32000), (25, 100, 250, 500, 1000, 2000)
)
"""60 buckets, as many as in the study of Melange."""


def _places(tokens: Sequence[int], edges: tuple[int, ...], which: str) -> Int[np.ndarray, "requests"]:
    lengths = np.asarray(tokens)
    if lengths.size and lengths.min() < 0:
        raise UserError(f"{which} lengths: found {lengths.min()}, expected numbers of tokens >= 0")
    beyond = int((lengths > edges[-1]).sum())
    if beyond:
        raise UserError(
            f"{which} lengths: found {beyond} requests beyond the last edge, the longest of {lengths.max()} tokens; "
            f"expected at most {edges[-1]}"
        )
    return np.searchsorted(np.asarray(edges), lengths, side="left")
