"""How many requests of which size: a rate, and the distribution of lengths over a grid."""

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Requests a second, and the share of each bucket.

    Args:
      distribution: sums to 1 within 1e-6.
      mean_tokens: mean input and output length of each bucket's requests, where they are known.

    Raises:
      UserError: a distribution of another shape or sum, a negative or infinite number.
    """

    grid: LengthGrid
    rate_rps: float
    distribution: Float[np.ndarray, "inputs outputs"]
    mean_tokens: tuple[Float[np.ndarray, "inputs outputs"], Float[np.ndarray, "inputs outputs"]] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate_rps) and self.rate_rps >= 0):
            raise UserError(f"rate_rps: found {self.rate_rps}, expected a number >= 0")
        table = np.array(self.distribution, dtype=float)
        if table.shape != self.grid.shape:
            found = " x ".join(map(str, table.shape))
            raise UserError(f"distribution: found a table of {found}, expected {self.grid.shape} as the grid has it")
        if not np.isfinite(table).all() or table.min() < 0:
            raise UserError("distribution: found a share that is negative or no number, expected shares from 0 to 1")
        if abs(table.sum() - 1) > 1e-6:
            raise UserError(f"distribution: found shares that sum to {table.sum():.6g}, expected 1")
        table.flags.writeable = False
        object.__setattr__(self, "distribution", table)

    @property
    def rates_rps(self) -> Float[np.ndarray, "inputs outputs"]:
        """Requests a second of each bucket."""
        return self.rate_rps * self.distribution

    def at_rate(self, rate_rps: float) -> "Workload":
        """The same requests at another rate."""
        return dataclasses.replace(self, rate_rps=rate_rps)

    def points(
        self, bucket_point: str
    ) -> tuple[Float[np.ndarray, "inputs outputs"], Float[np.ndarray, "inputs outputs"]]:
        """Where a bucket is to be profiled: at its "upper" corner, which never underestimates, or at the "mean" lengths
        of its requests.

        Raises:
          UserError: another word; or "mean" where the means are not known.
        """
        if bucket_point == "upper":
            return self.grid.upper_corners()
        if bucket_point != "mean":
            raise UserError(f"bucket_point: found {bucket_point!r}, expected 'upper' or 'mean'")
        if self.mean_tokens is None:
            raise UserError("bucket_point: found 'mean' for a workload without lengths, expected one made from lengths")
        return self.mean_tokens

    @classmethod
    def from_lengths(
        cls, grid: LengthGrid, input_tokens: Sequence[int], output_tokens: Sequence[int], rate_rps: float
    ) -> "Workload":
        """The distribution of requests whose lengths were seen.

        Raises:
          UserError: none at all, lists of different lengths, or requests beyond the last edge of the grid.
        """
        if len(input_tokens) != len(output_tokens) or not len(input_tokens):
            found = f"{len(input_tokens)} input and {len(output_tokens)} output lengths"
            raise UserError(f"lengths: found {found}, expected as many of one as of the other, at least 1")
        rows, columns = grid.buckets(input_tokens, output_tokens)
        counts = np.zeros(grid.shape)
        np.add.at(counts, (rows, columns), 1)
        means = []
        for tokens, corner in zip((input_tokens, output_tokens), grid.upper_corners()):
            sums = np.zeros(grid.shape)
            np.add.at(sums, (rows, columns), np.asarray(tokens, dtype=float))
            # A bucket that nothing was seen of keeps its corner.
            means.append(np.where(counts > 0, sums / np.maximum(counts, 1), corner))
        return cls(grid, rate_rps, counts / counts.sum(), (means[0], means[1]))


def read_lengths(path: str | Path) -> tuple[list[int], list[int]]:
    """Input and output lengths of a CSV with two columns, with or without a heading.

    Raises:
      UserError: no such file, or a line that is no two whole numbers; the message has the line.
    """
    try:
        rows = list(csv.reader(Path(path).read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}), expected a CSV of two columns") from None
    inputs: list[int] = []
    outputs: list[int] = []
    for number, row in enumerate(rows, 1):
        try:
            read, written = (int(cell) for cell in row)
        except ValueError:
            if number == 1 and len(row) == 2:
                continue
            raise UserError(f"{path}:{number}: found {','.join(row)!r}, expected two whole numbers of tokens") from None
        inputs.append(read)
        outputs.append(written)
    if not inputs:
        raise UserError(f"{path}: found no lengths, expected lines of two whole numbers (input, output tokens)")
    return inputs, outputs
