"""What all tests share: one folder of compiled programs, so that a program met twice in a run is compiled once, by
whichever worker, or program that a test starts, meets it first; and quick compilation, which is most of their time.

Programs are compiled by the emitters that XLA has had longest, in a third of the time that its newer ones take with
small programs. XLA_FLAGS=--xla_cpu_use_fusion_emitters=true runs the suite with the newer ones.
"""

import os
from pathlib import Path

import jax
import pytest

from jaxstack.runtime.compilation import use_compilation_cache

# Files whose machine code is optimised: their tolerances are missed by what plain emitters make of tanh otherwise.
# Everywhere else compiling is most of the time, and is done quickly; XLA's own passes are the same.
OPTIMISED = {"test_gated"}
# Where the files are that take longest: first, so that no worker is left with one alone at the end.
LONGEST = ("launch", "reasoning", "fleet", "training", "engine", "pde", "models", "kernels", "serving")

# XLA reads its flags when it compiles for the first time, and so do the programs that tests start.
if "xla_cpu_use_fusion_emitters" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()


def pytest_collection_modifyitems(items):
    places = {folder: place for place, folder in enumerate(LONGEST)}
    here = Path(__file__).parent
    items.sort(key=lambda item: places.get(item.path.relative_to(here).parts[0], len(places)))


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"  # one for all workers
    use_compilation_cache(folder)
    jax.config.update("jax_traceback_in_locations_limit", 0)  # where each operation came from: a tenth of all time
    os.environ |= {
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    # Where no bytecode may be left beside sources, each program that a test starts would compile JAX's for seconds.
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(folder.with_name("bytecode")))
    return folder


@pytest.fixture(scope="module", autouse=True)
def machine_code(request, compiled_programs):
    quick = request.path.stem not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
