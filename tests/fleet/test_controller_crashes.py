"""The controller against machines in memory: what it does, and that it may be killed at any instruction that matters.

A fault point stands before and behind every commit and every side effect. Random histories (preemptions, crashes, full
zones, broken images, changing targets) are run with the controller killed at random ones of them, and started again.
"""

import asyncio
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from in_memory import Clock, InMemory, Killed, Proxy

from jaxstack.fleet.controller import Controller, FleetState, ReplicaSpec, Service
from jaxstack.fleet.controller.service_spec import ReadinessProbe
from jaxstack.fleet.controller.state import Reading, controller_of
from jaxstack.fleet.spot.autoscaling import Autoscaler, FixedTarget, RequestRateAutoscaler
from jaxstack.fleet.spot.placement import Backoff
from jaxstack.fleet.spot.policy import spothedge
from jaxstack.fleet.spot.view import ReplicaState
from jaxstack.runtime.errors import UserError

ZONES = ("a", "b", "c")
EACH = 8  # histories a block: 64 together, with some 500 kills
PROBE = ReadinessProbe("/health", initial_delay_s=60.0, interval_s=2.0, failure_threshold_s=10.0)


_worlds: list["World"] = []


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    while _worlds:
        _worlds.pop().state.close()


class World:
    """All that outlives a controller, and the controller that lives at the moment."""

    def __init__(self, folder: Path, autoscaler: Callable[[], Autoscaler] = lambda: FixedTarget(3), **service: float):
        self.folder, self.clock, self.proxy = folder, Clock(), Proxy()
        self.machines = InMemory(self.clock, ZONES)
        self.autoscaler = autoscaler
        self.fault: Callable[[str], None] = lambda place: None
        self.service = Service("s", ReplicaSpec("run"), PROBE, **{"drain_s": 5.0, **service})  # type: ignore[arg-type]
        _worlds.append(self)
        self.start()

    def start(self) -> None:
        self.state = FleetState(
            self.folder, durable=False, fault=lambda p: self.fault(p), monotonic=self.clock, boot="one"
        )
        self.machines.fault = lambda p: self.fault(p)
        policy = spothedge(self.autoscaler(), backoff=Backoff(30.0, 120.0), rebalance=None)
        self.controller = Controller(
            self.service, policy, self.machines, self.state, self.proxy, self.machines.probe, decide_every_s=2.0
        )

    async def turn(self, seconds: float = 1.0) -> None:
        self.clock.now_s += seconds
        await self.controller.step()
        await asyncio.sleep(0)

    async def run(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.turn()
            assert not self.controller.trouble, self.controller.trouble

    async def kill_and_start(self) -> None:
        for task in self.controller._launching.values():
            task.cancel()
        await asyncio.gather(*self.controller._launching.values(), return_exceptions=True)
        self.state.close()
        self.fault = lambda place: None
        self.start()

    def check_settled(self, ready: int) -> None:
        """What is written down is what is there, and it is as much as is wanted."""
        rows = self.state.replicas()
        assert {row.id for row in rows} == self.machines.alive == set(self.machines.instances)
        assert all(row.intent is None for row in rows)
        spot = [row for row in rows if row.kind == "spot" and row.state is ReplicaState.READY]
        assert len(spot) == ready, rows
        assert sorted(self.proxy.ready) == sorted(row.url for row in rows if row.url)

    def zone_memory(self) -> dict:
        return self.controller.policy.state_dict()["placers"]["spot"]["zones"]


def test_a_fleet_comes_up_spreads_and_replaces_what_is_taken(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        await world.turn()
        # On-demand stands in for what is not ready yet, and goes when spot is.
        kinds = [row.kind for row in world.state.replicas()]
        assert kinds.count("spot") == 4 and kinds.count("on_demand") == 3
        await world.run(30)
        world.check_settled(4)
        zones = [row.zone for row in world.state.replicas()]
        assert sorted(zones.count(zone) for zone in ZONES) == [1, 1, 2]
        victim = next(row for row in world.state.replicas() if row.zone == "b")
        world.machines.instances[victim.id].alive = False
        await world.turn()
        assert victim.url in world.proxy.lost and victim.url not in world.proxy.ready
        ended = next(row for row in Reading.of(tmp_path).replicas if row.id == victim.id)
        assert ended.state is ReplicaState.PREEMPTED and ended.ended_s is not None
        assert world.zone_memory()["b"]["failures"] == 1
        await world.run(25)
        world.check_settled(4)
        assert all(row.zone != "b" for row in world.state.replicas())  # it is left alone for a while

    asyncio.run(history())
    assert len(set(world.machines.launched)) == len(world.machines.launched)


def test_a_provider_that_does_not_answer_stops_deciding_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def down() -> list:
        raise OSError("the provider does not answer")

    async def history() -> None:
        await world.run(30)
        world.machines.observe, observe = down, world.machines.observe
        sick = next(row for row in world.state.replicas())
        world.machines.instances[sick.id].born_s = math.inf  # runs, but its probes fail from now on
        for _ in range(20):
            await world.turn()
        assert "does not answer" in world.controller.trouble
        assert sick.url not in world.proxy.ready and len(world.proxy.ready) == 3
        assert set(world.machines.instances) == {row.id for row in world.state.replicas()}
        world.machines.observe = observe
        await world.run(40)
        world.check_settled(4)

    asyncio.run(history())


def test_reasons_are_told_apart(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        world.machines.capacity["a"] = 0
        await world.run(20)
        world.check_settled(4)
        assert world.zone_memory()["a"]["failures"] >= 1 and world.zone_memory()["b"]["failures"] == 0
        failed = [row for row in Reading.of(tmp_path, ended=50).replicas if row.state is ReplicaState.FAILED_PROVISION]
        assert failed and all(row.zone == "a" and row.reason.startswith("capacity: ") for row in failed)
        # A crash, and then an image that is broken, say nothing of a zone.
        world.machines.broken_image = True
        world.machines.crash(random.Random(0))
        await world.turn()
        crashed = [row for row in Reading.of(tmp_path, ended=50).replicas if row.state is ReplicaState.FAILED]
        assert "status 1: something was said" in crashed[0].reason
        before = len(Reading.of(tmp_path, ended=500).replicas)
        await world.run(40)
        tries = len(Reading.of(tmp_path, ended=500).replicas) - before
        assert 1 <= tries <= 12  # it is tried again, ever less often
        assert all(world.zone_memory()[zone]["failures"] == 0 for zone in "bc")
        world.machines.broken_image = False
        await world.run(130)
        world.check_settled(4)

    asyncio.run(history())


def test_who_never_answers_and_who_stops_answering(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        world.machines.cold_start_s = 1e9
        await world.run(62)
        failed = {row.state for row in Reading.of(tmp_path, ended=50).replicas if row.ended_s is not None}
        assert failed == {ReplicaState.FAILED_INITIAL_DELAY}
        told = [e for e in Reading.of(tmp_path, events=200).events if e[3].get("state") == "FAILED_INITIAL_DELAY"]
        assert told[0][3]["lines"] == ["something was said"]
        world.machines.cold_start_s = 3.0
        await world.run(40)
        world.check_settled(4)
        deaf = world.state.replicas()[0]
        world.machines.instances[deaf.id].born_s = 1e9
        await world.run(4)
        assert world.state.replica(deaf.id).state is ReplicaState.NOT_READY and deaf.url not in world.proxy.ready  # type: ignore[union-attr]
        world.machines.instances[deaf.id].born_s = 0.0
        await world.run(3)
        assert world.state.replica(deaf.id).state is ReplicaState.READY  # type: ignore[union-attr]
        world.machines.instances[deaf.id].born_s = 1e9
        await world.run(20)
        assert world.state.replica(deaf.id).state is ReplicaState.FAILED_PROBING  # type: ignore[union-attr]

    asyncio.run(history())


def test_a_probe_that_hangs_holds_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxstack.fleet.controller.controller._AT_ONCE_S", 0.002)
    world = World(tmp_path)

    async def history() -> None:
        await world.run(30)
        world.check_settled(4)
        slow, victim = sorted(world.machines.alive)[:2]
        answered, probe, asked = asyncio.Event(), world.machines.probe, 0

        async def hangs(url: str, how: ReadinessProbe) -> bool:
            nonlocal asked
            if url == f"http://{slow}:1":
                asked += 1
                await answered.wait()
                return False
            return await probe(url, how)

        world.controller._probe_replica = hangs
        await world.run(4)
        assert asked == 1
        world.machines.instances[victim].alive = False
        await world.run(20)
        world.check_settled(4)
        assert asked == 1 and victim not in world.machines.alive
        answered.set()
        await world.turn()
        row = world.state.replica(slow)
        assert row is not None and row.state is ReplicaState.NOT_READY
        await world.controller.close()

    asyncio.run(history())


def test_scaling_by_requests_from_zero_and_back(tmp_path: Path) -> None:
    scaler = lambda: RequestRateAutoscaler(0, 3, 0.5, upscale_delay_s=5, downscale_delay_s=10)  # noqa: E731
    world = World(tmp_path, scaler)

    async def history() -> None:
        await world.run(5)
        assert not world.machines.launched
        world.proxy.waiting = 1  # somebody is held
        await world.run(1)
        assert world.machines.launched
        world.proxy.waiting = 0
        for _ in range(40):
            world.proxy.came += 1
            await world.run(1)
        assert world.controller.decision.target == 2
        busy = world.proxy.ready[0]
        world.proxy.active[busy] = 1  # goes on answering when it is to go
        await world.run(75)
        assert world.controller.decision.target == 0
        assert len(world.state.replicas()) <= 1
        await world.run(8)
        assert not world.state.replicas() and not world.machines.instances  # nobody drains for ever

    asyncio.run(history())


def test_a_new_version_takes_over_without_a_gap(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        await world.run(20)
        old = {row.id for row in world.state.replicas()}
        world.service = Service("s", ReplicaSpec("other", version=2), PROBE, 2, 5.0)
        await world.kill_and_start()
        for _ in range(40):
            await world.run(1)
            assert len(world.proxy.ready) >= 3
        world.check_settled(4)
        assert not old & {row.id for row in world.state.replicas()}

    asyncio.run(history())


def test_shutting_down_and_a_second_controller(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        await world.run(20)
        with pytest.raises(UserError, match=r"belongs to another controller, process \d+"):
            FleetState(tmp_path)
        assert controller_of(tmp_path) is not None
        world.proxy.active[world.proxy.ready[0]] = 1

        async def time_passes() -> None:
            while True:
                world.clock.now_s += 1.0
                await asyncio.sleep(0.001)

        passing = asyncio.create_task(time_passes())
        await world.controller.shut_down(every_s=0.001)
        passing.cancel()
        assert not world.machines.instances and not world.state.replicas()

    asyncio.run(history())
    world.state.close()
    assert controller_of(tmp_path) is None


def test_the_clock_goes_on_when_the_machine_starts_anew(tmp_path: Path) -> None:
    clock = Clock()
    for boot, before in (("one", 1000.0), ("one", 1500.0), ("two", 3.0), ("two", 9.0)):
        clock.now_s = before
        state = FleetState(tmp_path, durable=False, monotonic=clock, boot=boot)
        last = (state.get("clock") or {"now_s": 0.0})["now_s"]
        assert state.now_s >= last and state.now_s - last < 1001.0
        clock.now_s += 5.0
        with state.transaction("x"):
            state.event("x")
        assert state.get("clock")["now_s"] == pytest.approx(last + 5.0, abs=1000.0)
        state.close()


def test_a_full_disk_stops_decisions_but_nothing_that_runs(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def history() -> None:
        await world.run(20)
        ready = list(world.proxy.ready)

        def full(place: str) -> None:
            if place.startswith("before"):
                raise OSError("database or disk is full")

        world.fault = full
        world.machines.preempt(random.Random(1))
        for _ in range(5):
            await world.turn()
            assert "full" in world.controller.trouble
        assert len(world.machines.alive) == 3 and len(set(ready) - set(world.proxy.ready)) <= 1
        world.fault = lambda place: None
        await world.run(40)
        world.check_settled(4)

    asyncio.run(history())


@pytest.mark.parametrize("block", range(8))
def test_killed_anywhere_in_random_histories(tmp_path: Path, block: int) -> None:
    """whatever happens and wherever the controller is killed, in the end everything is there once,
    nothing that nobody knows of runs, and what was known of a zone is known still.
    """
    kills = 0

    async def history(seed: int) -> int:
        choose = random.Random(seed)
        world = World(tmp_path / str(seed))
        killed = 0

        def die(place: str) -> None:
            if countdown[0] <= 0:  # and whatever comes later does not happen either
                countdown[0] = -1
                raise Killed(place)
            countdown[0] -= 1

        countdown = [choose.randrange(12)]
        for _ in range(24):
            what = choose.random()
            if what < 0.12:
                world.machines.preempt(choose)
            elif what < 0.15:
                world.machines.crash(choose)
            elif what < 0.25:
                world.machines.capacity[choose.choice(ZONES)] = choose.choice((0, 1, 4))
            elif what < 0.28:
                world.machines.broken_image = not world.machines.broken_image
            world.fault = die
            try:
                await world.turn(choose.choice((1.0, 1.0, 5.0, 20.0)))
                # A launch that dies does so in its own task; the controller would have died with it.
                if countdown[0] == -1:
                    raise Killed("in a task")
            except Killed:
                killed += 1
                before = world.state.get("policy")
                await world.kill_and_start()
                if before is not None:
                    assert world.controller.policy.state_dict() == before  # to the last back-off
                countdown = [choose.randrange(12)]
            # An id is launched once at most, at any time.
            assert len(set(world.machines.launched)) == len(world.machines.launched)
            known = {row.id for row in world.state.replicas()}
            assert len(known) <= 11
        world.fault = lambda place: None
        world.machines.broken_image = False
        world.machines.capacity = dict.fromkeys(ZONES, 4)
        for _ in range(24):  # until the last back-off is over
            await world.turn(40.0)
        await world.run(12)
        world.check_settled(4)
        assert not [row for row in world.state.replicas() if row.kind == "on_demand"]
        world.state.close()
        return killed

    for seed in range(block * EACH, (block + 1) * EACH):
        kills += asyncio.run(history(seed))
    assert kills > 2 * EACH
