"""What a policy sees of a fleet, what it is told, and what it answers.

Times are seconds on one clock that never runs backwards; prices are US dollars an hour.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["spot", "on_demand"]
"""How a replica is paid for. Only spot replicas are preempted."""
KINDS: tuple[Kind, ...] = ("spot", "on_demand")

FailureReason = Literal["capacity", "quota", "credentials", "other"]
"""Why a launch failed. Only `capacity` says anything of the zone."""


class ReplicaState(enum.StrEnum):
    """The states of a replica, by the names that SkyPilot gives them."""

    PENDING = "PENDING"
    PROVISIONING = "PROVISIONING"
    STARTING = "STARTING"
    READY = "READY"
    NOT_READY = "NOT_READY"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    FAILED = "FAILED"
    FAILED_INITIAL_DELAY = "FAILED_INITIAL_DELAY"
    FAILED_PROBING = "FAILED_PROBING"
    FAILED_PROVISION = "FAILED_PROVISION"
    FAILED_CLEANUP = "FAILED_CLEANUP"
    PREEMPTED = "PREEMPTED"
    UNKNOWN = "UNKNOWN"


ADVANCE: Mapping[ReplicaState, int] = {
    ReplicaState.PENDING: 0,
    ReplicaState.PROVISIONING: 1,
    ReplicaState.STARTING: 2,
    ReplicaState.UNKNOWN: 3,
    ReplicaState.NOT_READY: 3,
    ReplicaState.READY: 4,
}
"""The states in which a replica counts as launched -> how far it has come. A replica in another state is on its way
out: no policy counts it or ends it."""


@dataclass(frozen=True)
class ZonePrice:
    """What an instance costs in a zone, and the region that the zone belongs to."""

    spot_usd_per_hour: float
    on_demand_usd_per_hour: float
    region: str = ""

    def of(self, kind: Kind) -> float:
        return self.spot_usd_per_hour if kind == "spot" else self.on_demand_usd_per_hour


@dataclass(frozen=True)
class ReplicaView:
    """A replica. `version` is that of the service it runs; `launched_s` when it was asked for."""

    replica_id: str
    zone: str
    kind: Kind
    state: ReplicaState
    launched_s: float
    version: int = 1

    @property
    def launched(self) -> bool:
        """Whether it is there or on its way."""
        return self.state in ADVANCE

    @property
    def ready(self) -> bool:
        return self.state is ReplicaState.READY


@dataclass(frozen=True)
class FleetView:
    """The fleet at one moment.

    Args:
      replicas: those that have not ended.
      request_rate_rps: requests a second, mean over the last minute.
      prices: zone -> price. The zones named here are those that a policy may use.
    """

    now_s: float
    replicas: tuple[ReplicaView, ...]
    request_rate_rps: float
    prices: Mapping[str, ZonePrice]


@dataclass(frozen=True)
class ReplicaEvent:
    """What happened to a replica.

    Args:
      what: it answers its probe for the first time, or again; it was taken away; or it could not be had.
      asked_s: when it was launched. Failures of launches that were asked for before the zone was known to fail say
        nothing new.
      reason: of a failed launch.
    """

    what: Literal["ready", "preempted", "launch_failed"]
    now_s: float
    zone: str
    kind: Kind
    asked_s: float
    reason: FailureReason = "capacity"
    replica_id: str = ""


@dataclass(frozen=True)
class Launch:
    """A replica to start, and why, for the log."""

    zone: str
    kind: Kind
    reason: str


@dataclass(frozen=True)
class Termination:
    """A replica to drain and stop, and why, for the log."""

    replica_id: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """What to do now.

    Args:
      target: replicas that should be ready.
      launches: in this order. Once one has failed for want of capacity, later ones in that zone for that kind need not
        be tried: the policy chooses again.
      terminations: replicas that were launched; ending one twice is harmless.
      retry_at_once: decide again as soon as launches have failed, without waiting for the next turn.
      alerts: sentences for the operator.
      quiet_until_s: there is nothing to do until then, as long as no replica changes its state and the rate of requests
        stays as it is: nobody needs to ask.
    """

    target: int
    launches: tuple[Launch, ...] = ()
    terminations: tuple[Termination, ...] = ()
    retry_at_once: bool = False
    alerts: tuple[str, ...] = ()
    quiet_until_s: float = -math.inf


@dataclass
class Census:
    """Replicas that are there or on their way, counted once for all who ask."""

    launched: dict[Kind, dict[str, int]] = field(default_factory=lambda: {"spot": {}, "on_demand": {}})
    ready: dict[Kind, dict[str, int]] = field(default_factory=lambda: {"spot": {}, "on_demand": {}})

    @classmethod
    def of(cls, replicas: tuple[ReplicaView, ...]) -> "Census":
        census = cls()
        for replica in replicas:
            if replica.state in ADVANCE:
                zones = census.launched[replica.kind]
                zones[replica.zone] = zones.get(replica.zone, 0) + 1
                if replica.state is ReplicaState.READY:
                    zones = census.ready[replica.kind]
                    zones[replica.zone] = zones.get(replica.zone, 0) + 1
        return census

    def count(self, kind: Kind, *, ready: bool = False) -> int:
        return sum((self.ready if ready else self.launched)[kind].values())
