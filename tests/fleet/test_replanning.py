"""Changing plans: estimates, noise that changes nothing, steps that do; other ways to choose; what flips a plan."""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.allocation import AllocationProblem, Workload, solve
from jaxstack.fleet.allocation.authors import load_authors_problem
from jaxstack.fleet.allocation.baselines import best_single_type, cheapest_per_size, whole_slices
from jaxstack.fleet.allocation.replanning import Replanner, Transition, WorkloadEstimator
from jaxstack.fleet.allocation.sensitivity import costs_by_rate, price_flips
from jaxstack.fleet.profile import AcceleratorType, LatencyObjective, LengthGrid, ThroughputProfile
from jaxstack.runtime.errors import UserError

GRID = LengthGrid((100, 1000), (50, 500))
TABLES = {"small": [[6.0, 2.0], [1.5, 0.4]], "large": [[20.0, 9.0], [12.0, 5.0]]}
MIX = [[0.4, 0.3], [0.2, 0.1]]


def problem_at(rate: float, **more) -> AllocationProblem:
    profile = ThroughputProfile(GRID, TABLES, LatencyObjective(0.1))
    types = more.pop("types", (AcceleratorType("small", 1.0), AcceleratorType("large", 3.5)))
    return AllocationProblem(Workload(GRID, rate, MIX), types, profile, **more)


def test_noise_of_five_percent_changes_nothing_in_a_day():
    for rate in (11.0, 63.0):
        draw = np.random.default_rng(5)
        planner, estimator = Replanner(problem_at(rate)), WorkloadEstimator(GRID)
        changes = 0
        for minute in range(1, 24 * 60):
            number = 60 * rate * draw.uniform(0.95, 1.05)
            for (i, j), share in np.ndenumerate(np.array(MIX)):
                size = GRID.input_edges_tokens[i], GRID.output_edges_tokens[j]
                estimator.add(60.0 * minute - 30, *size, number=number * share)
            if minute >= 30 and minute % 20 == 0:  # when it has settled
                estimate = estimator.workload(60.0 * minute)
                assert estimate is not None and estimate.rate_rps == pytest.approx(rate, rel=0.08)
                changes += planner.look(estimate).transition is not None
        assert changes == 1  # the first plan


def test_twice_the_traffic_is_planned_for_at_once_and_half_of_it_after_a_while():
    planner = Replanner(problem_at(20.0), patience=3)
    planner.look(problem_at(20.0).workload)
    grown = planner.look(problem_at(40.0).workload)
    assert grown.transition is not None and "40 requests/s are more" in grown.reason
    assert grown.allocation.cost_usd_per_hour == pytest.approx(solve(problem_at(40.0)).cost_usd_per_hour)
    reasons = [planner.look(problem_at(20.0).workload) for _ in range(3)]
    assert [r.transition is None for r in reasons] == [True, True, False]
    assert "for 2 looks of 3" in reasons[1].reason and "$/h less will do" in reasons[2].reason
    assert reasons[2].allocation.cost_usd_per_hour < grown.allocation.cost_usd_per_hour
    # A rise in between begins the wait anew.
    planner = Replanner(problem_at(20.0), patience=3)
    planner.look(problem_at(40.0).workload)
    for rate in (20.0, 20.0, 40.0, 20.0, 20.0):
        assert planner.look(problem_at(rate).workload).transition is None
    assert planner.look(problem_at(20.0).workload).transition is not None


def test_with_an_estimate_a_step_is_seen_within_two_looks():
    planner, estimator = Replanner(problem_at(20.0)), WorkloadEstimator(GRID)
    for second in range(3600):
        estimator.add(float(second), 50, 20, number=20.0)
    planner.look(estimator.workload(3600.0))
    looks = []
    for second in range(3600, 3720):
        estimator.add(float(second), 50, 20, number=40.0)
        if second % 60 == 59:
            looks.append(planner.look(estimator.workload(second + 1.0)).transition is not None)
    assert any(looks)


def test_a_change_that_does_not_pay_is_not_made():
    cheap = Replanner(problem_at(20.0), patience=1)
    dear = Replanner(problem_at(20.0, stop_cost_usd=1000.0), patience=1)
    for planner in (cheap, dear):
        planner.look(problem_at(40.0).workload)
    assert cheap.look(problem_at(10.0).workload).transition is not None
    assert dear.look(problem_at(10.0).workload).transition is None


def test_beyond_the_caps_everything_that_can_be_had_runs():
    types = (AcceleratorType("small", 1.0, 2), AcceleratorType("large", 3.5, 1))
    planner = Replanner(problem_at(5.0, types=types))
    planner.look(problem_at(5.0).workload)
    flooded = planner.look(problem_at(500.0).workload)
    assert flooded.allocation.counts == {"small": 2, "large": 1}
    again = planner.look(problem_at(600.0).workload)
    assert again.transition is None and again.reason == "what runs is all that can be had"
    table = dataclasses.replace(problem_at(1.0).profile, max_rate_rps={"small": [[0, 0]] * 2, "large": [[0, 0]] * 2})
    with pytest.raises(UserError, match="replanning: found no plan"):
        Replanner(dataclasses.replace(problem_at(1.0), profile=table)).look(problem_at(1.0).workload)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_transition_never_has_less_than_both_plans(data):
    counts = st.fixed_dictionaries({"small": st.integers(0, 4), "large": st.integers(0, 4)})
    old, new = data.draw(counts), data.draw(counts)
    caps = {name: max(old[name], new[name]) for name in old}
    shares = np.full((2, 2, 2), 0.5)
    change = Transition(old, new, shares, np.broadcast_to([1.0, 0.0], (2, 2, 2)))
    ready = dict(old)
    for _ in range(40):
        wanted = change.wanted(ready)
        assert all(wanted[name] <= caps[name] for name in caps)
        # Replicas become ready one at a time, and leave one at a time.
        name = data.draw(st.sampled_from(sorted(ready)))
        if ready[name] < wanted[name]:
            ready[name] += 1
        elif ready[name] > wanted[name]:
            ready[name] -= 1
        assert all(ready[n] >= min(old[n], new[n]) for n in ready)
        blended = change.shares(ready)
        for g, n in enumerate(new):
            if not ready[n]:
                assert not blended[..., g].any()
        if any(ready.values()) and blended.any():
            sums = blended.sum(axis=-1)
            assert ((np.abs(sums - 1) < 1e-9) | (sums == 0)).all()
        if ready == new:
            break
    for n in new:
        ready[n] = new[n]
    assert change.wanted(ready) == new and change.all_ready(ready)
    grown = {n: max(0, new[n] - old[n]) for n in new}
    assert collections.Counter(change.starts) == collections.Counter(grown)
    assert collections.Counter(change.stops) == collections.Counter({n: max(0, old[n] - new[n]) for n in new})


def test_the_estimate_forgets_at_its_pace():
    estimator = WorkloadEstimator(GRID, rate_half_life_s=300, lengths_half_life_s=3600)
    assert estimator.workload(0.0) is None
    draw = np.random.default_rng(1)
    for now in np.cumsum(draw.exponential(1 / 8, 20_000)):
        estimator.add(float(now), 50, 20)
    late = float(now)
    found = estimator.workload(late)
    assert found is not None and found.rate_rps == pytest.approx(8, rel=0.1)
    halved = estimator.workload(late + 300)
    assert halved is not None and halved.rate_rps == pytest.approx(found.rate_rps / 2, rel=0.02)
    # Early on, too, it is the rate that is meant, not the part of it that was heard of.
    young = WorkloadEstimator(GRID, start_s=1000.0)
    for second in range(1000, 1030):
        young.add(float(second), 50, 20, number=5.0)
    early = young.workload(1030.0)
    assert early is not None and early.rate_rps == pytest.approx(5, rel=0.05)
    # What is longer than the grid counts as the longest.
    young.add(1031.0, 10**6, 10**6, number=1000.0)
    assert young.workload(1031.0).distribution[1, 1] > 0.8


def test_other_ways_to_choose_are_no_cheaper():
    problem = problem_at(25.0)
    best = solve(problem).cost_usd_per_hour
    single, greedy, sliced = best_single_type(problem), cheapest_per_size(problem), whole_slices(problem, 4)
    assert single.cost_usd_per_hour == min(c for c in solve(problem).single_type_cost_usd_per_hour.values() if c)
    assert single.counts is not None and sum(1 for count in single.counts.values() if count) == 1
    for other in (single, greedy, sliced):
        assert other.cost_usd_per_hour >= best - 1e-9
    few = problem_at(25.0, types=(AcceleratorType("small", 1.0, 1), AcceleratorType("large", 3.5, 1)))
    assert best_single_type(few).counts is cheapest_per_size(few).counts is whole_slices(few).counts is None


def test_what_would_change_the_answer():
    problem = problem_at(25.0)
    plans = costs_by_rate(problem, (0.5, 1.0, 2.0))
    costs = [plan.cost_usd_per_hour for plan in plans.values()]
    assert costs == sorted(costs) and plans[1.0].counts == solve(problem).counts
    flips = price_flips(problem, steps=8)
    assert flips
    rented = {name for name, count in solve(problem).counts.items() if count}
    for flip in flips:
        types = tuple(
            dataclasses.replace(t, price_usd_per_hour=t.price_usd_per_hour * flip.factor) if t.name == flip.name else t
            for t in problem.types
        )
        counts = solve(dataclasses.replace(problem, types=types)).counts
        assert {name for name, count in counts.items() if count} == set(flip.types) != rented


EXAMPLE = {
    "gpu_info": {
        "A10G": {"cost": 1.01, "tputs": [[2, 1], [5, 2]]},
        "A100": {"cost": 3.67, "tputs": [[20, 20], [40, 20]]},
    },
    "workload_distribution": [[0.2, 0.1], [0.5, 0.2]],
    "total_request_rate": 30.0,
    "slice_factor": 1,
}


def test_a_file_of_the_authors(tmp_path):
    (tmp_path / "example.json").write_text(json.dumps(EXAMPLE))
    problem = load_authors_problem(tmp_path / "example.json")
    found = solve(problem)
    assert found.cost_usd_per_hour == pytest.approx(6.70) and found.counts == {"A10G": 3, "A100": 1}
    assert math.isinf(problem.profile.objective.tpot_s) and problem.headroom == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workload_distribution": [[0.2, 0.1], [0.5, 0.17]]}, "found shares that sum to 0.97, expected 1"),
        ({"workload_distribution": [0.5, 0.5]}, "workload_distribution: found 1 dimensions"),
        ({"gpu_info": {"A10G": {"tputs": [[1, 1], [1, 1]]}}}, "the field 'cost' is missing"),
        ({"gpu_info": {"A10G": {"cost": 1, "tputs": [[1, 1]]}}}, "A10G: max_rate_rps: found a table of 1 x 2"),
        ({"total_request_rate": -1}, "rate_rps: found -1.0"),
        ({"slice_factor": 0}, "slice_factor: found 0"),
    ],
)
def test_bad_files_of_the_authors(change, message, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(EXAMPLE | change))
    with pytest.raises(UserError, match=f"bad.json: .*{message}"):
        load_authors_problem(tmp_path / "bad.json")
    for call in (lambda: Replanner(problem_at(1.0), patience=0), lambda: WorkloadEstimator(GRID, rate_half_life_s=0)):
        with pytest.raises(UserError, match="found 0, expected"):
            call()
