"""The emulated machine: copies no faster than their link, tasks no shorter than they should be, and bytes counted."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.runtime.emulation import (
    ALIGNMENT,
    BudgetExceeded,
    ByteLedger,
    EmulatedDevice,
    EmulatedLink,
    EmulatedMachine,
    aligned_empty,
)
from jaxstack.runtime.errors import UserError


def test_a_link_copies_whole_buffers_no_faster_than_its_bandwidth():
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, 3_000_001, np.uint8)  # not a whole number of chunks
    target = aligned_empty(source.shape, np.uint8)
    with EmulatedLink("link", 100e6) as link:
        start = time.perf_counter()
        first, second = link.copy(target, source), link.copy(aligned_empty((7,), np.uint8), source[:7], seconds=0.02)
        first.result(300)
        after_first = time.perf_counter() - start
        second.result(300)
        both = time.perf_counter() - start
    assert (target == source).all()
    assert after_first >= 0.03 and both >= 0.05  # the second waits for the first
    assert link.usage.moved_bytes == 3_000_008 and link.usage.tasks == 2


def test_a_link_refuses_what_does_not_fit_and_goes_on():
    with EmulatedLink("link", None) as link:
        with pytest.raises(ValueError, match="found 4 bytes for a buffer of 8"):
            link.copy(np.zeros(8, np.uint8), np.zeros(4, np.uint8))
        with pytest.raises(ValueError, match="not contiguous"):
            link.copy(np.zeros((4, 2), np.uint8), np.zeros((2, 4), np.uint8).T)
        out = np.zeros(4, np.float32)
        link.copy(out, np.arange(4, dtype=np.float32)).result(300)
        assert out.tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="closed"):
        link.copy(out, out)
    with pytest.raises(UserError, match="found 0 bytes/s"):
        EmulatedLink("link", 0)


def test_a_device_takes_its_time_and_passes_on_what_fails():
    def fail() -> None:
        raise KeyError("broken")

    with EmulatedDevice("device") as device:
        start = time.perf_counter()
        assert device.submit(lambda: 3, 0.03).result(300) == 3
        assert time.perf_counter() - start >= 0.03
        with pytest.raises(KeyError, match="broken"):
            device.submit(fail, 0.0).result(300)
        assert device.submit(threading.get_ident).result(300) != threading.get_ident()
        device.submit(lambda: time.sleep(0.02), 0.001).result(300)
        assert device.usage.late_s >= 0.015


def test_two_lanes_work_at_once():
    with EmulatedMachine(to_device_bytes_per_s=20e6) as machine:
        copied = machine.to_device.copy(np.empty(2_000_000, np.uint8), np.ones(2_000_000, np.uint8))
        machine.device.submit(lambda: copied.result(300)).result(300)  # one after the other would never end


def test_aligned_arrays_start_where_xla_can_read_them():
    for size in (1, 63, 64, 1000):
        assert aligned_empty((size,), np.uint8).ctypes.data % ALIGNMENT == 0
    assert aligned_empty((3, 5), np.float32).shape == (3, 5)


def test_a_ledger_refuses_what_is_over_budget_and_changes_nothing():
    ledger = ByteLedger({"device": 100, "host": None})
    ledger.take("device", 60, "weights")
    with pytest.raises(BudgetExceeded, match=r"device: cache needs 50 bytes, found 40 of 100 free; held by weights 60"):
        ledger.take("device", 50, "cache")
    assert ledger.live("device") == ledger.peak("device") == 60
    with ledger.holding("device", 40, "cache"):
        assert ledger.live("device") == 100
    assert (ledger.live("device"), ledger.peak("device")) == (60, 100)
    with pytest.raises(ValueError, match="gives back 61"):
        ledger.give("device", 61, "weights")
    ledger.reset_peak()
    assert ledger.peak("device") == 60
    ledger.take("host", 10**15, "pages")
    with pytest.raises(UserError, match="budget of device: found -1"):
        ByteLedger({"device": -1})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.booleans()), max_size=40))
def test_a_ledger_is_a_sum(operations):
    """Against plain dictionaries; the peak is the largest sum met."""
    ledger, held, peak = ByteLedger({"device": 120}), dict.fromkeys("abc", 0), 0
    for name, size, take in operations:
        if take and sum(held.values()) + size > 120:
            with pytest.raises(BudgetExceeded):
                ledger.take("device", size, name)
        elif take:
            ledger.take("device", size, name)
            held[name] += size
        elif size > held[name]:
            with pytest.raises(ValueError, match="gives back"):
                ledger.give("device", size, name)
        else:
            ledger.give("device", size, name)
            held[name] -= size
        peak = max(peak, sum(held.values()))
        assert (ledger.live("device"), ledger.peak("device")) == (sum(held.values()), peak)
        assert ledger.held("device") == {name: size for name, size in held.items() if size}
