"""What the solver's tests share: float64, for oracles that ask for it."""

import jax
import pytest


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
