"""Liu, Osher, Li, "A Natural Primal-Dual Hybrid Gradient Method for Adversarial Neural Network Training on Solving
Partial Differential Equations" (arXiv 2411.06278), in miniature: seconds to an error against physics-informed networks
and other rivals, the closed-form rate, time steps of Allen-Cahn, optimal maps.

The paper claims no ratio. What is reported: Poisson's equation in 10, 20 and 50 dimensions, seeds 0 to 2, methods in
turn on one clock, to a centred relative L2 error (a constant has 1) of 0.05, 0.05, 0.2. A run that does not arrive
counts as its budget and is flagged. The variable-coefficient problem stands beside it and is not in the median.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from configs.pde import allen_cahn as allen_cahn_config
from configs.pde import paper
from configs.pde import transport as transport_config
from jaxstack.pde import NpdgConfig, Stage, convergence_factor, solve, solve_evolution
from jaxstack.pde.baselines.first_order import TrainConfig
from jaxstack.pde.baselines.second_order import CurvatureConfig
from jaxstack.pde.compare import Case, Entrant, ratios, success_rates, time_to_error
from jaxstack.pde.equations import allen_cahn
from jaxstack.pde.job import errors_to_reference, run_job
from jaxstack.pde.linear_case import measured_factor
from jaxstack.pde.plots import plot_errors
from jaxstack.pde.transport import TransportConfig, gaussians, mixture_1d
from jaxstack.runtime.compilation import use_compilation_cache
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import StopFlag
from launch.dlpm_study.config import Parts

_BUDGET_S = flags.DEFINE_float("run_budget_s", 20.0, "run seconds of a run; one that does not arrive counts as this")
_SEEDS = flags.DEFINE_integer("pde_seeds", 3, "of each comparison", lower_bound=1)
_TUNE = flags.DEFINE_bool("tune", False, "first tune every method on seed 100, the same number of trials each")
_PARTS_OF = flags.DEFINE_list(
    "sections", ["rate", "poisson", "variable", "rivals", "floor", "evolution", "transport"], "which parts"
)
_EQUATION = flags.DEFINE_string("equation", "variable", "with --scale=full: which of the paper's runs")
_DIM = flags.DEFINE_integer("dim", 50, "with --scale=full: its dimension", lower_bound=1)

POISSON = (Case("poisson", 10, 0.05), Case("poisson", 20, 0.05), Case("poisson", 50, 0.2))
VARIABLE = (Case("variable", 10, 0.2), Case("variable", 20, 0.2))
_SAMPLES = {10: (400, 200), 20: (400, 200), 50: (1000, 500)}


def ours(case: Case) -> Entrant:
    """The primal-dual method: one setting for Poisson in every dimension, a heavier boundary for the other problem."""
    inner, edge = _SAMPLES[case.dim]
    if case.equation == "variable":
        config = NpdgConfig(
            tau_u=0.2, tau_phi=0.2, boundary_weight=100.0, interior_samples=inner, boundary_samples=edge,
            preconditioner="kappa_nabla",
        )  # fmt: skip
    else:
        config = NpdgConfig(interior_samples=inner, boundary_samples=edge)
    return Entrant("npdg", "npdg", config)


def adam(case: Case) -> Entrant:
    """The paper's rival: the same network and sample sizes."""
    inner, edge = _SAMPLES[case.dim]
    config = TrainConfig(learning_rate=3e-3, boundary_weight=100.0, interior_samples=inner, boundary_samples=edge)
    return Entrant("pinn_adam", "pinn_adam", config)


def tuned_adam(case: Case) -> Entrant:
    """The practitioner's: a smaller batch."""
    return Entrant("pinn_adam_tuned", "pinn_adam", dataclasses.replace(_config(adam(case)), interior_samples=200,
                                                                      boundary_samples=100))  # fmt: skip


def _config(entrant: Entrant) -> Any:
    return entrant.config


def rivals(case: Case) -> list[Entrant]:
    """All others."""
    inner, edge = _SAMPLES[case.dim]
    curved = CurvatureConfig(interior_samples=300, boundary_samples=200)
    return [
        Entrant("pinn_lbfgs", "pinn_lbfgs", dataclasses.replace(curved, interior_samples=inner, boundary_samples=edge)),
        Entrant("pinn_engd", "pinn_engd", curved),
        Entrant("pinn_spring", "pinn_spring", curved),
        Entrant("deepritz", "deepritz", TrainConfig(learning_rate=1e-3, interior_samples=inner, boundary_samples=edge)),
        Entrant("wan", "wan", TrainConfig(learning_rate=1e-3, test_learning_rate=1e-2, interior_samples=inner,
                                          boundary_samples=edge)),
    ]  # fmt: skip


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it; with full scale, one of the paper's runs. Returns the summary."""
    workdir.mkdir(parents=True, exist_ok=True)
    if scale == "full":
        summary = run_job(paper.get_config(_EQUATION.value, _DIM.value), workdir)
        return summary | {"paper_curve": PAPER_CURVE if (_EQUATION.value, _DIM.value) == ("variable", 50) else None}
    unknown = set(_PARTS_OF.value) - set(SECTIONS)
    if unknown:
        raise UserError(f"--sections: {sorted(unknown)[0]!r} is unknown; expected some of {', '.join(SECTIONS)}")
    use_compilation_cache(workdir / "compiled")
    settings = {"run_budget_s": _BUDGET_S.value, "seeds": _SEEDS.value, "tune": _TUNE.value}
    with StopFlag() as stop:
        study = _Study(Parts(workdir, settings), stop)
        began = time.perf_counter()
        planned = [name for name in SECTIONS if name in _PARTS_OF.value]
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
    text = report(summary)
    (workdir / "report.md").write_text(text + "\n")
    print(text, file=sys.stderr)
    draw(study, workdir)
    return summary


PAPER_CURVE = {
    "seconds": [8.4, 29, 204, 333, 534, 675, 2337],
    "log10_rel_l2": [-0.5, -1.0, -1.5, -2.0, -2.3, -2.4, -2.57],
}
"""Digitised from the authors' plot of the variable-coefficient problem in 50 dimensions, on one GPU."""


class _Study:
    """Parts of the study that are done, and the way to do others."""

    def __init__(self, parts: Parts, stop: StopFlag):
        self.parts, self.stop = parts, stop
        self.bar: Any = None
        self.budget_s, self.seeds = _BUDGET_S.value, _SEEDS.value

    def make(self, name: str, compute: Callable[[], dict[str, Any]]) -> None:
        if self.parts.get(name) is None:
            self.bar.figures(now=name)
            found = compute()
            if self.stop:
                return  # an interrupted run says nothing
            self.parts.put(name, found)
            if "seconds" in found:
                mark = ">" if found["censored"] else ""
                self.bar.say(f"{name}: {mark}{found['seconds']:.2f} s to the target, c_l2 {found['c_l2']:.3g}")
        self.bar.advance()

    def tuned(self, case: Case, entrant: Entrant) -> Entrant:
        """The entrant with the best of its trials, where it was tuned."""
        if not _TUNE.value or not isinstance(entrant.method, str):
            return entrant
        name = f"tune-{case.name}-{entrant.label}"
        if self.parts.get(name) is None:
            trials = []
            for changes in tuning_trials(entrant):
                config = dataclasses.replace(_config(entrant), **changes)
                found = time_to_error(
                    case, dataclasses.replace(entrant, config=config), seed=100, budget_s=self.budget_s / 2,
                    stop=self.stop,
                )  # fmt: skip
                trials.append({"changes": changes, "seconds": found["seconds"], "c_l2": found["c_l2"]})
                if self.stop:
                    return entrant
            self.parts.put(name, {"trials": trials})
        trials = (self.parts.get(name) or {})["trials"]
        best = min(trials, key=lambda t: (t["seconds"], t["c_l2"]))
        return dataclasses.replace(entrant, config=dataclasses.replace(_config(entrant), **best["changes"]))

    def compared(
        self, cases: tuple[Case, ...], entrants: Callable[[Case], list[Entrant]], seeds: int
    ) -> dict[str, Any]:
        """Runs by name, methods in turn for each seed, so that a busy machine hits all alike."""
        found = {}
        for case in cases:
            for seed in range(seeds):
                for entrant in entrants(case):
                    found[f"{case.name}-{entrant.label}-{seed}"] = lambda c=case, e=entrant, s=seed: time_to_error(
                        c, self.tuned(c, e), seed=s, budget_s=self.budget_s, stop=self.stop
                    )
        return found

    def found(self, names: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [part for name in names if (part := self.parts.get(name)) is not None]


def tuning_trials(entrant: Entrant) -> list[dict[str, Any]]:
    """Twelve settings of a method."""
    weights = (10.0, 100.0, 1000.0) if entrant.method != "npdg" else (3.0, 10.0, 30.0, 100.0)
    match entrant.method:
        case "npdg":
            steps = ((0.1, 0.19), (0.2, 0.38), (0.3, 0.3))
            return [{"tau_u": u, "tau_phi": p, "boundary_weight": w} for w in weights for u, p in steps]
        case "pinn_adam" | "deepritz" | "wan":
            return [{"learning_rate": r, "boundary_weight": w} for r in (3e-4, 1e-3, 3e-3, 1e-2) for w in weights]
        case "pinn_lbfgs":
            return [
                {"memory": m, "renew": n, "boundary_weight": w} for m in (10, 30) for n in (50, 200) for w in weights
            ]
    return [{"damping": d, "boundary_weight": w} for d in (1e-5, 1e-4, 1e-3, 1e-2) for w in weights]


def _main(case: Case) -> list[Entrant]:
    return [ours(case), adam(case), tuned_adam(case)]


def _floor(study: _Study) -> dict[str, Any]:
    """The error at equal time, in 20 dimensions: ours alone, ours with a polish, Adam with a cosine."""
    case = POISSON[1]
    npdg = _config(ours(case))
    annealed = dataclasses.replace(
        _config(tuned_adam(case)), decay_steps=max(1, int(study.budget_s * 100)), learning_rate=3e-3
    )
    entrants = [
        ours(case),
        Entrant("npdg+spring", (Stage("npdg", npdg, 0.3), Stage("pinn_spring", CurvatureConfig(), 0.7))),
        Entrant("pinn_spring", "pinn_spring", CurvatureConfig()),
        Entrant("pinn_adam_cosine", "pinn_adam", annealed),
    ]
    return {
        f"floor-{case.name}-{e.label}-0": lambda e=e: time_to_error(
            case, e, seed=0, budget_s=study.budget_s, to_the_end=True, stop=study.stop
        )
        for e in entrants
    }


def _rate(study: _Study) -> dict[str, Any]:
    steps = (0.05, 0.095)
    return {"rate": lambda: {"measured": measured_factor(*steps), "closed_form": convergence_factor(*steps)}}


def _evolution(study: _Study) -> dict[str, Any]:
    def march(dim: int) -> dict[str, Any]:
        config = allen_cahn_config.get_config().march
        evolution = allen_cahn(dim)
        if dim == 2:
            evolution = dataclasses.replace(evolution, final_time=evolution.step)
            config = dataclasses.replace(config, iterations=200)
        found = solve_evolution(evolution, config, stop=study.stop, progress=False)
        return {"rms": errors_to_reference(found), "run_s": found.run_s, "status": found.status}

    return {f"allen-cahn-{dim}": lambda d=dim: march(d) for dim in (1, 2)}


def _transport(study: _Study) -> dict[str, Any]:
    def transport(problem: Any, config: TransportConfig) -> dict[str, Any]:
        found = solve(
            problem, "transport", config=config, budget_s=study.budget_s, stop=study.stop, progress=False,
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
    "rate": _rate,
    "poisson": lambda study: study.compared(POISSON, _main, study.seeds),
    "variable": lambda study: study.compared(VARIABLE, _main, 1),
    "rivals": lambda study: study.compared(POISSON[:1], rivals, min(2, study.seeds)),
    "floor": _floor,
    "evolution": _evolution,
    "transport": _transport,
}


def summarise(study: _Study) -> dict[str, Any]:
    """The figures of what is done."""
    get = study.parts.get
    main = study.found(SECTIONS["poisson"](study))
    variable = study.found(SECTIONS["variable"](study))
    others = study.found(SECTIONS["rivals"](study))
    floor = study.found(_floor(study))
    plain, tuned = ratios(main, "npdg", "pinn_adam"), ratios(main, "npdg", "pinn_adam_tuned")
    median = lambda rows: statistics.median(r["ratio"] for r in rows.values()) if rows else None  # noqa: E731
    allen, lines = (get(f"allen-cahn-{d}") for d in (1, 2)), (get("transport-1"), get("transport-5"))
    best: dict[str, str] = {}
    for case in dict.fromkeys(r["case"] for r in main + others):
        rows = [r for r in main + others if r["case"] == case and not r["censored"]]
        by_label: dict[str, list[float]] = {}
        for r in rows:
            by_label.setdefault(r["label"], []).append(r["seconds"])
        if by_label:
            best[case] = min(by_label, key=lambda label: statistics.median(by_label[label]))
    return {
        "time_ratio_vs_adam_pinn_median": median(plain),
        "time_ratio_vs_tuned_adam_pinn_median": median(tuned),
        "time_ratio_by_dim": plain,
        "time_ratio_by_dim_tuned": tuned,
        "variable_ratio": ratios(variable, "npdg", "pinn_adam"),
        "variable_ratio_tuned": ratios(variable, "npdg", "pinn_adam_tuned"),
        "best_method_by_dim": best,
        "success_rate_by_method": success_rates(main + variable + others),
        "final_c_l2_by_method": {r["label"]: r["c_l2"] for r in floor},
        "convergence_factor_measured": (get("rate") or {}).get("measured"),
        "convergence_factor_closed_form": convergence_factor(0.05, 0.095),
        "allen_cahn_rms": [a and a["rms"]["implicit_euler"] for a in allen],
        "ot1d_rms": lines[0] and lines[0]["errors"]["map_rms"],
        "ot_gaussian_rms": lines[1] and lines[1]["errors"]["map_rms"],
        "run_budget_s": study.budget_s,
        "seeds": study.seeds,
        "tuning_trials": 12 if _TUNE.value else 0,
    }


def report(summary: Mapping[str, Any]) -> str:
    """A table for people."""
    lines = [
        "| seconds of a rival over ours, median of seeds | Adam, same samples | Adam, smaller batch |",
        "|---|---|---|",
    ]
    for case, row in (summary["time_ratio_by_dim"] | summary["variable_ratio"]).items():
        other = (summary["time_ratio_by_dim_tuned"] | summary["variable_ratio_tuned"]).get(case)
        cells = [
            "-" if r is None else f"{'>' if r['censored_other'] else ''}{r['ratio']:.2g}"
            + (f" (ours {r['censored_ours']} of {r['seeds']} not in time)" if r["censored_ours"] else "")
            for r in (row, other)
        ]  # fmt: skip
        lines.append(f"| {case} | {cells[0]} | {cells[1]} |")
    trials = summary["tuning_trials"]
    lines.append(f"\nTuning trials of each method: {trials or 'none; settings as written in the study'}.")
    for name in (
        "time_ratio_vs_adam_pinn_median", "time_ratio_vs_tuned_adam_pinn_median", "convergence_factor_measured",
        "convergence_factor_closed_form", "allen_cahn_rms", "ot1d_rms", "ot_gaussian_rms", "final_c_l2_by_method",
        "best_method_by_dim", "success_rate_by_method",
    ):  # fmt: skip
        lines.append(f"- {name}: {summary[name]}")
    return "\n".join(lines)


def draw(study: _Study, workdir: Path) -> None:
    """Errors against seconds, for each problem."""
    runs = [
        *study.found(SECTIONS["poisson"](study)),
        *study.found(SECTIONS["rivals"](study)),
        *study.found(SECTIONS["variable"](study)),
        *study.found(_floor(study)),
    ]
    for case in dict.fromkeys(r["case"] for r in runs):
        curves = {
            f"{r['label']} {r['seed']}": [{"seconds": s, "c_l2": c} for s, c in r["history"]]
            for r in runs
            if r["case"] == case
        }
        plot_errors(workdir / f"{case}.png", curves)
