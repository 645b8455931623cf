"""The simulator against the same thing said plainly, by hand, and by the windowed minimum; latency by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.spot.evaluation import POLICIES, Load, Scenario, latencies, run_policy, synthetic_windows
from jaxstack.fleet.spot.latency import exponential_services, poisson_arrivals, replay
from jaxstack.fleet.spot.policy import (
    Backoff,
    FixedTarget,
    RebalanceConfig,
    RequestRateAutoscaler,
    ServingPolicy,
    SpotOnly,
    ZonePlacer,
    ZonePrice,
    spothedge,
)
from jaxstack.fleet.spot.reference import ready_by_windowed_minimum, simulate_plainly
from jaxstack.fleet.spot.simulator import ReadySpan, simulate
from jaxstack.fleet.spot.traces import SpotTrace, flat_prices
from jaxstack.runtime.errors import UserError


def trace_of(rows):
    rows = np.asarray(rows)
    return SpotTrace(tuple(f"z{i}" for i in range(len(rows))), 30.0, rows)


capacities = st.integers(1, 3).flatmap(
    lambda zones: st.lists(
        st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=zones, max_size=zones
    )
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(capacities, st.sampled_from(["ours", "paper", "round_robin", "even_spread", "scaling_group"]), st.integers(1, 3))
def test_against_the_plain_loop(rows, name, cold_ticks):
    trace = trace_of(np.repeat(rows, 3, axis=1))
    fast = simulate(trace, POLICIES[name](trace, 2, 1), tick_s=30.0, cold_start_s=30.0 * cold_ticks)
    plain = simulate_plainly(trace, POLICIES[name](trace, 2, 1), tick_s=30.0, cold_ticks=cold_ticks)
    assert fast.ready.tolist() == plain["ready"].tolist()
    assert fast.spot.tolist() == plain["spot"].tolist()
    assert fast.on_demand.tolist() == plain["on_demand"].tolist()
    assert (fast.bill_usd_per_hour == fast.spot + 3 * fast.on_demand).all()


@settings(max_examples=30, deadline=None)
@given(
    capacities,
    st.sampled_from([(1.0, 1.0, 1.0), (1.0, 1.5, 2.0), (2.0, 1.0, 1.5)]),
    st.sampled_from([None, 240.0, 900.0]),
)
def test_ticks_that_are_passed_over_would_have_done_nothing(rows, prices, risk_s):
    """Moves and risk windows end by the clock alone; the plain loop asks at every tick."""
    names = tuple(f"z{i}" for i in range(len(rows)))
    priced = {name: ZonePrice(price, 4.0) for name, price in zip(names, prices)}
    trace = SpotTrace(names, 30.0, np.repeat(rows, 8, axis=1), priced)
    make = lambda: spothedge(  # noqa: E731
        FixedTarget(2), risk_window_s=risk_s, rebalance=RebalanceConfig(after_s=300.0), backoff=Backoff(60.0, 240.0)
    )
    fast = simulate(trace, make(), tick_s=30.0, cold_start_s=60.0)
    plain = simulate_plainly(trace, make(), tick_s=30.0, cold_ticks=2)
    assert fast.ready.tolist() == plain["ready"].tolist()
    assert fast.spot.tolist() == plain["spot"].tolist()
    assert fast.on_demand.tolist() == plain["on_demand"].tolist()


@settings(max_examples=60, deadline=None)
@given(capacities, st.integers(1, 3), st.integers(1, 3))
def test_ready_is_the_windowed_minimum_where_nobody_is_stopped(rows, target, cold_ticks):
    trace = trace_of(np.repeat(rows, 3, axis=1))
    policy = ServingPolicy(FixedTarget(target), SpotOnly(1), ZonePlacer())
    result = simulate(trace, policy, tick_s=30.0, cold_start_s=30.0 * cold_ticks)
    assert result.ready.tolist() == ready_by_windowed_minimum(result.spot_by_zone, cold_ticks).tolist()


def test_six_ticks_by_hand():
    """One zone with 2, 2, 2, 1, 2, 2; two wanted and none extra; ready after one tick.

    Tick 3 loses a replica, the zone is left alone, and an on-demand one stands in from tick 4 on.
    """
    trace = trace_of([[2, 2, 2, 1, 2, 2]])
    result = simulate(trace, spothedge(FixedTarget(2), overprovision=0), tick_s=30.0, cold_start_s=30.0)
    assert result.spot.tolist() == [2, 2, 2, 1, 2, 2]  # asked at tick 4 though left alone: there is nobody else
    assert result.on_demand.tolist() == [2, 0, 0, 1, 1, 0]
    assert result.ready.tolist() == [0, 2, 2, 1, 2, 2]
    assert result.availability == pytest.approx(4 / 5)
    assert result.cost == pytest.approx((2 + 2 + 1 + 3 + 2 + 3 + 2) / (3 * 2 * 5))
    assert result.shortfall == pytest.approx(1 / 5)
    assert result.none_ready == 0.0
    assert (result.preemptions, result.failures) == (1, 1)


def test_scores_follow_a_target_that_moves():
    rates = [0.0] * 10 + [2.5] * 30 + [0.0] * 60
    policy = spothedge(RequestRateAutoscaler(0, 4, 1.0, downscale_delay_s=300.0), overprovision=0)
    result = simulate(trace_of([[9] * 100]), policy, tick_s=30.0, cold_start_s=60.0, request_rates_rps=rates)
    assert result.targets[9:13].tolist() == [0, 3, 3, 3]
    assert result.targets[-1] == 0
    assert result.spot[-1] == result.on_demand[-1] == 0
    assert result.ready[12:40].tolist() == [3] * 28
    with pytest.raises(UserError, match="found 100 ticks"):
        simulate(trace_of([[9] * 100]), policy, request_rates_rps=[0.0])


def test_prices_are_on_the_bill():
    trace = SpotTrace(("a",), 30.0, np.full((1, 10), 9), flat_prices(["a"], 5.0))
    result = simulate(trace, spothedge(FixedTarget(2), overprovision=0), tick_s=30.0, cold_start_s=30.0)
    assert result.cost == pytest.approx(1 / 5)


def test_the_same_window_gives_the_same_scores():
    (first,), (second,) = (synthetic_windows("aws1", 1, duration_s=6 * 3600.0) for _ in range(2))
    assert first.name == second.name
    one, two = (run_policy(trace, POLICIES["ours"], Scenario()) for trace in (first, second))
    assert (one.ready == two.ready).all() and one.spans == two.spans


# Latency.


def spans_of(*spans):
    return [ReadySpan(start, end, how, "spot") for start, end, how in spans]


def waited(spans, arrivals, services, **options):
    return replay(spans, np.array(arrivals, float), np.array(services, float), **options)


def test_a_queue_by_hand():
    report = waited(spans_of((0, 100, "open"), (4, 100, "open")), [0, 1, 2, 3], [10, 4, 4, 4], timeout_s=50.0)
    # The first is served 0..10, the second from 4 on by the other replica, then the third and the fourth.
    assert report.latency_s.tolist() == [10.0, 7.0, 10.0, 11.0]
    assert (report.failed, report.interrupted) == (0, 0)


@pytest.mark.parametrize("how, latency, failed", [("restart", 16.0, 0), ("resume", 10.0, 0), ("lose", 50.0, 1)])
def test_a_preempted_replica(how, latency, failed):
    report = waited(
        spans_of((0, 6, "preempted"), (0, 99, "open")), [0, 0, 3], [10, 6, 1], timeout_s=50.0, on_preempted=how
    )
    assert report.latency_s[0] == latency
    assert (report.failed, report.interrupted) == (failed, 1)


def test_a_stopped_replica_finishes_what_it_has():
    report = waited(spans_of((0, 6, "stopped")), [0, 1], [10, 1], timeout_s=20.0)
    assert report.latency_s.tolist() == [10.0, 20.0]
    assert report.failed == 1


def test_a_client_that_leaves_frees_its_replica():
    report = waited(spans_of((0, 99, "open")), [0, 1], [40, 5], timeout_s=20.0)
    assert report.latency_s.tolist() == [20.0, 20.0]
    assert report.failed == 2  # the second is served from 20 on, and has left at 21
    assert waited(spans_of((0, 99, "open")), [0, 1], [40, 0.5], timeout_s=20.0).latency_s.tolist() == [20.0, 19.5]


def test_latency_of_one_server_is_that_of_theory():
    """M/M/1: the mean time in the system is 1 / (mu - lambda)."""
    arrivals = poisson_arrivals(0.05, 0.0, 400_000.0, 0)
    services = exponential_services(len(arrivals), 10.0, 0)
    report = replay(spans_of((0, 1e9, "open")), arrivals, services, timeout_s=1e6)
    assert report.latency_s.mean() == pytest.approx(1 / (1 / 10 - 0.05), rel=0.05)
    assert report.failed == 0


def test_resuming_is_never_worse_for_the_fleet():
    windows = synthetic_windows("aws2", 1, duration_s=12 * 3600.0)
    load = {
        how: Load(service_s=60.0, rate_rps=0.02, timeout_s=900.0, on_preempted=how) for how in ("restart", "resume")
    }
    found = {how: latencies(windows, POLICIES["ours"], Scenario(), each) for how, each in load.items()}
    assert found["resume"]["interrupted"] > 0
    assert found["resume"]["p99"] <= found["restart"]["p99"]


def test_bad_requests_are_one_line():
    with pytest.raises(UserError, match="found 1 arrivals, 2 services"):
        waited([], [1.0], [1.0, 2.0])
