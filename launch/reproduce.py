"""Reproduces a paper's headline claim in miniature: ours beside the paper's, with a plot.

    python -m launch.reproduce --paper=longcot --workdir=work/longcot
    python -m launch.reproduce --paper=longcot --help        # with the flags of that paper

Killed at any moment and started again in the same workdir, a reproduction goes on where it was.
"""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from launch import job

PAPERS: Mapping[str, str] = {
    "dlpm": "launch.papers.dlpm",
    "longcot": "launch.papers.longcot",
    "melange": "launch.papers.melange",
    "pdhg": "launch.papers.pdhg",
    "moe_lightning": "launch.papers.moe_lightning",
    "pie": "launch.papers.pie",
    "skyserve": "launch.papers.skyserve",
    "vectorq": "launch.papers.vectorq",
}
"""Name of a paper -> the module that reproduces it: it defines its flags when imported, and has `run(workdir)`."""

_PAPER = flags.DEFINE_enum("paper", None, sorted(PAPERS), "which paper")
_WORKDIR = flags.DEFINE_string("workdir", None, "where everything goes; by default work/PAPER")
_SCALE = flags.DEFINE_enum(
    "scale", "default", ["default", "full"], "default: minutes on two cores; full: the accelerator recipe"
)


def chosen_paper(argv: list[str]) -> str | None:
    """The paper that a command line names, before its flags are known."""
    for place, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "paper":
            return value if equals else (argv[place + 1] if place + 1 < len(argv) else None)
    return None


def run() -> Mapping[str, Any]:
    if _PAPER.value is None:
        raise job.BadUsage(f"--paper is missing; expected one of {', '.join(sorted(PAPERS))}")
    module = importlib.import_module(PAPERS[_PAPER.value])
    workdir = Path(_WORKDIR.value or f"work/{_PAPER.value}")
    return module.run(workdir, scale=_SCALE.value)


def main() -> None:
    name = chosen_paper(sys.argv[1:])
    if name is not None and name in PAPERS:
        flags.adopt_module_key_flags(importlib.import_module(PAPERS[name]))
    job.main(run)


if __name__ == "__main__":
    main()
