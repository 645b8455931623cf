"""Liu, Osher, Li, "A Natural Primal-Dual Hybrid Gradient Method for Adversarial Neural Network Training on Solving
Partial Differential Equations" (arXiv 2411.06278), in miniature: seconds to an error against physics-informed networks
and other rivals, the closed-form rate, time steps of Allen-Cahn, optimal maps.

The paper claims no ratio. What is reported: Poisson's equation in 10, 20 and 50 dimensions, seeds 0 to 2, methods in
turn on one clock, to a centred relative L2 error (a constant has 1) of 0.05, 0.05, 0.2. A run that does not arrive
counts as its budget and is flagged; a rival's budget ends at ten times what the primal-dual method took from the same
seed. The variable-coefficient problem stands beside it and is not in the median. All settings were tuned on a seed of
their own, twelve trials a method and problem (launch/pdhg_study/tuning.py).
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from configs.pde import allen_cahn as allen_cahn_config
from configs.pde import paper
from configs.pde import transport as transport_config
from jaxstack.pde import convergence_factor, solve, solve_evolution
from jaxstack.pde.compare import Case, Entrant, time_to_error
from jaxstack.pde.equations import allen_cahn
from jaxstack.pde.job import errors_to_reference, run_job
from jaxstack.pde.linear_case import measured_factor
from jaxstack.pde.transport import TransportConfig, gaussians, mixture_1d
from jaxstack.runtime.compilation import use_compilation_cache
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import StopFlag
from launch import job
from launch.dlpm_study.config import Parts
from launch.pdhg_study import entrants, report, tuning

_BUDGET_S = flags.DEFINE_float("run_budget_s", 20.0, "run seconds of a run; one that does not arrive counts as this")
_FLOOR_S = flags.DEFINE_float("floor_budget_s", 20.0, "run seconds after which methods' errors are compared")
_SEEDS = flags.DEFINE_integer("pde_seeds", 3, "of the headline's comparison", lower_bound=1)
_STABILITY_SEEDS = flags.DEFINE_integer("stability_seeds", 20, "of --sections=stability", lower_bound=1)
_SECTIONS_OF = flags.DEFINE_list(
    "sections", ["rate", "poisson", "variable", "low", "rivals", "floor", "evolution", "transport"],
    "which parts; there are also tuning (trials of every method's settings) and stability (many seeds of all methods)",
)  # fmt: skip
# What a rival is waited for in the headline's comparison, in times of what the primal-dual method took.
_PATIENCE = 10.0
_EQUATION = flags.DEFINE_string("equation", "variable", "with --scale=full: which of the paper's runs")
_DIM = flags.DEFINE_integer("dim", 50, "with --scale=full: its dimension", lower_bound=1)


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it; with full scale, one of the paper's runs. Returns the summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    if scale == "full":
        summary = run_job(paper.get_config(_EQUATION.value, _DIM.value), workdir)
        return summary | {"paper_curve": PAPER_CURVE if (_EQUATION.value, _DIM.value) == ("variable", 50) else None}
    unknown = set(_SECTIONS_OF.value) - set(SECTIONS)
    if unknown:
        raise job.BadUsage(f"--sections: {sorted(unknown)[0]!r} is unknown; expected some of {', '.join(SECTIONS)}")
    use_compilation_cache(workdir / "compiled")
    settings = {"run_budget_s": _BUDGET_S.value, "floor_budget_s": _FLOOR_S.value, "seeds": _SEEDS.value}
    with StopFlag() as stop:
        study = _Study(workdir, Parts(workdir, settings), stop)
        began = time.perf_counter()
        # Tuning goes first: what follows uses its outcome.
        planned = [name for name in SECTIONS if name in _SECTIONS_OF.value]
        study.bar = Progress(sum(len(SECTIONS[name](study)) for name in planned), "pdhg", unit="run")
        try:
            for name in planned:
                for part, compute in SECTIONS[name](study).items():
                    if stop:
                        break
                    study.make(part, compute)
        finally:
            study.bar.close()
    summary = summarise(study) | {"wall_s": round(time.perf_counter() - began, 1), "interrupted": bool(stop.reason)}
    write_summary(workdir, summary)
    shown = report.text(summary)
    (workdir / "report.md").write_text(shown + "\n")
    print(shown, file=sys.stderr)
    report.draw([r for name in ("poisson", "rivals", "variable", "low") for r in study.runs(name)], workdir)
    report.draw(study.runs("floor"), workdir, "floor-")
    return summary


PAPER_CURVE = {
    "seconds": [8.4, 29, 204, 333, 534, 675, 2337],
    "log10_rel_l2": [-0.5, -1.0, -1.5, -2.0, -2.3, -2.4, -2.57],
}
"""Digitised from the authors' plot of the variable-coefficient problem in 50 dimensions, on one GPU."""


class _Study:
    """Parts of the study that are done, and the way to do others."""

    def __init__(self, workdir: Path, parts: Parts, stop: StopFlag):
        self.workdir, self.parts, self.stop = workdir, parts, stop
        self.bar: Any = None
        own = workdir / "tuned.json"
        self.tuned_here = own.exists()
        self.tuned = tuning.Tuned.load(own if self.tuned_here else tuning.SHIPPED)

    def make(self, name: str, compute: Callable[[], dict[str, Any]]) -> None:
        if self.parts.get(name) is None:
            self.bar.figures(now=name)
            found = compute()
            if self.stop:
                return  # an interrupted run says nothing
            self.parts.put(name, found)
            if "label" in found:
                mark = ">" if found["censored"] else ""
                self.bar.say(f"{name}: {mark}{found['seconds']:.2f} s to the target, c_l2 {found['c_l2']:.3g}")
        self.bar.advance()

    def compared(
        self,
        cases: Sequence[Case],
        entrants_of: Callable[[Case], list[Entrant]],
        seeds: int,
        *,
        budget_s: float | None = None,
        to_the_end: bool = False,
        patience: float | None = None,
        prefix: str = "",
    ) -> dict[str, Any]:
        """Runs by name, methods in turn for each seed, so that a busy machine hits all alike. Those to the end of the
        budget have settings of their own, not those that were tuned for time; runs with another budget, another prefix.
        With `patience`, no run gets more than so many times what npdg took from its seed.
        """
        budget_s = _BUDGET_S.value if budget_s is None else budget_s
        found = {}
        for case in cases:
            for seed in range(seeds):
                for entrant in entrants_of(case):
                    name = f"{prefix}{case.name}-{entrant.label}-{seed}"
                    found[name] = lambda c=case, e=entrant, s=seed: time_to_error(
                        c,
                        e if to_the_end else self.tuned.apply(c, e),
                        seed=s,
                        budget_s=self._allowed(budget_s, patience, f"{prefix}{c.name}-npdg-{s}"),
                        to_the_end=to_the_end,
                        stop=self.stop,
                    )
        return found

    def _allowed(self, budget_s: float, patience: float | None, ours: str) -> float:
        done = None if patience is None else self.parts.get(ours)
        return budget_s if done is None or done["censored"] else min(budget_s, patience * done["seconds"])

    def runs(self, section: str) -> list[dict[str, Any]]:
        """What is done of a section."""
        return [part for name in SECTIONS[section](self) if (part := self.parts.get(name)) is not None]


def _rate(study: _Study) -> dict[str, Any]:
    steps = (0.05, 0.095)
    return {"rate": lambda: {"measured": measured_factor(*steps), "closed_form": convergence_factor(*steps)}}


def _tuning(study: _Study) -> dict[str, Any]:
    """Trials of every method on every problem; the last part writes the outcome."""
    wanted = tuning.wanted(
        [(entrants.POISSON, entrants.main), (entrants.VARIABLE, entrants.main), (entrants.POISSON[:1], entrants.rivals)]
    )

    def write() -> dict[str, Any]:
        found = {tuning.key(c, e): study.parts.get(f"tuning-{tuning.key(c, e)}") for c, e in wanted}
        study.tuned, study.tuned_here = tuning.Tuned({k: v for k, v in found.items() if v}), True
        study.tuned.save(study.workdir / "tuned.json")
        return {"written": len(study.tuned.found)}

    parts: dict[str, Any] = {
        f"tuning-{tuning.key(c, e)}": lambda c=c, e=e: tuning.tune(
            c, e, budget_s=_BUDGET_S.value / 2, stop=study.stop, on_trial=study.bar.say
        )
        for c, e in wanted
    }
    return parts | {"tuning-written": write}


def _low(study: _Study) -> dict[str, Any]:
    """In two dimensions: where natural gradients of the strong residual should win, and the primal-dual method not."""

    def methods(case: Case) -> list[Entrant]:
        engd = next(e for e in entrants.rivals(case) if e.label == "pinn_engd")
        return [entrants.npdg(case), entrants.adam(case), engd]

    return study.compared(entrants.LOW, methods, 1, budget_s=_BUDGET_S.value / 2)


def _stability(study: _Study) -> dict[str, Any]:
    """Whether methods arrive at all: every problem, the rivals where their settings are tuned."""

    def methods(case: Case) -> list[Entrant]:
        return [*entrants.main(case), *(entrants.rivals(case) if case == entrants.POISSON[0] else ())]

    cases, seeds = (*entrants.POISSON, *entrants.VARIABLE[:2]), _STABILITY_SEEDS.value
    return study.compared(cases, methods, seeds, budget_s=_BUDGET_S.value / 2, prefix="stability-")


def _evolution(study: _Study) -> dict[str, Any]:
    def march(dim: int) -> dict[str, Any]:
        # Half the iterations, and of the square one time step.
        config = dataclasses.replace(allen_cahn_config.get_config().march, iterations=150 if dim == 1 else 120)
        evolution = allen_cahn(dim)
        if dim == 2:
            evolution = dataclasses.replace(evolution, final_time=evolution.step)
        found = solve_evolution(evolution, config, stop=study.stop, progress=False)
        return {"rms": errors_to_reference(found), "run_s": found.run_s, "status": found.status}

    return {f"allen-cahn-{dim}": lambda d=dim: march(d) for dim in (1, 2)}


def _transport(study: _Study) -> dict[str, Any]:
    def transport(problem: Any, config: TransportConfig) -> dict[str, Any]:
        found = solve(
            problem, "transport", config=config, budget_s=_BUDGET_S.value, stop=study.stop, progress=False,
            indicator=False,
        )  # fmt: skip
        return {"errors": found.errors, "run_s": found.run_s, "iterations": found.iterations}

    gaussian = transport_config.get_config().transport
    line = TransportConfig(tau_map=0.1, tau_phi=0.15, samples=1000)
    return {
        "transport-1": lambda: transport(mixture_1d(), line),
        "transport-5": lambda: transport(gaussians(5), gaussian),
    }


SECTIONS: Mapping[str, Callable[[_Study], dict[str, Any]]] = {
    "tuning": _tuning,
    "rate": _rate,
    "poisson": lambda study: study.compared(entrants.POISSON, entrants.main, _SEEDS.value, patience=_PATIENCE),
    "variable": lambda study: study.compared(entrants.VARIABLE[:2], entrants.main, 1, patience=_PATIENCE),
    "low": _low,
    "rivals": lambda study: study.compared(entrants.POISSON[:1], entrants.rivals, 1, budget_s=_BUDGET_S.value / 2),
    "floor": lambda study: study.compared(
        entrants.FLOOR, entrants.floor, 1, budget_s=_FLOOR_S.value, to_the_end=True, prefix="floor-"
    ),
    "evolution": _evolution,
    "transport": _transport,
    "stability": _stability,
}


def summarise(study: _Study) -> dict[str, Any]:
    """The figures of what is done."""
    get = study.parts.get
    allen, maps = (get(f"allen-cahn-{d}") for d in (1, 2)), (get("transport-1"), get("transport-5"))
    found = report.figures(*map(study.runs, ("poisson", "variable", "rivals", "low", "floor")))
    rate = get("rate")
    summary = found | {
        "stability": report.spread(study.runs("stability")),
        "convergence_factor_measured": rate and rate["measured"],
        "convergence_factor_closed_form": convergence_factor(0.05, 0.095),
        "allen_cahn_rms": [a and a["rms"]["implicit_euler"] for a in allen],
        "ot1d_rms": maps[0] and maps[0]["errors"]["map_rms"],
        "ot_gaussian_rms": maps[1] and maps[1]["errors"]["map_rms"],
        "run_budget_s": _BUDGET_S.value,
        "floor_budget_s": _FLOOR_S.value,
        "seeds": _SEEDS.value,
        "tuning_trials": tuning.TRIALS,
        "tuning": f"Settings: {tuning.TRIALS} trials a method and problem, seed {tuning.SEED}, "
        + ("made here." if study.tuned_here else "as shipped (launch/pdhg_study/tuned.json)."),
    }
    return summary | {"goals_met": report.goals_met(summary)}
