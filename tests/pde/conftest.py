"""What the solver's tests share: float64 for oracles that ask for it, and quick compilation of programs that run once.

Compiling is nearly all of these tests' time. XLA's optimisations change rounding and nothing that is tested here.
"""

import jax
import pytest


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
