"""Accelerator types, objectives of latency, and the rates that types sustain within one."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class AcceleratorType:
    """What may be rented as one replica.

    Args:
      price_usd_per_hour: of one replica.
      max_count: replicas that can be had; None: any number.
      instance_devices: devices of one replica (tensor parallelism).

    Raises:
      UserError: a value out of range; the message names the type.
    """

    name: str
    price_usd_per_hour: float
    max_count: int | None = None
    instance_devices: int = 1

    def __post_init__(self) -> None:
        price = self.price_usd_per_hour
        if not self.name:
            raise UserError("type: found an empty name, expected one")
        if not (math.isfinite(price) and price >= 0):
            raise UserError(f"{self.name}: price_usd_per_hour: found {price}, expected a number >= 0")
        if self.max_count is not None and self.max_count < 0:
            raise UserError(f"{self.name}: max_count: found {self.max_count}, expected an integer >= 0 or None")
        if self.instance_devices < 1:
            raise UserError(f"{self.name}: instance_devices: found {self.instance_devices}, expected an integer >= 1")


@dataclasses.dataclass(frozen=True)
class LatencyObjective:
    """What a share `quantile` of all requests must keep: a mean time per output token after the first, and perhaps a
    time to the first.
    """

    tpot_s: float
    ttft_s: float | None = None
    quantile: float = 0.99

    def __post_init__(self) -> None:
        for name in ("tpot_s", "ttft_s"):
            value = getattr(self, name)
            if not (value is None and name == "ttft_s") and not (value is not None and value > 0):
                raise UserError(f"objective: {name}: found {value}, expected a positive number of seconds")
        if not 0 < self.quantile <= 1:
            raise UserError(f"objective: quantile: found {self.quantile}, expected a share above 0, at most 1")


@dataclasses.dataclass(frozen=True, eq=False)
class ThroughputProfile:
    """The highest rate that one replica of each type sustains on requests of each bucket within the objective.

    Args:
      max_rate_rps: by type; 0 where it never can (None and NaN are read as 0).
      concurrency: requests under way at that rate; 0 where it cannot serve. None: not known.
      provenance: where it comes from, in words.

    Raises:
      UserError: a table of another shape than the grid, a negative or infinite rate, types that differ between the
        tables; the message names the type.
    """

    grid: LengthGrid
    max_rate_rps: Mapping[str, Float[np.ndarray, "inputs outputs"]]
    objective: LatencyObjective
    concurrency: Mapping[str, Float[np.ndarray, "inputs outputs"]] | None = None
    source: Literal["measured", "datasheet"] = "measured"
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = {"max_rate_rps": self.max_rate_rps}
        if self.concurrency is not None:
            tables["concurrency"] = self.concurrency
            if set(self.concurrency) != set(self.max_rate_rps):
                odd = sorted(set(self.concurrency) ^ set(self.max_rate_rps))[0]
                raise UserError(f"profile: {odd!r} is in one of max_rate_rps and concurrency, expected in both")
        for field, table in tables.items():
            kept = {name: _checked(f"profile: {name}: {field}", values, self.grid) for name, values in table.items()}
            object.__setattr__(self, field, kept)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.max_rate_rps)

    def loads(self, names: Sequence[str]) -> Float[np.ndarray, "inputs outputs types"]:
        """Replicas that one request a second takes, infinite where the type cannot serve."""
        rates = np.stack([self.max_rate_rps[name] for name in names], axis=-1)
        with np.errstate(divide="ignore"):
            return np.where(rates > 0, 1 / rates, np.inf)

    def only(self, names: Sequence[str]) -> "ThroughputProfile":
        """The same, of some of the types."""
        pick = lambda table: {name: table[name] for name in names}  # noqa: E731
        return dataclasses.replace(
            self,
            max_rate_rps=pick(self.max_rate_rps),
            concurrency=None if self.concurrency is None else pick(self.concurrency),
        )


def _checked(what: str, values: object, grid: LengthGrid) -> Float[np.ndarray, "inputs outputs"]:
    try:
        table = np.array(values, dtype=float)  # None becomes NaN
    except (TypeError, ValueError):
        raise UserError(f"{what}: found rows that are no table of numbers, expected {_shape(grid)}") from None
    if table.shape != grid.shape:
        raise UserError(f"{what}: found a table of {' x '.join(map(str, table.shape))}, expected {_shape(grid)}")
    table[np.isnan(table)] = 0.0
    if not np.isfinite(table).all() or table.min() < 0:
        worst = table[~np.isfinite(table)][0] if not np.isfinite(table).all() else table.min()
        raise UserError(f"{what}: found {worst}, expected finite numbers >= 0")
    table.flags.writeable = False
    return table


def _shape(grid: LengthGrid) -> str:
    return f"{grid.shape[0]} x {grid.shape[1]} (inputs x outputs)"
