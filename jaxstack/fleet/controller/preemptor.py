"""Takes local replicas away, as a cloud takes spot instances: by SIGKILL, without a word.

`follow` replays a trace: a zone that has less to give loses replicas, and refuses new ones. `strike` takes one at
random. Only spot replicas are ever taken.
"""

import asyncio
import random
from collections.abc import Callable

from jaxstack.fleet.controller.local import LocalProvisioner
from jaxstack.fleet.spot.traces import SpotTrace


class Preemptor:
    """Args:
    provisioner: of this machine.
    seed: which replicas go.
    on_kill: told the id of each.
    """

    def __init__(
        self, provisioner: LocalProvisioner, seed: int = 0, on_kill: Callable[[str], None] = lambda replica_id: None
    ):
        self._provisioner, self._random, self._on_kill = provisioner, random.Random(seed), on_kill
        self.kills = 0

    async def strike(self) -> str | None:
        """Kills one spot replica, any; returns its id, None if there was none."""
        spot = [o.replica_id for o in await self._provisioner.observe() if o.alive and o.kind == "spot"]
        if not spot:
            return None
        chosen = self._random.choice(sorted(spot))
        return chosen if self._kill(chosen) else None

    async def set_capacity(self, zone: str, capacity: int) -> None:
        """From now on `zone` holds so many; whoever is too much is killed."""
        self._provisioner.set_capacities({**self._provisioner.capacities(), zone: capacity})
        here = [
            o.replica_id for o in await self._provisioner.observe() if o.alive and o.kind == "spot" and o.zone == zone
        ]
        self._random.shuffle(here)
        for replica_id in here[capacity:]:
            self._kill(replica_id)

    async def follow(self, trace: SpotTrace, stop: asyncio.Event, *, speed: float = 1.0) -> None:
        """Replays a trace, `speed` times as fast, until its end or `stop`. Zones are matched by order."""
        names = list(self._provisioner.capacities())
        for sample in range(trace.capacity.shape[1]):
            for row, zone in enumerate(names[: len(trace.zones)]):
                await self.set_capacity(zone, int(trace.capacity[row, sample]))
            try:
                await asyncio.wait_for(stop.wait(), trace.gap_s / speed)
                return
            except TimeoutError:
                continue

    def _kill(self, replica_id: str) -> bool:
        if not self._provisioner.kill(replica_id):
            return False
        self.kills += 1
        self._on_kill(replica_id)
        return True
