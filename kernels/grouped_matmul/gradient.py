"""The fast forms with their gradient: a loop with a dynamic trip count has none of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.grouped_matmul import xla
from kernels.platforms import pallas_module


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_matmul(form, x, stack, group_sizes, layer):
    """`form` of the operation; see the package."""
    return _forward(form, x, stack, group_sizes, layer)


def _forward(form, x, stack, group_sizes, layer, *, transposed=False):
    if form == "xla":
        return xla.grouped_matmul(x, stack, group_sizes, layer, transposed=transposed)
    pallas, interpret = pallas_module("kernels.grouped_matmul", form)
    return pallas.grouped_matmul(x, stack, group_sizes, layer, transposed=transposed, interpret=interpret)


def _keep(form, x, stack, group_sizes, layer):
    return _forward(form, x, stack, group_sizes, layer), (x, stack, group_sizes, layer)


def _pull_back(form, kept, out_gradient):
    x, stack, group_sizes, layer = kept
    of_x = _forward(form, out_gradient.astype(x.dtype), stack, group_sizes, layer, transposed=True)
    of_w = xla.gradient_of_weights(x, out_gradient, group_sizes).astype(stack.dtype)
    if stack.shape[0] == 1:
        of_stack = of_w[None]
    else:
        of_stack = jax.lax.dynamic_update_slice(jnp.zeros_like(stack), of_w[None], (layer, 0, 0, 0))
    no_gradient = [np.zeros(a.shape, jax.dtypes.float0) for a in (group_sizes, layer)]
    return of_x, of_stack, *no_gradient


grouped_matmul.defvjp(_keep, _pull_back)
