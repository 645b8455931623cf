"""In plain XLA. On a CPU a loop over blocks of one group's rows, with as many turns as there are blocks: `ragged_dot`
would multiply every row by every matrix there. Elsewhere `ragged_dot`, since a loop of small products starves an
accelerator.
"""

import jax
import jax.numpy as jnp

from kernels.grouped_matmul.work_items import work_items
from kernels.platforms import platform


def block_rows(rows: int, groups: int) -> int:
    """Rows of one turn: about what a group has, since every turn reads its group's whole matrix."""
    block = 16
    while block < 256 and block * groups < rows:
        block *= 2
    return block


def grouped_matmul(x, stack, group_sizes, layer, *, transposed=False):
    """`x @ w`, or with `transposed` `x @ w.T`, of each row's group."""
    if platform() != "cpu":
        w = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        w = jnp.swapaxes(w, 1, 2) if transposed else w
        out = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=jnp.float32)
        return jnp.where(_within(x, group_sizes), out, 0).astype(x.dtype)

    rows = x.shape[0]
    block = block_rows(rows, stack.shape[1])
    items = work_items(group_sizes, rows, block)
    # A block may start at the last row: room for a whole one behind it.
    padded = jnp.pad(x, ((0, block), (0, 0)))
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))

    def item(i, out):
        first = items.first[i]
        some = jax.lax.dynamic_slice_in_dim(padded, first, block)
        w = _matrix(stack, layer, items.group[i])
        product = jax.lax.dot_general(some, w, contracted, preferred_element_type=jnp.float32)
        own = first + jnp.arange(block) < items.end[i]
        product = jnp.where(own[:, None], product, 0).astype(out.dtype)
        # Rows past this item's end belong to later items, which overwrite them, or to no group, and are zero.
        return jax.lax.dynamic_update_slice_in_dim(out, product, first, axis=0)

    out = jnp.zeros((rows + block, stack.shape[2 if transposed else 3]), x.dtype)
    return jax.lax.fori_loop(0, items.total, item, out)[:rows]


def gradient_of_weights(x, out_gradient, group_sizes):
    """`x_e.T @ out_gradient_e` of every group's rows, float32: `[E, K, N]`."""
    groups, (rows, depth), columns = group_sizes.shape[0], x.shape, out_gradient.shape[1]
    if platform() != "cpu":
        w = jnp.zeros((groups, depth, columns), x.dtype)
        out_gradient = jnp.where(_within(x, group_sizes), out_gradient, 0).astype(x.dtype)
        (gradient,) = jax.vjp(lambda w: jax.lax.ragged_dot(x, w, group_sizes), w)[1](out_gradient)
        return gradient.astype(jnp.float32)

    block = block_rows(rows, groups)
    items = work_items(group_sizes, rows, block)
    x, out_gradient = (jnp.pad(a, ((0, block), (0, 0))) for a in (x, out_gradient))

    def item(i, total):
        first = items.first[i]
        own = (first + jnp.arange(block) < items.end[i])[:, None]
        some, its_gradient = (
            jnp.where(own, jax.lax.dynamic_slice_in_dim(a, first, block), 0) for a in (x, out_gradient)
        )
        product = jax.lax.dot_general(some, its_gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        start = (items.group[i], 0, 0)
        before = jax.lax.dynamic_slice(total, start, (1, depth, columns))
        return jax.lax.dynamic_update_slice(total, before + product, start)

    return jax.lax.fori_loop(0, items.total, item, jnp.zeros((groups, depth, columns), jnp.float32))


def _matrix(stack, layer, group):
    """`stack[layer, group]`, the only part of the stack that is touched."""
    return jax.lax.dynamic_slice(stack, (layer, group, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]


def _within(x, group_sizes):
    """Which rows belong to a group, `[rows, 1]`."""
    return (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
