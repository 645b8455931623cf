"""An equation as data: where it holds, its coefficients, and what holds on the boundary.

    -div(A(x) grad u) + N(x, u, grad u) = f(x)   in the domain,   B u = g   on its boundary.

All functions are of one point and are vectorised here; their shapes are checked once, when the problem is made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.pde.domains import Box, Domain
from jaxstack.runtime.errors import UserError

PointFunction = Callable[[Float[Array, " dim"]], Any]
"""A function of one point x of shape (dim,)."""


@dataclasses.dataclass(frozen=True)
class Dirichlet:
    """u = value on the boundary."""

    value: PointFunction | float = 0.0


@dataclasses.dataclass(frozen=True)
class Neumann:
    """n . A grad u = flux on the boundary, n the outward unit normal."""

    flux: PointFunction | float = 0.0


@dataclasses.dataclass(frozen=True)
class Robin:
    """n . A grad u + alpha u = value on the boundary."""

    alpha: PointFunction | float = 1.0
    value: PointFunction | float = 0.0


@dataclasses.dataclass(frozen=True)
class Periodic:
    """The box's opposite faces are one; its networks see sines and cosines of the coordinates."""


Boundary = Dirichlet | Neumann | Robin | Periodic


@dataclasses.dataclass(frozen=True)
class WeakForm:
    """A weak form of one's own: the mean of `density` over the domain is zero for every test function phi.

    Attributes:
      density: (x, u, du, phi, dphi) -> scalar, linear in phi and dphi. Flux terms on the boundary are not added: give
        only forms whose test functions vanish there, or whose natural condition is meant.
      strong: (x, u, du, hessian) -> scalar, the same equation pointwise; compared with `density` by `verify`. Methods
        that need a strong form derive it from `density`.
    """

    density: Callable[[Array, Array, Array, Array, Array], Any]
    strong: Callable[[Array, Array, Array, Array], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A boundary value problem.

    Attributes:
      domain: a `Box`, `Ball` or other `Domain`.
      source: f.
      diffusion: A(x): a scalar, a diagonal (dim,) or a matrix (dim, dim), whose symmetric part is positive.
      reaction: N(x, u, du), everything of order at most one.
      boundary: `Dirichlet`, `Neumann`, `Robin` or `Periodic`.
      exact: the solution where it is known: errors are then reported.
      weak_form: replaces diffusion, reaction and source.
      takes_previous: `reaction` has a fourth argument, the value of an earlier solution (`Evolution` uses it).
      name: for reports.

    Raises:
      UserError: a function of the wrong shape (by name), or a boundary condition that does not fit the domain.
    """

    domain: Domain
    source: PointFunction | float = 0.0
    diffusion: PointFunction | float = 1.0
    reaction: Callable[..., Any] | None = None
    boundary: Boundary = Dirichlet()
    exact: PointFunction | None = None
    weak_form: WeakForm | None = None
    takes_previous: bool = False
    name: str = "problem"

    def __post_init__(self) -> None:
        dim = self.dim
        self._check("source", self.source, ((),))
        self._check("diffusion", self.diffusion, ((), (dim,), (dim, dim)))
        self._check("exact", self.exact, ((),))
        if self.reaction is not None:
            self._check("reaction", self.reaction, ((),), more=((), (dim,), *([()] if self.takes_previous else [])))
        match self.boundary:
            case Dirichlet(value):
                self._check("boundary value", value, ((),))
            case Neumann(flux):
                self._check("boundary flux", flux, ((),))
            case Robin(alpha, value):
                self._check("boundary alpha", alpha, ((),))
                self._check("boundary value", value, ((),))
            case Periodic():
                if not isinstance(self.domain, Box):
                    raise UserError(f"boundary Periodic on a {type(self.domain).__name__}: expected a Box")
            case _:
                raise UserError(
                    f"boundary is a {type(self.boundary).__name__}: expected Dirichlet, Neumann, Robin or Periodic"
                )
        if isinstance(self.boundary, Neumann | Robin) and self.domain.surface_to_volume is None:
            raise UserError(
                f"boundary {type(self.boundary).__name__} on a {type(self.domain).__name__}, whose surface is not "
                "known: expected Dirichlet, or a Box or Ball"
            )
        if self.weak_form is not None:
            if callable(self.diffusion) or self.reaction is not None or self.source != 0.0:
                raise UserError("weak_form replaces source, diffusion and reaction: found both, expected one")
            self._check("weak_form.density", self.weak_form.density, ((),), more=((), (dim,), (), (dim,)))
            if self.weak_form.strong is not None:
                self._check("weak_form.strong", self.weak_form.strong, ((),), more=((), (dim,), (dim, dim)))

    @property
    def dim(self) -> int:
        return self.domain.dim

    @property
    def _point(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.dim,), jnp.result_type(float))

    def _check(
        self,
        name: str,
        function: Any,
        shapes: tuple[tuple[int, ...], ...],
        more: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        """Traces a function of a point (and of `more` arguments) and compares the shape of what it returns."""
        if function is None or isinstance(function, int | float):
            if isinstance(function, int | float) and not np.isfinite(function):
                raise UserError(f"{name}={function}: expected a finite number")
            return
        if not callable(function):
            raise UserError(f"{name} is a {type(function).__name__}: expected a number or a function of one point")
        arguments = [self._point, *(jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for shape in more)]
        try:
            found = jax.eval_shape(lambda *a: jnp.asarray(function(*a)), *arguments).shape
        except UserError:
            raise
        except Exception as error:  # a user's function can raise anything
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{name} fails on a point of shape ({self.dim},): {line[:200]}") from error
        if found not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise UserError(f"{name} returns shape {found} at one point of dimension {self.dim}, expected {wanted}")

    def check_values(self, seed: int = 0, points: int = 256) -> None:
        """Evaluates every function at random points.

        Raises:
          UserError: a value that is not finite (with the point), a diffusion that is not positive, or an exact solution
            that contradicts the boundary value (with the largest mismatch).
        """
        inner = {"source": self.source, "diffusion": self.diffusion, "exact": self.exact}
        outer = {f"boundary {f.name}": getattr(self.boundary, f.name) for f in dataclasses.fields(self.boundary)}
        if isinstance(self.boundary, Dirichlet) and self.exact is not None:
            outer["exact on the boundary"] = self.exact

        def evaluated(key: Array) -> tuple[Array, Array, dict[str, Array]]:
            inside, edge = jax.random.split(key)
            x = self.domain.sample_interior(inside, points)
            y = self.domain.sample_boundary(edge, points).x
            values = {name: point_values(f, x) for name, f in inner.items()}
            return x, y, values | {name: point_values(f, y) for name, f in outer.items()}

        x, y, values = jax.device_get(jax.jit(evaluated)(jax.random.key(seed)))
        for name, found in values.items():
            bad = ~np.isfinite(found).reshape(points, -1).all(axis=1)
            if bad.any():
                at = x if name in inner else y
                raise UserError(f"{name} is not finite at x = {_shown(at[int(np.argmax(bad))])}")
        if self.weak_form is None:
            a = np.asarray(values["diffusion"], float)
            symmetric = (a + a.swapaxes(1, 2)) / 2 if a.ndim == 3 else None
            least = a.reshape(points, -1).min(axis=1) if symmetric is None else np.linalg.eigvalsh(symmetric)[:, 0]
            if least.min() <= 0:
                raise UserError(
                    f"diffusion is not positive at x = {_shown(x[int(least.argmin())])}: found {least.min():.4g}"
                )
        if self.exact is not None and isinstance(self.boundary, Dirichlet):
            g, u = values["boundary value"].astype(float), values["exact on the boundary"].astype(float)
            gap = np.abs(u - g)
            if gap.max() > 1e-3 * max(1.0, float(np.abs(u).max())):
                raise UserError(
                    f"exact and boundary value differ by {gap.max():.4g} at x = {_shown(y[int(gap.argmax())])}"
                )


def _shown(point: Any) -> str:
    values = [f"{float(v):.4g}" for v in point]
    return "(" + ", ".join(values[:6] + (["..."] if len(values) > 6 else [])) + ")"


def point_values(function: PointFunction | float | None, x: Float[Array, "points dim"]) -> Float[Array, "points ..."]:
    """A number or a function of one point, at many."""
    if callable(function):
        return jax.vmap(lambda p: jnp.asarray(function(p), p.dtype))(x)
    return jnp.full(x.shape[:1], 0.0 if function is None else function, x.dtype)


def manufactured(problem: Problem, exact: PointFunction, *, name: str | None = None) -> Problem:
    """The same operator with the source and boundary data that make `exact` its solution.

    Raises:
      UserError: a problem with a weak form of its own, whose source is part of the form.
    """
    if problem.weak_form is not None:
        raise UserError("manufactured: the weak form holds its own source; add f * phi to the density instead")
    gradient = jax.grad(lambda x: jnp.asarray(exact(x), x.dtype))

    def diffusion(x: Array) -> Array:
        return jnp.asarray(problem.diffusion(x) if callable(problem.diffusion) else problem.diffusion, x.dtype)

    def flux(x: Array) -> Array:
        a, p = diffusion(x), gradient(x)
        return a @ p if a.ndim == 2 else a * p

    def source(x: Array) -> Array:
        value = -jnp.trace(jax.jacfwd(flux)(x))
        if problem.reaction is not None:
            value = value + problem.reaction(x, exact(x), gradient(x))
        return value

    boundary: Boundary
    match problem.boundary:
        case Dirichlet():
            boundary = Dirichlet(exact)
        case Periodic():
            boundary = problem.boundary
        case Neumann() | Robin():
            if not isinstance(problem.domain, Box):
                raise UserError(
                    f"manufactured: a flux on a {type(problem.domain).__name__}: expected a Box, or Dirichlet"
                )
            boundary = _manufactured_flux(problem.boundary, problem.domain, flux, exact)
    return dataclasses.replace(
        problem, source=source, boundary=boundary, exact=exact, name=name or f"manufactured {problem.name}"
    )


def _manufactured_flux(
    boundary: Neumann | Robin, box: Box, flux: PointFunction, exact: PointFunction
) -> Neumann | Robin:
    low, high = (np.asarray(corner) for corner in box.box)

    def normal_flux(x: Array) -> Array:
        # The face of a boundary point is the one that it is nearest to.
        gaps = jnp.concatenate([x - jnp.asarray(low, x.dtype), jnp.asarray(high, x.dtype) - x])
        face = jnp.argmin(jnp.abs(gaps))
        value = flux(x)[face % box.dim]
        return jnp.where(face < box.dim, -value, value)

    if isinstance(boundary, Neumann):
        return Neumann(normal_flux)
    alpha = boundary.alpha
    return Robin(alpha, lambda x: normal_flux(x) + (alpha(x) if callable(alpha) else alpha) * exact(x))
