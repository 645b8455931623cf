import jax
import jax.numpy as jnp

from jaxstack.runtime.compilation import CompileCounter


def test_counts_each_new_program_once_and_a_repeated_call_never():
    x, y = jnp.arange(3.0), jnp.arange(5.0)
    double = jax.jit(lambda v: v * 2.0 + 1.0)
    outer = CompileCounter()
    double(x)
    assert outer.count == 1 and outer.seconds > 0
    inner = CompileCounter()
    double(x)
    assert inner.count == 0
    double(y)  # another shape is another program
    assert (inner.count, outer.count) == (1, 2)
    outer.reset()
    assert outer.count == 0 and outer.seconds == 0.0
