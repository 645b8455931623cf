"""Time to an error: methods side by side on the same problems, networks, samples and clock."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jaxstack.pde.equations import poisson, poisson_rotated, semilinear, variable_coefficient
from jaxstack.pde.methods import MethodConfig
from jaxstack.pde.problem import Problem
from jaxstack.pde.solve import Stage, solve
from jaxstack.runtime.signals import StopFlag

_EQUATIONS = {
    "poisson": poisson,
    "poisson-rotated": poisson_rotated,
    "variable": variable_coefficient,
    "semilinear": semilinear,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem and the centred error that a method has to reach."""

    equation: str
    dim: int
    target: float

    @property
    def name(self) -> str:
        return f"{self.equation}-{self.dim}"

    @property
    def problem(self) -> Problem:
        return _EQUATIONS[self.equation](self.dim)


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A method under a label, with its settings; or stages of methods."""

    label: str
    method: str | tuple[Stage, ...]
    config: MethodConfig | None = None


def time_to_error(
    case: Case, entrant: Entrant, *, seed: int, budget_s: float, to_the_end: bool = False, stop: StopFlag | None = None
) -> dict[str, Any]:
    """One run.

    Args:
      case, entrant, seed: what runs.
      budget_s: run seconds after which it counts as not having arrived.
      to_the_end: use all of the budget, for the error at equal time.
      stop: ends it.

    Returns:
      `seconds` to the target, the budget itself where it was not reached (`censored`); the errors at the end and the
      best; a thinned history.
    """
    solution = solve(
        case.problem,
        entrant.method,
        config=entrant.config,
        budget_s=budget_s,
        target=None if to_the_end else case.target,
        seed=seed,
        evaluate_every=0 if not to_the_end else budget_s / 100,
        indicator=not isinstance(entrant.method, str),
        progress=False,
        stop=stop,
    )
    if solution.status == "interrupted" and stop is None:
        raise KeyboardInterrupt  # a run cut short says nothing of the method
    found = solution.time_to(case.target)
    rows = [(round(r["seconds"], 3), r["c_l2"]) for r in solution.history]
    kept = rows[:: max(1, len(rows) // 100)] + rows[-1:]
    assert solution.errors is not None
    return {
        "case": case.name, "label": entrant.label, "seed": seed, "status": solution.status,
        "seconds": budget_s if found is None else found, "censored": found is None,
        "c_l2": solution.errors["c_l2"], "rel_h1": solution.errors["rel_h1"],
        "best_c_l2": min((c for _, c in rows if math.isfinite(c)), default=None),
        "iterations": solution.iterations, "compile_s": round(solution.compile_s, 2), "history": kept,
    }  # fmt: skip


def ratios(runs: Sequence[Mapping[str, Any]], ours: str, other: str) -> dict[str, dict[str, Any]]:
    """By case: the median over seeds of the other's time over ours, and how many of each were censored. A censored time
    is the budget, so that a ratio with a censored other is at least what is said, and one with ours censored at most.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in dict.fromkeys(run["case"] for run in runs):
        pairs = []
        for seed in dict.fromkeys(run["seed"] for run in runs):
            both = [
                next((r for r in runs if (r["case"], r["seed"], r["label"]) == (case, seed, label)), None)
                for label in (ours, other)
            ]
            if both[0] is not None and both[1] is not None:
                pairs.append((both[0], both[1]))
        if pairs:
            found[case] = {
                "ratio": statistics.median(b["seconds"] / max(a["seconds"], 1e-9) for a, b in pairs),
                "seeds": len(pairs),
                "censored_ours": sum(a["censored"] for a, _ in pairs),
                "censored_other": sum(b["censored"] for _, b in pairs),
            }
    return found


def success_rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """label -> case -> share of seeds that reached the target."""
    found: dict[str, dict[str, float]] = {}
    for label in dict.fromkeys(run["label"] for run in runs):
        for case in dict.fromkeys(run["case"] for run in runs):
            mine = [not r["censored"] for r in runs if r["label"] == label and r["case"] == case]
            if mine:
                found.setdefault(label, {})[case] = sum(mine) / len(mine)
    return found
