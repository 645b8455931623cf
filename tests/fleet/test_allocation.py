"""Allocations: the printed example, brute force, the paper's own program, and what must hold for any problem."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.allocation import AllocationProblem, Workload, solve
from jaxstack.fleet.allocation.check import exact_loads, violations
from jaxstack.fleet.allocation.problem import Allocation
from jaxstack.fleet.allocation.program import Program
from jaxstack.fleet.profile import AcceleratorType, LatencyObjective, LengthGrid, ThroughputProfile
from jaxstack.runtime.errors import UserError

OBJECTIVE = LatencyObjective(0.12)


def problem_of(prices, tables, distribution, rate, *, caps=None, headroom=0.0, **more):
    """A problem with types "a", "b", ... in the order given."""
    names = [chr(ord("a") + g) for g in range(len(prices))]
    shape = np.shape(distribution)
    grid = LengthGrid(tuple(range(100, 100 * shape[0] + 1, 100)), tuple(range(10, 10 * shape[1] + 1, 10)))
    profile = ThroughputProfile(grid, dict(zip(names, tables)), OBJECTIVE)
    types = tuple(
        AcceleratorType(name, price, cap) for name, price, cap in zip(names, prices, caps or [None] * len(prices))
    )
    return AllocationProblem(Workload(grid, rate, distribution), types, profile, headroom=headroom, **more)


def example(**more):
    """The authors' example: A10G and A100-80GB, 30 requests a second."""
    tables = [[[2, 1], [5, 2]], [[20, 20], [40, 20]]]
    return problem_of([1.01, 3.67], tables, [[0.2, 0.1], [0.5, 0.2]], 30.0, **more)


@pytest.mark.parametrize(
    ("slices", "cost", "counts"),
    [
        (1, 6.70, (3, 1)),
        (2, 5.69, (2, 1)),
        (3, 4.68, (1, 1)),
        (4, 5.69, (2, 1)),
        (8, 5.69, (2, 1)),
        (16, 5.69, (2, 1)),
        (None, 4.68, (1, 1)),
    ],
)
def test_the_printed_example(slices, cost, counts):
    found = solve(example(slice_factor=slices))
    assert found.status == "optimal" and found.gap == pytest.approx(0, abs=1e-9)
    assert found.cost_usd_per_hour == pytest.approx(cost)
    assert tuple(found.counts.values()) == counts
    assert found.fractional_bound_usd_per_hour == pytest.approx(4.12875)
    assert found.single_type_cost_usd_per_hour == pytest.approx({"a": 12.12, "b": 7.34})
    assert not violations(example(), found)


def test_the_example_is_full_to_the_brim():
    found = solve(example())
    assert found.utilisation == pytest.approx({"a": 1.0, "b": 1.0})
    # A third of the third bucket, five requests a second, is what the small one takes.
    assert found.shares[1, 0] == pytest.approx([1 / 3, 2 / 3])


@st.composite
def problems(draw, *, types=(1, 4), side=(1, 3), caps=True, headroom=True):
    g = draw(st.integers(*types))
    shape = draw(st.tuples(st.integers(*side), st.integers(*side)))
    size = shape[0] * shape[1]
    weights = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any))
    speeds = [0.0, 0.3, 0.5, 1.0, 1.7, 2.0, 3.3, 5.0, 8.0, 20.0]
    tables = [
        np.reshape(draw(st.lists(st.sampled_from(speeds), min_size=size, max_size=size)), shape) for _ in range(g)
    ]
    return problem_of(
        [draw(st.integers(10, 900)) / 100 for _ in range(g)],
        tables,
        np.reshape(weights, shape) / sum(weights),
        draw(st.sampled_from([0.2, 1.0, 3.0, 7.7, 12.0])),
        caps=[draw(st.sampled_from([None, None, 0, 1, 2, 5])) if caps else None for _ in range(g)],
        headroom=draw(st.sampled_from([0.0, 0.15, 0.5])) if headroom else 0.0,
    )


def brute_force(problem: AllocationProblem, slices: int) -> float:
    """The cheapest of all ways to put every slice somewhere."""
    demand = problem.demand() / slices
    parts = [row for row in demand for _ in range(slices)]
    caps = [math.inf if t.max_count is None else t.max_count for t in problem.types]
    best = math.inf
    for places in itertools.product(range(len(caps)), repeat=len(parts)):
        loads = np.zeros(len(caps))
        for row, g in zip(parts, places):
            loads[g] += row[g]
        if np.isfinite(loads).all():
            counts = np.ceil(loads - 1e-9)
            if (counts <= caps).all():
                best = min(best, float(problem.prices @ counts))
    return best


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(types=(2, 3), side=(1, 2)), st.integers(1, 2))
def test_slices_cost_what_brute_force_finds(problem, slices):
    problem = dataclasses.replace(problem, slice_factor=slices)
    if len(problem.types) ** (len(problem.asked()) * slices) > 3**6:
        return
    found = solve(problem)
    best = brute_force(problem, slices)
    if math.isinf(best):
        assert found.status == "infeasible" and found.infeasibility is not None and found.infeasibility.reasons
    else:
        assert found.status == "optimal"
        assert found.cost_usd_per_hour == pytest.approx(best, abs=1e-6)


def brute_force_shares(problem: AllocationProblem, most: int) -> float:
    """The cheapest counts, tried one by one, that a linear program says can carry the load."""
    demand, best = problem.demand(), math.inf
    buckets, types = demand.shape
    able = np.isfinite(demand)
    caps = [most if t.max_count is None else min(most, t.max_count) for t in problem.types]
    for counts in itertools.product(*(range(cap + 1) for cap in caps)):
        cost = float(problem.prices @ counts)
        if cost >= best:
            continue
        rows = np.zeros((types, buckets * types))
        sums = np.zeros((buckets, buckets * types))
        for b, g in itertools.product(range(buckets), range(types)):
            rows[g, b * types + g] = demand[b, g] if able[b, g] else 0
            sums[b, b * types + g] = 1
        bounds = [(0, 1 if able[b, g] else 0) for b in range(buckets) for g in range(types)]
        answer = scipy.optimize.linprog(
            np.zeros(buckets * types), A_ub=rows, b_ub=np.array(counts) + 1e-9, A_eq=sums, b_eq=np.ones(buckets),
            bounds=bounds, method="highs",
        )  # fmt: skip
        if answer.status == 0:
            best = cost
    return best


@settings(max_examples=12, deadline=None, derandomize=True)
@given(problems(types=(2, 2), side=(1, 2), headroom=False))
def test_shares_cost_what_brute_force_finds(problem):
    most = 6
    problem = dataclasses.replace(
        problem, types=tuple(dataclasses.replace(t, max_count=min(t.max_count or most, most)) for t in problem.types)
    )
    found, best = solve(problem), brute_force_shares(problem, most)
    if math.isinf(best):
        assert found.status == "infeasible"
    else:
        assert found.cost_usd_per_hour == pytest.approx(best, abs=1e-6)


def papers_program(problem: AllocationProblem, slices: int) -> float:
    """A binary for every slice and type, as in the paper."""
    demand = np.repeat(problem.demand() / slices, slices, axis=0)
    parts, types = demand.shape
    able = np.isfinite(demand)
    width = parts * types + types
    sums, loads = np.zeros((parts, width)), np.zeros((types, width))
    for s, g in itertools.product(range(parts), range(types)):
        sums[s, s * types + g] = 1
        loads[g, s * types + g] = demand[s, g] if able[s, g] else 0
    loads[:, parts * types :] = -np.eye(types)
    upper = np.append(able.ravel().astype(float), np.full(types, np.inf))
    found = scipy.optimize.milp(
        np.append(np.zeros(parts * types), problem.prices),
        integrality=np.ones(width),
        bounds=scipy.optimize.Bounds(0, upper),
        constraints=[
            scipy.optimize.LinearConstraint(sums, 1, 1),
            scipy.optimize.LinearConstraint(loads, -np.inf, 0),
        ],
        options={"mip_rel_gap": 0.0},
    )
    return found.fun if found.status == 0 else math.inf


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems(caps=False), st.sampled_from([1, 2, 4]))
def test_slices_cost_what_the_papers_program_finds(problem, slices):
    found = solve(dataclasses.replace(problem, slice_factor=slices))
    theirs = papers_program(problem, slices)
    if found.status == "infeasible":
        assert math.isinf(theirs)
    else:
        assert found.cost_usd_per_hour == pytest.approx(theirs, abs=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(problems(), st.data())
def test_what_holds_for_every_plan(problem, data):
    found = solve(problem)
    bound = found.fractional_bound_usd_per_hour
    if not found.found:
        assert found.infeasibility is not None and all(found.infeasibility.reasons)
        assert not found.counts and math.isinf(found.cost_usd_per_hour)
        return
    assert not violations(problem, found)
    assert bound <= found.lower_bound_usd_per_hour + 1e-9 <= found.cost_usd_per_hour + 2e-9
    assert all(use <= 1 + 1e-9 for use in found.utilisation.values())
    for name, load in exact_loads(problem, found).items():
        assert float(load) == pytest.approx(found.utilisation.get(name, 0) * found.counts[name], abs=1e-9)
    cost = found.cost_usd_per_hour
    # Slices can do no better, and finer ones no worse than coarse ones.
    sliced = [solve(dataclasses.replace(problem, slice_factor=s)).cost_usd_per_hour for s in (1, 2, 4)]
    assert cost <= min(sliced) + 1e-6 and sliced[2] <= sliced[1] + 1e-6 <= sliced[0] + 2e-6
    # Dearer: more requests, more headroom, higher prices, a lower cap, a type less.
    more = [
        dataclasses.replace(problem, workload=problem.workload.at_rate(problem.workload.rate_rps * 1.3)),
        dataclasses.replace(problem, headroom=problem.headroom + 0.2),
    ]
    number = data.draw(st.integers(0, len(problem.types) - 1))
    kind = problem.types[number]
    for change in (
        {"price_usd_per_hour": kind.price_usd_per_hour * 1.5},
        {"max_count": max(0, found.counts[kind.name] - 1)},
    ):
        types = list(problem.types)
        types[number] = dataclasses.replace(kind, **change)
        more.append(dataclasses.replace(problem, types=tuple(types)))
    if len(problem.types) > 1:
        rest = tuple(t for t in problem.types if t is not kind)
        more.append(dataclasses.replace(problem, types=rest, profile=problem.profile.only([t.name for t in rest])))
    for dearer in more:
        assert solve(dearer).cost_usd_per_hour >= cost - 1e-6
    # The order of the types changes nothing.
    order = data.draw(st.permutations(range(len(problem.types))))
    turned = solve(dataclasses.replace(problem, types=tuple(problem.types[g] for g in order)))
    assert turned.counts == found.counts
    assert np.array_equal(turned.shares, found.shares[..., list(order)])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(problems(types=(2, 3), side=(1, 2)), st.integers(1, 2))
def test_replicas_may_be_lost(problem, lost):
    found = solve(dataclasses.replace(problem, redundancy=lost))
    if not found.found:
        assert found.infeasibility is not None and found.infeasibility.reasons
        return
    assert found.cost_usd_per_hour >= solve(problem).cost_usd_per_hour - 1e-6
    demand = problem.demand()

    def carries(counts) -> bool:
        fixed = Program(demand, problem.prices, np.array(counts, dtype=float))
        return fixed.solve(time_limit_s=10).x is not None

    counts = list(found.counts.values())
    for gone in itertools.combinations_with_replacement(range(len(counts)), lost):
        left = [max(0, count - gone.count(g)) for g, count in enumerate(counts)]
        assert carries(left)
    # With one fewer of anything, some loss is too much, or it would have been cheaper.
    for g, count in enumerate(counts):
        if count and problem.prices[g] > 0:
            fewer = [c - (i == g) for i, c in enumerate(counts)]
            ways = itertools.combinations_with_replacement(range(len(counts)), lost)
            assert not all(carries([max(0, c - gone.count(i)) for i, c in enumerate(fewer)]) for gone in ways)


def test_of_equal_costs_the_fewest_replicas_are_taken():
    # Two small ones or a large one, for the same money; and two of a kind by name.
    assert solve(problem_of([1.0, 2.0], [[[1.0]], [[2.0]]], [[1.0]], 2.0)).counts == {"a": 0, "b": 1}
    assert solve(problem_of([1.0, 1.0], [[[1.0]], [[1.0]]], [[1.0]], 1.0)).counts == {"a": 1, "b": 0}


def test_what_runs_is_kept_where_changing_costs_more():
    table = [[[1.0]], [[4.0]]]
    before = {"a": 4, "b": 0}
    free = solve(problem_of([1.0, 3.0], table, [[1.0]], 4.0, current=before))
    assert free.counts == {"a": 0, "b": 1} and free.switch_cost_usd == 0
    dear = problem_of([1.0, 3.0], table, [[1.0]], 4.0, current=before, start_cost_usd=2.0, stop_cost_usd=0.1)
    kept = solve(dear)
    assert kept.counts == before and kept.switch_cost_usd == 0 and kept.status == "optimal"
    # Over a longer time it pays: 1 $/h against 2.4 $ once.
    changed = solve(dataclasses.replace(dear, horizon_h=3.0))
    assert changed.counts == {"a": 0, "b": 1} and changed.switch_cost_usd == pytest.approx(2.4)
    assert changed.lower_bound_usd_per_hour == pytest.approx(3.0 + 2.4 / 3)


def test_no_requests_need_nothing():
    found = solve(problem_of([1.0, 3.0], [[[1.0]], [[4.0]]], [[1.0]], 0.0, redundancy=1))
    assert found.status == "optimal" and found.counts == {"a": 0, "b": 0} and found.cost_usd_per_hour == 0


def test_a_size_that_nobody_can_serve_is_named():
    found = solve(problem_of([1.0, 3.0], [[[1.0, 0]], [[4.0, 0]]], [[0.75, 0.25]], 8.0))
    assert found.status == "infeasible" and found.infeasibility is not None
    assert found.infeasibility.unserved == (("input <= 100, output <= 20 tokens", 2.0),)
    assert "no type can serve requests with input <= 100, output <= 20 tokens" in found.infeasibility.reasons[0]
    # It does not matter where nobody asks for it.
    assert solve(problem_of([1.0, 3.0], [[[1.0, 0]], [[4.0, 0]]], [[1.0, 0.0]], 8.0)).status == "optimal"


def test_caps_that_are_too_low_are_named_with_what_would_do():
    found = solve(problem_of([1.0, 3.0], [[[1.0]], [[4.0]]], [[1.0]], 10.0, caps=[2, 1]))
    reasons = found.infeasibility
    assert found.status == "infeasible" and reasons is not None
    assert reasons.served_multiple == pytest.approx(0.6)
    assert reasons.saturated == ("a", "b")
    assert reasons.relaxation == ("b", 2, 8.0)
    assert "with 2 b in the place of 1 it can be done, for 8.00 $/h" in reasons.reasons[1]
    assert "0.6 times the planned rates" in reasons.reasons[0] and "a (at most 2), b (at most 1)" in reasons.reasons[0]


def test_losses_that_cannot_be_borne_are_named():
    found = solve(problem_of([1.0], [[[1.0]]], [[1.0]], 2.0, caps=[2], redundancy=1))
    assert found.status == "infeasible" and found.infeasibility is not None
    assert "with 1 replicas lost" in found.infeasibility.reasons[0] and "2.00 $/h" in found.infeasibility.reasons[0]
    assert found.infeasibility.relaxation == ("a", 3, 3.0)


def test_whole_slices_that_the_caps_do_not_hold():
    found = solve(problem_of([1.0, 1.0], [[[1.0]], [[1.0]]], [[1.0]], 2.0, caps=[1, 1], slice_factor=1))
    assert found.status == "infeasible" and found.infeasibility is not None
    assert "not for 1 whole slices" in found.infeasibility.reasons[0]


def large(seed: int) -> AllocationProblem:
    draw = np.random.default_rng(seed)
    types, shape = 8, (10, 6)
    size = np.sort(draw.lognormal(0, 1.2, shape), axis=0)
    speed = draw.lognormal(0, 0.8, types)
    prices = (speed * draw.uniform(0.6, 1.6, types)).round(2) + 0.01
    tables = [speed[g] / size * draw.lognormal(0, 0.3, shape) for g in range(types)]
    return problem_of(list(prices), tables, draw.dirichlet(np.full(60, 0.5)).reshape(shape), 20.0)


def test_out_of_time_there_is_a_plan_with_a_gap_or_a_bound():
    found = solve(dataclasses.replace(large(3), slice_factor=7), time_limit_s=1e-4)
    assert found.status in ("time_limit", "feasible")
    assert 0 < found.fractional_bound_usd_per_hour <= found.lower_bound_usd_per_hour
    shared = solve(large(3), time_limit_s=1e-4)
    assert shared.status in ("feasible", "optimal") and not violations(large(3), shared)
    proven = solve(large(3))
    assert proven.status == "optimal"
    assert shared.lower_bound_usd_per_hour <= proven.cost_usd_per_hour + 1e-6 <= shared.cost_usd_per_hour + 2e-6


def test_a_plan_that_is_wrong_is_found_out():
    problem = example()
    good = solve(problem)
    few = dataclasses.replace(good, counts={"a": 0, "b": 1})
    assert any("a load of" in line for line in violations(problem, few))
    half = dataclasses.replace(good, shares=good.shares / 2)
    assert any("served to 0.5" in line for line in violations(problem, half))
    cheap = dataclasses.replace(good, cost_usd_per_hour=1.0)
    assert any("a cost of 1.0" in line for line in violations(problem, cheap))
    unable = problem_of([1.0, 3.0], [[[1.0, 0]], [[4.0, 1.0]]], [[0.5, 0.5]], 1.0)
    shares = solve(unable).shares.copy()
    shares[0, 1] = [1.0, 0.0]
    moved = dataclasses.replace(solve(unable), shares=shares)
    assert any("on a, which cannot serve it" in line for line in violations(unable, moved))


def test_an_answer_goes_into_json():
    found = solve(problem_of([1.0], [[[0.0]]], [[1.0]], 2.0))
    assert isinstance(found, Allocation)
    written = found.as_json()
    assert written["cost_usd_per_hour"] is None and written["infeasibility"]["reasons"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: Workload(p.workload.grid, 1.0, [[0.5, 0.47], [0, 0]]), "found shares that sum to 0.97"),
        (lambda p: Workload(p.workload.grid, -1.0, [[1.0, 0], [0, 0]]), "rate_rps: found -1.0, expected a number >= 0"),
        (lambda p: Workload(p.workload.grid, 1.0, [[1.0]]), "distribution: found a table of 1 x 1"),
        (lambda p: Workload(p.workload.grid, 1.0, [[math.nan, 1.0], [0, 0]]), "a share that is negative or no number"),
        (lambda p: AcceleratorType("a", math.nan), "a: price_usd_per_hour: found nan"),
        (lambda p: AcceleratorType("a", 1.0, -1), "a: max_count: found -1"),
        (lambda p: dataclasses.replace(p, slice_factor=0), "slice_factor: found 0, expected an integer >= 1"),
        (lambda p: dataclasses.replace(p, headroom=-0.1), "headroom: found -0.1"),
        (lambda p: dataclasses.replace(p, redundancy=4), "redundancy: found 4, expected 0 to 3"),
        (lambda p: dataclasses.replace(p, redundancy=1, slice_factor=4), "redundancy: found together with slice"),
        (lambda p: dataclasses.replace(p, types=p.types[:1]), "profile: 'b' has no type with a price"),
        (lambda p: dataclasses.replace(p, profile=p.profile.only(["a"])), "types: 'b' has no profile"),
        (lambda p: dataclasses.replace(p, types=(p.types[0], p.types[0])), "types: found 'a' twice"),
        (lambda p: dataclasses.replace(p, current={"c": 1}), "current: 'c' is none of the types a, b"),
        (
            lambda p: dataclasses.replace(p, workload=Workload(LengthGrid((1, 2), (1, 3)), 1.0, [[1, 0], [0, 0]])),
            "profile: found a grid",
        ),
        (lambda p: ThroughputProfile(p.workload.grid, {"a": [[1.0, -1], [1, 1]]}, OBJECTIVE), "max_rate_rps: found -1"),
        (lambda p: ThroughputProfile(p.workload.grid, {"a": [[1.0]]}, OBJECTIVE), "a table of 1 x 1, expected 2"),
        (lambda p: p.workload.grid.buckets([5, 300, 999], [1, 1, 1]), "found 2 requests beyond the last edge"),
        (lambda p: Workload.from_lengths(p.workload.grid, [], [], 1.0), "lengths: found 0 input and 0 output"),
        (lambda p: LengthGrid((5, 5), (1,)), "input_edges_tokens: found \\[5, 5\\], expected increasing"),
        (lambda p: LatencyObjective(0.0), "objective: tpot_s: found 0.0"),
        (lambda p: p.workload.points("mean"), "bucket_point: found 'mean' for a workload without lengths"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        change(example())
    assert "\n" not in str(caught.value)


def test_lengths_make_a_workload():
    grid = LengthGrid((100, 200), (10, 20))
    made = Workload.from_lengths(grid, [50, 100, 101, 200], [10, 5, 11, 20], 8.0)
    assert np.array_equal(made.rates_rps, [[4.0, 0.0], [0.0, 4.0]])
    inputs, outputs = made.points("mean")
    assert inputs.tolist() == [[75.0, 100.0], [200.0, 150.5]] and outputs.tolist() == [[7.5, 20.0], [10.0, 15.5]]
    assert made.points("upper")[0].tolist() == [[100.0, 100.0], [200.0, 200.0]]
    assert grid.bucket(0, 0) == (0, 0) and grid.bucket(200, 20) == (1, 1)
