"""bench_pde: what is handed to DeepXDE against our own definitions, turns and figures, the launcher in small, and the
real peer where it is installed."""

import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from jaxstack.pde.compare import Case
from jaxstack.pde.estimate import errors, held_out
from jaxstack.pde.forms import Form
from jaxstack.pde.networks import Mlp
from jaxstack.pde.npdg import NpdgConfig
from jaxstack.pde.operators import forward_laplacian
from jaxstack.runtime.errors import UserError
from launch.pde_benchmark import contest as contests
from launch.pde_benchmark.laplacian import laplacian
from launch.pde_benchmark.plot import draw
from launch.pde_benchmark.sides import DeepXde, Mode, modes, run_row, write_held_out
from launch.peers import poisson

REPOSITORY = Path(__file__).parents[2]
PEER = REPOSITORY / ".venv-deepxde" / "bin" / "python"
NETWORK = NpdgConfig(width=8, depth=3)


def launch(*flags: str) -> tuple[int, str, str]:
    done = programs.run("launch.bench_pde", *flags)
    return done.returncode, done.stdout, done.stderr


def test_the_peers_problem_is_ours(tmp_path):
    dim = 10
    case = Case("poisson", dim, 0.05)
    problem, net = case.problem, Mlp.of(dim, 8, 3)
    points = np.random.default_rng(0).uniform(size=(50, dim)).astype(np.float32)
    exact, source = (jax.vmap(f)(jnp.asarray(points)) for f in (problem.exact, problem.source))
    np.testing.assert_allclose(poisson.exact(points)[:, 0], exact, rtol=1e-6)
    np.testing.assert_allclose(poisson.source(points)[:, 0], source, rtol=1e-6)
    np.testing.assert_allclose(poisson.exact(jnp.asarray(points), jnp.sin)[:, 0], exact, rtol=1e-6)

    theta = net.init(jax.random.key(1))
    samples = Form(problem).samples(jax.random.key(2), 40, 20, strong=True)
    second = forward_laplacian(net, theta, samples.x).second[:, None]
    found = poisson.residual(np.asarray(samples.x), np.asarray(second))[:, 0]
    np.testing.assert_allclose(found, Form(problem).net_residual(net, theta, samples), rtol=1e-4, atol=1e-5)
    edge = np.asarray(samples.y)
    values = np.asarray(net(theta, jnp.asarray(edge))) - poisson.exact(edge)[:, 0]
    np.testing.assert_allclose(values, Form(problem).net_misfit(net, theta, samples), rtol=1e-4, atol=1e-5)

    with np.load(write_held_out(case, tmp_path)) as file:
        judged = held_out(problem)
        np.testing.assert_array_equal(file["x"], judged.x)
        np.testing.assert_array_equal(file["value"], judged.value)
        error = poisson.centred_error(net(theta, judged.x)[:, None], file["value"])
    assert error == pytest.approx(float(errors(net, theta, judged).c_l2), rel=1e-4)
    assert poisson.centred_error(np.full(4000, judged.value.mean()), judged.value) == pytest.approx(1, rel=1e-4)


def test_modes_are_what_they_say():
    plain, advised, forward, half = modes("jax", 400, 201)
    assert plain.arguments(10.0) == {
        "inside": 400, "boundary": 201, "distribution": "Hammersley", "weight": 1.0, "resample": 0,
        "autodiff": "reverse", "lbfgs_after_s": None,
    }  # fmt: skip
    # Quasi-random points would be the same ones each time they are drawn.
    assert (advised.distribution, advised.weight, advised.resample) == ("pseudo", 100.0, 100)
    assert (forward.autodiff, half.autodiff, half.inside, half.boundary) == ("forward", "forward", 200, 101)
    *_, alone, after = modes("pytorch", 400, 200)
    assert (alone.arguments(10.0)["lbfgs_after_s"], after.arguments(10.0)["lbfgs_after_s"]) == (0.0, 3.0)
    assert alone.resample == after.resample == 0


def test_sides_take_turns_and_the_best_mode_counts(tmp_path):
    cases = [Case("poisson", 10, 0.1), Case("poisson", 20, 0.1)]
    turns = []

    def side(label, seconds):
        """Arrives after `seconds` (by dimension), having had twice the target's error at half that time."""

        def run(case, seed, budget_s, say):
            turns.append((case.dim, seed, label))
            time = seconds[case.dim] + 0.1 * seed
            steps = [(time / 2, 0.2), (time, 0.1)]
            history = [(s, c) for s, c in steps if s <= budget_s]
            return run_row(case, label, seed, budget_s, history) | {"iterations": len(history), "compile_s": 0.0}

        return run

    others = {"slow": side("slow", {10: 4.0, 20: 30.0}), "quick": side("quick", {10: 2.0, 20: 12.0})}
    runs = contests.contest(cases, {"npdg": side("npdg", {10: 0.5, 20: 1.0})}, others, seeds=2, budget_s=10.0)
    assert turns == [
        (10, 0, "npdg"), (10, 0, "slow"), (10, 0, "quick"), (20, 0, "npdg"), (20, 0, "slow"), (20, 0, "quick"),
        (10, 1, "quick"), (10, 1, "npdg"), (20, 1, "quick"), (20, 1, "npdg"),
    ]  # fmt: skip
    found = contests.summarise(runs, "npdg", list(others))
    ten, twenty = found["time_to_error_ratio_by_problem"].values()
    assert (ten["best_mode"], ten["lower_bound"], ten["seeds"]) == ("quick", False, 2)
    assert ten["ratio"] == pytest.approx((2.0 / 0.5 + 2.1 / 0.6) / 2)
    # At 20 dimensions nobody arrives: who came nearer within the budget is met again, and counts as the budget.
    assert (twenty["best_mode"], twenty["lower_bound"], twenty["censored_other"]) == ("quick", True, 2)
    assert twenty["ratio"] == pytest.approx((10 / 1.0 + 10 / 1.1) / 2)
    assert found["time_to_error_ratio"] == pytest.approx((ten["ratio"] + twenty["ratio"]) / 2)
    assert found["time_to_error_ratio_is_lower_bound"] is True
    assert found["error_at_the_end_by_problem"]["poisson-20"]["quick"] == 0.2
    assert "| quick | 2.05 (0.1 at the end) | >10.00 (0.2 at the end) |" in contests.report(found | {"target": 0.1})
    draw(tmp_path / "error.png", runs, {case.name: case.target for case in cases})
    assert (tmp_path / "error.png").read_bytes().startswith(b"\x89PNG")


def test_methods_side_by_side(tmp_path):
    flags = ("--peer=adam", "--dims=2", "--target=0.9", "--budget_s=0.5", f"--workdir={tmp_path}")
    code, out, err = launch(*flags)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["peer"] == "adam" and {run["label"] for run in summary["runs"]} == {"npdg", "pinn_adam"}
    row = summary["time_to_error_ratio_by_problem"]["poisson-2"]
    assert row["ratio"] == pytest.approx(row["other_s"] / row["ours_s"]) and row["best_mode"] == "pinn_adam"
    assert json.loads((tmp_path / "summary.json").read_text()) == summary and (tmp_path / "error.png").exists()
    assert isinstance(summary["conclusive"], bool) and "| npdg |" in err


def test_the_laplacians_agree():
    forms = laplacian(3, points=16, width=8, repeats=1, timed=False)
    assert len(forms) == 3 and all(form["difference"] < 1e-4 for form in forms.values())


@pytest.mark.parametrize(
    ("flags", "message", "expected"),
    [
        (("--peer=deepxde", "--peer_python=/nowhere/python"), "make peer-deepxde", 1),
        (("--peer=spring", "--dims=ten"), "--dims: found 'ten', expected integers above 0", 2),
    ],
)
def test_bad_usage(tmp_path, flags, message, expected):
    code, out, err = launch(*flags, f"--workdir={tmp_path / 'new'}")
    assert code == expected and message in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("backend", ["jax", "pytorch"])
def test_deepxde_itself(backend, tmp_path):
    """Its loss is the one of our problem, for its network and points; it trains; and it refuses another problem."""
    if not PEER.exists():
        pytest.skip("DeepXDE is not installed: `make peer-deepxde`")
    if backend == "pytorch" and subprocess.run([PEER, "-c", "import torch"], capture_output=True).returncode:
        pytest.skip("DeepXDE has no PyTorch: `make peer-deepxde-torch`")
    case = Case("poisson", 3, 0.5)
    with DeepXde(PEER, backend, tmp_path, NETWORK) as peer:
        for mode in (
            Mode("defaults", 20, 10),
            Mode("advised", 20, 10, "pseudo", 100.0, 5, "forward", 0.5 if backend == "pytorch" else None),
        ):
            begun = peer.begin(mode, case, 0, 1.0)
            found = peer.losses()
            net = Mlp.of(3, 8, 3, last_bias=True)
            parts = [np.ravel(part) for layer in found["layers"] for part in layer]
            theta = jnp.asarray(np.concatenate(parts), jnp.float32)
            assert begun["parameters"] == net.parameter_count == theta.size
            # Those of the boundary's term, then all: they are among the points of the equation, too.
            x, edge = np.asarray(found["points"], np.float32), found["of_boundary"]
            assert len(x) == 2 * edge + 20 and edge == 10
            assert bool(case.problem.domain.contains(jnp.asarray(x)).all())
            assert np.isclose(x[:edge], np.round(x[:edge]), atol=1e-6).any(axis=1).all()
            second = np.asarray(forward_laplacian(net, theta, jnp.asarray(x[edge:])).second)[:, None]
            misfit = np.asarray(net(theta, jnp.asarray(x[:edge]))) - poisson.exact(x[:edge])[:, 0]
            expected = [np.mean(poisson.residual(x[edge:], second) ** 2), mode.weight * np.mean(misfit**2)]
            np.testing.assert_allclose(found["terms"], expected, rtol=1e-3)
            judged = held_out(case.problem)
            assert begun["c_l2"] == pytest.approx(float(errors(net, theta, judged).c_l2), rel=1e-3)

            run = peer.side(mode)(case, 0, 1.0, lambda text: None)
            assert run["best_c_l2"] < begun["c_l2"] and run["iterations"] > 0 and run["label"] == mode.title
            assert run["censored"] or run["c_l2"] <= case.target
            assert all(a[0] < b[0] for a, b in zip(run["history"], run["history"][1:-1]))
        with pytest.raises(UserError, match="exact solutions differ"):
            peer.begin(Mode("other", 20, 10), Case("variable", 3, 0.5), 0, 1.0)
