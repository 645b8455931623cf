"""The paper's preconditioners, as quadratic forms on fields, and the natural gradients that they make.

A preconditioner M of a player turns its step into a natural gradient with Gram matrix J^T M^T M J, J the derivative of
the player's fields by its parameters. Here M^T M is the Hessian of a quadratic form of fields on the samples: a product
with the Gram matrix is a forward sweep, a pointwise weighting and a backward sweep, all linearised once a solve.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.pde.forms import Fields, Form, Samples, apply_coefficient, tangential_part
from jaxstack.pde.minres import MinresResult, minres
from jaxstack.pde.problem import Dirichlet, Problem
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metric:
    """Squared norm of a player's function: the sum of the parts that are switched on.

    Attributes:
      identity: mean of w v^2; "reaction" weighs with dN/du (at the earlier solution where there is one) and
        "reaction_squared" with its square at the present one.
      gradient: mean of |grad v|^2, or with "diffusion" of grad v . A grad v.
      laplacian: mean of (Laplacian v)^2.
      edge: lam times the mean of (B v)^2 over the boundary.
      tangential: lam times the mean of |tangential derivatives|^2.
    """

    identity: Literal["one", "reaction", "reaction_squared"] | None = None
    gradient: Literal["one", "diffusion"] | None = None
    laplacian: bool = False
    edge: bool = False
    tangential: bool = False

    def weights(self, form: Form, samples: Samples, u: Fields) -> Float[Array, " points"] | None:
        """Of the identity, at the samples; constants of the solve. Never below a twentieth: W'' may be negative."""
        if self.identity in (None, "one"):
            return None
        at = u.value if samples.previous is None or self.identity == "reaction_squared" else samples.previous
        slope = form.reaction_slope(samples, at, u.gradient)
        return jax.lax.stop_gradient(jnp.maximum(slope if self.identity == "reaction" else slope**2, 0.05))

    def half_square(
        self, form: Form, samples: Samples, v: Fields, weights: Float[Array, " points"] | None
    ) -> Float[Array, ""]:
        """Half the squared norm of a function given by its fields."""
        total = jnp.zeros((), samples.x.dtype)
        if self.identity is not None:
            total = total + jnp.mean(v.value**2 if weights is None else weights * v.value**2)
        if self.gradient is not None:
            flux = v.gradient if self.gradient == "one" else apply_coefficient(samples.diffusion, v.gradient)
            total = total + jnp.mean(jnp.sum(flux * v.gradient, axis=1))
        if self.laplacian:
            total = total + jnp.mean(v.second**2)
        if self.edge and form.has_edge:
            total = total + form.boundary_weight * jnp.mean(form.edge_operator(samples, v) ** 2)
        if self.tangential and form.has_edge:
            along = tangential_part(v.edge_gradient, samples.normal)
            total = total + form.boundary_weight * jnp.mean(jnp.sum(along**2, axis=1))
        return 0.5 * total


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """Metrics of the players u and phi; psi's is lam times the boundary mean of psi^2 (and tangential derivatives)."""

    u: Metric
    phi: Metric
    tangential: bool = False

    def psi_half_square(self, form: Form, samples: Samples, psi: Fields) -> Float[Array, ""]:
        """Half of psi's squared norm; its tangential derivatives are fields already."""
        total = jnp.mean(psi.edge_value**2)
        if self.tangential:
            total = total + jnp.mean(jnp.sum(psi.edge_gradient**2, axis=1))
        return 0.5 * form.boundary_weight * total


PRECONDITIONERS: dict[str, Preconditioner] = {
    "nabla": Preconditioner(Metric(gradient="one", edge=True), Metric(gradient="one")),
    "kappa_nabla": Preconditioner(Metric(gradient="diffusion", edge=True), Metric(gradient="diffusion")),
    "kappa_nabla_h1": Preconditioner(
        Metric(gradient="diffusion", edge=True, tangential=True), Metric(gradient="diffusion"), tangential=True
    ),
    "nabla_h1": Preconditioner(
        Metric(gradient="one", edge=True, tangential=True), Metric(gradient="one"), tangential=True
    ),
    "identity": Preconditioner(Metric(identity="one", edge=True), Metric(identity="one")),
    "id_laplace": Preconditioner(Metric(identity="one", edge=True), Metric(laplacian=True)),
    "h1": Preconditioner(
        Metric(identity="one", gradient="diffusion", edge=True), Metric(identity="one", gradient="diffusion")
    ),
    "reaction_large": Preconditioner(
        Metric(identity="reaction", gradient="diffusion", edge=True), Metric(identity="reaction", gradient="diffusion")
    ),
    "reaction_small": Preconditioner(Metric(identity="reaction_squared", edge=True), Metric(identity="one")),
}
"""Name -> preconditioner. `kappa_nabla` and `h1` are not in the paper: a constant diffusion other than one, and test
functions that do not vanish on the boundary."""


def preconditioner_named(name: str, problem: Problem) -> tuple[str, Preconditioner]:
    """The preconditioner of a name; "auto" goes by the problem.

    Raises:
      UserError: an unknown name, or tangential terms on a boundary that has no Dirichlet value.
    """
    if name == "auto":
        if isinstance(problem.boundary, Dirichlet):
            if problem.weak_form is not None or problem.diffusion == 1.0:
                name = "nabla"
            else:
                name = "kappa_nabla_h1" if callable(problem.diffusion) and problem.dim > 1 else "kappa_nabla"
        else:
            name = "reaction_large" if problem.takes_previous else "h1"
    if name not in PRECONDITIONERS:
        raise UserError(f"preconditioner={name!r}: expected auto or one of {', '.join(PRECONDITIONERS)}")
    chosen = PRECONDITIONERS[name]
    if chosen.tangential and not isinstance(problem.boundary, Dirichlet):
        raise UserError(
            f"preconditioner={name!r} with a {type(problem.boundary).__name__} boundary: expected Dirichlet"
        )
    return name, chosen


class Linearized:
    """A player's fields and their derivative at its parameters, linearised once for a gradient and all Gram products.

    Args:
      function: parameters -> fields (any pytree).
      parameters: where.
    """

    def __init__(self, function: Callable, parameters: Float[Array, " parameters"]):
        self.fields, self._push = jax.linearize(function, parameters)
        self._pull = jax.linear_transpose(self._push, parameters)

    def gradient(self, loss: Callable) -> Float[Array, " parameters"]:
        """The gradient by the parameters of a function of the fields."""
        return self._pull(jax.grad(loss)(self.fields))[0]

    def gram(self, half_square: Callable, vector: Float[Array, " parameters"]) -> Float[Array, " parameters"]:
        """The product of the Gram matrix of a quadratic form of fields with a vector."""
        return self._pull(jax.grad(half_square)(self._push(vector)))[0]

    def natural_gradient(
        self,
        gradient: Float[Array, " parameters"],
        half_square: Callable,
        *,
        rtol: float | Array,
        max_iterations: int,
        damping: float = 0.0,
        min_iterations: int = 0,
    ) -> MinresResult:
        """Solves Gram x = gradient by MINRES."""
        return minres(
            lambda v: self.gram(half_square, v),
            gradient,
            rtol=rtol,
            max_iterations=max_iterations,
            damping=damping,
            min_iterations=min_iterations,
        )

    def dense_gram(self, half_square: Callable, size: int) -> Float[Array, "parameters parameters"]:
        """The Gram matrix, column by column: for small networks and tests."""
        return jax.lax.map(lambda v: self.gram(half_square, v), jnp.eye(size)).T
