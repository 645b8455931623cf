"""Solves a partial differential equation: one of the paper's by a config, or your own from a Python file.

    python -m launch.pde --config=configs/pde/poisson.py --config.dim=20 --workdir=work/poisson
    python -m launch.pde --problem=my_pde.py:problem --config.budget_s=120 --workdir=work/mine
    python -m launch.pde --problem=my_pde.py:problem --verify_only

The workdir gets solution.npz, error.png, solution.png, metrics.jsonl, tensorboard/, checkpoints/ and summary.json.
Started again in the same workdir it goes on where it was; Ctrl-C and SIGTERM save first.
"""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging

from jaxstack.pde import Evolution, OptimalTransport, Problem, verify
from jaxstack.pde.job import EQUATIONS, Anything, PdeJob, run_job
from jaxstack.runtime.errors import UserError
from launch import job

_CONFIG = job.config_flag(PdeJob, "configs/pde/poisson.py")
_PROBLEM = flags.DEFINE_string(
    "problem", None, "FILE.py:NAME, your own Problem, Evolution or OptimalTransport, instead of the config's equation"
)
_WORKDIR = flags.DEFINE_string("workdir", "work/pde", "where everything goes; a run found there is continued")
_SEED = flags.DEFINE_integer("seed", None, "of networks and samples; the config's by default")
_CHECKPOINT_S = flags.DEFINE_float("checkpoint_every_s", 30.0, "seconds between checkpoints", lower_bound=0.0)
_VERIFY = flags.DEFINE_bool("verify_only", False, "check the problem and solve nothing; exit code 1 if a check fails")


def own_problem(where: str) -> Anything:
    """The object NAME of FILE.py, or what it returns if it is a function without arguments.

    Raises:
      BadUsage: no such file or name, or another kind of object.
    """
    file, _, name = where.partition(":")
    if not name or not Path(file).is_file():
        raise job.BadUsage(f"--problem={where}: expected FILE.py:NAME, with a file that exists")
    try:
        names = runpy.run_path(file)
    except SyntaxError as error:
        raise job.BadUsage(f"--problem: {file}, line {error.lineno}: {error.msg}") from error
    if name not in names:
        known = [k for k, v in names.items() if isinstance(v, Problem | Evolution | OptimalTransport)]
        raise job.BadUsage(f"--problem: {file} has no {name!r}; it has {', '.join(known) or 'no problem'}")
    found = names[name]
    if not isinstance(found, Problem | Evolution | OptimalTransport) and callable(found):
        found = found()
    if not isinstance(found, Problem | Evolution | OptimalTransport):
        raise job.BadUsage(
            f"--problem={where} is a {type(found).__name__}, expected a Problem, Evolution or OptimalTransport"
        )
    return found


def run() -> dict[str, Any]:
    logging.set_verbosity(logging.WARNING)
    config = _CONFIG.get()
    if _SEED.value is not None:
        config = dataclasses.replace(config, seed=_SEED.value)
    problem = own_problem(_PROBLEM.value) if _PROBLEM.value else EQUATIONS[config.equation](config.dim)
    if isinstance(problem, OptimalTransport):
        if _VERIFY.value:
            raise job.BadUsage("--verify_only: a transport problem has no weak form to check")
    else:
        report = verify(problem.step_problem() if isinstance(problem, Evolution) else problem, seed=config.seed)
        print(report, file=sys.stderr)
        if _VERIFY.value:
            if not report.passed:
                raise UserError(
                    f"{report.problem}: {len(report.failures)} of {len(report.checks)} checks failed: "
                    + "; ".join(check.name for check in report.failures)
                )
            return {"problem": report.problem, "passed": True, "checks": report.as_json()}
        for check in report.failures:
            print(f"warning: {check.name}: {check.explanation}", file=sys.stderr)
    return run_job(config, _WORKDIR.value, problem, checkpoint_every_s=_CHECKPOINT_S.value)


if __name__ == "__main__":
    job.main(run)
