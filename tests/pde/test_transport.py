"""Optimal transport: maps that are known, and the saddle step from scratch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack import pde
from jaxstack.pde.networks import Mlp
from jaxstack.pde.transport import (
    Transport,
    TransportConfig,
    circle_mixture,
    gaussians,
    mixture_1d,
    mode_weights,
)
from jaxstack.runtime.errors import UserError

SMALL = TransportConfig(width=16, depth=3, samples=300, tau_map=0.05, tau_phi=0.09)


def test_exact_maps_carry_source_to_target():
    for problem in (mixture_1d(), gaussians(6)):
        x = problem.sample_source(jax.random.key(0), 40_000)
        y = np.asarray(problem.sample_target(jax.random.key(1), 40_000))
        image = problem.exact_map(np.asarray(x, float))
        np.testing.assert_allclose(np.cov(image.T), np.cov(y.T), atol=0.05)
        np.testing.assert_allclose(image.mean(0), y.mean(0), atol=0.03)
    weights = mode_weights(np.asarray(circle_mixture().sample_target(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(weights, np.tile([0.05, 0.2], 4), atol=0.01)


@pytest.mark.parametrize("iteration", [0, 1], ids=["metric of the target", "metric of the image"])
def test_a_step_from_scratch(float64, iteration):
    config = dataclasses.replace(
        SMALL, width=5, samples=40, minres_rtol=1e-15, minres_max_iterations=5000, omega=0.7, image_after=1
    )
    problem = gaussians(5)
    method = Transport(problem, config)
    state = jax.jit(method.init)(jax.random.key(0))._replace(iteration=jnp.asarray(iteration, jnp.int32))
    new, report = jax.jit(method.step)(state)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), iteration)
    source, target = jax.random.split(key)
    x, y = problem.sample_source(source, 40), problem.sample_target(target, 40)
    image = method.u(state.theta, x)
    where = y if iteration == 0 else image
    g = jax.jit(jax.grad(lambda e: jnp.mean(method.phi(e, image)) - jnp.mean(method.phi(e, y))))(state.eta)
    slopes = lambda e: jax.vmap(jax.grad(lambda z: method.phi(e, z[None])[0]))(where).ravel() / 40**0.5  # noqa: E731
    j = jax.jit(jax.jacfwd(slopes))(state.eta)
    # A Gram matrix this singular is solved to a backward error, and its residual is that much larger.
    near = 0.01 * np.abs(g).max()
    np.testing.assert_allclose(j.T @ j @ ((new.eta - state.eta) / config.tau_phi), g, atol=near)

    def saddle(theta):
        t = method.u(theta, x)
        tilde = (1 + 0.7) * method.phi(new.eta, t) - 0.7 * method.phi(state.eta, t)
        return jnp.mean(0.5 * jnp.sum((t - x) ** 2, axis=1) + tilde)

    g = jax.jit(jax.grad(saddle))(state.theta)
    j = jax.jit(jax.jacfwd(lambda p: method.u(p, x).ravel() / 40**0.5))(state.theta)
    near = 0.01 * np.abs(g).max()
    np.testing.assert_allclose(j.T @ j @ ((state.theta - new.theta) / config.tau_map), g, atol=near)
    assert bool(report.accepted)


def test_a_map_between_gaussians_is_found():
    found = pde.solve(gaussians(5), "transport", config=SMALL, max_iterations=200, progress=False, evaluate_every=50)
    assert found.recompilations == 0
    assert found.errors["c_l2"] < 0.25 and found.errors["turned_pairs"] < 0.01
    assert found.errors["map_rms"] < 0.5 and found.errors["sliced_w2"] < 0.2
    x = gaussians(5).sample_source(jax.random.key(5), 100)
    assert found(x).shape == (100, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussians(4), "gaussians dim=4: expected at least 5"),
        (lambda: circle_mixture(20), "circle_mixture dim=20: expected at least 21"),
        (lambda: TransportConfig(tau_map=1.0, tau_phi=1.5), "errors by 1.366, expected below 1; for instance"),
        (lambda: TransportConfig(metric="l2"), "metric='l2': expected nabla or identity"),
        (
            lambda: pde.OptimalTransport(lambda k, n: jnp.zeros((n, 2)), lambda k, n: jnp.zeros((n, 3)), 2),
            r"sample_target returns shape \(7, 3\) for 7 points, expected \(7, 2\)",
        ),
        (lambda: Mlp((2, 4, 3), skip=True), "expected as many outputs as inputs"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
