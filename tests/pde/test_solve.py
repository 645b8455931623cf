"""`pde.solve` as a whole: it solves, stops, resumes to the bit, compiles once, and refuses what cannot be."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import pde
from jaxstack.pde import equations
from jaxstack.pde.baselines.first_order import TrainConfig
from jaxstack.pde.baselines.second_order import CurvatureConfig
from jaxstack.pde.estimate import energy_seminorm_error
from jaxstack.pde.forms import Form
from jaxstack.pde.methods import METHODS, make_method
from jaxstack.pde.solution import Solution
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.signals import StopFlag

SMALL = pde.NpdgConfig(width=16, psi_width=8, depth=3, interior_samples=100, boundary_samples=60, minres_rtol=1e-3)
PROBLEM = equations.poisson(3)


def solve(method="npdg", config=SMALL, problem=PROBLEM, **options):
    return pde.solve(problem, method, config=config, **({"progress": False, "evaluate_every": 10} | options))


@pytest.fixture(scope="module")
def solved():
    return solve(max_iterations=150)


def test_it_solves(solved):
    assert solved.status == "budget_exhausted" and solved.iterations == 150 and solved.recompilations == 0
    assert solved.errors["c_l2"] < 0.25
    x = PROBLEM.domain.sample_interior(jax.random.key(9), 500)
    exact = jax.vmap(PROBLEM.exact)(x)
    gap = np.sqrt(np.mean((np.asarray(solved(x)) - exact) ** 2)) / np.std(exact)
    assert gap == pytest.approx(solved.errors["c_l2"], rel=0.2)
    difference = (solved(x + 1e-3 * jnp.eye(3)[0]) - solved(x - 1e-3 * jnp.eye(3)[0])) / 2e-3
    np.testing.assert_allclose(solved.gradient(x)[:, 0], difference, atol=2e-3)
    iterations = [row["iteration"] for row in solved.history]
    assert iterations == sorted(set(iterations)) and len(iterations) >= 10
    assert solved.history[-1]["c_l2"] < solved.history[0]["c_l2"] / 2
    assert solved.time_to(10.0) == solved.history[0]["seconds"] and solved.time_to(1e-9) is None
    assert "poisson-3: budget_exhausted after 150 iterations" in solved.summary()
    with pytest.raises(UserError, match=r"points of shape \(4,\): expected \(points, 3\)"):
        solved(jnp.zeros(4))


def test_a_saved_solution_is_the_same(solved, tmp_path):
    solved.save(tmp_path / "solution.npz")
    loaded = Solution.load(tmp_path / "solution.npz", PROBLEM)
    x = PROBLEM.domain.sample_interior(jax.random.key(9), 10)
    np.testing.assert_array_equal(loaded(x), solved(x))
    assert loaded.as_json() == solved.as_json() and loaded.history == solved.history
    with pytest.raises(UserError, match="solves a problem of dimension 3, expected 2"):
        Solution.load(tmp_path / "solution.npz", equations.poisson(2))
    (tmp_path / "text").write_text("no")
    with pytest.raises(UserError, match="is no saved solution"):
        Solution.load(tmp_path / "text", PROBLEM)


def test_the_indicator_estimates_the_energy_error(solved):
    form = Form(PROBLEM)
    samples = jax.jit(lambda key: form.samples(key, 2000, 10))(jax.random.key(3))
    error = float(jax.jit(lambda p: energy_seminorm_error(form, solved.net, p, samples))(solved.theta))
    assert 0.3 < solved.indicator / error < 3


def test_a_target_ends_it():
    found = solve(max_iterations=400, target=0.5, evaluate_every=0)
    assert found.status == "target_reached" and found.errors["c_l2"] <= 0.5 and found.iterations < 400
    assert found.time_to(0.5) == found.history[-1]["seconds"]


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    whole = solve(max_iterations=40)
    stop = StopFlag()

    def at_twenty(row):
        if row["iteration"] >= 20:
            stop.set()

    half = solve(max_iterations=40, workdir=tmp_path, callback=at_twenty, stop=stop)
    assert half.status == "interrupted" and half.iterations == 25
    assert (tmp_path / "checkpoints" / "25").is_dir()
    with pytest.raises(UserError, match="holds another run: seed 0 there, 1 here"):
        solve(max_iterations=40, workdir=tmp_path, seed=1)
    with pytest.raises(UserError, match=r"stage0.omega 1.0 there, 0.9 here"):
        solve(config=dataclasses.replace(SMALL, omega=0.9), max_iterations=40, workdir=tmp_path)
    with pytest.raises(UserError, match="holds a run already"):
        solve(max_iterations=40, workdir=tmp_path, resume=False)
    rest = solve(max_iterations=40, workdir=tmp_path)
    assert rest.status == whole.status and rest.iterations == 40
    np.testing.assert_array_equal(rest.theta, whole.theta)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(rest.history) == drop(whole.history)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["iteration"] for row in whole.history]
    # A finished run is not run again.
    again = solve(max_iterations=40, workdir=tmp_path)
    np.testing.assert_array_equal(again.theta, whole.theta)


TINY = {
    "pinn_adam": TrainConfig(width=16, depth=3, interior_samples=64, boundary_samples=32, learning_rate=1e-2),
    "deepritz": TrainConfig(width=16, depth=3, interior_samples=64, boundary_samples=32, learning_rate=1e-2),
    "wan": TrainConfig(width=16, depth=3, interior_samples=64, boundary_samples=32, learning_rate=1e-2),
    "pinn_lbfgs": CurvatureConfig(width=16, depth=3, interior_samples=64, boundary_samples=32),
    "pinn_engd": CurvatureConfig(width=16, depth=3, interior_samples=64, boundary_samples=32),
    "pinn_spring": CurvatureConfig(width=16, depth=3, interior_samples=64, boundary_samples=32),
}
STEPS = {"pinn_adam": 300, "deepritz": 300, "wan": 300, "pinn_lbfgs": 60, "pinn_engd": 20, "pinn_spring": 20}


@pytest.mark.parametrize("method", TINY)
def test_the_rivals_solve_it_too(method):
    found = solve(method, TINY[method], max_iterations=STEPS[method], indicator=False, evaluate_every=1e9)
    assert found.recompilations == 0
    assert found.errors["c_l2"] < (0.6 if method == "wan" else 0.35)


def test_stages_polish_and_say_whether_it_helped():
    stages = (pde.Stage("npdg", SMALL), pde.Stage("pinn_spring", dataclasses.replace(TINY["pinn_spring"])))
    found = solve(stages, None, max_iterations=100)
    assert [stage.method for stage in found.stages] == ["npdg", "pinn_spring"]
    assert found.iterations == 100 and found.stages[1].kept
    assert found.stages[1].indicator < found.stages[0].indicator
    assert "pinn_spring: 50 iterations" in found.summary()


def test_automatic_stages_follow_the_dimension():
    stages = lambda dim, *config: pde.automatic_stages(equations.poisson(dim), *config)  # noqa: E731
    names = lambda dim, *config: [s.method for s in stages(dim, *config)]  # noqa: E731
    assert names(2) == ["pinn_engd"] and names(20) == names(5) == ["npdg", "pinn_engd"] and names(50) == ["npdg"]
    # One network for all stages, one's own where it is given.
    for config in ((), (SMALL,)):
        problem = equations.poisson(12)
        networks = {make_method(s.method, problem, s.config).u for s in pde.automatic_stages(problem, *config)}
        assert len(networks) == 1
    assert networks == {SMALL.network(problem)}
    assert set(METHODS) == {*TINY, "npdg", "transport"}


def test_divergence_is_a_status_and_not_an_exception():
    # Not finite where 256 points of a check do not look.
    broken = pde.Problem(pde.Box(0.0, 1.0, 2), source=lambda x: jnp.where(x[0] > 0.999, jnp.nan, 1.0))
    config = dataclasses.replace(SMALL, interior_samples=4000, boundary_samples=20)
    found = solve(problem=broken, config=config, max_iterations=50)
    assert found.status == "diverged" and np.isfinite(found.theta).all() and found.iterations < 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adam"}, "method='adam': expected auto or one of npdg, pinn_adam"),
        ({"method": "wan"}, "method=wan: found a NpdgConfig, expected a TrainConfig"),
        ({"budget_s": -1.0}, "budget_s=-1.0: expected more than 0"),
        ({"problem": pde.Problem(pde.Box(0.0, 1.0, 2)), "target": 0.1}, "whose exact solution is not known"),
        ({"method": "transport"}, "method=transport on poisson-3: expected npdg, pinn_adam"),
        (
            {"problem": equations.allen_cahn(2).step_problem(), "method": "wan", "config": TrainConfig()},
            "by solve_evolution",
        ),
        ({"method": (pde.Stage("npdg", SMALL), pde.Stage("wan"))}, "stages: wan's network is"),
    ],
)
def test_what_cannot_be_solved(options, message):
    with pytest.raises(UserError, match=message):
        solve(**({"max_iterations": 10} | options))
