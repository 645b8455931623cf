"""`gated(gate, up, activation)`: `activation(gate) * up`, between the products of a gated MLP.

Its arrays are the widest of a layer, so it costs what reading and writing them costs. The gradient keeps only `gate`
and `up` and computes the activation again.

    ref.py: plain jax.numpy, the oracle and what XLA runs
    cpu.py -> gated.cc: compiled, one pass over the arrays on all threads, forward and backward
"""

from typing import Literal

import jax
from jaxtyping import Array, Float

from kernels.gated import cpu, ref
from kernels.platforms import implementation_for

__all__ = ["Activation", "Implementation", "gated"]

Activation = Literal["silu", "gelu_tanh"]
Implementation = Literal["ref", "xla", "cpu"]
_FORMS = ("ref", "xla", "cpu")


def gated(
    gate: Float[Array, "..."],
    up: Float[Array, "..."],
    activation: Activation,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "..."]:
    """`activation(gate) * up`. Differentiable by reverse mode.

    Args:
      activation: "silu", x sigmoid(x); "gelu_tanh", x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
      implementation: "ref", "xla" (the same form; its gradient computes the activation again), or "cpu" (compiled C++:
        float32, a multiple of 16 numbers). None picks "cpu" where it can run, else "xla".

    Raises:
      ValueError: shapes that do not fit, an unknown activation, or a form that cannot take these arrays.
      RuntimeError: the implementation asked for cannot run here.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gated: gate {gate.shape} and up {up.shape} do not fit each other")
    if activation not in ref.ACTIVATIONS:
        raise ValueError(f"gated: found activation {activation!r}, expected one of {', '.join(ref.ACTIVATIONS)}")
    form = implementation_for("gated", implementation, _FORMS, lambda f: cpu.refuses(gate, up) if f == "cpu" else "")
    if form == "cpu":
        return cpu.gated(gate, up, activation)
    if form == "ref":
        return ref.gated(gate, up, activation)
    return jax.checkpoint(lambda gate, up: ref.gated(gate, up, activation), prevent_cse=False)(gate, up)
