"""Replicas under one virtual clock: one is the replica alone; nothing is lost between many; reports are true."""

import subprocess
import sys

import pytest

from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import Arrival, OpenLoop, drive
from jaxstack.engine.scheduling.measuring import Meter
from jaxstack.engine.scheduling.simulator import SimulatedReplica, StepCostModel, VirtualClock
from jaxstack.engine.scheduling.workloads import mixed
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.policies import ROUTING_POLICIES, RoundRobin, routing_policy_named
from jaxstack.serving.router.simulator import SimulatedFleet

COSTS = StepCostModel(0.002, 25e-6)


def replica(policy: str, number: int = 0, clock: VirtualClock | None = None) -> SimulatedReplica:
    options = {"quantum": 1024} if policy == "dlpm" else {}
    return SimulatedReplica.of(policy_named(policy, **options), COSTS, clock=clock, number=number)


def fleet(router: str, policy: str, replicas: int) -> SimulatedFleet:
    def route(clock):
        clocked = router in ("cache_aware", "preble", "d2lpm")
        return routing_policy_named(router, **({"clock": clock} if clocked else {}))

    return SimulatedFleet(lambda number, clock: replica(policy, number, clock), replicas, route)


def test_a_fleet_of_one_is_that_replica():
    both = []
    for server in (replica("dlpm"), fleet("d2lpm", "dlpm", 1)):
        outcomes = []
        drive(server, mixed(), until_s=2.0, on_outcome=outcomes.append)
        both.append([(o.client, o.arrival_s, o.first_token_s, o.finished_s, o.cached_tokens) for o in outcomes])
    assert both[0] == both[1] and len(both[0]) > 100


@pytest.mark.parametrize("router", ROUTING_POLICIES)
def test_every_request_is_answered_once_and_in_the_order_of_time(router):
    server = fleet(router, "fcfs", 3)
    prompts = [tuple(range(100 * family, 100 * family + 64)) for family in range(5)]
    arrivals = [
        Arrival(f"client-{i % 4}", prompts[i % 5] + (7 + i,), 3 + i % 9, at_s=0.003 * (i % 50)) for i in range(120)
    ]
    outcomes = []
    drive(server, OpenLoop(arrivals), on_outcome=outcomes.append)
    assert sorted(map(id, (o.arrival for o in outcomes))) == sorted(map(id, arrivals))
    assert [o.finished_s for o in outcomes] == sorted(o.finished_s for o in outcomes)
    assert all(0 <= o.arrival_s - o.arrival.at_s < 0.02 for o in outcomes)
    assert all(o.arrival_s <= o.scheduled_s < o.first_token_s <= o.finished_s for o in outcomes)
    assert sum(server.dispatched) == 120 and all(target.active == 0 for target in server.targets)
    assert all(r.unfinished == 0 and r.scheduler.pool.private == 0 for r in server.replicas)
    if router in ("round_robin", "least_load"):
        assert min(server.dispatched) >= 30


def test_replicas_run_side_by_side():
    """Two take half as long as one, for requests that have nothing in common."""
    arrivals = [Arrival("a", tuple(range(1000 * i, 1000 * i + 200)), 20) for i in range(64)]
    times = []
    for replicas in (1, 2):
        server = fleet("round_robin", "fcfs", replicas)
        drive(server, OpenLoop(arrivals))
        times.append(server.now_s)
    assert times[1] == pytest.approx(times[0] / 2, rel=0.1)


def test_the_router_hears_of_what_is_evicted_and_of_nothing_else():
    server = fleet("d2lpm", "dlpm", 2)
    drive(server, mixed(backlog=4, flood=24), until_s=3.0)
    server.wait_until(server.now_s + 1.0)
    server._hear()
    tree = server.policy.tree
    truth = {target.name: set() for target in server.targets}
    under_way = {key for routed in server._routed.values() for key in routed.keys}
    for target in server.targets:
        cached = {page for node in target.replica.scheduler.tree.nodes() for page in node.pages}
        truth[target.name] = {key for page, key in target._keys.items() if page in cached}
        assert set(target._keys) <= cached | {p for s in target.replica.scheduler.running for p in s.pages}
        assert len(truth[target.name]) > 100
        held = {key for key, node in tree._nodes.items() if tree._owner[target.name] in node.marks}
        # It believes in what is there, and in what it has sent and may yet come; in nothing that was reported lost.
        assert held - under_way <= truth[target.name]
        assert len(held & truth[target.name]) > 0.8 * len(truth[target.name])


def test_locality_over_replicas_pays_and_stays_fair():
    rows = {}
    for router, policy in (("client_round_robin", "vtc"), ("d2lpm", "dlpm")):
        server = fleet(router, policy, 2)
        load = mixed(backlog=12, flood=60)
        meter = Meter(load.well_behaved)
        for each in server.replicas:
            each.observers.append(meter)
        drive(server, load, until_s=3.0, on_outcome=meter.on_outcome)
        rows[router] = meter.row(1.0, 3.0)
    assert rows["d2lpm"].service_rate > 1.3 * rows["client_round_robin"].service_rate
    assert rows["d2lpm"].hit_rate > rows["client_round_robin"].hit_rate + 0.1
    assert rows["d2lpm"].jain > 0.9


def test_a_simulated_fleet_needs_no_jax():
    code = "import jaxstack.serving.router.simulator, launch.dlpm_study.simulated, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_no_replicas():
    with pytest.raises(UserError, match="replicas: found 0"):
        SimulatedFleet(lambda number, clock: replica("fcfs", number, clock), 0, lambda clock: RoundRobin())
