"""The networks of the solver: multilayer perceptrons as pure functions of one flat vector of parameters.

A natural gradient is linear algebra on parameters, so they are one vector from the start: nothing is flattened or
unflattened between a Gram product and the update. Layers are slices of it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxstack.runtime.errors import UserError


def _tanh(z: Array) -> tuple[Array, Array, Array]:
    s = jnp.tanh(z)
    slope = 1 - s * s
    return s, slope, -2 * s * slope


def _softplus(z: Array) -> tuple[Array, Array, Array]:
    slope = jax.nn.sigmoid(z)
    return jax.nn.softplus(z), slope, slope * (1 - slope)


def _sin(z: Array) -> tuple[Array, Array, Array]:
    s = jnp.sin(z)
    return s, jnp.cos(z), -s


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], tuple[Array, Array, Array]]]] = {
    "tanh": (jnp.tanh, _tanh),
    "softplus": (jax.nn.softplus, _softplus),
    "sin": (jnp.sin, _sin),
}
"""Name -> the function, and the function with its first two derivatives. Twice differentiable: strong forms need it."""


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A perceptron on points.

    Attributes:
      sizes: inputs, hidden widths, outputs; `len(sizes) - 1` linear layers ("depth" in the papers).
      activation: a name of `ACTIVATIONS`.
      last_bias: whether the output layer has a bias.
      residual: add a layer's input to its output where both have the same width.
      skip: add the network's input to its output, which has the same width: maps of space start near the identity.
      periods: lengths of a periodic box's sides; the inputs become sines and cosines of them.
      center, half_width: inputs are shifted and scaled by these first; None leaves them.
      inputs_per_unit: a unit of the first layer starts with weights on so many of its inputs, in turns, each with the
        variance that the layer's sum would have had; None for all. All weights are trained either way. In high
        dimension a unit that starts with all coordinates hardly curves along any one of them: solutions that are sums
        of functions of few coordinates are then learned up to their quadratic part, and no further for long.
    """

    sizes: tuple[int, ...]
    activation: str = "tanh"
    last_bias: bool = False
    residual: bool = False
    skip: bool = False
    periods: tuple[float, ...] | None = None
    center: tuple[float, ...] | None = None
    half_width: tuple[float, ...] | None = None
    inputs_per_unit: int | None = None

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise UserError(f"network sizes={self.sizes}: expected inputs, widths and outputs, each at least 1")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation={self.activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.skip and self.sizes[0] != self.sizes[-1]:
            raise UserError(f"network skip with sizes={self.sizes}: expected as many outputs as inputs")
        for name in ("periods", "center", "half_width"):
            value = getattr(self, name)
            if value is not None and len(value) != self.sizes[0]:
                raise UserError(
                    f"network {name} has {len(value)} entries, expected one for each of {self.sizes[0]} inputs"
                )

    @classmethod
    def of(cls, dim: int, width: int, depth: int, *, outputs: int = 1, **options: Any) -> "Mlp":
        """`depth` linear layers, all hidden ones `width` wide."""
        if depth < 1 or width < 1:
            raise UserError(f"network width={width}, depth={depth}: expected both at least 1")
        return cls((dim, *[width] * (depth - 1), outputs), **options)

    @property
    def dim(self) -> int:
        return self.sizes[0]

    @property
    def shapes(self) -> list[tuple[int, int, bool]]:
        """Inputs, outputs and whether there is a bias, of each linear layer."""
        first = 2 * self.sizes[0] if self.periods is not None else self.sizes[0]
        sizes = (first, *self.sizes[1:])
        last = len(sizes) - 2
        return [(sizes[i], sizes[i + 1], self.last_bias or i < last) for i in range(len(sizes) - 1)]

    @property
    def parameter_count(self) -> int:
        return sum(n * m + m * bias for n, m, bias in self.shapes)

    def init(self, key: PRNGKeyArray) -> Float[Array, " parameters"]:
        """Weights and biases uniform within 1/sqrt(inputs) of zero."""
        pieces = []
        for (n, m, bias), k in zip(self.shapes, jax.random.split(key, len(self.shapes))):
            bound = 1 / math.sqrt(n)
            pieces.append(jax.random.uniform(k, (n * m + m * bias,), minval=-bound, maxval=bound))
        (n, m, _), kept = self.shapes[0], self.inputs_per_unit
        if kept is not None and kept < n:
            mask = jnp.asarray(self._first_inputs(n, m, kept) * math.sqrt(n / kept), pieces[0].dtype)
            pieces[0] = pieces[0].at[: n * m].multiply(mask.ravel())
        return jnp.concatenate(pieces)

    @staticmethod
    def _first_inputs(inputs: int, units: int, kept: int) -> np.ndarray:
        """1 where a unit sees an input, (inputs, units): a round of all inputs before any of them comes again."""
        mask = np.zeros((inputs, units))
        turns = np.arange(units * kept).reshape(units, kept) % inputs
        mask[turns, np.arange(units)[:, None]] = 1.0
        return mask

    def layers(self, flat: Float[Array, " parameters"]) -> list[tuple[Float[Array, "n m"], Float[Array, " m"] | None]]:
        """The weights and biases inside a flat vector."""
        layers, at = [], 0
        for n, m, bias in self.shapes:
            weight = flat[at : at + n * m].reshape(n, m)
            at += n * m
            layers.append((weight, flat[at : at + m] if bias else None))
            at += m * bias
        return layers

    def inputs(self, x: Float[Array, "points dim"]) -> Float[Array, "points features"]:
        """What the first layer sees of the points."""
        if self.center is not None:
            x = x - jnp.asarray(self.center, x.dtype)
        if self.half_width is not None:
            x = x / jnp.asarray(self.half_width, x.dtype)
        if self.periods is not None:
            angle = x * (2 * jnp.pi / jnp.asarray(self.periods, x.dtype))
            x = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return x

    def __call__(
        self, flat: Float[Array, " parameters"], x: Float[Array, "points dim"]
    ) -> Float[Array, "points *outputs"]:
        """Values at points: (points,) of a network with one output and no skip, else (points, outputs)."""
        function = ACTIVATIONS[self.activation][0]
        start, h = x, self.inputs(x)
        layers = self.layers(flat)
        for index, (weight, bias) in enumerate(layers):
            z = h @ weight
            if bias is not None:
                z = z + bias
            if index == len(layers) - 1:
                h = z
            else:
                s = function(z)
                h = h + s if self.residual and h.shape == s.shape else s
        if self.skip:
            return start + h
        return h[:, 0] if self.sizes[-1] == 1 else h


def value_and_gradient(
    function: Callable[[Float[Array, "points dim"]], Float[Array, " points"]], x: Float[Array, "points dim"]
) -> tuple[Float[Array, " points"], Float[Array, "points dim"]]:
    """A scalar field and its gradient, all points in one reverse sweep: products stay matrix by matrix."""
    value, pull = jax.vjp(function, x)
    return value, pull(jnp.ones_like(value))[0]
