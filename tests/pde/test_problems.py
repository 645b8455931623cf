"""The paper's equations: exact solutions put into them, weakly and strongly, and their norms by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import pde
from jaxstack.pde import equations
from jaxstack.pde.forms import Fields, Form, exact_second_order
from jaxstack.runtime.errors import UserError

STATIONARY = [
    equations.poisson(1),
    equations.poisson(3),
    equations.variable_coefficient(2),
    equations.variable_coefficient(5),
    equations.semilinear(5),
]


def samples_and_exact(problem, points: int = 400):
    form = Form(problem, tangential=isinstance(problem.boundary, pde.Dirichlet)).with_cutoff_scale()

    @jax.jit
    def draw(key):
        samples = form.samples(key, points, 60, strong=True)
        return samples, exact_second_order(problem.exact, samples.x, samples.diffusion)

    return form, *draw(jax.random.key(0))


@pytest.mark.parametrize("problem", STATIONARY, ids=lambda p: p.name)
def test_the_exact_solution_solves_it(float64, problem):
    form, samples, u = samples_and_exact(problem)
    residual = form.residual(samples, u)
    assert float(jnp.abs(residual).max()) < 1e-9 * float(jnp.abs(u.second).max() + 1)
    exact = jax.vmap(jax.value_and_grad(problem.exact))(samples.y)
    misfit = form.misfit(samples, Fields(edge_value=exact[0]))
    assert float(jnp.abs(misfit).max()) < 1e-9
    # The tangential part of g's gradient is that of u*.
    tangential = exact[1] - jnp.sum(exact[1] * samples.normal, axis=1, keepdims=True) * samples.normal
    np.testing.assert_allclose(samples.edge_gradient, tangential, atol=1e-9)


def gauss_box(problem, count: int = 24):
    """Quadrature points and weights of a box's uniform measure."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    low, high = (np.asarray(c) for c in problem.domain.box)
    grids = [low[k] + (high[k] - low[k]) * (nodes + 1) / 2 for k in range(problem.dim)]
    x = np.stack([g.ravel() for g in np.meshgrid(*grids, indexing="ij")], axis=1)
    w = np.prod(np.stack([g.ravel() for g in np.meshgrid(*[weights / 2] * problem.dim, indexing="ij")]), axis=0)
    return jnp.asarray(x), jnp.asarray(w)


@pytest.mark.parametrize("problem", [equations.poisson(1), equations.poisson(2), equations.variable_coefficient(2)])
def test_the_weak_form_vanishes_there_by_quadrature(float64, problem):
    x, w = gauss_box(problem)
    form = Form(problem, cutoff="harmonic")
    edge = problem.domain.sample_boundary(jax.random.key(1), 4)
    low, high = (jnp.asarray(c) for c in problem.domain.box)

    @jax.jit
    def weak(wave, factor):
        samples = form.at(x, *edge)
        u, du = jax.vmap(jax.value_and_grad(problem.exact))(x)
        # A function that vanishes on every face, without a cutoff.
        phi = lambda p: jnp.prod(jnp.sin(jnp.pi * wave * (p - low) / (high - low))) * jnp.exp(p[0])  # noqa: E731
        test = Fields(*jax.vmap(jax.value_and_grad(phi))(x))
        return w @ form.interior_density(samples, Fields(u, factor * du), test)

    for wave in (1.0, 2.0, 3.0):
        assert abs(float(weak(wave, 1.0))) < 1e-11
    assert abs(float(weak(1.0, 1.1))) > 1e-4


def test_norms_of_the_exact_solutions(float64):
    d = 7
    x = equations.poisson(d).domain.sample_interior(jax.random.key(0), 200_000)
    u, du = jax.vmap(jax.value_and_grad(equations.poisson(d).exact))(x)
    assert float(jnp.sqrt(jnp.mean(u**2))) == pytest.approx(np.sqrt(d / 2 + 4 * d * (d - 1) / np.pi**2), rel=2e-3)
    assert float(jnp.std(u)) == pytest.approx(np.sqrt(d * (0.5 - 4 / np.pi**2)), rel=1e-2)
    assert float(jnp.sqrt(jnp.mean(jnp.sum(du**2, 1)))) == pytest.approx(np.sqrt(d * np.pi**2 / 8), rel=2e-3)
    varying = equations.variable_coefficient(50)
    x = varying.domain.sample_interior(jax.random.key(0), 50_000)
    u, du = jax.vmap(jax.value_and_grad(varying.exact))(x)
    assert float(jnp.sqrt(jnp.mean(u**2))) == pytest.approx(5.2647, rel=2e-3)
    assert float(jnp.std(u)) == pytest.approx(0.7683, rel=1e-2)
    assert float(jnp.sqrt(jnp.mean(jnp.sum(du**2, 1)))) == pytest.approx(2.9756, rel=2e-3)
    ball = equations.semilinear()
    x = ball.domain.sample_interior(jax.random.key(0), 200_000)
    u, du = jax.vmap(jax.value_and_grad(ball.exact))(x)
    assert float(jnp.sqrt(jnp.mean(u**2))) == pytest.approx(0.628510, rel=3e-3)
    assert float(jnp.sqrt(jnp.mean(jnp.sum(du**2, 1)))) == pytest.approx(1.221767, rel=3e-3)


BOX = pde.Box((0.0, -1.0), (2.0, 1.0))
SMOOTH = lambda x: jnp.sin(x[0]) * jnp.cos(2 * x[1]) + x[0] * x[1]  # noqa: E731
OPERATORS = {
    "scalar": pde.Problem(BOX, diffusion=lambda x: 1 + x[0] ** 2, reaction=lambda x, u, du: u**3 + du[0]),
    "diagonal": pde.Problem(BOX, diffusion=lambda x: jnp.stack([1 + x[1] ** 2, 2 + jnp.sin(x[0])])),
    "matrix": pde.Problem(
        BOX, diffusion=lambda x: jnp.asarray([[2.0, 0.0], [0.0, 1.0]]) + jnp.outer(x, x), boundary=pde.Neumann()
    ),
    "robin": pde.Problem(
        BOX, diffusion=lambda x: 1 + x[1] ** 2, reaction=lambda x, u, du: u, boundary=pde.Robin(lambda x: 2 + x[0])
    ),
    "periodic": pde.Problem(pde.Box(0.0, 2 * np.pi, 2), reaction=lambda x, u, du: u, boundary=pde.Periodic()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_manufactured_problems_have_their_solution(float64, name):
    exact = (lambda x: jnp.sin(x[0]) * jnp.cos(x[1])) if name == "periodic" else SMOOTH
    problem = pde.manufactured(OPERATORS[name], exact)
    form = Form(problem)

    @jax.jit
    def gaps(key):
        samples = form.samples(key, 100, 60, strong=True)
        residual = form.residual(samples, exact_second_order(exact, samples.x, samples.diffusion))
        if not form.has_edge:
            return residual, jnp.zeros(1)
        fields = Fields(edge_value=jax.vmap(exact)(samples.y), edge_gradient=jax.vmap(jax.grad(exact))(samples.y))
        return residual, form.misfit(samples, fields)

    for gap in gaps(jax.random.key(0)):
        assert float(jnp.abs(gap).max()) < 1e-10


def test_flux_terms_close_the_weak_form_for_free_test_functions(float64):
    # With phi that do not vanish on the boundary, E(u*, phi) = 0 needs the flux term with the right factor and sign.
    for boundary in (pde.Neumann(), pde.Robin(1.5)):
        base = pde.Problem(pde.Box((0.0,), (2.0,)), diffusion=lambda x: 1 + x[0], boundary=boundary)
        problem = pde.manufactured(base, lambda x: jnp.sin(2 * x[0]))
        form = Form(problem)
        x, w = gauss_box(problem, 40)
        y = jnp.asarray([[0.0], [2.0]])
        phi = lambda p: jnp.exp(p[0]) + p[0] ** 2  # noqa: E731

        @jax.jit
        def terms(x, y, w, form=form, phi=phi, exact=problem.exact):
            samples = form.at(x, y, jnp.asarray([[-1.0], [1.0]]))
            u = Fields(*jax.vmap(jax.value_and_grad(exact))(x), edge_value=jax.vmap(exact)(y))
            v = Fields(*jax.vmap(jax.value_and_grad(phi))(x), edge_value=jax.vmap(phi)(y))
            return w @ form.interior_density(samples, u, v), form._flux_term(samples, u, v)

        inside, flux = terms(x, y, w)
        assert abs(float(inside)) > 0.1 and abs(float(inside + flux)) < 1e-10


def test_a_weak_form_of_ones_own_gives_its_strong_form(float64):
    # The density of -div((1 + u^2) grad u) + u - x_0.
    own = pde.WeakForm(lambda x, u, du, phi, dphi: (1 + u**2) * (du @ dphi) + (u - x[0]) * phi)
    problem = pde.Problem(BOX, weak_form=own)
    form = Form(problem)

    @jax.jit
    def residual(key):
        samples = form.samples(key, 50, 10, strong=True)
        plain = exact_second_order(SMOOTH, samples.x, None)
        u = exact_second_order(SMOOTH, samples.x, form.strong_coefficient(samples, plain.value, plain.gradient))
        return samples, plain, form.residual(samples, u)

    samples, plain, found = residual(jax.random.key(0))
    expected = (
        -(1 + plain.value**2) * plain.second
        - 2 * plain.value * jnp.sum(plain.gradient**2, axis=1)
        + plain.value - samples.x[:, 0]
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pde.Problem(BOX, source=lambda x: x), r"source returns shape \(2,\) .* expected \(\)"),
        (lambda: pde.Problem(BOX, diffusion=lambda x: jnp.ones(3)), r"diffusion returns shape \(3,\)"),
        (lambda: pde.Problem(BOX, reaction=lambda x, u: u), "reaction fails on a point of shape"),
        (lambda: pde.Problem(BOX, source=float("nan")), "source=nan: expected a finite number"),
        (lambda: pde.Problem(BOX, boundary="periodic"), "boundary is a str: expected Dirichlet"),
        (lambda: pde.Problem(pde.Ball(2), boundary=pde.Periodic()), "boundary Periodic on a Ball: expected a Box"),
        (lambda: equations.allen_cahn(3), "allen_cahn dim=3: expected 1 or 2"),
        (lambda: equations.semilinear(5, 2.0), "expected an odd integer"),
        (lambda: pde.Evolution(equations.poisson(1), lambda x: 0.0, 0.3, 1.0), "expected a multiple of step=0.3"),
    ],
)
def test_problems_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_values_that_cannot_be():
    with pytest.raises(UserError, match=r"source is not finite at x = \(") as error:
        pde.Problem(BOX, source=lambda x: jnp.log(x[0] - 1)).check_values()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="diffusion is not positive at"):
        pde.Problem(BOX, diffusion=lambda x: x[0] - 1).check_values()
    with pytest.raises(UserError, match="exact and boundary value differ by"):
        pde.Problem(BOX, exact=lambda x: x[0], boundary=pde.Dirichlet(1.0)).check_values()
