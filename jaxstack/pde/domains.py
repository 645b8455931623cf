"""Where an equation holds: domains that can be sampled, inside and on their boundary, within a compiled step.

Each domain also has a cutoff, a function that is positive inside and zero on the boundary: a test function that must
vanish there is a network times the cutoff.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxstack.runtime.errors import UserError

Cutoff = Literal["harmonic", "min"]
"""Of a box: the harmonic mean over coordinates of 4 t (1 - t), smooth; or the distance to the nearest face, as in the
paper. Other domains have one cutoff each."""


class BoundaryPoints(NamedTuple):
    """Points on a boundary and the outward unit normals there."""

    x: Float[Array, "points dim"]
    normal: Float[Array, "points dim"]


class Domain(Protocol):
    """What a solver asks of a domain."""

    @property
    def dim(self) -> int: ...

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lower and upper corner of a box around it."""

    @property
    def surface_to_volume(self) -> float | None:
        """Measure of the boundary over that of the domain, which turns means into integrals; None where unknown."""

    def sample_interior(self, key: PRNGKeyArray, n: int) -> Float[Array, "{n} dim"]:
        """Points of the uniform distribution."""

    def sample_boundary(self, key: PRNGKeyArray, n: int) -> BoundaryPoints:
        """Points of the uniform distribution on the boundary."""

    def cutoff(self, x: Float[Array, " dim"], kind: Cutoff = "harmonic") -> Float[Array, ""]:
        """Positive inside, zero on the boundary, at one point."""

    def contains(self, x: Float[Array, "points dim"]) -> Bool[Array, " points"]:
        """Which points are inside or on the boundary."""


@dataclasses.dataclass(frozen=True)
class Box:
    """The product of intervals.

    Attributes:
      lower, upper: corners; a number stands for every coordinate.
      dim: the dimension; may be left out where a corner gives it.
    """

    lower: float | Sequence[float] = 0.0
    upper: float | Sequence[float] = 1.0
    dim: int = 0

    def __post_init__(self) -> None:
        given = [len(c) for c in (self.lower, self.upper) if isinstance(c, Sequence)]
        dim = self.dim or (given[0] if given else 1)
        if dim < 1:
            raise UserError(f"box dim={self.dim}: expected at least 1")
        corners = []
        for name, corner in (("lower", self.lower), ("upper", self.upper)):
            values = tuple(float(c) for c in corner) if isinstance(corner, Sequence) else (float(corner),) * dim
            if len(values) != dim:
                raise UserError(f"box {name} has {len(values)} coordinates, expected {dim}")
            if not all(math.isfinite(c) for c in values):
                raise UserError(f"box {name}={corner}: expected finite numbers; an unbounded domain cannot be sampled")
            corners.append(values)
        for k, (low, high) in enumerate(zip(*corners)):
            if low >= high:
                raise UserError(f"box coordinate {k} runs from {low:g} to {high:g}: expected lower < upper")
        object.__setattr__(self, "lower", corners[0])
        object.__setattr__(self, "upper", corners[1])
        object.__setattr__(self, "dim", dim)

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.lower, self.upper  # type: ignore[return-value]

    @property
    def sides(self) -> tuple[float, ...]:
        return tuple(high - low for low, high in zip(*self.box))

    @property
    def surface_to_volume(self) -> float:
        return sum(2 / side for side in self.sides)

    def sample_interior(self, key: PRNGKeyArray, n: int) -> Float[Array, "{n} dim"]:
        # Never on a face, where the harmonic cutoff has no gradient.
        t = jnp.clip(jax.random.uniform(key, (n, self.dim)), 1e-6, 1 - 1e-6)
        return jnp.asarray(self.lower) + t * jnp.asarray(self.sides)

    def sample_boundary(self, key: PRNGKeyArray, n: int) -> BoundaryPoints:
        inner, face = jax.random.split(key)
        areas = np.repeat([1 / side for side in self.sides], 2)
        # Systematic: each face has its share of the points to within one, and an interval has both ends.
        place = (jnp.arange(n) + jax.random.uniform(face, ())) / n
        index = jnp.searchsorted(jnp.asarray(np.cumsum(areas)[:-1] / areas.sum()), place, side="right")
        axis, upper = index // 2, index % 2
        on_face = jax.nn.one_hot(axis, self.dim)
        ends = jnp.where(upper[:, None] == 1, jnp.asarray(self.upper), jnp.asarray(self.lower))
        x = jnp.where(on_face > 0, ends, self.sample_interior(inner, n))
        return BoundaryPoints(x, on_face * (2.0 * upper[:, None] - 1.0))

    def cutoff(self, x: Float[Array, " dim"], kind: Cutoff = "harmonic") -> Float[Array, ""]:
        low, sides = jnp.asarray(self.lower, x.dtype), jnp.asarray(self.sides, x.dtype)
        if kind == "min":
            return jnp.min(jnp.minimum(x - low, low + sides - x))
        t = (x - low) / sides
        bump = 4 * t * (1 - t)
        # On a face the mean of 1 / bump is infinite and the cutoff zero; the bound keeps rounding from turning it.
        return 1 / jnp.mean(1 / jnp.maximum(bump, 1e-12))

    def contains(self, x: Float[Array, "points dim"]) -> Bool[Array, " points"]:
        return jnp.all((x >= jnp.asarray(self.lower)) & (x <= jnp.asarray(self.upper)), axis=-1)


def Interval(lower: float = 0.0, upper: float = 1.0) -> Box:
    """A box of dimension one."""
    return Box(lower, upper, 1)


@dataclasses.dataclass(frozen=True)
class Ball:
    """The points within `radius` of `center` (the origin by default)."""

    dim: int
    radius: float = 1.0
    center: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise UserError(f"ball dim={self.dim}: expected at least 1")
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise UserError(f"ball radius={self.radius}: expected a positive, finite number")
        if self.center is not None and len(self.center) != self.dim:
            raise UserError(f"ball center has {len(self.center)} coordinates, expected {self.dim}")

    @property
    def _center(self) -> np.ndarray:
        return np.zeros(self.dim) if self.center is None else np.asarray(self.center, float)

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self._center - self.radius), tuple(self._center + self.radius)

    @property
    def surface_to_volume(self) -> float:
        return self.dim / self.radius

    def sample_interior(self, key: PRNGKeyArray, n: int) -> Float[Array, "{n} dim"]:
        direction, length = jax.random.split(key)
        r = self.radius * jax.random.uniform(length, (n, 1)) ** (1 / self.dim)
        return r * _directions(direction, n, self.dim) + jnp.asarray(self._center)

    def sample_boundary(self, key: PRNGKeyArray, n: int) -> BoundaryPoints:
        normal = _directions(key, n, self.dim)
        return BoundaryPoints(self.radius * normal + jnp.asarray(self._center), normal)

    def cutoff(self, x: Float[Array, " dim"], kind: Cutoff = "harmonic") -> Float[Array, ""]:
        y = x - jnp.asarray(self._center, x.dtype)
        return self.radius**2 - y @ y

    def contains(self, x: Float[Array, "points dim"]) -> Bool[Array, " points"]:
        return jnp.sum((x - self._center) ** 2, axis=-1) <= self.radius**2 * (1 + 1e-6)


def _directions(key: PRNGKeyArray, n: int, dim: int) -> Array:
    """Uniform on the unit sphere."""
    g = jax.random.normal(key, (n, dim))
    return g / jnp.maximum(jnp.linalg.norm(g, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class SignedDistance:
    """The points of a box where `function` is negative.

    Points are drawn by rejection; the boundary's come from points near it, moved onto it along the gradient, so their
    density there is only roughly uniform, and a flux through the boundary cannot be given.

    Attributes:
      function: of one point; negative inside, zero on the boundary, with a gradient that does not vanish near it.
      around: a box that holds the domain, the tighter the better.
      band: how far from the boundary points are taken to be moved onto it.
    """

    function: Callable[[Float[Array, " dim"]], Float[Array, ""]]
    around: Box
    band: float = 0.1

    def __post_init__(self) -> None:
        draw = jax.jit(lambda key: jnp.mean(self.contains(self.around.sample_interior(key, 4096))))
        share = float(draw(jax.random.key(0)))
        if share < 0.01:
            raise UserError(
                f"signed distance: {share:.1%} of its box is inside, expected at least 1 %; take a tighter box"
            )

    @property
    def dim(self) -> int:
        return self.around.dim

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.around.box

    @property
    def surface_to_volume(self) -> None:
        return None

    def sample_interior(self, key: PRNGKeyArray, n: int) -> Float[Array, "{n} dim"]:
        return _accepted(key, n, self.dim, lambda k: self.around.sample_interior(k, n), self._inside)

    def sample_boundary(self, key: PRNGKeyArray, n: int) -> BoundaryPoints:
        def near(k: Array) -> Array:
            x = self.around.sample_interior(k, n)
            close = jnp.abs(jax.vmap(self.function)(x)) < self.band
            moved = jax.lax.fori_loop(0, 8, lambda _, y: self._towards(y), x)
            # What is not close is marked by leaving the box.
            return jnp.where(close[:, None], moved, jnp.inf)

        def on(x: Array) -> Array:
            finite = jnp.all(jnp.isfinite(x), axis=-1)
            value = jax.vmap(self.function)(jnp.where(finite[:, None], x, 0.0))
            return finite & (jnp.abs(value) < 1e-5) & self.around.contains(x)

        x = _accepted(key, n, self.dim, near, on)
        gradient = jax.vmap(jax.grad(self.function))(x)
        return BoundaryPoints(x, gradient / jnp.linalg.norm(gradient, axis=1, keepdims=True))

    def _towards(self, x: Array) -> Array:
        """One Newton step onto the boundary."""
        value, gradient = jax.vmap(jax.value_and_grad(self.function))(x)
        return x - (value / jnp.maximum(jnp.sum(gradient**2, axis=1), 1e-12))[:, None] * gradient

    def cutoff(self, x: Float[Array, " dim"], kind: Cutoff = "harmonic") -> Float[Array, ""]:
        return -self.function(x)

    def _inside(self, x: Array) -> Array:
        return jax.vmap(self.function)(x) < 0

    def contains(self, x: Float[Array, "points dim"]) -> Bool[Array, " points"]:
        return jax.vmap(self.function)(x) <= 1e-5


def _accepted(
    key: PRNGKeyArray, n: int, dim: int, propose: Callable[[Array], Array], accept: Callable[[Array], Array]
) -> Array:
    """The first n accepted proposals, drawn in rounds of static size."""

    def round_(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        points, count, k = carry
        k, now = jax.random.split(k)
        candidates = propose(now)
        good = accept(candidates)
        place = jnp.where(good, count + jnp.cumsum(good) - 1, n)
        return points.at[place].set(candidates, mode="drop"), count + jnp.sum(good), k

    start = (jnp.zeros((n, dim)), jnp.zeros((), jnp.int32), key)
    return jax.lax.while_loop(lambda c: c[1] < n, round_, start)[0]
