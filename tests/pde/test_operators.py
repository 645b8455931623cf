"""The forward Laplacian against nested differentiation, in float64; the other forms against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.pde.networks import ACTIVATIONS, Mlp, value_and_gradient
from jaxstack.pde.operators import forward_laplacian, hutchinson_laplacian, jvp_laplacian, nested_laplacian
from jaxstack.runtime.errors import UserError

DIM, POINTS = 3, 5


def network(**options) -> Mlp:
    return Mlp.of(DIM, 8, 4, **options)


def points(seed: int = 1) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (POINTS, DIM), minval=-1.0)


def test_units_may_start_with_few_inputs():
    dim, units = 5, 8
    for kept in (1, 2, 5, 9, None):
        net = Mlp.of(dim, units, 3, inputs_per_unit=kept)
        weight = np.asarray(net.layers(jax.jit(net.init)(jax.random.key(0)))[0][0])
        full = np.asarray(Mlp.of(dim, units, 3).layers(jax.jit(net.init)(jax.random.key(0)))[0][0])
        seen = min(kept or dim, dim)
        assert ((weight != 0).sum(axis=0) == seen).all()
        # Every input is seen by as many units as any other, give or take one.
        per_input = (weight != 0).sum(axis=1)
        assert per_input.max() - per_input.min() <= 1
        assert np.abs(weight).max() <= np.sqrt(dim / seen) / np.sqrt(dim) + 1e-6
        if seen == dim:
            np.testing.assert_array_equal(weight, full)


NETWORKS = [
    *({"activation": name} for name in ACTIVATIONS),
    {"residual": True, "last_bias": True},
    {"periods": (1.0, 2.0, 3.0)},
    {"center": (0.1, 0.2, 0.3), "half_width": (1.0, 2.0, 0.5), "activation": "softplus"},
]


@pytest.mark.parametrize("coefficient", ["identity", "scalar", "diagonal", "matrix"])
@pytest.mark.parametrize("options", NETWORKS, ids=lambda o: "-".join(o) + o.get("activation", ""))
def test_forward_laplacian_is_the_trace_with_the_hessian(float64, options, coefficient):
    net = network(**options)
    flat, x = net.init(jax.random.key(0)), points()
    value = lambda p: net(flat, p[None])[0]  # noqa: E731
    hessian = np.asarray(jax.jit(jax.vmap(jax.hessian(value)))(x))
    m = np.random.default_rng(0).normal(size=(POINTS, DIM, DIM))
    full = np.einsum("nij,nkj->nik", m, m)
    a = {
        "identity": None,
        "scalar": full[:, 0, 0],
        "diagonal": np.einsum("nii->ni", full),
        "matrix": full,
    }[coefficient]
    eye = np.broadcast_to(np.eye(DIM), full.shape)
    dense = {"identity": eye, "scalar": full[:, :1, :1] * eye, "diagonal": full * eye, "matrix": full}[coefficient]
    found = jax.jit(lambda p: forward_laplacian(net, p, x, None if a is None else jnp.asarray(a)))(flat)
    np.testing.assert_allclose(found.second, np.einsum("nij,nij->n", dense, hessian), atol=1e-10)
    u, du = jax.jit(lambda p: value_and_gradient(lambda y: net(flat, y), p))(x)
    np.testing.assert_allclose(found.value, u, atol=1e-12)
    np.testing.assert_allclose(found.gradient, du, atol=1e-12)
    np.testing.assert_allclose(du, jax.jit(jax.vmap(jax.grad(value)))(x), atol=1e-12)


def test_its_gradient_by_the_parameters(float64):
    net = network()
    flat, x = net.init(jax.random.key(0)), points()
    grad = lambda f: jax.jit(jax.grad(f))  # noqa: E731
    forward = grad(lambda p: jnp.mean(forward_laplacian(net, p, x).second ** 2))(flat)
    nested = grad(lambda p: jnp.mean(nested_laplacian(lambda y: net(p, y[None])[0], x) ** 2))(flat)
    np.testing.assert_allclose(forward, nested, atol=1e-10)


def test_a_linear_network_has_no_second_order_part():
    net = Mlp((DIM, 1))
    found = forward_laplacian(net, net.init(jax.random.key(0)), points())
    assert found.gradient.shape == (POINTS, DIM) and not found.second.any()


def test_the_forms_for_any_function(float64):
    function = lambda x: jnp.sin(x[:, 0]) * x[:, 1] ** 2 + jnp.exp(x[:, 2])  # noqa: E731
    x = points()
    exact = (2 - x[:, 1] ** 2) * jnp.sin(x[:, 0]) + jnp.exp(x[:, 2])
    np.testing.assert_allclose(jvp_laplacian(function, x), exact, atol=1e-12)
    np.testing.assert_allclose(nested_laplacian(lambda p: function(p[None])[0], x), exact, atol=1e-12)
    estimate = hutchinson_laplacian(function, x, jax.random.key(3), probes=4000)
    np.testing.assert_allclose(estimate, exact, atol=0.2)  # 4000 signs: a standard error of about 0.03


def test_layers_are_slices_of_the_vector_and_start_within_their_bounds():
    net = Mlp.of(4, 6, 3, last_bias=True)
    flat = net.init(jax.random.key(0))
    assert flat.shape == (net.parameter_count,) == (4 * 6 + 6 + 6 * 6 + 6 + 6 + 1,)
    pieces = [part for weight, bias in net.layers(flat) for part in (weight.reshape(-1), bias)]
    np.testing.assert_array_equal(jnp.concatenate(pieces), flat)
    for (weight, bias), (inputs, _, _) in zip(net.layers(flat), net.shapes):
        bound = inputs**-0.5
        assert np.abs(weight).max() <= bound and np.abs(weight).max() > bound / 2 and np.abs(bias).max() <= bound


def test_periodic_networks_are_periodic():
    net = network(periods=(1.0, 2.0, 3.0))
    flat, x = net.init(jax.random.key(0)), points()
    np.testing.assert_allclose(net(flat, x), net(flat, x + jnp.asarray([1.0, -2.0, 6.0])), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mlp.of(2, 8, 3, activation="relu"), "activation='relu': expected one of tanh, softplus, sin"),
        (lambda: Mlp((2,)), "sizes="),
        (lambda: Mlp.of(2, 8, 3, periods=(1.0,)), "network periods has 1 entries, expected one for each of 2"),
    ],
)
def test_networks_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
