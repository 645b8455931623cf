"""The rivals: each one's gradient is that of its own loss, and each solves an easy problem."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import pde
from jaxstack.pde import equations
from jaxstack.pde.baselines.first_order import DeepRitz, PinnAdam, TrainConfig, Wan
from jaxstack.pde.baselines.second_order import CurvatureConfig, PinnEngd, PinnLbfgs, PinnSpring
from jaxstack.pde.forms import exact_second_order
from jaxstack.runtime.errors import UserError

TINY = TrainConfig(width=6, depth=3, interior_samples=30, boundary_samples=12)
CURVED = CurvatureConfig(width=6, depth=3, interior_samples=24, boundary_samples=12, renew=4, memory=4)


def central(function, at, directions, step=1e-5):
    """Differences of a scalar function along directions."""
    return np.asarray([(function(at + step * d) - function(at - step * d)) / (2 * step) for d in directions])


@pytest.mark.parametrize("make", [PinnAdam, DeepRitz, Wan])
@pytest.mark.parametrize("problem", [equations.variable_coefficient(2), equations.poisson(3)], ids=lambda p: p.name)
def test_a_step_uses_the_gradient_of_the_players_own_loss(float64, make, problem):
    method = make(problem, TINY)
    state = jax.jit(method.init)(jax.random.key(0))
    samples = method.sample(state.key, state.iteration)
    directions = jax.random.normal(jax.random.key(1), (3, state.theta.size))
    if make is Wan:
        # The solution's player sees the test function after its own ascent, and only its own gradient.
        loss = jax.jit(lambda p, e: method.player_loss(p, e, samples))
        new, report = jax.jit(method.step)(state)
        assert float(report.loss) == pytest.approx(float(loss(state.theta, new.eta)), rel=1e-9)
        gradient = jax.grad(loss)(state.theta, new.eta)
        expected = central(lambda p: float(loss(p, new.eta)), state.theta, directions)
        # The test function's player ascends the weak norm.
        before, after = (float(method.weak_norm(state.theta, e, samples)) for e in (state.eta, new.eta))
        assert after > before
    else:
        loss = jax.jit(lambda p: method.loss(p, samples))
        gradient = jax.grad(loss)(state.theta)
        expected = central(lambda p: float(loss(p)), state.theta, directions)
        new, _ = jax.jit(method.step)(state)
    np.testing.assert_allclose(directions @ gradient, expected, rtol=1e-5, atol=1e-7)
    # Adam's first step is the gradient's sign.
    moved = new.theta - state.theta
    large = np.abs(gradient) > 1e-3 * np.abs(gradient).max()
    np.testing.assert_allclose(moved[large], -TINY.learning_rate * np.sign(gradient[large]), rtol=1e-3)


def test_the_ritz_energy_is_least_at_the_solution(float64):
    # -Delta u + u^3 = f: the energy's gradient at u* is zero, and its reaction is integrated exactly.
    problem = pde.manufactured(
        pde.Problem(pde.Box(0.0, 1.0, 2), diffusion=lambda x: 1 + x[0], reaction=lambda x, u, du: u**3),
        lambda x: jnp.sin(np.pi * x[0]) * jnp.sin(np.pi * x[1]),
    )
    method = DeepRitz(problem, TINY)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    x, y = (g.ravel() for g in np.meshgrid((nodes + 1) / 2, (nodes + 1) / 2, indexing="ij"))
    points, w = jnp.asarray(np.stack([x, y], axis=1)), jnp.asarray(np.outer(weights, weights).ravel() / 4)
    edge = problem.domain.sample_boundary(jax.random.key(0), 4)
    samples = method.form.at(points, *edge)
    bump = lambda p: p[0] * (1 - p[0]) * p[1] * (1 - p[1])  # noqa: E731

    def energy(t):
        u, du = jax.vmap(jax.value_and_grad(lambda p: problem.exact(p) + t * bump(p)))(points)
        return w @ method.energy_density(samples, u, du)

    assert abs(float(jax.grad(energy)(0.0))) < 1e-8
    assert float(jax.grad(jax.grad(energy))(0.0)) > 0.01


def test_equations_without_an_energy_are_refused():
    with pytest.raises(UserError, match="its reaction depends on grad u, so no energy belongs to it"):
        DeepRitz(equations.semilinear(3), TINY)
    own = pde.Problem(pde.Box(0.0, 1.0, 2), weak_form=pde.WeakForm(lambda x, u, du, phi, dphi: du @ dphi))
    with pytest.raises(UserError, match="deepritz on a weak form"):
        DeepRitz(own, TINY)


def test_the_semilinear_residual_has_the_right_signs(float64):
    problem = equations.semilinear(3)
    form = PinnAdam(problem, TINY).form
    samples = form.samples(jax.random.key(0), 20, 4, strong=True)
    v = exact_second_order(lambda x: jnp.sum(jnp.sin(x)), samples.x, None)
    potential = -jax.vmap(problem.source)(samples.x)
    expected = -v.second + 0.5 * jnp.sum(v.gradient**2, axis=1) + potential
    np.testing.assert_allclose(form.residual(samples, v), expected, atol=1e-10)


# ------------------------------------------------------------------------------------------------- sample space


@pytest.mark.parametrize("problem", [equations.variable_coefficient(2), equations.semilinear(2)], ids=lambda p: p.name)
def test_rows_of_the_jacobian(float64, problem):
    method = PinnEngd(problem, CURVED)
    state = jax.jit(method.init)(jax.random.key(0))
    samples = jax.jit(method.sample)(state.key, state.iteration)
    r, j = jax.jit(method.jacobian)(state.theta, samples)
    np.testing.assert_allclose(r, method.residuals(state.theta, samples), atol=1e-10)
    np.testing.assert_allclose(j, jax.jacfwd(lambda p: method.residuals(p, samples))(state.theta), atol=1e-9)


def test_the_direction_is_the_damped_gauss_newton_step(float64):
    method = PinnEngd(equations.poisson(2), CURVED)
    state = jax.jit(method.init)(jax.random.key(0))
    samples = jax.jit(method.sample)(state.key, state.iteration)
    r, j = jax.jit(method.jacobian)(state.theta, samples)
    mu = float(state.damping) * float(jnp.trace(j @ j.T)) / len(r)
    expected = jnp.linalg.solve(j.T @ j + mu * jnp.eye(j.shape[1]), j.T @ r)
    np.testing.assert_allclose(method.direction(state, r, j), expected, rtol=1e-6, atol=1e-9)
    # SPRING's is the minimiser of |J (d - old) ... | + mu |d - momentum * old|^2.
    spring = PinnSpring(equations.poisson(2), CURVED)
    old = jax.random.normal(jax.random.key(1), state.theta.shape)
    found = spring.direction(state._replace(direction=old), r, j)
    expected = jnp.linalg.solve(j.T @ j + mu * jnp.eye(j.shape[1]), j.T @ r + mu * 0.9 * old)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_engd_takes_only_steps_that_help():
    method = PinnEngd(equations.poisson(2), CURVED)
    state = jax.jit(method.init)(jax.random.key(0))
    step, loss = jax.jit(method.step), jax.jit(method.loss)
    for _ in range(5):
        samples = method.sample(state.key, state.iteration)
        new, report = step(state)
        if bool(report.accepted):
            assert float(loss(new.theta, samples)) < float(report.loss)
        else:
            np.testing.assert_array_equal(new.theta, state.theta)
            assert float(new.damping) > float(state.damping)
        state = new


def test_a_running_mean_is_answered_and_the_iterates_go_on_without_it(float64):
    plain = PinnSpring(equations.poisson(2), CURVED)
    averaged = PinnSpring(equations.poisson(2), dataclasses.replace(CURVED, averaging=0.75))
    one, other = (jax.jit(m.init)(jax.random.key(0)) for m in (plain, averaged))
    mean = np.asarray(one.theta, np.float64)
    for _ in range(4):
        one, other = jax.jit(plain.step)(one)[0], jax.jit(averaged.step)(other)[0]
        np.testing.assert_allclose(other.iterate, one.theta, rtol=1e-5, atol=1e-6)
        mean = 0.75 * mean + 0.25 * np.asarray(one.theta, np.float64)
    np.testing.assert_array_equal(one.iterate, one.theta)
    np.testing.assert_allclose(other.theta, mean, rtol=1e-4, atol=1e-5)
    assert np.abs(other.theta - other.iterate).max() > 1e-3


def test_lbfgs_descends_on_samples_that_it_keeps_and_starts_afresh_with_new_ones():
    method = PinnLbfgs(equations.poisson(2), CURVED)
    state = jax.jit(method.init)(jax.random.key(0))
    step = jax.jit(method.step)
    losses = []
    for _ in range(2 * CURVED.renew):
        state, report = step(state)
        losses.append(float(report.loss))
    first = losses[: CURVED.renew]
    assert all(b <= a * 1.0001 for a, b in itertools.pairwise(first)) and first[-1] < first[0]
    same = np.asarray(method.sample(state.key, jnp.asarray(0)).x) == np.asarray(
        method.sample(state.key, jnp.asarray(1)).x
    )
    assert not same.all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(learning_rate=0.0), "learning_rate=0.0: expected a finite number above 0"),
        (lambda: TrainConfig(depth=1), "depth=1: expected at least 2"),
        (lambda: TrainConfig(decay_steps=0), "decay_steps=0"),
        (lambda: CurvatureConfig(averaging=1.0), "averaging=1.0: expected at least 0 and below 1"),
        (lambda: TrainConfig(inputs_per_unit=0), "inputs_per_unit=0: expected at least 1"),
        (lambda: CurvatureConfig(momentum=1.0), "momentum=1.0: expected at least 0 and below 1"),
        (lambda: CurvatureConfig(damping=-1.0), "damping=-1.0"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
