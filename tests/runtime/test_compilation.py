import threading

import jax
import jax.numpy as jnp

from jaxstack.runtime.compilation import CompileCounter, CompileWatch


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


def test_a_watch_counts_its_own_blocks_and_thread():
    sizes = iter(range(20, 40))

    def compile_something():
        size = next(sizes)
        jax.jit(lambda v: v * 3.0 + size)(jnp.zeros(7))

    compile_something()
    watch = CompileWatch()
    compile_something()
    assert watch.count == 0
    with watch:
        other = threading.Thread(target=compile_something)
        other.start()
        other.join()
        assert watch.count == 0
    assert watch.count == 0
    for _ in range(2):
        with watch:
            compile_something()
    assert watch.count == 2
