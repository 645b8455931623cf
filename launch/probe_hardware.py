"""Measures what this machine can do and writes it down as a profile: `python -m launch.probe_hardware`.

    .venv/bin/python -m launch.probe_hardware --out=machine.json
    .venv/bin/python -m launch.serve --model=... --offload=auto --machine=machine.json

FLOP/s are of a large matrix product in the dtype that would be served, bytes/s of reading and writing arrays larger
than any cache, the link's of arrays between page-locked host memory and the device: each direction alone, both at once,
and to the device while it computes. A figure is the best of as many tries as `--seconds` allows in all; on a machine
that others use it is too low.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.errors import UserError
from launch import job
from launch.hardware_probe import measure

_OUT = flags.DEFINE_string("out", "machine.json", "where the profile goes")
_NAME = flags.DEFINE_string("name", None, "of the profile; by default the device's")
_SECONDS = flags.DEFINE_float("seconds", 20.0, "to spend in all, compilation aside", lower_bound=0.1)
_MIB = flags.DEFINE_integer("mib", None, "of the arrays that move; by default 512, on a CPU 64", lower_bound=1)


def run() -> Mapping[str, Any]:
    path = Path(_OUT.value)
    if not path.parent.is_dir():
        raise UserError(f"--out: found no folder {path.parent}, expected an existing one")
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    profile, extra = measure(_NAME.value, seconds=_SECONDS.value, mib=_MIB.value, say=say)
    profile.save(path)
    return profile.as_json() | extra | {"out": str(path)}


def main() -> None:
    job.main(run)


if __name__ == "__main__":
    main()
