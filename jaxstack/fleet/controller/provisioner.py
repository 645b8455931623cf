"""What a controller asks of whoever has the machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxstack.fleet.spot.view import FailureReason, Kind, ZonePrice


class LaunchFailed(Exception):
    """A replica could not be had. Only `capacity` says anything of its zone."""

    def __init__(self, reason: FailureReason, message: str):
        super().__init__(message)
        self.reason: FailureReason = reason


@dataclass(frozen=True)
class ReplicaSpec:
    """What runs on a replica.

    Args:
      run, setup: shell text; `run` listens on `$PORT`.
      envs: environment.
      workdir: where they run; None is the current folder.
      port: where the replica has a machine of its own.
      content: the whole service file, for a provisioner that speaks SkyPilot.
      version: of the service.
    """

    run: str
    setup: str = ""
    envs: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None
    port: int | None = None
    content: Mapping[str, object] = field(default_factory=dict)
    version: int = 1


@dataclass(frozen=True)
class Handle:
    """Where a replica is. `pid` and `pid_start` are of its first process, where that is on this machine."""

    url: str
    pid: int | None = None
    pid_start: str | None = None


@dataclass(frozen=True)
class Observation:
    """An instance of our service that exists, or has just ceased to.

    Args:
      alive: it runs, as far as the provisioner can tell.
      exited: of one that is not alive: it ended by itself, with this status. None: it was taken away.
    """

    replica_id: str
    zone: str
    kind: Kind
    alive: bool
    handle: Handle
    exited: int | None = None


class Provisioner(Protocol):
    """Has machines in zones. Calls may take minutes; all of them may be made again after a crash of the caller."""

    def zones(self) -> Mapping[str, ZonePrice]:
        """The zones there are, with their prices."""
        ...

    async def launch(self, replica_id: str, zone: str, kind: Kind, spec: ReplicaSpec) -> Handle:
        """Starts a replica. Called again with an id that it knows, it starts nothing and says where that one is; one
        that has been terminated does not start again.

        Raises:
          LaunchFailed: there is none, and nothing of it is left.
        """
        ...

    async def observe(self) -> Sequence[Observation]:
        """Every instance that carries our service's tag, wanted or not."""
        ...

    async def terminate(self, replica_id: str) -> None:
        """Ends a replica and whatever is left of it; one that is not there is as good."""
        ...

    async def last_lines(self, replica_id: str, count: int) -> list[str]:
        """The end of what the replica has printed; nothing where that cannot be had."""
        ...
