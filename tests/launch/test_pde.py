"""`python -m launch.pde`, as a user types it."""

import json
import signal
import time

import programs
import pytest

SMALL = (
    "--config.method=npdg", "--config.dim=2", "--config.npdg.width=12", "--config.npdg.depth=3",
    "--config.npdg.interior_samples=60", "--config.npdg.boundary_samples=40",
)  # fmt: skip
OWN = """
import jax.numpy as jnp
from jaxstack import pde

def make(source):
    return pde.Problem(
        domain=pde.Box(lower=0.0, upper=1.0, dim=3),
        diffusion=lambda x: 1.0 + 0.5 * (x @ x),
        reaction=lambda x, u, du: u**3,
        source=lambda x: source * jnp.sin(x).sum(),
        boundary=pde.Dirichlet(lambda x: 0.0),
        exact=EXACT,
        name="mine",
    )

EXACT = None
problem = make(1.0)
EXACT = lambda x: 0.0 * x[0]
wrong = make(1.0)
"""


def run(*arguments: str, **how: bool) -> tuple[int, str, str]:
    done = programs.run("launch.pde", *arguments, **how)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "my_pde.py"
    file.write_text(OWN)
    return file


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, compiled_programs):
    import numpy as np

    arguments = (*SMALL, "--config.budget_s=none", "--config.max_iterations=120")
    code, out, err = run(*arguments, f"--workdir={tmp_path / 'whole'}", anew=True)
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary == json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["iterations"] == 120 and summary["recompilations"] == 0 and summary["errors"]["c_l2"] < 0.3
    assert "all checks passed" in err
    for name in ("error.png", "solution.png"):
        assert (tmp_path / "whole" / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()) >= 12

    for number in range(20):  # once more where a busy machine let it end first
        killed = tmp_path / f"killed{number}"
        process = programs.start("launch.pde", *arguments, "--checkpoint_every_s=0.05", f"--workdir={killed}")
        while not any(f.name.isdigit() for f in (killed / "checkpoints").glob("*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not (killed / "summary.json").exists():
            break
    assert not (killed / "summary.json").exists()
    code, out, err = run(*arguments, f"--workdir={killed}")
    assert code == 0 and "resumed at iteration" in err, err
    first, second = (np.load(tmp_path / name / "solution.npz")["theta"] for name in ("whole", killed.name))
    np.testing.assert_array_equal(first, second)


def test_ones_own_equation(own, tmp_path):
    code, out, err = run(f"--problem={own}:problem", "--verify_only", f"--workdir={tmp_path}")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["passed"] is True and "weak and strong form agree" in err
    code, out, err = run(f"--problem={own}:wrong", "--verify_only", f"--workdir={tmp_path}")
    assert code == 1 and "exact solution satisfies the equation" in err.splitlines()[-1] and out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--problem=nowhere.py:problem",), "expected FILE.py:NAME, with a file that exists"),
        (("--config.method=sgd",), "method='sgd': expected auto or one of npdg"),
        (("--config.npdg.tau_u=1.0", "--config.npdg.tau_phi=1.0"), "each iteration multiplies errors by"),
        (("--config.dim=zero",), "--config.dim='zero': expected int"),
    ],
)
def test_bad_usage(arguments, message):
    code, out, err = run(*arguments)
    assert code in (1, 2) and message in err and err.count("\n") == 1 and out == ""
