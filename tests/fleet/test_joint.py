"""The joint plan: equal to trying every choice, never dearer than planning one thing after the other, and replayed."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.allocation import AllocationProblem, Workload, solve
from jaxstack.fleet.allocation.program import even_shares
from jaxstack.fleet.joint import Option, options_for, solve_jointly, zone_sets
from jaxstack.fleet.joint_replay import replay_markets, replay_requests
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective, ThroughputProfile
from jaxstack.fleet.simulator.arrivals import requests_of
from jaxstack.fleet.simulator.step_times import StepTimes
from jaxstack.fleet.spot.simulator import ReadySpan
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.fleet.spot.view import ZonePrice
from jaxstack.runtime.errors import UserError

GRID = LengthGrid((100, 1000), (100, 500))
RATES = {"small": [[2.0, 1.0], [5.0, 2.0]], "large": [[20.0, 20.0], [40.0, 20.0]]}
PRICES = {"small": 1.01, "large": 3.67}


def problem_of(rate=30.0, rates=RATES, **more):
    profile = ThroughputProfile(
        GRID, {name: np.array(table) for name, table in rates.items()}, LatencyObjective(0.12),
        {name: np.full((2, 2), 8.0) for name in rates},
    )  # fmt: skip
    types = tuple(AcceleratorType(name, PRICES[name]) for name in rates)
    workload = Workload(GRID, rate, np.array([[0.2, 0.1], [0.5, 0.2]]))
    return AllocationProblem(workload, types, profile, **{"headroom": 0.0, **more})


def market(kind, rows, share=(0.3, 0.4), gap_s=300.0):
    names = tuple(f"zone-{i}" for i in range(len(rows)))
    prices = {name: ZonePrice(part * PRICES[kind], PRICES[kind]) for name, part in zip(names, share)}
    return SpotTrace(names, gap_s, np.array(rows), prices, name=kind)


def on_demand_options(most=14):
    return [Option(k, n, (), 0, n * price, 0.0) for k, price in PRICES.items() for n in range(1, most)]


@pytest.mark.parametrize("rate", [3.0, 30.0, 47.0])
@pytest.mark.parametrize("headroom", [0.0, 0.15])
def test_with_on_demand_alone_it_is_the_cheapest_mix(rate, headroom):
    problem = problem_of(rate, headroom=headroom)
    plan = solve_jointly(problem, on_demand_options(most=25))
    assert plan.status == "optimal"
    assert plan.cost_usd_per_hour == pytest.approx(solve(problem).cost_usd_per_hour)
    assert plan.gap == pytest.approx(0.0, abs=1e-6)


options_drawn = st.lists(
    st.builds(
        Option, st.sampled_from(list(PRICES)), st.integers(1, 4), st.just(("z",)), st.just(1),
        st.integers(1, 40).map(lambda tenth: tenth / 10), st.integers(0, 5).map(lambda percent: percent / 100),
    ),
    min_size=1, max_size=7,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(options_drawn, st.sampled_from([0.9, 0.96, 0.99]), st.sampled_from([5.0, 30.0]))
def test_every_choice_tried(options, availability, rate):
    problem = problem_of(rate)
    demand = problem.demand()
    best = math.inf
    by_kind = [[None, *(o for o in options if o.kind == name)] for name in problem.names]
    for choice in itertools.product(*by_kind):
        taken = [option for option in choice if option is not None]
        split = even_shares(demand, [option.replicas if option else 0 for option in choice])
        short = sum(option.unready for option in taken)
        if split is not None and split[1] <= 1 + 1e-9 and short <= 1 - availability + 1e-9:
            best = min(best, sum(option.cost_usd_per_hour for option in taken))
    plan = solve_jointly(problem, options, availability=availability)
    if best == math.inf:
        assert plan.status == "infeasible" and not plan.found and plan.gap == 1.0
        return
    assert plan.cost_usd_per_hour == pytest.approx(best, abs=1e-6)
    assert plan.lower_bound_usd_per_hour == pytest.approx(best, abs=1e-6)
    loads = (np.where(np.isfinite(demand), demand, 0.0) * plan.shares.reshape(4, -1)[problem.asked()]).sum(0)
    assert (loads <= [plan.counts.get(name, 0) + 1e-6 for name in problem.names]).all()
    assert plan.shares.sum(-1) == pytest.approx(np.ones((2, 2)))


def test_cheap_spot_changes_the_mix():
    """At on-demand prices some of both; with small ones nearly free as spot, many of those."""
    problem = problem_of()
    always = {"small": market("small", [[99] * 60], share=(0.05,))}
    mixed = solve(problem)
    options = options_for(problem, always)
    plan = solve_jointly(problem, options)
    assert mixed.counts == {"small": 1, "large": 1}
    assert plan.counts["small"] == 12 and "large" not in plan.counts
    assert plan.cost_usd_per_hour == pytest.approx(12 * 0.05 * 1.01, rel=0.3)
    one_after_the_other = [o for o in options if mixed.counts.get(o.kind) == o.replicas]
    after = solve_jointly(problem, one_after_the_other)
    assert plan.cost_usd_per_hour < after.cost_usd_per_hour < mixed.cost_usd_per_hour


def test_zones_are_weighed_by_price_and_by_how_often_they_fail():
    flaky = [1, 0] * 60
    trace = market("small", [np.array(flaky) * 9, [9] * 120], share=(0.30, 0.33))
    assert zone_sets(trace) == [("zone-0",), ("zone-0", "zone-1")]
    options = options_for(problem_of(3.0), {"small": trace}, extras=(0, 1))
    both = [o for o in options if o.kind == "small" and len(o.zones) == 2 and o.extra == 0 and o.replicas == 1]
    alone = [o for o in options if o.kind == "small" and len(o.zones) == 1 and o.replicas == 1]
    assert both and not alone  # dearer in the end, for its on-demand replicas, and short more often
    assert any(not o.zones for o in options)
    assert all(o.unready == 0 and o.cost_usd_per_hour == o.replicas * PRICES[o.kind] for o in options if not o.zones)


def test_availability_is_bought():
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.integers(0, 3, (2, 40)), 3, axis=1)
    problem = problem_of(6.0, {"small": RATES["small"]})
    options = options_for(problem, {"small": market("small", rows)})
    costs = [solve_jointly(problem, options, availability=a).cost_usd_per_hour for a in (0.5, 0.9, 0.99, 1.0)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1] == pytest.approx(solve(problem).cost_usd_per_hour)


def test_a_replay_on_what_was_planned_from_costs_what_was_planned():
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.integers(0, 4, (2, 20)), 4, axis=1)
    problem = problem_of(12.0)
    history = {name: market(name, rows) for name in PRICES}
    plan = solve_jointly(problem, options_for(problem, history, extras=(0, 1)), availability=0.8)
    replay = replay_markets(plan, problem, history)
    assert replay.cost_usd_per_hour == pytest.approx(plan.cost_usd_per_hour)
    assert replay.whole >= 1 - plan.unready - 1e-9
    assert replay.carried >= replay.whole
    with pytest.raises(UserError, match="markets: found"):
        replay_markets(plan, problem, {})


STEPS = {
    "small": StepTimes(1e-4, 0.01, 1e-7, 0.0, 0.003, 20_000),
    "large": StepTimes(2e-5, 0.004, 2e-8, 0.0, 0.003, 80_000),
}
LENGTHS = ([80, 500, 900], [50, 90, 300])


def plan_of(problem):
    return solve_jointly(problem, on_demand_options())


def test_requests_start_again_where_a_replica_is_taken_away():
    problem = problem_of(6.0)
    plan = plan_of(problem)
    steady = {"large": [ReadySpan(0.0, 300.0, "open", "spot")]}
    broken = {"large": [ReadySpan(0.0, 100.0, "preempted", "spot"), ReadySpan(120.0, 300.0, "open", "on_demand")]}
    stopped = {"large": [ReadySpan(0.0, 100.0, "stopped", "spot"), ReadySpan(100.0, 300.0, "open", "spot")]}
    plan = dataclasses.replace(plan, options=(Option("large", 1, (), 0, 3.67, 0.0),))
    found = {}
    for name, spans in {"steady": steady, "broken": broken, "stopped": stopped}.items():
        requests = requests_of(LENGTHS, 6.0, 200.0, seed=0)
        found[name], interrupted = replay_requests(plan, problem, spans, STEPS, requests, warmup_s=0.0)
        assert found[name].refused == 0
        assert all(request.end_s >= request.first_s >= request.at_s for request in requests)
        assert (interrupted > 0) == (name == "broken")
    assert found["steady"].ttft_s[2] < 1.0 < found["broken"].ttft_s[2]
    assert found["stopped"].ttft_s[2] < 2.0


def test_where_nobody_comes_requests_are_refused():
    problem = problem_of(6.0)
    plan = dataclasses.replace(plan_of(problem), options=(Option("large", 1, (), 0, 3.67, 0.0),))
    requests = requests_of(LENGTHS, 1.0, 100.0, seed=0)
    spans = {"large": [ReadySpan(0.0, 50.0, "preempted", "spot")]}
    report, _ = replay_requests(plan, problem, spans, STEPS, requests, warmup_s=0.0)
    assert 0 < report.refused < report.requests


def test_bad_input_is_one_line():
    problem = problem_of()
    with pytest.raises(UserError, match="found a market for 'huge'"):
        options_for(problem, {"huge": market("small", [[1] * 60])})
    with pytest.raises(UserError, match=r"large: found on-demand at 1.01 \$/h in small, expected the type's 3.67"):
        options_for(problem, {"large": market("small", [[1] * 60])})
    with pytest.raises(UserError, match=r"availability: found 1\.5"):
        solve_jointly(problem, on_demand_options(), availability=1.5)
    with pytest.raises(UserError, match="no requests"):
        solve_jointly(problem_of(0.0), on_demand_options())
    nothing = solve_jointly(problem, on_demand_options(most=2)[:1])
    with pytest.raises(UserError, match="found one that is infeasible"):
        replay_markets(nothing, problem, {})
