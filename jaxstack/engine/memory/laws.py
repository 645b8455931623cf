"""Closed forms for the period of a schedule: seconds of a layer, all micro-batches, in the steady state.

They are what the simulator finds (`schedule_sim.py`); a search evaluates them for every policy.
"""

import math
from typing import Any

import numpy as np

from jaxstack.engine.memory.schedule_build import TaskTimes

# Times and counts are floats, or arrays of one shape: a search evaluates many policies at once.
Number = Any


def s1_terms(times: TaskTimes, micro_batches: Number) -> dict[str, Number]:
    """What each resource takes for a layer under S1, and the chain of one micro-batch. The period is the largest."""
    n = micro_batches
    return {
        "to_device": times.weights + n * times.output_to_device,
        "device": n * (times.before + times.after),
        "host": n * times.attention,
        "to_host": n * times.qkv_to_host,
        "chain": chain(times),
    }


def s4_paged_terms(times: TaskTimes, micro_batches: Number) -> dict[str, Number]:
    """The same with attention on the device, KV loaded for each micro-batch and the weights in pages between.

    There is no chain: what a micro-batch loads waits for nothing but a slot.
    """
    n = micro_batches
    return {
        "to_device": times.weights + n * times.load_kv,
        "device": n * (times.before + times.attention + times.after),
        "to_host": n * times.store_kv,
    }


def s4_paged_period(times: TaskTimes, micro_batches: Number) -> Number:
    """The period of S4 with paged weights: exact where a step has four micro-batches in all layers, or more."""
    return np.maximum.reduce(np.broadcast_arrays(*s4_paged_terms(times, micro_batches).values()))


def chain(times: TaskTimes) -> Number:
    """One micro-batch through one layer under S1, nothing beside it."""
    return times.before + times.attention + times.after + times.qkv_to_host + times.output_to_device


def s1_period(times: TaskTimes, micro_batches: Number, *, buffer_share: Number = 1.0) -> Number:
    """S1's period, given enough look-ahead: exact for a whole layer of spare pages.

    With fewer, the last pages of a layer come after all C of the layer before, and the first C of their own waits for
    them: no period is less than this, and most are more.
    """
    terms = list(s1_terms(times, micro_batches).values())
    return np.maximum.reduce([*terms, late_pages(times, micro_batches, buffer_share)])


def late_pages(times: TaskTimes, micro_batches: Number, buffer_share: Number) -> Number:
    """All C of a layer, and the transfer of the pages that find no free slot before the last of them is over."""
    return micro_batches * times.after + (1 - buffer_share) * times.weights


def s1_look_ahead(times: TaskTimes, micro_batches: int) -> int:
    """The micro-batches ahead with which S1 attains its period: as many as are under way at once in a period."""
    each = s1_period(times, micro_batches) / micro_batches
    if not each:
        return 1
    # A sum that is a whole multiple but for rounding needs no further one.
    return max(1, min(micro_batches, math.ceil(chain(times) / each - 1e-9)))


def s4_synced_period(times: TaskTimes, micro_batches: Number) -> Number:
    """S4 with a barrier after every micro-batch, the weights at the first one."""
    compute = times.before + times.attention + times.after
    first = np.maximum(compute, times.weights + times.load_kv)
    return first + (micro_batches - 1) * np.maximum(compute, times.load_kv)
