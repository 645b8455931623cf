"""Placement under adversarial capacity: nobody is starved, and nobody is asked all the time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.spot.evaluation import POLICIES, Scenario, run_policy, starved_zone_trace
from jaxstack.fleet.spot.placement import Backoff, EvenSpread, PaperPlacer, RoundRobin, SingleRegion, ZonePlacer
from jaxstack.fleet.spot.policy import FixedTarget, ServingPolicy, SpotOnly, spothedge
from jaxstack.fleet.spot.simulator import simulate
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.fleet.spot.view import Decision, FleetView, ReplicaEvent, ZonePrice
from jaxstack.runtime.errors import UserError

TICK_S, COLD_S = 30.0, 120.0
SHORT = Backoff(base_s=60.0, max_s=480.0)


def trace_of(rows, tick_s=TICK_S):
    rows = np.asarray(rows)
    return SpotTrace(tuple(f"z{i}" for i in range(len(rows))), tick_s, rows)


def spot_policy(target, backoff=SHORT):
    return ServingPolicy(FixedTarget(target), SpotOnly(), ZonePlacer(backoff))


@st.composite
def capacities(draw, max_zones=4, ticks=80, max_capacity=4):
    """Zones that change at times of the adversary's choosing."""
    zones = draw(st.integers(1, max_zones))
    rows = []
    for _ in range(zones):
        row = []
        while len(row) < ticks:
            row += [draw(st.integers(0, max_capacity))] * draw(st.integers(1, 40))
        rows.append(row[:ticks])
    return np.array(rows)


class Watched:
    """A policy, and every launch that was asked for: (time, zone, whether it failed)."""

    def __init__(self, policy):
        self._policy, self.asks = policy, []

    def decide(self, view: FleetView) -> Decision:
        return self._policy.decide(view)

    def on_event(self, event: ReplicaEvent) -> None:
        if event.what == "launch_failed":
            self.asks.append((event.now_s, event.zone))
        self._policy.on_event(event)


@settings(max_examples=60, deadline=None)
@given(capacities(), st.integers(1, 5))
def test_a_zone_with_room_is_filled_within_the_longest_backoff(capacity, target):
    """P1: a replica is missing throughout the longest back-off only where no zone had room throughout."""
    result = simulate(trace_of(capacity), spot_policy(target), tick_s=TICK_S, cold_start_s=COLD_S)
    wait = math.ceil(SHORT.longest_s / TICK_S) + 1
    for zone, row in enumerate(capacity):
        room = row > result.spot_by_zone[zone]
        starved = room & (result.spot < target)
        run = 0
        for tick in starved:
            run = run + 1 if tick else 0
            assert run <= wait


@settings(max_examples=60, deadline=None)
@given(capacities(), st.integers(1, 5))
def test_while_a_replica_is_missing_every_zone_is_asked_in_time(capacity, target):
    """P2: asks are failures here (a launch that is granted in a zone is one that found it alive)."""
    policy = Watched(spot_policy(target))
    result = simulate(trace_of(capacity), policy, tick_s=TICK_S, cold_start_s=COLD_S)
    held = result.spot_by_zone
    wait = math.ceil(SHORT.longest_s / TICK_S) + 1
    for zone in range(len(capacity)):
        asked = {round(when / TICK_S) for when, name in policy.asks if name == f"z{zone}"}
        asked |= {t for t in range(held.shape[1]) if held[zone, t] > (held[zone, t - 1] if t else 0)}
        last = 0
        for tick in range(held.shape[1]):
            # A preemption is news of the zone as good as an ask: it begins a back-off.
            preempted = tick and capacity[zone, tick] < held[zone, tick - 1]
            if result.spot[tick] >= target or tick in asked or preempted:
                last = tick
            assert tick - last <= wait


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 6), st.lists(st.integers(0, 400), max_size=8))
def test_a_dead_zone_is_asked_a_bounded_number_of_times(dead, room, target, blips):
    """P3: whatever the live zone does, with replicas missing all the while."""
    ticks = 480
    capacity = np.zeros((dead + 1, ticks), int)
    capacity[0] = room + 1
    for blip in blips:
        capacity[0, blip : blip + 2] = 0
    alone = []

    policy = Watched(spot_policy(target, Backoff(60.0, 960.0)))
    placer = policy._policy.placers["spot"]
    simulate(
        trace_of(capacity), policy, tick_s=TICK_S, cold_start_s=COLD_S,
        on_tick=lambda view, decision: alone.append(placer.left_alone("z0", view.now_s)),
    )  # fmt: skip
    bound = 2 + math.log2(960 / 60) + ticks * TICK_S / 960
    for zone in range(1, dead + 1):
        asks = [
            when
            for when, name in policy.asks
            if name == f"z{zone}" and not alone[round(when / TICK_S)] and (when, "z0") not in policy.asks
        ]
        assert len(asks) <= bound


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_zones_that_never_fail_are_filled_evenly(zones, steps):
    """P4, as the wanted number rises."""
    placer, prices = ZonePlacer(), {f"z{i}": 1.0 + i for i in range(zones)}
    counts: dict[str, int] = dict.fromkeys(prices, 0)
    for step, more in enumerate(steps):
        for zone in placer.place(more, counts, prices, 30.0 * step):
            counts[zone] += 1
        assert max(counts.values()) - min(counts.values()) <= 1


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["fail", "preempt", "ready"]), st.integers(0, 3)), max_size=60),
)
def test_there_is_always_a_zone_to_ask(zones, events):
    """P5, and with what the paper's variants do."""
    names = [f"z{i}" for i in range(zones)]
    placers = [ZonePlacer(), PaperPlacer(), PaperPlacer(min(1, zones - 3) + 1), RoundRobin()]
    for tick, (what, zone) in enumerate(events):
        now_s = 30.0 * tick
        name = names[zone % zones]
        for placer in placers:
            if what == "fail":
                placer.on_launch_failed(name, now_s, now_s)
            elif what == "preempt":
                placer.on_preempted(name, now_s)
            else:
                placer.on_ready(name, now_s)
            chosen = placer.place(2, {}, dict.fromkeys(names, 1.0), now_s + 1.0)
            # Ours asks once in a while where nobody is to be asked.
            silent = isinstance(placer, ZonePlacer) and all(placer.left_alone(z, now_s + 1.0) for z in names)
            assert len(chosen) == 2 or (silent and not chosen)
            assert set(chosen) <= set(names)
        ours = placers[0].place(1, {}, dict.fromkeys(names, 1.0), now_s + 21.5)
        assert len(ours) == 1


def test_a_live_zone_beside_dead_ones_is_not_starved():
    trace, scenario = starved_zone_trace(), Scenario()
    ours, paper = (run_policy(trace, POLICIES[name], scenario) for name in ("ours", "paper"))
    assert ours.spot_by_zone[0, round(300 / scenario.tick_s)] == 4
    assert ours.cost <= 0.46
    assert ours.failures < 10
    assert paper.spot_by_zone[0].max() == 2  # what is wrong with it
    assert paper.failures > 5000
    assert paper.cost / ours.cost >= 1.8


def test_a_cheap_zone_that_blinked_gets_its_replicas_back():
    capacity = np.full((3, 960), 9)
    capacity[0, 20:22] = 0
    prices = {f"z{i}": ZonePrice(price, 6.0) for i, price in enumerate((1.0, 1.6, 1.7))}
    trace = SpotTrace(("z0", "z1", "z2"), TICK_S, capacity, prices)
    ours = simulate(trace, spothedge(FixedTarget(3)), tick_s=TICK_S, cold_start_s=COLD_S)
    assert ours.spot_by_zone[:, 19].tolist() == [2, 1, 1]
    assert ours.spot_by_zone[:, 60].tolist() == [0, 2, 2]
    assert ours.spot_by_zone[:, -1].tolist() == [2, 1, 1]
    assert (ours.ready[40:] >= 4).all()  # moved without ever having fewer
    assert ours.spot[60:].max() == 5  # one move at a time
    paper = simulate(trace, POLICIES["paper"](trace, 3, 1), tick_s=TICK_S, cold_start_s=COLD_S)
    assert paper.spot_by_zone[0, -1] == 0


@pytest.mark.parametrize("zones", [1, 2])
def test_few_zones_that_all_fail_are_survived(zones):
    capacity = np.full((zones, 200), 5)
    capacity[:, 50:100] = 0
    for name in ("ours", "paper", "artifact"):
        result = run_policy(trace_of(capacity), POLICIES[name], Scenario())
        assert result.spot[-1] == 4, name


def test_failures_at_one_moment_are_one():
    placer = ZonePlacer(Backoff(100.0, 800.0))
    for _ in range(4):
        placer.on_preempted("a", 50.0)
    assert placer.settled_since_s("a") == 150.0
    placer.on_launch_failed("a", 70.0, asked_s=40.0)  # asked before
    assert placer.settled_since_s("a") == 150.0
    placer.on_launch_failed("a", 200.0, asked_s=160.0)
    assert placer.settled_since_s("a") == 400.0
    placer.on_ready("a", 300.0)  # still left alone: it proves nothing
    placer.on_launch_failed("a", 500.0, asked_s=450.0)
    assert placer.settled_since_s("a") == 900.0
    placer.on_ready("a", 900.0)
    placer.on_preempted("a", 1000.0)
    assert placer.settled_since_s("a") == 1100.0


def test_jitter_is_bounded_and_repeats():
    backoff = Backoff(100.0, 800.0, jitter=0.5)
    delays = [backoff.delay_s(zone, 9) for zone in ("a", "b", "c")]
    assert len(set(delays)) == 3
    assert all(800.0 <= delay <= backoff.longest_s for delay in delays)
    assert delays == [backoff.delay_s(zone, 9) for zone in ("a", "b", "c")]


def test_one_region_and_even_spread():
    prices = {"a1": 1.0, "a2": 2.0, "b1": 0.5}
    inside = SingleRegion(RoundRobin(), lambda zone: zone.startswith("a"))
    assert inside.place(3, {}, prices, 0.0) == ["a1", "a2", "a1"]
    assert EvenSpread(4).place(4, {}, prices, 0.0) == ["a1", "a1", "a2", "b1"]
    assert EvenSpread(4).place(1, {"a1": 2, "b1": 1}, prices, 0.0) == ["a2"]


@pytest.mark.parametrize(
    "make", [lambda: Backoff(0.0, 1.0), lambda: Backoff(2.0, 1.0), lambda: Backoff(jitter=2.0), lambda: FixedTarget(-1)]
)
def test_bad_settings_are_one_line(make):
    with pytest.raises(UserError, match=r"found .*expected") as error:
        make()
    assert "\n" not in str(error.value)
