"""The primal-dual iteration: its closed-form rate, its natural gradients, its formulas for each equation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack import pde
from jaxstack.pde import Npdg, NpdgConfig, convergence_factor, equations, suggest_steps
from jaxstack.pde.domains import Box
from jaxstack.pde.gram import PRECONDITIONERS, Linearized
from jaxstack.pde.linear_case import linear_solver, trajectories
from jaxstack.runtime.errors import UserError

TINY = NpdgConfig(width=6, psi_width=4, depth=3, interior_samples=40, boundary_samples=20)


@pytest.mark.parametrize(
    ("steps", "factor"),
    [
        ((0.05, 0.095, 1, 1), 0.94882), ((0.1, 0.19, 1, 1), 0.88938), ((0.2, 0.38, 1, 1), 0.73756),
        ((0.3, 0.3, 1, 1), 0.78102), ((0.5, 0.5, 1, 1), 0.5), ((0.01, 0.02, 1, 1), 0.98985),
        ((0.05, 0.09, 2, 1), 0.94921), ((0.1, 0.15, 1, 0), 0.99247), ((0.05, 0.09, 1, 0), 0.99775),
    ],
)  # fmt: skip
def test_convergence_factors(steps, factor):
    assert convergence_factor(*steps) == pytest.approx(factor, abs=6e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 2), st.floats(0.1, 10))
def test_without_regularisation_only_the_product_of_the_steps_counts(tau_u, tau_phi, omega, c):
    assert convergence_factor(tau_u, tau_phi, omega, 0) == pytest.approx(
        convergence_factor(tau_u * c, tau_phi / c, omega, 0), abs=1e-9
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0, 2), st.floats(0, 1.5))
def test_factors_are_spectral_radii_and_the_stability_limit_is_the_published_one(tau_u, tau_phi, omega, eps):
    s = tau_u * tau_phi
    # (e, p) -> one iteration on the error of u and the test function.
    step = np.array([[1 - tau_u * (1 + omega) * tau_phi, -tau_u * (1 - (1 + omega) * eps * tau_phi)],
                     [tau_phi, 1 - eps * tau_phi]])  # fmt: skip
    radius = np.abs(np.linalg.eigvals(step)).max()
    assert convergence_factor(tau_u, tau_phi, omega, eps) == pytest.approx(radius, abs=1e-6)
    stable = 0 < s < (4 - 2 * eps * tau_phi) / (1 + 2 * omega) and eps * tau_phi + omega * s < 2
    if abs(radius - 1) > 1e-6:
        assert stable == (radius < 1)


# -------------------------------------------------------------------------------------------- the closed-form rate


def test_each_mode_follows_the_recursion(float64):
    errors, tests = trajectories(linear_solver(tau_u=0.05, tau_phi=0.095, tau_psi=0.095), 400)
    e, p = errors[0].copy(), tests[0].copy()
    for n in range(1, 101):
        new = p + 0.095 * (e - p)
        e, p = e - 0.05 * (new + 1.0 * (new - p)), new
        np.testing.assert_allclose(errors[n], e, atol=1e-10)
        np.testing.assert_allclose(tests[n], p, atol=1e-10)
    # The fitted decay of |(e, p)| is the closed form's, to four digits.
    size = np.linalg.norm(np.concatenate([errors, tests], axis=1), axis=1)
    decay = np.exp(np.polyfit(np.arange(40, 401), np.log(size[40:]), 1)[0])
    assert decay == pytest.approx(convergence_factor(0.05, 0.095), abs=1e-3)


def test_just_past_the_stability_limit_it_diverges(float64):
    limit = (4 - 2 * 1.0) / 3  # of s at tau_phi = 1
    for scale, grows in ((0.95, False), (1.05, True)):
        errors, _ = trajectories(linear_solver(tau_u=scale * limit, tau_phi=1.0, tau_psi=1.0), 200)
        assert (np.linalg.norm(errors[-1]) > np.linalg.norm(errors[100])) == grows


# ------------------------------------------------------------------------------------------------ natural gradients

CASES = {
    "nabla": equations.poisson(2),
    "kappa_nabla": equations.variable_coefficient(2),
    "kappa_nabla_h1": equations.variable_coefficient(3),
    "nabla_h1": equations.poisson(2),
    "identity": equations.semilinear(2),
    "id_laplace": equations.poisson(2),
    "h1": pde.Problem(Box(0.0, 1.0, 2), reaction=lambda x, u, du: u, boundary=pde.Robin(1.0, 1.0)),
    "reaction_large": equations.allen_cahn(2).step_problem(),
    "reaction_small": equations.allen_cahn(1).step_problem(),
}


def earlier(problem):
    return (lambda x: jnp.cos(jnp.sum(x, axis=1))) if problem.takes_previous else None


@pytest.mark.parametrize("name", ["nabla", "kappa_nabla_h1", "id_laplace", "reaction_large", "h1"])
def test_gram_products_are_those_of_the_dense_matrix(float64, name):
    solver = Npdg(CASES[name], dataclasses.replace(TINY, preconditioner=name))
    form, chosen = solver.form, solver.preconditioner

    @jax.jit
    def matrices(key):
        state = solver.init(key)
        samples = solver.samples(state, earlier(solver.problem))
        u = form.u_fields(solver.u, state.theta, samples)
        found = []
        for net, flat, fields, metric in (
            (solver.u, state.theta, form.u_fields, chosen.u),
            (solver.phi, state.eta, form.phi_fields, chosen.phi),
        ):
            weights = metric.weights(form, samples, u)
            square = lambda v, m=metric, w=weights: m.half_square(form, samples, v, w)  # noqa: E731
            function = lambda p, n=net, f=fields: f(n, p, samples)  # noqa: E731
            dense = Linearized(function, flat).dense_gram(square, flat.size)
            # The squared norm of a direction, by the derivative of every field: no transposition.
            v = jax.random.normal(key, flat.shape)
            pushed = jax.jvp(function, (flat,), (v,))[1]
            found.append((dense, v, 2 * square(pushed)))
        return found

    for dense, v, energy in jax.device_get(matrices(jax.random.key(1))):
        size = np.abs(dense).max()
        assert v @ dense @ v == pytest.approx(float(energy), rel=1e-10)
        np.testing.assert_allclose(dense, dense.T, atol=1e-10 * size)
        assert np.linalg.eigvalsh(dense).min() > -1e-10 * size


def test_steps_are_the_dense_natural_gradients(float64):
    """One iteration against dense solves and differences of the published saddle function, from scratch."""
    problem = equations.variable_coefficient(2)
    config = dataclasses.replace(TINY, preconditioner="kappa_nabla", minres_rtol=1e-14, minres_max_iterations=5000)
    config = dataclasses.replace(config, minres_damping=1e-3, tau_u=0.1, tau_phi=0.2, tau_psi=0.2, omega=0.7)
    solver = Npdg(problem, config)
    state = jax.jit(solver.init)(jax.random.key(3))
    samples = jax.jit(solver.samples)(state)
    new, report = jax.jit(solver.step_on)(state, samples)
    x, y = samples.x, samples.y
    sigma = jax.vmap(problem.diffusion)(x)
    f, g = jax.vmap(problem.source)(x), jax.vmap(problem.boundary.value)(y)
    lam = config.boundary_weight
    zeta = solver.form.zeta

    def gradient_of(net, p, cut):
        scale = zeta if cut else (lambda z: 1.0)
        return jax.vmap(jax.value_and_grad(lambda z: scale(z) * net(p, z[None])[0]))(x)

    def saddle(theta, phi, psi):
        _, du = gradient_of(solver.u, theta, False)
        value, dphi = phi
        inside = jnp.mean(sigma * jnp.sum(du * dphi, axis=1) - f * value)
        return inside + lam * jnp.mean((solver.u(theta, y) - g) * psi)

    def solve(features, gradient):
        j = jnp.concatenate([jax.jit(jax.jacfwd(part))(p).reshape(-1, p.size) for part, p in features])
        return jnp.linalg.solve(j.T @ j + 1e-3 * jnp.eye(gradient.size), gradient)

    grad = lambda f: jax.jit(jax.grad(f))  # noqa: E731
    n, m = x.shape[0], y.shape[0]
    phi_feature = lambda p: jnp.sqrt(sigma / n)[:, None] * gradient_of(solver.phi, p, True)[1]  # noqa: E731
    psi_feature = lambda p: jnp.sqrt(lam / m) * solver.psi(p, y)  # noqa: E731
    by_phi = grad(
        lambda p: saddle(state.theta, gradient_of(solver.phi, p, True), 0 * g) - 0.5 * jnp.sum(phi_feature(p) ** 2)
    )(state.eta)
    eta = state.eta + 0.2 * solve([(phi_feature, state.eta)], by_phi)
    np.testing.assert_allclose(new.eta, eta, atol=1e-8)
    zero = (jnp.zeros(n), jnp.zeros_like(x))
    by_psi = jax.grad(lambda p: saddle(state.theta, zero, solver.psi(p, y)) - 0.5 * jnp.sum(psi_feature(p) ** 2))(
        state.xi
    )
    xi = state.xi + 0.2 * solve([(psi_feature, state.xi)], by_psi)
    np.testing.assert_allclose(new.xi, xi, atol=1e-8)
    ahead = lambda a, b: jax.tree.map(lambda s, t: t + 0.7 * (t - s), a, b)  # noqa: E731
    phi = ahead(gradient_of(solver.phi, state.eta, True), gradient_of(solver.phi, eta, True))
    psi = ahead(solver.psi(state.xi, y), solver.psi(xi, y))
    by_u = jax.grad(lambda p: saddle(p, phi, psi) + lam * jnp.mean((solver.u(p, y) - g) ** 2))(state.theta)
    u_inside = lambda p: jnp.sqrt(sigma / n)[:, None] * gradient_of(solver.u, p, False)[1]  # noqa: E731
    u_edge = lambda p: jnp.sqrt(lam / m) * solver.u(p, y)  # noqa: E731
    theta = state.theta - 0.1 * solve([(u_inside, state.theta), (u_edge, state.theta)], by_u)
    np.testing.assert_allclose(new.theta, theta, atol=1e-8)
    assert bool(report.accepted)
    assert float(report.loss) == pytest.approx(float(saddle(state.theta, phi, psi)), rel=1e-9)


def test_the_varying_metric_is_a_mean_of_products(float64):
    # Not the product of means that broadcasting (N, 1) against (N,) gives.
    solver = Npdg(equations.variable_coefficient(2), TINY)
    state = jax.jit(solver.init)(jax.random.key(0))
    samples = jax.jit(solver.samples)(state)
    fields = solver.form.phi_fields(solver.phi, state.eta, samples)
    expected = sum(float(s) * float(jnp.sum(p**2)) for s, p in zip(samples.diffusion, fields.gradient)) / len(samples.x)
    found = 2 * solver.preconditioner.phi.half_square(solver.form, samples, fields, None)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_tangential_terms_are_summed_over_directions_and_averaged_over_points(float64):
    solver = Npdg(equations.variable_coefficient(4), dataclasses.replace(TINY, preconditioner="kappa_nabla_h1"))
    state = jax.jit(solver.init)(jax.random.key(0))
    samples = jax.jit(solver.samples)(state)
    form = solver.form
    u, psi = form.u_fields(solver.u, state.theta, samples), form.psi_fields(solver.psi, state.xi, samples)
    du = jax.vmap(jax.grad(lambda y: solver.u(state.theta, y[None])[0] - solver.problem.exact(y)))(samples.y)
    dpsi = jax.vmap(jax.grad(lambda y: solver.psi(state.xi, y[None])[0]))(samples.y)
    total = 0.0
    for a, b, normal, gap, value in zip(du, dpsi, samples.normal, form.misfit(samples, u), psi.edge_value):
        axis = int(jnp.argmax(jnp.abs(normal)))
        total += float(gap * value) + sum(float(a[k] * b[k]) for k in range(4) if k != axis)
    expected = form.boundary_weight * total / len(samples.y)
    assert float(form.boundary(samples, u, psi)) == pytest.approx(expected, rel=1e-10)


def test_the_reaction_weight_is_the_derivative_of_the_step(float64):
    # 1 + b h W''(u), with one where one belongs, kept away from zero.
    solver = Npdg(equations.allen_cahn(1).step_problem(), TINY)

    @jax.jit
    def weigh(key):
        state = solver.init(key)
        samples = solver.samples(state, lambda x: jnp.sin(x[:, 0]))
        fields = solver.form.u_fields(solver.u, state.theta, samples)
        return samples, PRECONDITIONERS["reaction_large"].u.weights(solver.form, samples, fields)

    samples, weights = weigh(jax.random.key(0))
    np.testing.assert_allclose(weights, 1 + 0.1 * (3 * jnp.sin(samples.x[:, 0]) ** 2 - 1), atol=1e-12)


# ----------------------------------------------------------------------------------------------------- whole steps

ALL = {
    "poisson": equations.poisson(3),
    "variable": equations.variable_coefficient(3),
    "semilinear": equations.semilinear(3),
    "allen-cahn": equations.allen_cahn(2).step_problem(),
    "periodic": pde.Problem(Box(0.0, 1.0, 2), source=lambda x: jnp.sin(2 * jnp.pi * x[0]), boundary=pde.Periodic(),
                            reaction=lambda x, u, du: u),
    "robin": CASES["h1"],
    "own": pde.Problem(Box(0.0, 1.0, 2), weak_form=pde.WeakForm(lambda x, u, du, phi, dphi: du @ dphi - phi)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_an_iteration_of_every_equation_is_finite_and_moves(name):
    solver = Npdg(ALL[name], dataclasses.replace(TINY, strong_penalty=name == "allen-cahn"))
    state = jax.jit(solver.init)(jax.random.key(0))
    new, report = jax.jit(lambda s: solver.step(s, earlier(solver.problem)))(state)
    assert bool(report.accepted) and int(new.iteration) == 1
    assert float(report.step_norms[0]) > 0 and float(report.step_norms[2]) > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (new.theta, new.eta, new.xi, report.loss))
    again, _ = jax.jit(lambda s: solver.step(s, earlier(solver.problem)))(state)
    np.testing.assert_array_equal(new.theta, again.theta)


def test_an_outcome_that_is_not_finite_is_not_taken():
    broken = pde.Problem(Box(0.0, 1.0, 2), source=lambda x: jnp.where(x[0] > 0.5, jnp.nan, 1.0))
    solver = Npdg(broken, TINY)
    state = jax.jit(solver.init)(jax.random.key(0))
    new, report = jax.jit(solver.step)(state)
    assert not bool(report.accepted) and int(new.rejected_in_row) == 1 and int(new.careful) == 20
    np.testing.assert_array_equal(new.theta, state.theta)
    np.testing.assert_array_equal(new.eta, state.eta)


def test_a_step_far_out_of_the_ordinary_is_not_taken():
    solver = Npdg(equations.poisson(2), TINY)
    state = jax.jit(solver.init)(jax.random.key(0))
    step = jax.jit(solver.step)
    usual = float(step(state)[1].step_norms[2])
    small = state._replace(norms=jnp.full_like(state.norms, usual / 20))
    assert not bool(step(small)[1].accepted)
    assert bool(step(state._replace(norms=jnp.full_like(state.norms, usual / 5)))[1].accepted)
    halved = step(state._replace(careful=jnp.asarray(5, jnp.int32)))
    assert float(halved[1].step_norms[2]) < usual and int(halved[0].careful) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NpdgConfig(tau_u=1.0, tau_phi=1.0), r"tau_u=1, tau_phi=1, .* errors by 1\.\d+, expected below 1; for"),
        (lambda: NpdgConfig(interior_samples=0), "interior_samples=0: expected more than 0"),
        (lambda: NpdgConfig(cutoff="geometric"), "cutoff='geometric': expected harmonic or min"),
        (lambda: Npdg(equations.poisson(2), NpdgConfig(preconditioner="sobolev")), "expected auto or one of nabla"),
        (lambda: Npdg(CASES["h1"], NpdgConfig(preconditioner="nabla_h1")), "with a Robin boundary: expected Dirichlet"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_suggested_steps_converge():
    for omega, epsilon in ((1.0, 1.0), (2.0, 1.0), (1.0, 0.0)):
        assert convergence_factor(*suggest_steps(omega, epsilon), omega, epsilon) < 1
