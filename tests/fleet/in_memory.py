"""Machines that are nowhere: a provisioner, a proxy and a clock for histories of thousands of events a second."""

import dataclasses
import random
from collections.abc import Mapping, Sequence

from jaxstack.fleet.controller.controller import Traffic
from jaxstack.fleet.controller.provisioner import Handle, LaunchFailed, Observation, ReplicaSpec
from jaxstack.fleet.controller.service_spec import ReadinessProbe
from jaxstack.fleet.spot.view import Kind, ZonePrice


class Killed(BaseException):
    """SIGKILL to the controller."""


@dataclasses.dataclass
class Instance:
    zone: str
    kind: Kind
    born_s: float
    alive: bool = True
    exited: int | None = None


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class InMemory:
    """Zones with capacities; what has been launched goes on without any controller.

    Attributes:
      capacity: zone -> spot instances that it has.
      instances: by replica id; those that have been terminated are gone.
      launched: ids that have ever been begun, to see that none is begun twice.
      fault: called inside every side effect, before and behind what it does.
    """

    def __init__(self, clock: Clock, zones: Sequence[str], cold_start_s: float = 3.0):
        self.clock, self.cold_start_s = clock, cold_start_s
        self.capacity = dict.fromkeys(zones, 4)
        self.instances: dict[str, Instance] = {}
        self.launched: list[str] = []
        self.ended: set[str] = set()
        self.broken_image = False
        self.fault = lambda place: None

    def zones(self) -> Mapping[str, ZonePrice]:
        return {zone: ZonePrice(1.0 + 0.1 * i, 3.0) for i, zone in enumerate(self.capacity)}

    async def launch(self, replica_id: str, zone: str, kind: Kind, spec: ReplicaSpec) -> Handle:
        self.fault("before launch")
        if replica_id in self.ended:
            raise LaunchFailed("capacity", "it had been launched, and is gone")
        if replica_id not in self.instances:
            here = sum(i.alive and i.zone == zone and i.kind == "spot" for i in self.instances.values())
            if kind == "spot" and here >= self.capacity[zone]:
                raise LaunchFailed("capacity", f"{zone} is full")
            if self.broken_image:
                raise LaunchFailed("other", "no such image")
            self.launched.append(replica_id)
            self.instances[replica_id] = Instance(zone, kind, self.clock())
        self.fault("behind launch")
        return Handle(f"http://{replica_id}:1", 1, "1")

    async def observe(self) -> Sequence[Observation]:
        return [
            Observation(name, i.zone, i.kind, i.alive, Handle(f"http://{name}:1", 1, "1"), i.exited)
            for name, i in self.instances.items()
        ]

    async def terminate(self, replica_id: str) -> None:
        self.fault("before terminate")
        if self.instances.pop(replica_id, None) is not None:
            self.ended.add(replica_id)
        self.fault("behind terminate")

    async def last_lines(self, replica_id: str, count: int) -> list[str]:
        return ["something was said"]

    # What happens by itself.

    def preempt(self, choose: random.Random) -> None:
        spot = [i for i in self.instances.values() if i.alive and i.kind == "spot"]
        if spot:
            choose.choice(spot).alive = False

    def crash(self, choose: random.Random) -> None:
        alive = [i for i in self.instances.values() if i.alive]
        if alive:
            instance = choose.choice(alive)
            instance.alive, instance.exited = False, 1

    async def probe(self, url: str, probe: ReadinessProbe) -> bool:
        instance = self.instances.get(url.removeprefix("http://").removesuffix(":1"))
        return instance is not None and instance.alive and self.clock() - instance.born_s >= self.cold_start_s

    @property
    def alive(self) -> set[str]:
        return {name for name, instance in self.instances.items() if instance.alive}


class Proxy:
    """Knows what it was told last. Requests do not come unless a test says so."""

    def __init__(self) -> None:
        self.ready: list[str] = []
        self.lost: list[str] = []
        self.active: dict[str, int] = {}
        self.came = self.waiting = 0

    async def push(self, ready: list[str], lost: list[str]) -> dict[str, int]:
        self.ready, self.lost = ready, lost
        return {url: self.active.get(url, 0) for url in {*ready, *(u for u, n in self.active.items() if n)}}

    async def traffic(self) -> Traffic:
        return Traffic(self.came, self.waiting)
