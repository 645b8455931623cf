"""Samplers, normals and cutoffs of domains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.pde import Ball, Box, Interval, SignedDistance
from jaxstack.runtime.errors import UserError

RING = SignedDistance(lambda x: jnp.abs(jnp.sqrt(x @ x) - 0.7) - 0.2, Box(-1.0, 1.0, 2), band=0.15)


@st.composite
def boxes(draw):
    dim = draw(st.integers(1, 4))
    lower = draw(st.lists(st.floats(-3, 3), min_size=dim, max_size=dim))
    sides = draw(st.lists(st.floats(0.1, 4), min_size=dim, max_size=dim))
    return Box(tuple(lower), tuple(low + side for low, side in zip(lower, sides)))


@st.composite
def balls(draw):
    dim = draw(st.integers(1, 4))
    center = draw(st.lists(st.floats(-2, 2), min_size=dim, max_size=dim))
    return Ball(dim, draw(st.floats(0.1, 4)), tuple(center))


def check(domain, n: int = 64) -> None:
    low, high = (np.asarray(corner) for corner in domain.box)
    size, short = float((high - low).max()), 1e-3 * float((high - low).min())

    @jax.jit
    def draw(key):
        x = domain.sample_interior(key, n)
        y, normal = domain.sample_boundary(key, n)
        found = {"inside": domain.contains(x), "out": domain.contains(y + short * normal)}
        found["in"] = domain.contains(y - short * normal)
        for kind in ("harmonic", "min"):
            zeta = lambda p, k=kind: domain.cutoff(p, k)  # noqa: E731
            value, gradient = jax.vmap(jax.value_and_grad(zeta))(x)
            found[kind] = (value, gradient, jax.vmap(zeta)(y))
        return x, y, normal, found

    x, y, normal, found = jax.device_get(draw(jax.random.key(0)))
    assert x.shape == y.shape == normal.shape == (n, domain.dim)
    assert found["inside"].all()
    assert ((y >= low - 1e-5 * size) & (y <= high + 1e-5 * size)).all()
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1.0, atol=1e-5)
    # A step outward leaves, a step inward enters.
    assert not found["out"].any() and found["in"].all()
    for kind in ("harmonic", "min"):
        inside, gradient, edge = found[kind]
        assert (inside > 0).all() and np.isfinite(gradient).all()
        assert np.abs(edge).max() < 1e-3 * inside.max()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.one_of(boxes(), balls()))
def test_samples_lie_where_they_should(domain):
    check(domain)


def test_a_domain_given_by_its_distance():
    check(RING, 200)


def test_faces_have_their_share():
    box = Box((0.0, 0.0), (1.0, 3.0))
    y, _ = box.sample_boundary(jax.random.key(0), 800)
    left = int((y[:, 0] == 0.0).sum())
    bottom = int((y[:, 1] == 0.0).sum())
    assert abs(left - 300) <= 1 and abs(bottom - 100) <= 1  # lengths 3 and 1 of a boundary of 8
    assert box.surface_to_volume == pytest.approx(8 / 3)
    ends, normal = Interval(-1.0, 2.0).sample_boundary(jax.random.key(3), 2)
    np.testing.assert_allclose(ends[:, 0], [-1.0, 2.0])
    np.testing.assert_allclose(normal[:, 0], [-1.0, 1.0])


def test_samples_are_uniform():
    x = Ball(3, 2.0).sample_interior(jax.random.key(0), 20_000)
    r = np.linalg.norm(x, axis=1) / 2
    assert np.mean(r) == pytest.approx(3 / 4, abs=0.005)  # E r = d / (d + 1)
    ring = jax.jit(lambda key: RING.sample_interior(key, 20_000))(jax.random.key(0))
    r = np.linalg.norm(ring, axis=1)
    # Between radii 0.5 and 0.9 the density is proportional to r.
    assert np.mean(r) == pytest.approx((0.9**3 - 0.5**3) / 3 / ((0.9**2 - 0.5**2) / 2), abs=0.005)


def test_the_harmonic_cutoff_is_the_harmonic_mean_of_bumps():
    x = jnp.asarray([0.1, 0.5, 0.8])
    bumps = 4 * np.asarray([0.09, 0.25, 0.16])
    assert float(Box(0.0, 1.0, 3).cutoff(x)) == pytest.approx(3 / np.sum(1 / bumps), rel=1e-5)
    assert float(Box(0.0, 1.0, 3).cutoff(x, "min")) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(0.0, 1.0, -1), "box dim=-1: expected at least 1"),
        (lambda: Box((0.0, 2.0), (1.0, 1.0)), "coordinate 1 runs from 2 to 1: expected lower < upper"),
        (lambda: Box(0.0, float("inf"), 2), "an unbounded domain cannot be sampled"),
        (lambda: Box((0.0, 0.0), (1.0, 1.0, 1.0)), "box upper has 3 coordinates, expected 2"),
        (lambda: Ball(0), "ball dim=0"),
        (lambda: Ball(2, -1.0), "ball radius=-1.0: expected a positive"),
        (lambda: SignedDistance(lambda x: x @ x - 1e-4, Box(-1.0, 1.0, 2)), "take a tighter box"),
    ],
)
def test_domains_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()
