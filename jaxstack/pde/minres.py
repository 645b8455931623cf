"""MINRES (Paige and Saunders 1975) as one compiled loop, with SciPy's stopping rules.

Solves symmetric, possibly singular or indefinite systems from products with the matrix alone. The rules of
`scipy.sparse.linalg.minres` are kept to the letter, because one of them is the regulariser of a natural gradient: the
backward error |r| / (|A| |x|) falls below `rtol` long before |r| / |b| does where A is nearly singular, and the solve
ends before the null space's noise is amplified. One difference: a step that the condition rule stops at is not taken.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class StopReason(enum.IntEnum):
    """Why a solve ended; the numbers up to 6 are those of the published implementation."""

    EIGENVECTOR = -1
    ZERO_RIGHT_SIDE = 0
    BACKWARD_ERROR = 1
    LEAST_SQUARES = 2
    EPS_REACHED = 3
    CONDITION = 4
    ITERATION_LIMIT = 6
    NOT_FINITE = 9


class MinresResult(NamedTuple):
    """A solve's outcome; scalars are arrays, so that it can leave a compiled step.

    Attributes:
      x: the solution; the last finite iterate where a product was not finite.
      iterations: products with the matrix.
      stop_reason: a `StopReason`.
      residual_norm: |b - A x|, estimated by the recurrence.
      a_norm: |A| in the Frobenius norm of its tridiagonal projection.
      cond_estimate: ratio of the largest to the smallest diagonal entry of the projection's QR factor.
    """

    x: Float[Array, " n"]
    iterations: Int[Array, ""]
    stop_reason: Int[Array, ""]
    residual_norm: Float[Array, ""]
    a_norm: Float[Array, ""]
    cond_estimate: Float[Array, ""]


class _Lanczos(NamedTuple):
    """The loop's state, named as in the published code."""

    x: Any
    w: Any
    w2: Any
    r1: Any
    r2: Any
    y: Any
    iteration: Any
    stop: Any
    oldb: Any
    beta: Any
    dbar: Any
    epsln: Any
    phibar: Any
    cs: Any
    sn: Any
    tnorm2: Any
    gmax: Any
    gmin: Any


# Of a loop that goes on; none of the reasons.
_GOING = 100


def minres(
    matvec: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    b: Float[Array, " n"],
    *,
    rtol: float | Float[Array, ""] = 1e-5,
    max_iterations: int | None = None,
    damping: float | Float[Array, ""] = 0.0,
    min_iterations: int = 0,
) -> MinresResult:
    """Minimises |b - (A + damping I) x| over growing Krylov spaces, from x = 0.

    Args:
      matvec: the product with a symmetric A.
      b: the right-hand side.
      rtol: bound of the backward error and of |A r| / (|A| |r|).
      max_iterations: at most so many products; 5 n by default.
      damping: added to A's diagonal (SciPy's `shift` with the other sign).
      min_iterations: the two tests against `rtol` wait for so many.

    Returns:
      See `MinresResult`. Not differentiable: a natural gradient is a direction, and the loop's length is data.
    """
    dtype = b.dtype
    eps = jnp.finfo(dtype).eps
    limit = 5 * b.size if max_iterations is None else max_iterations
    beta1 = jnp.sqrt(jnp.vdot(b, b))
    # A right-hand side of zeros ends before the first product; one that is not finite, too.
    start = jnp.where(beta1 == 0, int(StopReason.ZERO_RIGHT_SIDE), _GOING)
    start = jnp.where(jnp.isfinite(beta1), start, int(StopReason.NOT_FINITE))
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    zeros = jnp.zeros_like(b)
    first = _Lanczos(
        x=zeros, w=zeros, w2=zeros, r1=b, r2=b, y=b,
        iteration=jnp.zeros((), jnp.int32), stop=start.astype(jnp.int32),
        oldb=zero, beta=beta1, dbar=zero, epsln=zero, phibar=beta1, cs=-one, sn=zero,
        tnorm2=zero, gmax=zero, gmin=jnp.full((), jnp.finfo(dtype).max, dtype),
    )  # fmt: skip

    def step(s: _Lanczos) -> _Lanczos:
        iteration = s.iteration + 1
        v = s.y / s.beta
        y = matvec(v) + damping * v
        y = y - jnp.where(iteration >= 2, s.beta / jnp.where(s.oldb == 0, one, s.oldb), zero) * s.r1
        alfa = jnp.vdot(v, y)
        y = y - (alfa / s.beta) * s.r2
        beta = jnp.sqrt(jnp.vdot(y, y))
        tnorm2 = s.tnorm2 + alfa**2 + s.beta**2 + beta**2
        # A b is a multiple of b: one iteration is all there is.
        stop = jnp.where((iteration == 1) & (beta / beta1 <= 10 * eps), int(StopReason.EIGENVECTOR), _GOING)

        # The previous plane rotation on the new column, then the next rotation.
        delta = s.cs * s.dbar + s.sn * alfa
        gbar = s.sn * s.dbar - s.cs * alfa
        epsln = s.sn * beta
        dbar = -s.cs * beta
        root = jnp.hypot(gbar, dbar)
        gamma = jnp.maximum(jnp.hypot(gbar, beta), eps)
        cs, sn = gbar / gamma, beta / gamma
        phi, phibar = cs * s.phibar, sn * s.phibar
        w = (v - s.epsln * s.w2 - delta * s.w) / gamma
        gmax, gmin = jnp.maximum(s.gmax, gamma), jnp.minimum(s.gmin, gamma)
        # Singular to working precision: this column only has noise to add, divided by next to nothing.
        singular = gmax / gmin >= 0.1 / eps
        x = jnp.where(singular, s.x, s.x + phi * w)

        a_norm, x_norm = jnp.sqrt(tnorm2), jnp.sqrt(jnp.vdot(x, x))
        product = a_norm * x_norm
        test1 = jnp.where(product == 0, jnp.inf, phibar / jnp.where(product == 0, one, product))
        test2 = jnp.where(a_norm == 0, jnp.inf, root / jnp.where(a_norm == 0, one, a_norm))
        judged = iteration >= min_iterations
        # In the published order: a later line overrules the ones before it.
        found = jnp.asarray(_GOING)
        for condition, reason in (
            (1 + test2 <= 1, StopReason.LEAST_SQUARES),
            (1 + test1 <= 1, StopReason.BACKWARD_ERROR),
            (iteration >= limit, StopReason.ITERATION_LIMIT),
            (singular, StopReason.CONDITION),
            (product * eps >= beta1, StopReason.EPS_REACHED),
            (judged & (test2 <= rtol), StopReason.LEAST_SQUARES),
            (judged & (test1 <= rtol), StopReason.BACKWARD_ERROR),
        ):
            found = jnp.where(condition, int(reason), found)
        stop = jnp.where(stop == _GOING, found, stop)
        # The Krylov space is used up: the next vector would be a division by zero.
        stop = jnp.where((stop == _GOING) & (beta == 0), int(StopReason.LEAST_SQUARES), stop)
        finite = jnp.isfinite(beta) & jnp.isfinite(x_norm) & jnp.isfinite(phibar)
        stop = jnp.where(finite, stop, int(StopReason.NOT_FINITE))
        return _Lanczos(
            x=jnp.where(finite, x, s.x), w=w, w2=s.w, r1=s.r2, r2=y, y=y,
            iteration=iteration, stop=stop.astype(jnp.int32),
            oldb=s.beta, beta=beta, dbar=dbar, epsln=epsln, phibar=jnp.where(finite, phibar, s.phibar), cs=cs, sn=sn,
            tnorm2=jnp.where(finite, tnorm2, s.tnorm2), gmax=gmax, gmin=gmin,
        )  # fmt: skip

    end = jax.lax.while_loop(lambda s: s.stop == _GOING, step, first)
    return MinresResult(
        x=end.x,
        iterations=end.iteration,
        stop_reason=end.stop,
        residual_norm=end.phibar,
        a_norm=jnp.sqrt(end.tnorm2),
        cond_estimate=jnp.where(end.iteration == 0, one, end.gmax / end.gmin),
    )
