"""Is the problem the one that was meant? Checks of a weak form, its signs and its boundary terms, before hours are
spent.

Each check has a number and a tolerance. Those with an exact solution put it into the equation; those without compare
the weak form with the strong one on random functions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxstack.pde.forms import Fields, Form, Samples, exact_second_order
from jaxstack.pde.gram import Linearized, preconditioner_named
from jaxstack.pde.network_config import network_options
from jaxstack.pde.networks import Mlp, value_and_gradient
from jaxstack.pde.problem import Periodic, Problem


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: it passes where `value` is at most `tolerance`."""

    name: str
    value: float
    tolerance: float
    explanation: str

    @property
    def passed(self) -> bool:
        return bool(self.value <= self.tolerance)


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    problem: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def __str__(self) -> str:
        lines = [f"{self.problem}: {'all checks passed' if self.passed else 'NOT as meant'}"]
        for c in self.checks:
            lines.append(
                f"  {'ok  ' if c.passed else 'FAIL'} {c.name}: {c.value:.3g} (at most {c.tolerance:.3g})"
                + ("" if c.passed else f" - {c.explanation}")
            )
        return "\n".join(lines)

    def as_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(c) | {"passed": c.passed} for c in self.checks]


# Test functions, and points for each of them. With 32 normal deviates the largest is above 4.5 once in 5000 times.
_TESTS, _POINTS, _DEVIATES = 32, 4096, 4.5


def verify(problem: Problem, *, seed: int = 0) -> VerifyReport:
    """Checks a problem.

    Returns:
      a report that prints as a table. Checks that need an exact solution, or a strong form of one's own, are there only
      where the problem has them.

    Raises:
      UserError: a function that is not finite, a diffusion that is not positive, or an exact solution that contradicts
        the boundary value (section 7 of what a user may get wrong: no check can go on from there).
    """
    problem.check_values(seed)
    key = jax.random.key(seed)
    checks = [*_geometry(problem, key)]
    form = Form(problem).with_cutoff_scale()
    if problem.exact is not None:
        checks += [*strong_checks(form, key), *_weak_checks(form, key)]
    if problem.weak_form is not None and problem.weak_form.strong is not None:
        checks.append(own_strong(form, key))
    checks.append(weak_against_strong(form, key))
    checks.append(gram_check(problem, key))
    return VerifyReport(problem.name, tuple(checks))


def _geometry(problem: Problem, key: Array) -> list[Check]:
    domain = problem.domain
    low, high = (np.asarray(corner) for corner in domain.box)
    short = 1e-3 * float((high - low).min())
    closed = isinstance(problem.boundary, Periodic)

    def figures(key: Array) -> dict[str, Array]:
        x = domain.sample_interior(key, 512)
        found = {"strays": jnp.mean(~domain.contains(x))}
        if closed:
            return found
        y, normal = domain.sample_boundary(key, 512)
        outward = domain.contains(y + short * normal) | ~domain.contains(y - short * normal)
        length = jnp.abs(jnp.linalg.norm(normal, axis=1) - 1)
        inside, edge = jax.vmap(domain.cutoff)(x), jax.vmap(domain.cutoff)(y)
        size = jnp.maximum(jnp.max(inside), 1e-30)
        found |= {"normals": jnp.max(length) + jnp.mean(outward), "edge": jnp.max(jnp.abs(edge)) / size}
        return found | {"negative": jnp.mean(inside <= 0)}

    texts = {
        "strays": ("interior samples inside", 0.0, "the sampler leaves the domain"),
        "normals": (
            "normals unit and outward", 1e-4,
            "boundary samples are off the boundary, or their normals do not point outward",
        ),
        "edge": ("cutoff zero on the boundary", 1e-3, "test functions would not vanish on the boundary"),
        "negative": ("cutoff positive inside", 0.0, "test functions would vanish inside"),
    }  # fmt: skip
    found = jax.device_get(jax.jit(figures)(key))
    return [Check(texts[k][0], float(v), texts[k][1], texts[k][2]) for k, v in found.items()]


def strong_checks(form: Form, key: Array) -> list[Check]:
    """The exact solution in the equation and in the boundary condition, point by point."""
    problem = form.problem
    exact = problem.exact
    assert exact is not None
    rms = lambda v: jnp.sqrt(jnp.mean(v**2))  # noqa: E731
    point = lambda p: jnp.asarray(exact(p), p.dtype)  # noqa: E731

    def strongly(key: Array) -> dict[str, Array]:
        samples = _drawn(form, key, 1024)
        coefficient: Any = samples.diffusion
        if problem.weak_form is not None:
            value, gradient = jax.vmap(jax.value_and_grad(point))(samples.x)
            coefficient = form.strong_coefficient(samples, value, gradient)
        u = exact_second_order(exact, samples.x, coefficient)
        # The size of the terms that cancel.
        rest = form.residual(samples, u._replace(second=jnp.zeros_like(u.second)))
        scale = rms(u.second) + rms(rest)
        found = {"strong": rms(form.residual(samples, u)) / jnp.where(scale == 0, 1.0, scale)}
        if form.has_edge:
            value, gradient = jax.vmap(jax.value_and_grad(point))(samples.y)
            fields = Fields(edge_value=value, edge_gradient=gradient)
            size = rms(form.edge_operator(samples, fields))
            found["edge"] = jnp.max(jnp.abs(form.misfit(samples, fields))) / jnp.maximum(size, 1e-3)
        return found

    found = jax.device_get(jax.jit(strongly)(key))
    checks = [
        Check(
            "exact solution satisfies the equation", float(found["strong"]), 1e-4,
            "the strong residual at the exact solution is not zero: look at the source, signs and factors",
        )
    ]  # fmt: skip
    if form.has_edge:
        text = "exact solution satisfies the boundary condition"
        checks.append(Check(text, float(found["edge"]), 1e-3, "B u* differs from g"))

    return checks


def _weak_checks(form: Form, key: Array) -> list[Check]:
    """The exact solution in the weak form, and something else in it."""
    problem = form.problem
    exact = problem.exact
    assert exact is not None
    point = lambda p: jnp.asarray(exact(p), p.dtype)  # noqa: E731
    bump = _random_net(problem, jax.random.fold_in(key, 5))

    def densities(samples: Samples, phi: Fields) -> tuple[Array, Array]:
        value, gradient = jax.vmap(jax.value_and_grad(point))(samples.x)
        v, dv = bump(samples.x)
        size = 3 * (jnp.std(value) + 1e-3) / jnp.maximum(jnp.std(v), 1e-6)
        disturbed = Fields(value + size * v, gradient + size * dv)
        return (
            form.interior_density(samples, Fields(value, gradient), phi),
            form.interior_density(samples, disturbed, phi),
        )

    at_exact, disturbed = _deviates(form, jax.random.fold_in(key, 6), densities)
    checks = []
    checks.append(
        Check(
            "weak form zero at the exact solution", float(np.abs(at_exact).max()), _DEVIATES,
            f"E(u*, phi) is not zero within its standard error for one of {_TESTS} test functions phi",
        )
    )  # fmt: skip
    checks.append(
        Check(
            "weak form sees a disturbed solution", _DEVIATES / max(float(np.abs(disturbed).max()), 1e-30), 1.0,
            "E(u* + w, phi) is zero within its standard error, too: the check before this one says nothing",
        )
    )  # fmt: skip
    return checks


def own_strong(form: Form, key: Array) -> Check:
    """One's own strong form against the one that follows from the density."""
    own = form.problem.weak_form
    assert own is not None and own.strong is not None
    strong = own.strong
    net = _network(form.problem)
    theta = jax.jit(net.init)(jax.random.fold_in(key, 1)) * 2

    def gap(key: Array) -> Array:
        samples = _drawn(form, key, 512)
        value, gradient = value_and_gradient(lambda x: net(theta, x), samples.x)
        hessian = jax.vmap(jax.hessian(lambda p: net(theta, p[None])[0]))(samples.x)
        given = jax.vmap(lambda *a: jnp.asarray(strong(*a), value.dtype))(samples.x, value, gradient, hessian)
        size = jnp.sqrt(jnp.mean(given**2))
        difference = form.net_residual(net, theta, samples) - given
        return jnp.sqrt(jnp.mean(difference**2)) / jnp.where(size == 0, 1.0, size)

    return Check(
        "strong form follows from the weak one", float(jax.jit(gap)(key)), 1e-3,
        "integrating the density by parts gives another equation: a sign or factor differs in one term",
    )  # fmt: skip


def weak_against_strong(form: Form, key: Array) -> Check:
    """E(v, phi) = mean(phi * strong residual of v) for random v, and phi that vanish on the boundary."""
    net = _network(form.problem)
    theta = jax.jit(net.init)(jax.random.fold_in(key, 2)) * 2

    def density(samples: Samples, phi: Fields) -> tuple[Array, ...]:
        value, gradient = value_and_gradient(lambda x: net(theta, x), samples.x)
        weak = form.interior_density(samples, Fields(value, gradient), phi)
        return (weak - phi.value * form.net_residual(net, theta, samples),)

    (found,) = _deviates(form, jax.random.fold_in(key, 3), density)
    return Check(
        "weak and strong form agree", float(np.abs(found).max()), _DEVIATES,
        "on random functions they differ by more than their standard error: a form "
        "that is not linear in phi, or boundary terms that are missing",
    )  # fmt: skip


def _deviates(form: Form, key: Array, densities: Callable[[Samples, Fields], tuple[Array, ...]]) -> list[np.ndarray]:
    """Mean over standard error of densities, for random test functions that vanish on the boundary, each on points of
    its own."""
    domain, problem = form.problem.domain, form.problem
    phi_net = dataclasses.replace(_network(problem), last_bias=True)
    cut = not isinstance(problem.boundary, Periodic)

    def one(k: Array) -> list[Array]:
        points, network = jax.random.split(k)
        samples = _drawn(form, points, _POINTS)
        flat = phi_net.init(network)
        value, gradient = value_and_gradient(lambda x: phi_net(flat, x), samples.x)
        if cut:
            zeta, slope = jax.vmap(jax.value_and_grad(domain.cutoff))(samples.x)
            value, gradient = zeta * value, zeta[:, None] * gradient + value[:, None] * slope
        ratios = []
        for found in densities(samples, Fields(value, gradient)):
            error = jnp.std(found) / np.sqrt(_POINTS)
            ratios.append(jnp.mean(found) / jnp.maximum(error, 1e-6 * jnp.max(jnp.abs(found)) + 1e-20))
        return ratios

    return [np.asarray(a) for a in jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, _TESTS))]


def gram_check(problem: Problem, key: Array) -> Check:
    """Symmetry and sign of the Gram matrix that the solver would use."""
    name, chosen = preconditioner_named("auto", problem)
    form = Form(problem, tangential=chosen.tangential, test_laplacian=chosen.phi.laplacian)
    net = _network(problem)

    def figure(key: Array) -> Array:
        samples = _drawn(form, key, 128)
        u = Linearized(lambda p: form.u_fields(net, p, samples), net.init(key))
        weights = chosen.u.weights(form, samples, u.fields)
        product = lambda v: u.gram(lambda f: chosen.u.half_square(form, samples, f, weights), v)  # noqa: E731
        a, b = jax.random.normal(key, (2, net.parameter_count))
        ga, gb = product(a), product(b)
        size = jnp.maximum(jnp.linalg.norm(ga) * jnp.linalg.norm(b), 1e-30)
        negative = jnp.maximum(0.0, jnp.maximum(-(ga @ a), -(gb @ b)))
        return (jnp.abs(ga @ b - gb @ a) + negative) / size

    return Check(
        f"Gram matrix ({name}) symmetric and positive", float(jax.jit(figure)(key)), 1e-4,
        "natural gradients need a symmetric, positive metric: look at the diffusion",
    )  # fmt: skip


def _network(problem: Problem) -> Mlp:
    return Mlp.of(problem.dim, 16, 3, **network_options(problem, not isinstance(problem.boundary, Periodic)))


def _random_net(problem: Problem, key: Array) -> Callable[[Array], tuple[Array, Array]]:
    net = _network(problem)
    theta = jax.jit(net.init)(key) * 2
    return lambda x: value_and_gradient(lambda p: net(theta, p), x)


def _drawn(form: Form, key: Array, points: int) -> Samples:
    previous = (lambda x: jnp.sin(jnp.sum(x, axis=1))) if form.problem.takes_previous else None
    return form.samples(key, points, 256, previous=previous, strong=True)
