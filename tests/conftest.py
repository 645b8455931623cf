"""What all tests share: one folder of compiled programs, so that a program met twice in a run is compiled once, by
whichever worker meets it first."""

import os

import pytest

from jaxstack.runtime.compilation import use_compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"  # one for all workers
    use_compilation_cache(folder)
    return folder
