"""Routing over replicas of different kinds: what a request takes, the rules, and what is not known of a request."""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.mixed_fleet import RULES, MixedFleet, OutputLengths, RoutingTable
from jaxstack.serving.router.policies import RoutedRequest


@dataclasses.dataclass
class Target:
    name: str
    active: int = 0


def request(prompt: int, most: int = 1000) -> RoutedRequest:
    return RoutedRequest("", (), (), prompt, most)


# The small kind cannot serve long prompts; of short ones it sustains a quarter of what the large kind does.
TABLE = RoutingTable(
    (100, 1000),
    (10, 100),
    {"small": [[4.0, 1.0], [0.0, 0.0]], "large": [[16.0, 4.0], [8.0, 2.0]]},
    {"small": [[8.0, 10.0], [0.0, 0.0]], "large": [[32.0, 40.0], [16.0, 20.0]]},
    {"small": [[0.3, 0.3], [0.0, 0.0]], "large": [[0.7, 0.7], [1.0, 1.0]]},
    [[0.5, 0.0], [0.25, 0.25]],
)
REPLICAS = [Target("s0"), Target("l0"), Target("l1")]
KINDS = {"s0": "small", "l0": "large", "l1": "large"}


def send(policy: MixedFleet, prompt: int, most: int = 1000) -> tuple[RoutedRequest, Target]:
    asked = request(prompt, most)
    chosen = policy.choose(asked, REPLICAS)
    policy.on_dispatch(asked, chosen)
    return asked, chosen


def test_requests_go_where_they_take_least_of_a_replica():
    policy = MixedFleet(TABLE, KINDS)
    # Short prompts with short answers: 1/8 of the small one, 1/32 of a large one.
    names = [send(policy, 50)[1].name for _ in range(9)]
    assert names == ["l0", "l1", "l0", "l1", "l0", "l1", "l0", "l1", "s0"]  # the ninth: 5/32 against 4/32
    assert policy.occupancy("l0") == pytest.approx(4 / 32) and policy.occupancy("s0") == pytest.approx(1 / 8)
    # Long prompts never to the small one, however full the others are.
    assert {send(policy, 500)[1].name for _ in range(200)} == {"l0", "l1"}
    assert policy.occupancy("l0") > 5


def test_what_is_under_way_is_weighed_by_how_long_it_stays():
    # Half of the long prompts have short answers. At a rate of T a large one has T/2 (2 + 10) seconds of work under
    # way and T/2 (1/8 + 1/2) of a replica busy: 0.3125 busy for 6 under way.
    policy = MixedFleet(TABLE, KINDS)
    _, chosen = send(policy, 500)
    assert policy.occupancy(chosen.name) == pytest.approx(0.3125 / 6)


def test_everything_is_given_back_when_it_ends_or_fails():
    policy = MixedFleet(TABLE, KINDS)
    sent = [send(policy, prompt) for prompt in (50, 500, 50, 500, 5000)]
    for number, (asked, target) in enumerate(sent):
        if number % 2:
            policy.on_failed(asked, target)
        else:
            policy.on_finish(asked, target, None, 5)
    assert all(policy.occupancy(name) == pytest.approx(0, abs=1e-12) for name in KINDS)


def test_a_plan_is_followed_in_its_shares():
    policy = MixedFleet(TABLE, KINDS, "plan", seed=7)
    counts = collections.Counter(KINDS[policy.choose(request(50), REPLICAS).name] for _ in range(100_000))
    test = scipy.stats.chisquare([counts["small"], counts["large"]], [30_000, 70_000])
    assert test.pvalue > 0.01
    # And among the replicas of a kind by how full they are.
    busy = MixedFleet(TABLE, KINDS, "plan", seed=7)
    names = [send(busy, 500)[1].name for _ in range(10)]
    assert names == ["l0", "l1"] * 5


def test_a_plan_by_answers_that_nobody_knows_is_followed_in_its_work():
    # All short answers to the small kind, all long ones to the large one; to the router they look alike.
    shares = {"small": [[1.0, 0.0], [0.0, 0.0]], "large": [[0.0, 1.0], [1.0, 1.0]]}
    table = dataclasses.replace(TABLE, shares=shares, output_weights=[[0.5, 0.5], [0.5, 0.5]])
    policy = MixedFleet(table, KINDS, "plan", seed=1)
    counts = collections.Counter(KINDS[policy.choose(request(50), REPLICAS).name] for _ in range(10_000))
    # The small kind is to have 0.125 / 0.625 = 1/5 of all work, the large one 4/5.
    assert counts["small"] / 10_000 == pytest.approx(0.2, abs=0.02)


def test_throughput_draws_replicas_by_their_rates():
    policy = MixedFleet(TABLE, KINDS, "throughput", seed=3)
    counts = collections.Counter(policy.choose(request(50), REPLICAS).name for _ in range(20_000))
    expected = np.array([4, 16, 16]) / 36 * 20_000
    assert scipy.stats.chisquare([counts["s0"], counts["l0"], counts["l1"]], expected).pvalue > 0.01


def test_sums_of_loads_forget_how_long_requests_stay():
    policy = MixedFleet(TABLE, KINDS, "profiled_load")
    loads = collections.Counter(send(policy, 50)[1].name for _ in range(900))
    # Rates are as 1 : 4 : 4, and so are the numbers.
    assert loads["l0"] / loads["s0"] == pytest.approx(4, rel=0.05)


def test_what_would_overflow_a_kind_spills_over():
    shares = {"small": [[1.0, 1.0], [0.0, 0.0]], "large": [[0.0, 0.0], [1.0, 1.0]]}
    policy = MixedFleet(dataclasses.replace(TABLE, shares=shares), KINDS, "spill")
    names = [send(policy, 50)[1].name for _ in range(12)]
    assert names[:8] == ["s0"] * 8 and set(names[8:]) <= {"l0", "l1"}


def test_expected_answers_follow_what_was_seen_and_what_may_come():
    lengths = OutputLengths((10, 100, 1000), [[1.0, 1.0, 2.0], [0.0, 0.0, 0.0]], half_life=100)
    assert lengths.expected(0) == [0.25, 0.25, 0.5]
    assert lengths.expected(1) == [0.25, 0.25, 0.5]  # nothing planned: as all others
    assert lengths.expected(0, 50) == [0.25, 0.75, 0.0] and lengths.expected(0, 10) == [1.0, 0.0, 0.0]
    assert lengths.expected(0, 10**9) == [0.25, 0.25, 0.5]
    for _ in range(100):
        lengths.add(0, 5)
    assert lengths.expected(0)[0] == pytest.approx(1 - 0.75 / 2)
    assert sum(lengths.expected(0)) == pytest.approx(1)


def test_the_expected_load_is_near_the_true_one():
    draw = np.random.default_rng(0)
    edges, rates = (25, 100, 250, 500, 1000, 2000), [70.0, 30.0, 6.6, 1.6, 0.43, 0.09]
    planned = [0.1, 0.4, 0.4, 0.09, 0.01, 0.0]
    table = RoutingTable((100,), edges, {"a": [rates]}, {"a": [[9.0] * 6]}, {"a": [[1.0] * 6]}, [planned])
    policy = MixedFleet(table, {"r": "a"}, "profiled_load", half_life=1000)
    replica = Target("r")
    written = np.clip(draw.lognormal(math.log(120), 0.6, 5000), 1, 2000).astype(int)
    for number in written:
        asked = request(50)
        policy.on_dispatch(asked, replica)
        policy.on_finish(asked, replica, None, int(number))
    # Of the last thousands, weighed as the policy weighs them.
    weight = 0.5 ** (np.arange(4999, -1, -1) / 1000)
    true = (weight * np.array([1 / rates[int(np.searchsorted(edges, n))] for n in written])).sum() / weight.sum()
    policy.on_dispatch(request(50), replica)
    assert policy._loaded["r"] == pytest.approx(true, rel=0.02)


def test_nobody_who_can_serve_it_is_no_end():
    policy = MixedFleet(TABLE, KINDS)
    only = [Target("s0", active=3)]
    asked = request(500)
    assert policy.choose(asked, only).name == "s0"
    policy.on_dispatch(asked, only[0])
    assert policy.occupancy("s0") == 1.0


def test_a_table_there_and_back(tmp_path):
    (tmp_path / "routing.json").write_text(json.dumps(TABLE.as_json()))
    again = RoutingTable.load(tmp_path / "routing.json")
    assert again == TABLE


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: MixedFleet(TABLE, {"r": "huge"}), "r: found kind 'huge', expected one of small, large"),
        (lambda folder: MixedFleet(TABLE, KINDS, "best"), "rule: found 'best', expected one of occupancy"),
        (lambda folder: MixedFleet(TABLE, KINDS, half_life=0), "half_life: found 0"),
        (lambda folder: dataclasses.replace(TABLE, shares={"small": TABLE.shares["small"]}), "shares: found other"),
        (lambda folder: dataclasses.replace(TABLE, output_weights=[[1.0]]), "output_weights: found another"),
        (lambda folder: RoutingTable.load(folder / "nowhere"), "nowhere: cannot be read"),
        (lambda folder: RoutingTable.load(written(folder, '{"version": 2}')), "bad.json: .*another version"),
        (lambda folder: RoutingTable.load(written(folder, '{"version": 1}')), "bad.json: found no routing table"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line(call, message, tmp_path):
    with pytest.raises(UserError, match=message):
        call(tmp_path)


def written(folder, text):
    (folder / "bad.json").write_text(text)
    return folder / "bad.json"


def test_all_rules_are_reported():
    for rule in RULES:
        assert MixedFleet(TABLE, KINDS, rule).report() == {"rule": rule, "occupancy": dict.fromkeys(sorted(KINDS), 0.0)}
