"""The fast forms with their gradient, which is that of the dense form: a loop with a dynamic trip count has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.lora_matmul import xla
from kernels.platforms import pallas_module


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lora_matmul(form, x, a, b, scale, adapter_of_row, layer):
    """`form` of the operation; see the package."""
    if form == "xla":
        return xla.lora_matmul(x, a, b, scale, adapter_of_row, layer)
    pallas, interpret = pallas_module("kernels.lora_matmul", form)

    def work():
        return pallas.lora_matmul(x, a, b, scale, adapter_of_row, layer, interpret=interpret)

    nothing = lambda: jnp.zeros((x.shape[0], b.shape[-1]), x.dtype)  # noqa: E731
    return jax.lax.cond((adapter_of_row > 0).any(), work, nothing)


def _keep(form, *arguments):
    return lora_matmul(form, *arguments), arguments


def _pull_back(form, arguments, out_gradient):
    x, a, b, scale, adapter_of_row, layer = arguments
    _, pull_back = jax.vjp(lambda *v: xla.dense(v[0], v[1], v[2], v[3], adapter_of_row, layer), x, a, b, scale)
    no_gradient = [np.zeros(index.shape, jax.dtypes.float0) for index in (adapter_of_row, layer)]
    return *pull_back(out_gradient), *no_gradient


lora_matmul.defvjp(_keep, _pull_back)
