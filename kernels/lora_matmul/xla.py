"""In plain XLA: blocks of rows, and in each block one narrow pair of products for every adapter met in it."""

import jax
import jax.numpy as jnp

# Rows of a block: always as many, so that a row's bits do not depend on the size of its batch.
BLOCK = 16


def lora_matmul(x, a, b, scale, adapter_of_row, layer):
    rows, out_features = x.shape[0], b.shape[-1]
    surplus = -rows % BLOCK

    def work():
        padded = jnp.pad(x, ((0, surplus), (0, 0)))
        adapters = jnp.pad(adapter_of_row, (0, surplus))

        def block(i, out):
            some = jax.lax.dynamic_slice_in_dim(padded, i * BLOCK, BLOCK)
            wanted = jax.lax.dynamic_slice_in_dim(adapters, i * BLOCK, BLOCK)

            def after(adapter):
                """The lowest adapter of the block beyond this one; past the last if there is none."""
                return jnp.min(jnp.where(wanted > adapter, wanted, a.shape[1]))

            def one_adapter(state):
                adapter, total = state
                factor_a, factor_b = _matrix(a, layer, adapter), _matrix(b, layer, adapter)
                low = jnp.dot(some, factor_a, preferred_element_type=jnp.float32) * scale[layer, adapter]
                product = jnp.dot(low.astype(factor_b.dtype), factor_b, preferred_element_type=jnp.float32)
                return after(adapter), jnp.where((wanted == adapter)[:, None], product, total)

            nothing = jnp.zeros((BLOCK, out_features), jnp.float32)
            _, total = jax.lax.while_loop(lambda state: state[0] < a.shape[1], one_adapter, (after(0), nothing))
            return jax.lax.dynamic_update_slice_in_dim(out, total.astype(out.dtype), i * BLOCK, axis=0)

        out = jnp.zeros((rows + surplus, out_features), x.dtype)
        return jax.lax.fori_loop(0, (rows + surplus) // BLOCK, block, out)[:rows]

    return jax.lax.cond((adapter_of_row > 0).any(), work, lambda: jnp.zeros((rows, out_features), x.dtype))


def dense(x, a, b, scale, adapter_of_row, layer):
    """The same with every adapter's narrow product for all rows, then zeros where a row does not use it: loops over
    nothing, so it has a gradient.
    """
    a, b, scale = a[layer], b[layer], scale[layer]
    low = jnp.einsum("ri,nik->rnk", x, a, preferred_element_type=jnp.float32) * scale[:, None]
    adapter = jnp.arange(a.shape[0])
    used = (adapter_of_row[:, None] == adapter) & (adapter > 0)
    low = jnp.where(used[..., None], low, 0).astype(b.dtype)
    return jnp.einsum("rnk,nko->ro", low, b, preferred_element_type=jnp.float32).astype(x.dtype)


def _matrix(stack, layer, adapter):
    return jax.lax.dynamic_slice(stack, (layer, adapter, 0, 0), (1, 1, *stack.shape[2:]))[0, 0]
