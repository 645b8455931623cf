"""The bound: equal to brute force, and below everything that keeps to the target."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.spot.evaluation import POLICIES
from jaxstack.fleet.spot.omniscient import solve_omniscient
from jaxstack.fleet.spot.simulator import simulate
from jaxstack.fleet.spot.traces import SpotTrace, flat_prices
from jaxstack.fleet.spot.view import ZonePrice
from jaxstack.runtime.errors import UserError


def brute_force(trace, target, cold):
    """Every schedule of whole replicas, one tick after the other: the cheapest way to each history of a cold start."""
    capacity = np.minimum(trace.ticks(30.0), target)
    price = [trace.zone_prices[zone].spot_usd_per_hour for zone in trace.zones]
    price.append(min(each.on_demand_usd_per_hour for each in trace.zone_prices.values()))
    best = {(): 0.0}
    for tick in range(capacity.shape[1]):
        options = list(itertools.product(*[range(c + 1) for c in (*capacity[:, tick], target)]))
        following = {}
        for history, cost in best.items():
            for held in options:
                recent = (*history, held)[-(cold + 1) :]
                if tick >= cold and sum(min(kind) for kind in zip(*recent)) < target:
                    continue
                whole = cost + (np.dot(held, price) if tick >= cold else 0.0)
                key = recent[-cold:] if cold else ()
                if whole < following.get(key, np.inf):
                    following[key] = whole
        best = following
    return min(best.values()) / (price[-1] * target * (capacity.shape[1] - cold))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2).flatmap(
        lambda zones: st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=zones, max_size=zones)
    ),
    st.integers(1, 2),
    st.sampled_from([1.0, 1.7]),
)
def test_brute_force(rows, target, dearer):
    names = tuple(f"z{i}" for i in range(len(rows)))
    prices = {name: ZonePrice(1.0 if i == 0 else dearer, 3.0) for i, name in enumerate(names)}
    trace = SpotTrace(names, 30.0, np.array(rows), prices)
    found = solve_omniscient(trace, target, tick_s=30.0, cold_start_s=30.0)
    assert found.status == "optimal"
    assert found.cost == pytest.approx(brute_force(trace, target, 1), abs=1e-6)
    assert found.lower_bound <= found.cost + 1e-9


def test_two_ticks_of_cold_start():
    trace = SpotTrace(("a",), 30.0, np.array([[1, 1, 1, 0, 1, 1, 1, 1]]))
    found = solve_omniscient(trace, 1, tick_s=30.0, cold_start_s=60.0)
    assert found.cost == pytest.approx(brute_force(trace, 1, 2), abs=1e-6)
    assert found.integral and found.relaxed


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 2))
def test_nobody_who_keeps_to_the_target_pays_less(rows, target):
    trace = SpotTrace(tuple(f"z{i}" for i in range(len(rows))), 30.0, np.repeat(rows, 5, axis=1))
    bound = solve_omniscient(trace, target, tick_s=30.0, cold_start_s=60.0).lower_bound
    for name in ("ours", "paper", "on_demand", "scaling_group"):
        result = simulate(trace, POLICIES[name](trace, target, 1), tick_s=30.0, cold_start_s=60.0)
        assert result.availability < 1 or result.cost >= bound - 1e-9, name


def test_spot_that_is_always_there_costs_its_share():
    trace = SpotTrace(("a",), 30.0, np.full((1, 40), 9), flat_prices(["a"], 4.0))
    found = solve_omniscient(trace, 3)
    assert found.cost == pytest.approx(0.25)
    assert found.on_demand[4:].max() == 0


def test_no_target_and_no_time():
    trace = SpotTrace(("a",), 30.0, np.ones((1, 4), int))
    with pytest.raises(UserError, match="found a target of 0"):
        solve_omniscient(trace, 0, cold_start_s=30.0)
    with pytest.raises(UserError, match="4 ticks"):
        solve_omniscient(trace, 1)
