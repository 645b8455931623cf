"""`verify` passes what is right, and catches a sign or a factor in any term."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxstack import pde
from jaxstack.pde import equations
from jaxstack.pde.forms import Form
from jaxstack.pde.verify import VerifyReport, own_strong, strong_checks, weak_against_strong
from jaxstack.runtime.errors import UserError

BOX = pde.Box((0.0, -1.0), (2.0, 1.0))
OWN = pde.Problem(
    BOX,
    weak_form=pde.WeakForm(
        lambda x, u, du, phi, dphi: (1 + x[0]) * (du @ dphi) + (u**3 - jnp.sin(x[1])) * phi,
        strong=lambda x, u, du, hessian: -(1 + x[0]) * jnp.trace(hessian) - du[0] + u**3 - jnp.sin(x[1]),
    ),
    name="own",
)


@pytest.mark.parametrize("problem", [equations.variable_coefficient(4), OWN], ids=lambda p: p.name)
def test_right_problems_pass(problem):
    report = pde.verify(problem, seed=3)
    assert report.passed, str(report)
    names = [check.name for check in report.checks]
    assert "weak and strong form agree" in names
    assert ("weak form sees a disturbed solution" in names) == (problem.exact is not None)
    assert ("strong form follows from the weak one" in names) == (problem is OWN)
    assert "all checks passed" in str(report) and all("passed" in row for row in report.as_json())


def mutants():
    """(name, problem, the check that must fail): one term of one equation, its sign turned or a tenth too large."""
    exact = lambda x: jnp.sin(x[0]) * jnp.cos(x[1])  # noqa: E731
    base = pde.manufactured(
        pde.Problem(BOX, diffusion=lambda x: 1 + 0.5 * x[0], reaction=lambda x, u, du: u**3 + du[1]), exact
    )
    strongly = "exact solution satisfies the equation"
    density = OWN.weak_form.density
    for factor in (-1.0, 1.1):
        yield "source", dataclasses.replace(base, source=lambda x, f=factor: f * base.source(x)), strongly
        yield (
            "reaction",
            dataclasses.replace(base, reaction=lambda x, u, du, f=factor: f * u**3 + du[1]),
            strongly,
        )
        yield "drift", dataclasses.replace(base, reaction=lambda x, u, du, f=factor: u**3 + f * du[1]), strongly
        own = pde.WeakForm(
            lambda x, u, du, phi, dphi, f=factor: density(x, u, du, phi, dphi) + (f - 1) * u**3 * phi,
            OWN.weak_form.strong,
        )
        yield "own", dataclasses.replace(OWN, weak_form=own), "strong form follows from the weak one"
        own = pde.WeakForm(
            lambda x, u, du, phi, dphi, f=factor: density(x, u, du, phi, dphi) + (f - 1) * (1 + x[0]) * (du @ dphi),
            OWN.weak_form.strong,
        )
        yield "own flux", dataclasses.replace(OWN, weak_form=own), "strong form follows from the weak one"
    varying = dataclasses.replace(base, diffusion=lambda x: 1 + 0.55 * x[0])
    yield "diffusion", varying, strongly


@pytest.mark.parametrize(("name", "problem", "check"), list(mutants()), ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_term_is_caught(name, problem, check):
    form, key = Form(problem), jax.random.key(0)
    checks = strong_checks(form, key) if problem.exact is not None else [own_strong(form, key)]
    failed = [c for c in checks if not c.passed]
    assert [c.name for c in failed] == [check]
    report = VerifyReport("it", tuple(checks))
    assert not report.passed and "NOT as meant" in str(report) and failed[0].explanation in str(report)


def test_a_wrong_flux_is_caught():
    exact = lambda x: jnp.sin(x[0]) * jnp.cos(x[1])  # noqa: E731
    right = pde.manufactured(pde.Problem(BOX, boundary=pde.Neumann()), exact)
    assert all(c.passed for c in strong_checks(Form(right), jax.random.key(0)))
    flux = right.boundary.flux
    wrong = dataclasses.replace(right, boundary=pde.Neumann(lambda x: -flux(x)))
    failed = [c.name for c in strong_checks(Form(wrong), jax.random.key(0)) if not c.passed]
    assert failed == ["exact solution satisfies the boundary condition"]


def test_a_form_that_is_not_linear_in_phi_is_caught():
    own = pde.WeakForm(lambda x, u, du, phi, dphi: du @ dphi + phi**2 + u * phi)
    form = Form(pde.Problem(BOX, weak_form=own)).with_cutoff_scale()
    assert not weak_against_strong(form, jax.random.key(0)).passed


def test_values_are_checked_first():
    with pytest.raises(UserError, match="source is not finite"):
        pde.verify(pde.Problem(BOX, source=lambda x: jnp.log(-jnp.abs(x[0]))))
