"""The Pallas forms with their gradient, which is that of the plain XLA form."""

import functools

import jax

from kernels.platforms import pallas_module
from kernels.rms_norm_rope import xla


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def rms_norm_rope(form, eps, offset, q, k, cos, sin, q_weight, k_weight):
    """`form` of the operation; see the package."""
    pallas, interpret = pallas_module("kernels.rms_norm_rope", form)
    flat = lambda x, axes: x.reshape(-1, *x.shape[x.ndim - axes :])  # noqa: E731
    rows = flat(q, 2), flat(k, 2), flat(cos, 1), flat(sin, 1)
    out_q, out_k = pallas.rms_norm_rope(*rows, q_weight, k_weight, eps=eps, offset=offset, interpret=interpret)
    return out_q.reshape(q.shape), out_k.reshape(k.shape)


def _keep(form, eps, offset, *arguments):
    return rms_norm_rope(form, eps, offset, *arguments), arguments


def _pull_back(form, eps, offset, arguments, out_gradients):
    return jax.vjp(functools.partial(xla.rms_norm_rope, eps=eps, offset=offset), *arguments)[1](out_gradients)


rms_norm_rope.defvjp(_keep, _pull_back)
