"""A case: one operation on arrays of one shape, and every implementation of it that can run here."""

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import jax
import numpy as np

from kernels import platforms

Scale = Literal["default", "full"]
# Bytes between two uses of the same weights, so that they come from memory as in a decode step: beyond any cache.
COLD_BYTES = 96 << 20


@dataclass(frozen=True)
class Form:
    """One implementation. `inputs` are used in turn; the first of them is the one that errors are measured with.

    Attributes:
      moved_bytes: what the operation must at least read and write, once each.
      carried: the first argument is donated, and the result takes its place in the next call.
    """

    function: Callable
    inputs: Sequence[tuple]
    moved_bytes: int
    carried: bool = False


@dataclass(frozen=True)
class Case:
    """Attributes:
    op, label: the operation, and what is special here.
    forms: by name; never "ref".
    reference: the oracle's result for the first inputs, or None where the oracle would need too much memory.
    timed: whether to measure times; the small ragged cases are for errors alone.
    distance: of a result from the reference's; None is the largest difference over the largest value.
    flops: of the products in it, 0 where there are none.
    """

    op: str
    label: str
    forms: dict[str, Form]
    reference: Callable[[], Any] | None
    timed: bool = True
    distance: Callable[[Any, Any], float] | None = None
    flops: int = 0

    def error(self, form: Form) -> float | None:
        """Of one implementation, against the oracle."""
        if self.reference is None:
            return None
        inputs = form.inputs[0]
        if form.carried:
            inputs = (jax.tree.map(lambda a: a.copy(), inputs[0]), *inputs[1:])
        return (self.distance or relative)(form.function(*inputs), self.reference())


def relative(found: Any, wanted: Any) -> float:
    """The largest difference of any number, over the largest number."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    largest = max(float(np.abs(b).max(initial=0.0)) for _, b in arrays)
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in arrays) / (largest or 1.0)


def forms_of(
    package: ModuleType,
    call: Callable,
    inputs: Sequence[tuple],
    moved_bytes: int,
    *,
    interpret: bool = False,
    donated: bool = False,
) -> dict[str, Form]:
    """Every implementation of `package`, except the oracle, that can run here and takes these inputs.

    Args:
      call: `call(*inputs, implementation=name)`.
      interpret: also Pallas's interpreter, which is slow.
      donated: the first argument is given away.
    """
    found = {}
    for name in typing.get_args(package.Implementation):
        if name == "ref" or platforms.why_not(name) or (name == "interpret" and not interpret):
            continue
        function = functools.partial(call, implementation=name)
        try:
            jax.eval_shape(function, *inputs[0])
        except (ValueError, RuntimeError):
            continue  # a form that refuses these arrays, or whose compiler is not here
        jitted = jax.jit(function, donate_argnums=(0,) if donated else ())
        # Each form carries buffers of its own, since it gives them away.
        own = [(inputs[0][0].copy(), *rest[1:]) for rest in inputs] if donated else inputs
        found[name] = Form(jitted, own, moved_bytes, carried=donated)
    return found


def nbytes(*arrays: Any) -> int:
    """Of all arrays in these trees."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def normal(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> jax.Array:
    """Standard normal numbers, made where they shall be: an accelerator needs gigabytes of them."""
    if platforms.platform() == "cpu":
        return jax.numpy.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)
    key = jax.random.key(int(rng.integers(2**31)), impl="rbg")
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(key, shape, dtype)


def layers_to_stay_cold(size_bytes: int, most: int = 8) -> int:
    """How many layers of `size_bytes` make COLD_BYTES, at least one and at most `most`."""
    return max(1, min(most, -(-COLD_BYTES // size_bytes)))


Cases = Iterator[Case]
