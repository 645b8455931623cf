"""Memory spaces: arrays go there and back and say where they are, operations do not mix spaces, and programs compiled
for accelerators keep them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.runtime.emulation import aligned_empty
from jaxstack.runtime.memory_spaces import Space, alias, compute_on_host, probe_spaces


@pytest.fixture(scope="module")
def spaces():
    return probe_spaces()


def test_arrays_go_to_the_host_and_back(spaces):
    assert spaces.pinned
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    there = spaces.put(numbers, Space.HOST)
    back = spaces.put(there, Space.DEVICE)
    assert (spaces.space_of(there), spaces.space_of(back)) == (Space.HOST, Space.DEVICE)
    np.testing.assert_array_equal(np.asarray(there), numbers)
    np.testing.assert_array_equal(np.asarray(back), numbers)
    with pytest.raises(ValueError, match="memory"):
        jax.jit(jnp.add)(there, back)


def test_without_page_locked_memory_there_is_a_warning(spaces, monkeypatch, caplog):
    real = jax.device_put

    def refuse(x, to=None, **more):
        if getattr(to, "memory_kind", None) == "pinned_host":
            raise RuntimeError("RESOURCE_EXHAUSTED: mlock")
        return real(x, to, **more)

    monkeypatch.setattr(jax, "device_put", refuse)
    found = probe_spaces(spaces.device)
    assert not found.pinned and found.kinds[Space.HOST] == "unpinned_host"
    assert "mlock" in caplog.text and "bandwidth" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_an_alias_shows_later_writes(dtype):
    numbers = aligned_empty((64,), jnp.dtype(dtype))
    numbers[...] = 1
    seen = alias(numbers)
    numbers[3] = 2
    assert np.asarray(seen)[3] == 2
    with pytest.raises(ValueError, match="aligned"):
        alias(aligned_empty((65,), np.uint8)[1:])


def on_host_and_device(pages, x):
    """A page from host memory is moved, then multiplied; the result also goes back, through the host's processor."""
    here = jax.device_put(pages, jax.memory.Space.Device)
    y = x @ here
    return y, compute_on_host(lambda p: p * 2.0)(pages)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_accelerators_keep_memory_kinds(platform):
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    pages = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=host)
    exported = jax.export.export(jax.jit(on_host_and_device), platforms=[platform])(
        pages, jax.ShapeDtypeStruct((2, 8), jnp.float32)
    )
    text = exported.mlir_module()
    assert 'mhlo.memory_kind = "pinned_host"' in text
    assert "annotate_device_placement" in text
    assert '_xla_compute_type = "host"' in text
