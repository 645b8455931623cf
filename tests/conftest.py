"""What all tests share: one folder of compiled programs, so that a program met twice in a run is compiled once."""

import pytest

from jaxstack.runtime.compilation import use_compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    use_compilation_cache(folder)
    return folder
