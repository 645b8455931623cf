"""A serving policy's parts: autoscaling by hand, fallback, order of scaling down, failures of the service, state."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.spot.mixture import DynamicFallback, OnDemandOnly, RiskWindow, SpotOnly, StaticMixture
from jaxstack.fleet.spot.policy import (
    FixedTarget,
    FleetView,
    PaperPlacer,
    PeakHold,
    RebalanceConfig,
    ReplicaEvent,
    ReplicaState,
    ReplicaView,
    RequestRateAutoscaler,
    RoundRobin,
    ServingPolicy,
    ZonePrice,
    scale_down_order,
    spothedge,
)
from jaxstack.fleet.spot.simulator import simulate
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.fleet.spot.view import Census
from jaxstack.runtime.errors import UserError

PRICES = {zone: ZonePrice(1.0, 3.0) for zone in ("a", "b", "c")}


def fleet(ready_spot, starting_spot=0, ready_on_demand=0, zone="a"):
    replicas = []
    for count, kind, state in (
        (ready_spot, "spot", ReplicaState.READY),
        (starting_spot, "spot", ReplicaState.STARTING),
        (ready_on_demand, "on_demand", ReplicaState.READY),
    ):
        for _ in range(count):
            replicas.append(ReplicaView(f"r{len(replicas)}", zone, kind, state, float(len(replicas))))
    return tuple(replicas)


UP, DOWN = {"upscale_delay_s": 60.0}, {"downscale_delay_s": 120.0}
BOTH = {**UP, **DOWN}
# bounds, delays, [(seconds, rate, target)]; a replica takes 1 request a second
SEQUENCES = {
    "the minimum at once": ((1, 4), BOTH, [(0, 0.0, 1)]),
    "up after the delay": ((1, 4), BOTH, [(0, 2.5, 1), (40, 2.5, 1), (60, 2.5, 3)]),
    "a dip starts the delay again": ((1, 4), BOTH, [(0, 3, 1), (40, 1, 1), (60, 3, 1), (119, 3, 1), (120, 3, 3)]),
    "up to what is asked for in the end": ((1, 4), BOTH, [(0, 2, 1), (30, 9, 1), (60, 3, 3)]),
    "no more than the maximum": ((1, 4), BOTH, [(0, 9, 1), (60, 9, 4)]),
    "down after the longer delay": ((1, 4), BOTH, [(0, 4, 1), (60, 4, 4), (80, 1, 4), (199, 1, 4), (200, 1, 1)]),
    "up and down do not add up": (
        (1, 4), BOTH, [(0, 2, 1), (60, 2, 2), (70, 1, 2), (130, 3, 2), (189, 3, 2), (190, 3, 3)],
    ),
    "from zero at once": ((0, 4), BOTH, [(0, 0, 0), (20, 2.1, 3)]),
    "to zero after its own delay": (
        (0, 4), {**BOTH, "scale_to_zero_delay_s": 300.0},
        [(0, 2, 2), (10, 0, 2), (130, 0, 1), (309, 0, 1), (310, 0, 0)],
    ),
    "to zero soon, though not down": (
        (0, 4), {**BOTH, "scale_to_zero_delay_s": 30.0}, [(0, 2, 2), (10, 0, 2), (39, 0, 2), (40, 0, 0)],
    ),
    "never below the minimum": ((2, 4), BOTH, [(0, 0, 2), (1000, 0, 2)]),
    "a whole number of replicas is not one more": ((1, 9), UP, [(0, 0.1 * 3 / 0.1, 1), (60, 0.1 * 3 / 0.1, 3)]),
    "the rate wavers within a replica": ((1, 4), BOTH, [(0, 1.2, 1), (60, 1.9, 2), (80, 1.1, 2), (800, 2.0, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_autoscaler_by_hand(name):
    (low, high), options, steps = SEQUENCES[name]
    scaler = RequestRateAutoscaler(low, high, 1.0, **options)
    for now_s, rate, target in steps:
        assert scaler.target(now_s, rate) == target, (now_s, rate)
        copy = RequestRateAutoscaler(low, high, 1.0, **options)
        copy.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
        scaler = copy  # as after a restart


def test_peak_hold_keeps_the_peak_for_an_hour():
    scaler = PeakHold(1, 9, 1.0)
    seen = [scaler.target(t, rate) for t, rate in ((0, 2), (600, 5), (1200, 1), (4200, 3), (4201, 3), (8000, 1))]
    assert seen == [2, 5, 5, 5, 3, 1]
    copy = PeakHold(1, 9, 1.0)
    copy.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert copy.target(8001, 0) == scaler.target(8001, 0) == 1


@pytest.mark.parametrize("bad", [(3, 2, 1.0), (-1, 2, 1.0), (1, 2, 0.0), (1, 2, float("inf"))])
def test_a_bad_autoscaler_is_one_line(bad):
    with pytest.raises(UserError, match="found"):
        RequestRateAutoscaler(*bad)


@pytest.mark.parametrize(
    "mixture, ready, wanted",
    [
        (DynamicFallback(1), 4, (4, 0)),
        (DynamicFallback(1), 3, (4, 1)),
        (DynamicFallback(1), 0, (4, 3)),
        (DynamicFallback(1, cover_extra=False), 3, (4, 0)),
        (DynamicFallback(1, cover_extra=False), 2, (4, 1)),
        (DynamicFallback(1, base_on_demand=1), 3, (3, 1)),
        (DynamicFallback(1, base_on_demand=1), 1, (3, 3)),
        (DynamicFallback(0, base_on_demand=5), 0, (0, 3)),
        (SpotOnly(1), 0, (4, 0)),
        (OnDemandOnly(), 0, (0, 3)),
        (StaticMixture(0.1), 0, (2, 1)),
        (StaticMixture(0.0), 0, (3, 0)),
        (StaticMixture(0.5, overprovision=1), 0, (2, 2)),
    ],
)
def test_mixtures_by_hand(mixture, ready, wanted):
    assert mixture.wanted(3, Census.of(fleet(ready)), 0.0) == wanted
    assert mixture.wanted(0, Census.of(()), 0.0) == (0, 0)


def test_risk_window_covers_the_loss_of_the_zone():
    mixture = RiskWindow(DynamicFallback(1), 600.0)
    census = Census.of((*fleet(3, zone="a"), ReplicaView("b", "b", "spot", ReplicaState.READY, 0.0)))
    assert mixture.wanted(3, census, 0.0) == (4, 0)
    mixture.on_preempted("a", 0.0)
    assert mixture.wanted(3, census, 599.0) == (4, 2)
    copy = RiskWindow(DynamicFallback(1), 600.0)
    copy.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert copy.wanted(3, census, 599.0) == (4, 2)
    assert copy.wanted(3, census, 600.0) == (4, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=30, max_size=90), st.integers(1, 4), st.integers(0, 2))
def test_fallback_is_bounded_and_goes_as_soon_as_spot_is_ready(row, target, extra):
    capacity = np.repeat(np.array([row]), 2, axis=1)
    trace = SpotTrace(("a",), 30.0, capacity)
    seen = []
    result = simulate(
        trace, spothedge(FixedTarget(target), overprovision=extra), tick_s=30.0, cold_start_s=60.0,
        on_tick=lambda view, decision: seen.append(Census.of(view.replicas).count("spot", ready=True)),
    )  # fmt: skip
    ready_spot = np.array(seen)
    assert (result.on_demand <= target).all()
    assert (result.on_demand[ready_spot >= target + extra] == 0).all()
    assert (result.on_demand == np.minimum(target, target + extra - np.minimum(ready_spot, target + extra))).all()


def test_who_goes_first():
    views = [
        ReplicaView("new", "a", "spot", ReplicaState.READY, 20.0),
        ReplicaView("starting", "a", "spot", ReplicaState.STARTING, 5.0),
        ReplicaView("old", "a", "spot", ReplicaState.READY, 10.0),
        ReplicaView("pending", "a", "spot", ReplicaState.PENDING, 1.0, version=2),
        ReplicaView("previous", "a", "spot", ReplicaState.READY, 30.0, version=0),
    ]
    order = [view.replica_id for view in sorted(views, key=scale_down_order)]
    assert order == ["pending", "starting", "previous", "new", "old"]


def test_only_the_surplus_is_stopped():
    policy = spothedge(FixedTarget(2), overprovision=1)
    decision = policy.decide(FleetView(0.0, fleet(5, 1), 0.0, PRICES))
    assert [t.replica_id for t in decision.terminations] == ["r5", "r4", "r3"]
    assert not decision.launches


def test_replicas_on_their_way_out_are_not_counted():
    policy = spothedge(FixedTarget(1), overprovision=0)
    gone = (
        ReplicaView("x", "a", "spot", ReplicaState.SHUTTING_DOWN, 0.0),
        ReplicaView("y", "a", "spot", ReplicaState.PREEMPTED, 0.0),
    )
    decision = policy.decide(FleetView(0.0, gone, 0.0, PRICES))
    assert [launch.kind for launch in decision.launches] == ["spot", "on_demand"]
    assert not decision.terminations


def test_a_bad_image_is_not_held_against_the_zone():
    policy = spothedge(FixedTarget(1), overprovision=0)
    for kind in ("spot", "on_demand"):
        policy.on_event(ReplicaEvent("launch_failed", 0.0, "a", kind, 0.0, reason="other"))
    held = policy.decide(FleetView(10.0, (), 0.0, PRICES))
    assert not held.launches
    assert "other, 1 in a row" in held.alerts[0]
    after = policy.decide(FleetView(20.0, (), 0.0, PRICES))
    assert [launch.zone for launch in after.launches] == ["a", "a"]
    policy.on_event(ReplicaEvent("launch_failed", 25.0, "a", "spot", 20.0, reason="quota"))
    assert not policy.decide(FleetView(64.0, (), 0.0, PRICES)).launches
    policy.on_event(ReplicaEvent("ready", 64.5, "a", "spot", 20.0))
    assert policy.decide(FleetView(64.6, (), 0.0, PRICES)).launches


def test_no_on_demand_either_calls_the_operator():
    policy = spothedge(FixedTarget(1), overprovision=0)
    for zone in PRICES:
        policy.on_event(ReplicaEvent("launch_failed", 0.0, zone, "on_demand", 0.0))
    decision = policy.decide(FleetView(1.0, (), 0.0, PRICES))
    assert "on-demand" in decision.alerts[0]
    result = simulate(SpotTrace(("a",), 30.0, np.zeros((1, 100), int)), spothedge(FixedTarget(3)), on_demand_capacity=2)
    assert result.on_demand.max() == 2
    assert result.availability == 0.0
    assert result.shortfall == 1.0


def test_a_move_is_given_up_when_something_else_is_lost():
    policy = spothedge(FixedTarget(2), overprovision=0, rebalance=RebalanceConfig(after_s=0.0))
    prices = {"a": ZonePrice(2.0, 6.0), "b": ZonePrice(1.0, 6.0)}
    replicas = fleet(2, zone="a")
    begun = policy.decide(FleetView(100.0, replicas, 0.0, prices))
    assert [(launch.zone, launch.kind) for launch in begun.launches] == [("b", "spot")]
    fresh = ReplicaView("n", "b", "spot", ReplicaState.STARTING, 100.0)
    waiting = policy.decide(FleetView(120.0, (*replicas, fresh), 0.0, prices))
    assert not waiting.launches and not waiting.terminations
    state = json.loads(json.dumps(policy.state_dict()))
    ready = ReplicaView("n", "b", "spot", ReplicaState.READY, 100.0)
    moved = policy.decide(FleetView(220.0, (*replicas, ready), 0.0, prices))
    assert [t.replica_id for t in moved.terminations] == ["r0"]
    policy.load_state_dict(state)
    lost = policy.decide(FleetView(220.0, (replicas[0], ready), 0.0, prices))
    assert not [launch for launch in lost.launches if launch.kind == "spot"] and not lost.terminations


def test_a_restarted_policy_decides_as_the_old_one_would(tmp_path):
    rng = np.random.default_rng(0)
    capacity = np.repeat(rng.integers(0, 4, (3, 40)), 10, axis=1)
    trace = SpotTrace(("a", "b", "c"), 30.0, capacity)

    class Restarting:
        """Everything it knows goes through JSON at every turn."""

        def __init__(self, make):
            self._make, self._policy = make, make()

        def decide(self, view):
            decision = self._policy.decide(view)
            self._again()
            return decision

        def on_event(self, event):
            self._policy.on_event(event)
            self._again()

        def _again(self):
            state = json.dumps(self._policy.state_dict(), allow_nan=False)
            self._policy = self._make()
            self._policy.load_state_dict(json.loads(state))

    makers = [
        lambda: spothedge(FixedTarget(3), risk_window_s=600.0),
        lambda: ServingPolicy(FixedTarget(3), DynamicFallback(1), PaperPlacer()),
        lambda: ServingPolicy(FixedTarget(3), SpotOnly(1), RoundRobin()),
    ]
    for make in makers:
        plain, restarted = simulate(trace, make()), simulate(trace, Restarting(make))
        assert (plain.spot_by_zone == restarted.spot_by_zone).all()
        assert (plain.on_demand == restarted.on_demand).all()
        assert plain.asks == restarted.asks


def test_moves_need_a_placer_that_knows_who_failed():
    with pytest.raises(UserError, match="found a RoundRobin, expected a ZonePlacer"):
        ServingPolicy(FixedTarget(1), SpotOnly(), RoundRobin(), rebalance=RebalanceConfig())
