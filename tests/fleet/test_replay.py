"""Replays: a replica against a plain loop, requests that are neither lost nor served twice, plans that are checked."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.allocation import AllocationProblem, Workload, solve
from jaxstack.fleet.allocation.routing import routing_table
from jaxstack.fleet.profile import DATASHEETS, LatencyObjective, LengthGrid, throughput_from_datasheet
from jaxstack.fleet.profile.roofline import MODELS, Roofline
from jaxstack.fleet.simulator import Request, StepReplica, StepTimes, replay, requests_of, solve_and_check
from jaxstack.fleet.simulator.replaying import fleet_of, report_of, run_fleet
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.mixed_fleet import MixedFleet
from jaxstack.serving.router.policies import RoundRobin

LLAMA = MODELS["llama-2-7b"]
GRID = LengthGrid((50, 200, 1000, 4000), (20, 100, 500))
SHEETS = [DATASHEETS["L4"], DATASHEETS["A100-80GB"]]
TIMES = {s.name: StepTimes.of_roofline(Roofline(s.device, LLAMA)) for s in SHEETS}


def plain_replica(times: StepTimes, requests: list[tuple[float, int, int]], chunk: float) -> list[tuple[float, float]]:
    """First and last token of each request: a list of states, looked through at every step."""
    state = [{"at": at, "in": i, "out": o, "left": i, "made": 0, "taken": False} for at, i, o in requests]
    found = [(math.nan, math.nan)] * len(requests)
    now = 0.0
    while any(math.isnan(end) for _, end in found):
        came = [s for s in state if s["at"] <= now and not s["taken"]]
        for s in came:
            held = [x for x in state if x["taken"] and x["made"] < x["out"]]
            room = times.kv_tokens - sum(x["in"] + x["out"] for x in held)
            if len(held) >= times.max_batch or s["in"] + s["out"] > room:
                break
            s["taken"] = True
        decoding = [s for s in state if s["taken"] and s["left"] == 0 and s["made"] < s["out"]]
        reading = [s for s in state if s["taken"] and s["left"] > 0]
        if not decoding and not reading:
            now = min(s["at"] for s in state if not s["taken"])
            continue
        budget, parts = chunk, []
        for s in reading:
            part = min(budget, s["left"])
            budget -= part
            parts.append((s, part))
        context = sum(s["in"] + s["made"] for s in decoding)
        now += times.seconds(len(decoding), context, int(sum(part for _, part in parts)))
        for s in decoding:
            s["made"] += 1
        for s, part in parts:
            s["left"] -= part
            if s["left"] == 0 and part:
                s["made"] = 1
                found[state.index(s)] = (now, math.nan)
        for number, s in enumerate(state):
            if s["made"] == s["out"] and math.isnan(found[number][1]):
                found[number] = (found[number][0], now)
    return found


TINY = StepTimes(0.001, 0.01, 0.0001, 0.0005, 0.002, kv_tokens=60, max_batch=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=8),
    st.sampled_from([4, 16, None]),
)
def test_a_replica_takes_the_steps_of_a_plain_loop(shapes, chunk):
    shapes = sorted((at / 1000, i, o) for at, i, o in shapes)
    # Times of their own: at the very moment of a step's end, either order would do.
    shapes = [(at + 1.234567e-5 * (k + 1), i, o) for k, (at, i, o) in enumerate(shapes)]
    replica = StepReplica("a", "a", TINY, chunk_tokens=chunk)
    requests = [Request(*shape) for shape in shapes]
    for request in requests:
        replica.advance(request.at_s)
        replica.submit(request, request.at_s)
    over = replica.advance(math.inf)
    assert replica.active == 0 and len(over) <= len(requests)
    expected = plain_replica(TINY, shapes, math.inf if chunk is None else chunk)
    for request, (first, end) in zip(requests, expected):
        assert request.first_s == pytest.approx(first) and request.end_s == pytest.approx(end)


def test_one_request_alone_takes_what_its_steps_take():
    replica = StepReplica("a", "a", TINY, chunk_tokens=4)
    request = Request(1.0, 10, 5)
    replica.submit(request, 1.0)
    replica.advance(math.inf)
    prompt = sum(TINY.seconds(0, 0, n) for n in (4, 4, 2))
    answer = sum(TINY.seconds(1, 11 + k, 0) for k in range(4))
    assert request.ttft_s == pytest.approx(prompt) and request.end_s - request.first_s == pytest.approx(answer)
    assert request.tpot_s == pytest.approx(answer / 4) and replica.busy_s == pytest.approx(prompt + answer)


def lengths_of(seed: int = 0, number: int = 4000):
    draw = np.random.default_rng(seed)
    read = np.clip(draw.lognormal(math.log(120), 1.0, number), 1, 4000).astype(int)
    written = np.clip(draw.lognormal(math.log(80), 0.8, number), 1, 500).astype(int)
    return read.tolist(), written.tolist()


LENGTHS = lengths_of()


def problem_at(rate: float, **objective) -> AllocationProblem:
    workload = Workload.from_lengths(GRID, *LENGTHS, rate)
    goal = LatencyObjective(**{"tpot_s": 0.12, **objective})
    profile = throughput_from_datasheet(SHEETS, LLAMA, GRID, goal, workload.points("mean"))
    return AllocationProblem(workload, tuple(s.accelerator() for s in SHEETS), profile)


def test_a_profile_is_what_a_replica_sustains():
    # At nine tenths of the profiled rate requests of one size keep the objective; at 1.3 times the rate they queue.
    size = LengthGrid((200,), (100,))
    profile = throughput_from_datasheet(SHEETS, LLAMA, size, LatencyObjective(0.12))
    for name, times in TIMES.items():
        top = profile.max_rate_rps[name][0, 0]
        p99 = {}
        for share in (0.9, 1.6):
            replica = StepReplica("r", name, times, chunk_tokens=None)
            requests = requests_of(([200], [100]), share * top, 120.0, seed=1)
            run_fleet([replica], RoundRobin(), requests)
            p99[share] = report_of(requests, [replica], LatencyObjective(0.12), warmup_s=20.0)
        assert p99[0.9].met and p99[0.9].ttft_s[2] < 2
        assert p99[1.6].ttft_s[2] > 10 * p99[0.9].ttft_s[2]


@pytest.mark.parametrize("rule", ["occupancy", "plan", "throughput", "profiled_load", "spill"])
def test_every_request_is_served_once_whatever_the_rule(rule):
    problem = problem_at(20.0)
    plan = solve(problem)
    requests = requests_of(LENGTHS, 20.0, 60.0, seed=2)
    report = replay(plan, problem, TIMES, requests, rule=rule, warmup_s=0.0, seed=3)
    assert report.requests == len(requests) == sum(report.served.values()) and report.refused == 0
    for request in requests:
        assert request.at_s < request.first_s <= request.end_s
        assert (request.output_tokens == 1) == (request.first_s == request.end_s)
    again = requests_of(LENGTHS, 20.0, 60.0, seed=2)
    assert replay(plan, problem, TIMES, again, rule=rule, warmup_s=0.0, seed=3) == report
    assert all(0 < busy <= 1 for busy in report.busy.values())


def test_a_plan_keeps_its_objective_and_one_that_is_too_small_does_not():
    problem = problem_at(20.0, ttft_s=2.0)
    plan = solve(problem)
    good = replay(plan, problem, TIMES, requests_of(LENGTHS, 20.0, 120.0), warmup_s=20.0)
    assert good.met and good.tpot_attainment >= 0.995
    overrun = replay(plan, problem, TIMES, requests_of(LENGTHS, 100.0, 60.0), warmup_s=20.0)
    assert not overrun.met and overrun.ttft_s[2] > 5


def test_requests_that_nobody_can_hold_miss_the_objective():
    replicas = fleet_of({"L4": 1}, {"L4": dataclasses.replace(TINY, kv_tokens=40)})
    requests = [Request(0.1, 10, 10), Request(0.2, 60, 10), Request(0.3, 10, 10)]
    run_fleet(replicas, RoundRobin(), requests)
    report = report_of(requests, replicas, LatencyObjective(1.0))
    assert (report.requests, report.refused, report.tpot_attainment) == (3, 1, pytest.approx(2 / 3))
    assert not report.met and requests[1].replica == ""


def test_occupancy_returns_to_nought_and_counts_what_is_under_way():
    problem = problem_at(20.0)
    plan = solve(problem)
    replicas = fleet_of(plan.counts, TIMES)
    policy = MixedFleet(routing_table(plan, problem), {r.name: r.kind for r in replicas})
    run_fleet(replicas, policy, requests_of(LENGTHS, 20.0, 30.0))
    assert all(policy.occupancy(r.name) == pytest.approx(0, abs=1e-9) for r in replicas)
    assert set(policy.report()["occupancy"]) == {r.name for r in replicas}


def test_what_misses_is_planned_for_more_until_it_is_met():
    problem = dataclasses.replace(problem_at(30.0, ttft_s=1.0), headroom=0.0)
    # Arrivals 1.4 times as many as was planned for.
    said: list[str] = []
    checked = solve_and_check(
        problem, TIMES, lambda: requests_of(LENGTHS, 42.0, 60.0), raise_headroom=0.2, warmup_s=20.0, say=said.append
    )
    assert checked.met and len(said) == len(checked.path) > 1
    headrooms = [step["headroom"] for step in checked.path]
    assert headrooms == pytest.approx([0.2 * k for k in range(len(headrooms))])
    assert checked.problem.headroom == pytest.approx(headrooms[-1])
    assert all(step["attainment"] < 0.99 for step in checked.path[:-1])
    cost = [step["cost_usd_per_hour"] for step in checked.path]
    assert cost == sorted(cost) and checked.allocation.cost_usd_per_hour == cost[-1]
    tried = solve_and_check(
        problem, TIMES, lambda: requests_of(LENGTHS, 150.0, 30.0), raise_headroom=0.01, tries=2, warmup_s=10.0
    )
    assert not tried.met and len(tried.path) == 3
    capped = tuple(dataclasses.replace(t, max_count=0) for t in problem.types)
    nothing = solve_and_check(dataclasses.replace(problem, types=capped), TIMES, list)
    assert nothing.report is None and nothing.allocation.status == "infeasible"


def test_arrivals_have_their_rate_their_burstiness_and_their_pieces():
    even = np.diff([r.at_s for r in requests_of(([5], [7]), 10.0, 2000.0, seed=4)])
    burst = np.diff([r.at_s for r in requests_of(([5], [7]), 10.0, 2000.0, seed=4, burstiness=2.0)])
    assert even.mean() == pytest.approx(0.1, rel=0.05) and burst.mean() == pytest.approx(0.1, rel=0.1)
    assert even.std() / even.mean() == pytest.approx(1, rel=0.05)
    assert burst.std() / burst.mean() == pytest.approx(2, rel=0.1)
    changing = [r.at_s for r in requests_of(([5], [7]), [(500.0, 2.0), (1000.0, 0.0), (math.inf, 8.0)], 2000.0)]
    counts = np.histogram(changing, [0, 500, 1000, 2000])[0]
    assert counts[1] == 0 and counts[0] == pytest.approx(1000, rel=0.1) and counts[2] == pytest.approx(8000, rel=0.05)
    assert changing == sorted(changing) and requests_of(([5], [7]), 0.0, 10.0) == []


def test_step_times_are_found_again_from_a_profile():
    true = StepTimes(0.0, 0.0, 2e-7, 8e-5, 0.012, kv_tokens=200_000)
    inputs, outputs = GRID.upper_corners()
    concurrency = np.clip(np.round(20_000 / (inputs + outputs)), 2, 200)
    step = true.overhead_s + true.context_token_s * concurrency * (inputs + outputs / 2)
    step += true.prompt_token_s * concurrency / outputs * inputs
    profile = dataclasses.replace(
        problem_at(1.0).profile.only(["L4"]),
        max_rate_rps={"L4": concurrency / (outputs * step)},
        concurrency={"L4": concurrency},
    )
    found = StepTimes.fit(profile, "L4")
    assert found.overhead_s == pytest.approx(0.012, rel=1e-6)
    assert found.context_token_s == pytest.approx(2e-7, rel=1e-6)
    assert found.prompt_token_s == pytest.approx(8e-5, rel=1e-6)
    assert found.max_batch == 200 and found.kv_tokens >= (concurrency * (inputs + outputs)).max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: requests_of(([], []), 1.0, 10.0), "lengths: found 0 and 0"),
        (lambda: requests_of(([1], [1]), -1.0, 10.0), "found -1.0"),
        (lambda: requests_of(([1], [1]), [(5.0, 1.0), (2.0, 1.0), (9.0, 2.0)], 10.0), "times that do not increase"),
        (lambda: requests_of(([1], [1]), 1.0, 0.0), "duration_s: found 0.0"),
        (lambda: StepReplica("a", "a", TINY, chunk_tokens=0), "chunk_tokens: found 0"),
        (lambda: fleet_of({"H100": 1}, TIMES), "'H100' has no step times; expected one of L4, A100-80GB"),
        (lambda: report_of([], [], LatencyObjective(1.0)), "found no request after the first 0 s"),
        (lambda: dataclasses.replace(TINY, weights_s=0.0, overhead_s=0.0), "steps that take no time"),
        (lambda: routing_table(solve(dataclasses.replace(problem_at(1.0), types=tuple(
            dataclasses.replace(s.accelerator(), max_count=0) for s in SHEETS))), problem_at(1.0)), "plan that is"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
