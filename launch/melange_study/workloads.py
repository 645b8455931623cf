"""The workloads of the study, and the problems made of them.

The paper's requests are those of Chatbot Arena (short), of PubMed summaries (long), and four to one of both (mixed).
The data sets are not ours to ship: lognormal lengths stand in for them, and a CSV of lengths may take their place.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxstack.fleet.allocation import AllocationProblem, Workload
from jaxstack.fleet.profile import DATASHEETS, LatencyObjective, throughput_from_datasheet
from jaxstack.fleet.profile.lengths import PAPER_SIZED_GRID
from jaxstack.fleet.profile.roofline import MODELS, Roofline
from jaxstack.fleet.simulator import StepTimes
from jaxstack.runtime.errors import UserError

WORKLOADS = ("short", "long", "mixed")
MODEL = MODELS["llama-2-7b"]
SHEETS = tuple(DATASHEETS.values())
SAMPLES = 20_000

Lengths = tuple[Sequence[int], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is run.

    Args:
      rates_rps: of the cost curves.
      tpots_s: the objectives.
      headroom: on top of each rate.
      replay_s, warmup_s: of virtual time, and the part of it that does not count.
      seeds: of the arrivals where routing rules are compared.
      race: also race PuLP with CBC, if it is installed.
      cbc_limit_s: after which it is stopped.
    """

    rates_rps: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
    tpots_s: tuple[float, ...] = (0.12, 0.04)
    headroom: float = 0.15
    replay_s: float = 400.0
    warmup_s: float = 60.0
    seeds: int = 5
    race: bool = True
    cbc_limit_s: float = 5.0

    def __post_init__(self) -> None:
        for field in ("replay_s", "seeds", "cbc_limit_s"):
            if not getattr(self, field) > 0:
                raise UserError(f"{field}: found {getattr(self, field)}, expected a positive number")
        if not 0 <= self.warmup_s < self.replay_s:
            raise UserError(f"warmup_s: found {self.warmup_s}, expected from 0 to below {self.replay_s:g}")


@functools.cache
def lengths_of(name: str) -> Lengths:
    """Input and output lengths of a workload's requests, always the same ones."""
    draw = np.random.default_rng(0)
    if name == "mixed":
        parts = [_sample(draw, "short", SAMPLES * 4 // 5), _sample(draw, "long", SAMPLES // 5)]
        return tuple(np.concatenate(columns).tolist() for columns in zip(*parts))  # type: ignore[return-value]
    return tuple(column.tolist() for column in _sample(draw, name, SAMPLES))  # type: ignore[return-value]


def _sample(draw: np.random.Generator, name: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Median and sigma of the inputs', then of the outputs' logarithms."""
    read, spread, written, spread_written = {"short": (45, 1.25, 150, 0.95), "long": (3700, 0.6, 240, 0.5)}[name]
    inputs = np.round(draw.lognormal(math.log(read), spread, number))
    outputs = np.round(draw.lognormal(math.log(written), spread_written, number))
    grid = PAPER_SIZED_GRID
    return (
        np.clip(inputs, 1, grid.input_edges_tokens[-1]).astype(int),
        np.clip(outputs, 1, grid.output_edges_tokens[-1]).astype(int),
    )


def problem_of(
    name: str,
    rate_rps: float,
    tpot_s: float,
    *,
    point: str = "upper",
    headroom: float = 0.15,
    ttft_s: float | None = None,
    plan_ttft: bool = False,
) -> AllocationProblem:
    """The four types of the paper under the roofline, for a workload of the study.

    Args:
      point: where buckets are profiled, see `Workload.points`.
      ttft_s: what replays are held to.
      plan_ttft: whether profiles are held to it, too.
    """
    workload = Workload.from_lengths(PAPER_SIZED_GRID, *lengths_of(name), rate_rps)
    goal = LatencyObjective(tpot_s, ttft_s if plan_ttft else None)
    profile = throughput_from_datasheet(SHEETS, MODEL, PAPER_SIZED_GRID, goal, workload.points(point))
    profile = dataclasses.replace(profile, objective=LatencyObjective(tpot_s, ttft_s))
    return AllocationProblem(workload, tuple(s.accelerator() for s in SHEETS), profile, headroom=headroom)


def step_times() -> Mapping[str, StepTimes]:
    """Of the types, by the law that profiled them."""
    return {sheet.name: StepTimes.of_roofline(Roofline(sheet.device, MODEL)) for sheet in SHEETS}
