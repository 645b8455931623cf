"""Allen-Cahn by implicit Euler steps, against finite differences; stopped and resumed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import pde
from jaxstack.pde import equations
from jaxstack.pde.job import errors_to_reference
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.signals import StopFlag

NPDG = pde.NpdgConfig(
    tau_u=0.1, tau_phi=0.19, boundary_weight=1.0, preconditioner="reaction_large", strong_penalty=True,
    interior_samples=200, boundary_samples=20, width=20, psi_width=8, depth=3, standardize=True, minres_rtol=1e-4,
)  # fmt: skip
CONFIG = pde.MarchConfig(npdg=NPDG, iterations=60, fit_iterations=100)
EVOLUTION = equations.allen_cahn(1)


@pytest.fixture(scope="module")
def marched():
    return pde.solve_evolution(EVOLUTION, CONFIG, progress=False)


def test_two_steps_of_allen_cahn(marched):
    assert marched.times.tolist() == [0.0, 0.001, 0.002] and marched.recompilations == 0
    x = jnp.linspace(0.0, 2.0, 200)[:, None]
    start = np.asarray([EVOLUTION.initial(p) for p in x])
    assert np.sqrt(np.mean((np.asarray(marched(x, 0)) - start) ** 2)) < 0.03
    found = errors_to_reference(marched)
    assert max(found["implicit_euler"]) < 0.05
    # What it approximates is the step, not the flow; and it is nearer than where it came from.
    moved = np.sqrt(np.mean((np.asarray(marched(x, 2)) - start) ** 2))
    assert found["implicit_euler"][-1] < moved
    with pytest.raises(UserError, match=r"expected \(points, 1\)"):
        marched(jnp.zeros((3, 2)))


def test_an_interrupted_march_goes_on_to_the_same_bits(marched, tmp_path):
    stop = StopFlag()

    def later(row):
        if row["iteration"] >= 80:
            stop.set()

    half = pde.solve_evolution(EVOLUTION, CONFIG, workdir=tmp_path, callback=later, stop=stop, progress=False)
    assert half.status == "interrupted" and half.iterations == 80 and len(half.times) == 2
    with pytest.raises(UserError, match="holds another run: config differ"):
        other = dataclasses.replace(CONFIG, iterations=70)
        pde.solve_evolution(EVOLUTION, other, workdir=tmp_path, progress=False)
    rest = pde.solve_evolution(EVOLUTION, CONFIG, workdir=tmp_path, progress=False)
    assert rest.iterations == marched.iterations == 120
    np.testing.assert_array_equal(rest.thetas, marched.thetas)


def test_a_tolerance_ends_a_step_early():
    config = dataclasses.replace(CONFIG, tolerance=10.0)
    found = pde.solve_evolution(EVOLUTION, config, progress=False)
    assert found.status == "tolerance_reached" and found.iterations == 20
