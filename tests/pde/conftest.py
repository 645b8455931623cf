"""Oracles run in float64, switched on for the test that asks for it and never at import."""

import jax
import pytest


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
