"""The formulas: the saddle function E(u, phi, psi), what its players minimise, and the equation in its strong form.

With means over the uniform measures of the domain and of its boundary,

    E = <A grad u, grad phi> + <N(x, u, grad u) - f, phi> - |boundary|/|domain| <flux, phi>_boundary
        + lam <B u - g, psi>_boundary                                                       (sections 2 and 3 of the
        paper)

where the flux term is there only for test functions that do not vanish on the boundary. Players see each other's fields
on the samples of an iteration, never each other's parameters: E is a function of arrays.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxstack.pde.domains import Cutoff
from jaxstack.pde.networks import Mlp, value_and_gradient
from jaxstack.pde.operators import Coefficient, SecondOrder, forward_laplacian
from jaxstack.pde.problem import Dirichlet, Neumann, Periodic, Problem, Robin, point_values

# A field that nothing asks for.
_ABSENT: Any = None


class Samples(NamedTuple):
    """An iteration's points with everything there that no parameter changes; None where the problem has no use for it.

    Attributes:
      x: interior points; y, normal: boundary points and outward unit normals.
      diffusion: A at x; None for the identity. divergence: div A at x, where a strong form wants it.
      source: f at x. previous: an earlier solution's values at x.
      zeta, zeta_gradient, zeta_laplacian: the cutoff of test functions at x.
      edge_diffusion: n . A n at y and A n. edge_value: g at y. edge_gradient: tangential part of grad g at y.
      alpha: of a Robin condition, at y.
    """

    # Typed as what they are where they are used: who asks for a field knows that the problem has it.
    x: Float[Array, "points dim"]
    y: Float[Array, "edge dim"]
    normal: Float[Array, "edge dim"]
    diffusion: Coefficient
    divergence: Float[Array, "points dim"]
    source: Float[Array, " points"]
    previous: Float[Array, " points"]
    zeta: Float[Array, " points"]
    zeta_gradient: Float[Array, "points dim"]
    zeta_laplacian: Float[Array, " points"]
    edge_diffusion: tuple[Float[Array, " edge"], Float[Array, "edge dim"]]
    edge_value: Float[Array, " edge"]
    edge_gradient: Float[Array, "edge dim"]
    alpha: Float[Array, " edge"]

    def split(self) -> "tuple[Samples, Samples]":
        """The interior's part and the boundary's, each with None for the other: what `vmap` can go over."""
        edge = {"y", "normal", "edge_diffusion", "edge_value", "edge_gradient", "alpha"}
        inner: dict[str, Any] = {name: None for name in self._fields if name in edge}
        outer: dict[str, Any] = {name: None for name in self._fields if name not in edge}
        return self._replace(**inner), self._replace(**outer)


class Fields(NamedTuple):
    """A function's values on the samples; None where nothing asks for them.

    Attributes:
      value, gradient, second: at interior points; second is A : D^2 (of u) or the Laplacian (of phi).
      edge_value, edge_gradient: at boundary points.
    """

    value: Float[Array, " points"] = _ABSENT
    gradient: Float[Array, "points dim"] = _ABSENT
    second: Float[Array, " points"] = _ABSENT
    edge_value: Float[Array, " edge"] = _ABSENT
    edge_gradient: Float[Array, "edge dim"] = _ABSENT


@dataclasses.dataclass(frozen=True)
class Form:
    """A problem's saddle function.

    Attributes:
      problem: the equation.
      boundary_weight: lam.
      cutoff: the kind of cutoff of test functions; they vanish on a Dirichlet boundary and nowhere else.
      cutoff_scale: divides the cutoff; `with_cutoff_scale` makes its root mean square one, for a box's is about
        1 / (2 dim).
      tangential: boundary terms compare tangential derivatives as well (Dirichlet only).
      strong_penalty: the u player also minimises the mean squared strong residual.
      test_laplacian: the Laplacian of test functions is wanted.
    """

    problem: Problem
    boundary_weight: float = 10.0
    cutoff: Cutoff = "harmonic"
    cutoff_scale: float = 1.0
    tangential: bool = False
    strong_penalty: bool = False
    test_laplacian: bool = False

    @property
    def has_edge(self) -> bool:
        return not isinstance(self.problem.boundary, Periodic)

    @property
    def vanishing(self) -> bool:
        """Whether test functions vanish on the boundary."""
        return isinstance(self.problem.boundary, Dirichlet)

    @property
    def edge_needs_gradient(self) -> bool:
        return self.has_edge and (self.tangential or not self.vanishing)

    @property
    def has_flux(self) -> bool:
        """Whether test functions meet a flux that is not zero by definition."""
        match self.problem.boundary:
            case Neumann(flux):
                return callable(flux) or flux != 0
            case Robin():
                return True
        return False

    @property
    def _diffusion_varies(self) -> bool:
        return callable(self.problem.diffusion)

    def with_cutoff_scale(self) -> "Form":
        """This form with a cutoff whose root mean square over the domain is one."""
        if not self.vanishing:
            return self

        def scale(key: Array) -> Array:
            x = self.problem.domain.sample_interior(key, 4096)
            return jnp.sqrt(jnp.mean(jax.vmap(lambda p: self.problem.domain.cutoff(p, self.cutoff))(x) ** 2))

        return dataclasses.replace(self, cutoff_scale=float(jax.jit(scale)(jax.random.key(7))))

    def zeta(self, x: Float[Array, " dim"]) -> Float[Array, ""]:
        """The cutoff of test functions at one point."""
        return (
            self.problem.domain.cutoff(x, self.cutoff) / self.cutoff_scale if self.vanishing else jnp.ones((), x.dtype)
        )

    # ------------------------------------------------------------------------------------------------------- samples

    def samples(
        self,
        key: PRNGKeyArray,
        interior: int,
        edge: int,
        *,
        previous: Callable[[Float[Array, "points dim"]], Float[Array, " points"]] | None = None,
        strong: bool = False,
    ) -> Samples:
        """Draws points and evaluates coefficients there; for the inside of a compiled step.

        Args:
          key: of this iteration.
          interior, edge: how many points.
          previous: the earlier solution of a problem that takes one.
          strong: also what the strong residual needs.
        """
        inside, outside = jax.random.split(key)
        x = self.problem.domain.sample_interior(inside, interior)
        y, normal = self.problem.domain.sample_boundary(outside, edge) if self.has_edge else (None, None)
        return self.at(x, y, normal, previous=previous, strong=strong)

    def at(
        self,
        x: Float[Array, "points dim"],
        y: Float[Array, "edge dim"] | None,
        normal: Float[Array, "edge dim"] | None,
        *,
        previous: Callable[[Float[Array, "points dim"]], Float[Array, " points"]] | None = None,
        strong: bool = False,
    ) -> Samples:
        """The coefficients at given points."""
        problem = self.problem
        own = problem.weak_form is not None
        unit = not own and not self._diffusion_varies and problem.diffusion == 1.0
        diffusion: Any = None if own or unit else point_values(problem.diffusion, x)
        source: Any = None if own else point_values(problem.source, x)
        earlier: Any = None if previous is None else previous(x)
        divergence: Any = None
        if (strong or self.strong_penalty) and not own and self._diffusion_varies:
            divergence = jax.vmap(self._divergence)(x)
        zeta: Any = None
        zeta_gradient: Any = None
        zeta_laplacian: Any = None
        if self.vanishing:
            zeta, zeta_gradient = jax.vmap(jax.value_and_grad(self.zeta))(x)
            if self.test_laplacian:
                zeta_laplacian = jax.vmap(lambda p: jnp.trace(jax.hessian(self.zeta)(p)))(x)
        edge_value: Any = None
        edge_gradient: Any = None
        edge_diffusion: Any = None
        alpha: Any = None
        if self.has_edge:
            assert y is not None and normal is not None
            match problem.boundary:
                case Dirichlet(value):
                    edge_value = point_values(value, y)
                    if self.tangential:
                        gradient = (
                            jax.vmap(jax.grad(lambda p, g=value: jnp.asarray(g(p), p.dtype)))(y)
                            if callable(value)
                            else jnp.zeros_like(y)
                        )
                        edge_gradient = tangential_part(gradient, normal)
                case Neumann(flux):
                    edge_value = point_values(flux, y)
                case Robin(rate, value):
                    edge_value, alpha = point_values(value, y), point_values(rate, y)
            if not self.vanishing:
                along = apply_coefficient(None if own else point_values(problem.diffusion, y), normal)
                edge_diffusion = (jnp.sum(along * normal, axis=1), along)
        points: Any = y
        normals: Any = normal
        return Samples(
            x=x, y=points, normal=normals, diffusion=diffusion, divergence=divergence, source=source, previous=earlier,
            zeta=zeta, zeta_gradient=zeta_gradient, zeta_laplacian=zeta_laplacian,
            edge_diffusion=edge_diffusion, edge_value=edge_value, edge_gradient=edge_gradient, alpha=alpha,
        )  # fmt: skip

    def _divergence(self, x: Array) -> Array:
        """div A at one point: a vector."""
        assert callable(self.problem.diffusion)
        function = self.problem.diffusion
        a = lambda p: jnp.asarray(function(p), p.dtype)  # noqa: E731
        match jax.eval_shape(a, x).ndim:
            case 0:
                return jax.grad(a)(x)
            case 1:
                return jnp.diagonal(jax.jacfwd(a)(x))
        return jnp.einsum("klk->l", jax.jacfwd(a)(x))

    # --------------------------------------------------------------------------------------------- fields of networks

    def u_fields(self, net: Mlp, theta: Float[Array, " parameters"], samples: Samples) -> Fields:
        """The solution network on the samples."""
        if self.strong_penalty:
            value, gradient, second = forward_laplacian(net, theta, samples.x, samples.diffusion)
        else:
            (value, gradient), second = value_and_gradient(lambda x: net(theta, x), samples.x), _ABSENT
        edge_value = edge_gradient = _ABSENT
        if self.edge_needs_gradient:
            edge_value, edge_gradient = value_and_gradient(lambda x: net(theta, x), samples.y)
        elif self.has_edge:
            edge_value = net(theta, samples.y)
        return Fields(value, gradient, second, edge_value, edge_gradient)

    def phi_fields(self, net: Mlp, eta: Float[Array, " parameters"], samples: Samples) -> Fields:
        """The test function, network times cutoff, on the samples."""
        if self.test_laplacian:
            value, gradient, second = forward_laplacian(net, eta, samples.x)
        else:
            (value, gradient), second = value_and_gradient(lambda x: net(eta, x), samples.x), _ABSENT
        if samples.zeta is not None:
            zeta, slope = samples.zeta, samples.zeta_gradient
            if second is not None:
                second = zeta * second + 2 * jnp.sum(slope * gradient, axis=1) + value * samples.zeta_laplacian
            value, gradient = zeta * value, zeta[:, None] * gradient + value[:, None] * slope
        edge_value = net(eta, samples.y) if self.has_flux else _ABSENT
        return Fields(value, gradient, second, edge_value)

    def psi_fields(self, net: Mlp, xi: Float[Array, " parameters"], samples: Samples) -> Fields:
        """The boundary's test function on the samples."""
        if self.tangential:
            value, gradient = value_and_gradient(lambda x: net(xi, x), samples.y)
            return Fields(edge_value=value, edge_gradient=tangential_part(gradient, samples.normal))
        return Fields(edge_value=net(xi, samples.y))

    # ------------------------------------------------------------------------------------------------------ formulas

    def reaction(self, samples: Samples, value: Array, gradient: Array) -> Float[Array, " points"]:
        """N(x, u, grad u) at the samples; zeros where there is none."""
        function = self.problem.reaction
        if function is None:
            return jnp.zeros_like(value)
        more = (samples.previous,) if self.problem.takes_previous else ()
        return jax.vmap(lambda *a: jnp.asarray(function(*a), value.dtype))(samples.x, value, gradient, *more)

    def reaction_slope(self, samples: Samples, value: Array, gradient: Array) -> Float[Array, " points"]:
        """dN/du at the samples."""
        return jax.grad(lambda v: jnp.sum(self.reaction(samples, v, gradient)))(value)

    def edge_operator(self, samples: Samples, u: Fields) -> Float[Array, " edge"]:
        """The linear B u: u, or (n . A grad u + alpha u) / (n . A n), which for a scalar A is du/dn + alpha/A u."""
        if self.vanishing:
            return u.edge_value
        scale, along = samples.edge_diffusion
        flux = jnp.sum(along * u.edge_gradient, axis=1)
        if samples.alpha is not None:
            flux = flux + samples.alpha * u.edge_value
        return flux / scale

    def misfit(self, samples: Samples, u: Fields) -> Float[Array, " edge"]:
        """B u - g on the boundary, in the units of `edge_operator`."""
        g = samples.edge_value if self.vanishing else samples.edge_value / samples.edge_diffusion[0]
        return self.edge_operator(samples, u) - g

    def interior(self, samples: Samples, u: Fields, phi: Fields) -> Float[Array, ""]:
        """The part of E that tests the equation."""
        return jnp.mean(self.interior_density(samples, u, phi)) + self._flux_term(samples, u, phi)

    def interior_density(self, samples: Samples, u: Fields, phi: Fields) -> Float[Array, " points"]:
        """What `interior` averages over the domain."""
        own = self.problem.weak_form
        if own is not None:
            density = lambda *a: jnp.asarray(own.density(*a), a[1].dtype)  # noqa: E731
            return jax.vmap(density)(samples.x, u.value, u.gradient, phi.value, phi.gradient)
        flux = apply_coefficient(samples.diffusion, u.gradient)
        rest = self.reaction(samples, u.value, u.gradient) - samples.source
        return jnp.sum(flux * phi.gradient, axis=1) + rest * phi.value

    def _flux_term(self, samples: Samples, u: Fields, phi: Fields) -> Array | float:
        if not self.has_flux:
            return 0.0
        flux = samples.edge_value
        if samples.alpha is not None:
            flux = flux - samples.alpha * u.edge_value
        ratio = self.problem.domain.surface_to_volume
        assert ratio is not None  # a problem with a flux is not made without it
        return -ratio * jnp.mean(flux * phi.edge_value)

    def boundary(self, samples: Samples, u: Fields, psi: Fields) -> Float[Array, ""]:
        """The part of E that tests the boundary condition, lam included."""
        value = jnp.mean(self.misfit(samples, u) * psi.edge_value)
        if self.tangential:
            gap = tangential_part(u.edge_gradient, samples.normal) - samples.edge_gradient
            value = value + jnp.mean(jnp.sum(gap * psi.edge_gradient, axis=1))
        return self.boundary_weight * value

    def u_loss(self, samples: Samples, u: Fields, phi: Fields, psi: Fields | None) -> Float[Array, ""]:
        """What the u player minimises: E and the mean squared boundary misfit (and strong residual)."""
        loss = self.interior(samples, u, phi)
        if psi is not None:
            loss = loss + self.boundary(samples, u, psi)
            loss = loss + self.boundary_weight * jnp.mean(self.misfit(samples, u) ** 2)
        if self.strong_penalty:
            loss = loss + jnp.mean(self.residual(samples, SecondOrder(u.value, u.gradient, u.second)) ** 2)
        return loss

    # --------------------------------------------------------------------------------------------------- strong form

    def strong_coefficient(self, samples: Samples, value: Array, gradient: Array) -> Coefficient | None:
        """What contracts the Hessian in the strong form: A, or the derivative of one's own flux by grad u."""
        own = self.problem.weak_form
        if own is None:
            return samples.diffusion
        return jax.vmap(lambda x, u, p: jax.jacfwd(lambda q: self._own_flux(x, u, q))(p))(samples.x, value, gradient)

    def _own_flux(self, x: Array, u: Array, p: Array) -> Array:
        """a(x, u, p) of a density a . dphi + b phi."""
        own = self.problem.weak_form
        assert own is not None
        zero = jnp.zeros((), x.dtype)
        return jax.grad(lambda q: jnp.asarray(own.density(x, u, p, zero, q), x.dtype))(jnp.zeros_like(x))

    def residual(self, samples: Samples, u: SecondOrder) -> Float[Array, " points"]:
        """The strong form -div(A grad u) + N - f at the samples.

        Args:
          samples: drawn with `strong=True`.
          u: values, gradients and the Hessian contracted with `strong_coefficient`.
        """
        own = self.problem.weak_form
        if own is not None:

            def rest(x: Array, value: Array, p: Array) -> Array:
                one, zero = jnp.ones((), x.dtype), jnp.zeros_like(x)
                slope = jax.jacfwd(lambda v: self._own_flux(x, v, p))(value)
                divergence = jnp.trace(jax.jacfwd(lambda y: self._own_flux(y, value, p))(x))
                return jnp.asarray(own.density(x, value, p, one, zero), x.dtype) - slope @ p - divergence

            return jax.vmap(rest)(samples.x, u.value, u.gradient) - u.second
        residual = self.reaction(samples, u.value, u.gradient) - samples.source - u.second
        if samples.divergence is not None:
            residual = residual - jnp.sum(samples.divergence * u.gradient, axis=1)
        return residual

    def net_residual(self, net: Mlp, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, " points"]:
        """The strong form of a network's function, by the forward Laplacian."""
        if self.problem.weak_form is None:
            return self.residual(samples, forward_laplacian(net, theta, samples.x, samples.diffusion))
        value, gradient = value_and_gradient(lambda x: net(theta, x), samples.x)
        coefficient = self.strong_coefficient(samples, value, gradient)
        return self.residual(samples, forward_laplacian(net, theta, samples.x, coefficient))

    def net_misfit(self, net: Mlp, theta: Float[Array, " parameters"], samples: Samples) -> Float[Array, " edge"]:
        """B u - g of a network's function."""
        function = lambda y: net(theta, y)  # noqa: E731
        if self.vanishing:
            return self.misfit(samples, Fields(edge_value=function(samples.y)))
        value, gradient = value_and_gradient(function, samples.y)
        return self.misfit(samples, Fields(edge_value=value, edge_gradient=gradient))


def apply_coefficient(a: Coefficient | None, v: Float[Array, "points dim"]) -> Float[Array, "points dim"]:
    """A v at each point."""
    if a is None:
        return v
    if a.ndim == 1:
        return a[:, None] * v
    return a * v if a.ndim == 2 else jnp.einsum("nkl,nl->nk", a, v)


def tangential_part(v: Float[Array, "points dim"], normal: Float[Array, "points dim"]) -> Float[Array, "points dim"]:
    """The part along the boundary."""
    return v - jnp.sum(v * normal, axis=1, keepdims=True) * normal


def exact_second_order(
    function: Callable[[Float[Array, " dim"]], Any], x: Float[Array, "points dim"], coefficient: Coefficient | None
) -> SecondOrder:
    """Value, gradient and contracted Hessian of any smooth function of one point, by nested differentiation."""
    scalar = lambda p: jnp.asarray(function(p), p.dtype)  # noqa: E731
    value, gradient = jax.vmap(jax.value_and_grad(scalar))(x)
    hessian = jax.vmap(jax.hessian(scalar))(x)
    if coefficient is None or coefficient.ndim == 1:
        second = jnp.trace(hessian, axis1=1, axis2=2)
        return SecondOrder(value, gradient, second if coefficient is None else coefficient * second)
    if coefficient.ndim == 2:
        return SecondOrder(value, gradient, jnp.einsum("nk,nkk->n", coefficient, hessian))
    return SecondOrder(value, gradient, jnp.einsum("nkl,nkl->n", coefficient, hessian))
