"""The CPU form: XLA custom calls into gated.cc, compiled on first use."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels.native import NativeKernel

_LANES = 16  # `kLanes` of simd.h
_NUMBERS = {"silu": np.int64(0), "gelu_tanh": np.int64(1)}  # of the activations in gated.cc
_SOURCE = Path(__file__).with_name("gated.cc")
_forward, _backward = (
    NativeKernel(_SOURCE, symbol=f"JaxstackGated{name}", target=f"jaxstack_gated_{name.lower()}")
    for name in ("Forward", "Backward")
)


def refuses(gate, up) -> str:
    """Why these arrays cannot be taken, in one line; empty if they can."""
    count = math.prod(gate.shape)
    if any(x.dtype != jnp.float32 for x in (gate, up)) or count % _LANES:
        return f"found {count} numbers of {gate.dtype} and {up.dtype}, expected float32, a multiple of {_LANES}"
    return _forward.why_not() or _backward.why_not()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate, up, activation):
    call = jax.ffi.ffi_call(_forward.target, jax.ShapeDtypeStruct(gate.shape, gate.dtype))
    return call(gate, up, activation=_NUMBERS[activation])


def _keep(gate, up, activation):
    return gated(gate, up, activation), (gate, up)


def _pull_back(activation, kept, d_out):
    gate, up = kept
    call = jax.ffi.ffi_call(_backward.target, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept])
    return tuple(call(gate, up, d_out, activation=_NUMBERS[activation]))


gated.defvjp(_keep, _pull_back)
