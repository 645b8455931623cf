"""What all tests share: one folder of compiled programs, so that a program met twice in a run is compiled once, by
whichever worker, or program that a test starts, meets it first; and quick compilation, which is most of their time.
"""

import os
from pathlib import Path

import jax
import pytest

from jaxstack.runtime.compilation import use_compilation_cache

# Folders whose machine code is optimised, as it is for users. Elsewhere compiling is most of the time, and is done
# quickly; XLA's own passes are the same.
OPTIMISED = {"kernels"}
# Where the files are that take longest: first, so that no worker is left with one alone at the end.
LONGEST = ("launch", "reasoning", "fleet", "training", "engine", "pde", "models", "kernels", "serving")


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
    quick = request.path.parent.name not in OPTIMISED
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
