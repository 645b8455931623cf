"""Settings by trial: every method has the same number of them, on a seed that no comparison uses.

`tuned.json` is what the trials found on one core (`--sections=tuning` makes it anew, in the working folder, and the
comparisons then take that one). A trial is judged by the seconds to the target, and by the error where it was not
reached.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxstack.pde.compare import Case, Entrant, time_to_error
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.signals import StopFlag
from launch.pdhg_study.entrants import config_of

TRIALS = 12
"""Of each method and problem."""
SEED = 100
SHIPPED = Path(__file__).with_name("tuned.json")


def trials(entrant: Entrant) -> list[dict[str, Any]]:
    """The settings that are tried."""
    rates, weights = (3e-4, 1e-3, 3e-3, 1e-2), (100.0, 1000.0, 10_000.0)
    found: list[dict[str, Any]]
    match entrant.label:
        case "npdg":
            steps = ((0.1, 0.19), (0.2, 0.2), (0.3, 0.3))
            found = [
                {"tau_u": u, "tau_phi": p, "boundary_weight": w} for w in (10.0, 30.0, 100.0, 300.0) for u, p in steps
            ]
        case "pinn_adam_tuned":
            found = [
                {"interior_samples": n, "boundary_samples": n // 2, "learning_rate": r, "decay_steps": d}
                for n in (100, 200, 400)
                for r in (3e-3, 1e-2)
                for d in (None, 4000)
            ]
        case "pinn_adam" | "deepritz" | "wan":
            found = [{"learning_rate": r, "boundary_weight": w} for r in rates for w in weights]
        case "pinn_lbfgs":
            found = [
                {"memory": m, "renew": n, "boundary_weight": w} for m in (10, 30) for n in (50, 200) for w in weights
            ]
        case "pinn_engd" | "pinn_spring":
            found = [{"damping": d, "boundary_weight": w} for d in (1e-4, 1e-3, 1e-2, 1e-1) for w in weights]
        case _:
            raise KeyError(entrant.label)
    assert len(found) == TRIALS
    return found


def key(case: Case, entrant: Entrant) -> str:
    """The name of a method on a problem."""
    return f"{case.name}-{entrant.label}"


def tune(
    case: Case, entrant: Entrant, *, budget_s: float, stop: StopFlag | None, on_trial: Callable[[str], object]
) -> dict[str, Any]:
    """All trials of a method on a problem; empty where it was stopped."""
    rows: list[dict[str, Any]] = []
    for changes in trials(entrant):
        config = dataclasses.replace(config_of(entrant), **changes)
        # A trial that cannot become the best any more is a waste of time.
        limit = min([budget_s, *(2 * r["seconds"] + 0.5 for r in rows if not r["censored"])])
        found = time_to_error(
            case, dataclasses.replace(entrant, config=config), seed=SEED, budget_s=limit, stop=stop
        )  # fmt: skip
        if stop:
            return {}
        rows.append({"changes": changes} | {k: found[k] for k in ("seconds", "censored", "best_c_l2")})
        mark = ">" if found["censored"] else ""
        on_trial(f"{key(case, entrant)} {changes}: {mark}{found['seconds']:.2f} s, c_l2 {found['best_c_l2']:.3g}")
    best = min(rows, key=lambda r: (r["censored"], r["best_c_l2"] if r["censored"] else r["seconds"]))
    return {"changes": best["changes"], "seconds": best["seconds"], "censored": best["censored"], "trials": rows}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Outcomes by `key`."""

    found: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, path: Path) -> "Tuned":
        """Raises UserError where the file is none of ours."""
        try:
            found = json.loads(path.read_text())
            if not all("changes" in row for row in found.values()):
                raise ValueError("no changes")
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: expected outcomes of tuning ({error})") from None
        return cls(found)

    def apply(self, case: Case, entrant: Entrant) -> Entrant:
        """The entrant with what was best for it; as it is where it was not tuned."""
        row = self.found.get(key(case, entrant))
        if row is None:
            return entrant
        return dataclasses.replace(entrant, config=dataclasses.replace(config_of(entrant), **row["changes"]))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.found, indent=1) + "\n")


def wanted(groups: Sequence[tuple[Sequence[Case], Callable[[Case], list[Entrant]]]]) -> list[tuple[Case, Entrant]]:
    """Every method on every problem that is compared, once."""
    return list({key(c, e): (c, e) for cases, of in groups for c in cases for e in of(c)}.values())
