"""A serving policy: an autoscaler, a mixture and a placer. The simulator and the live controller run the same one.

policy = spothedge(FixedTarget(3), overprovision=1)
decision = policy.decide(FleetView(now_s, replicas, request_rate_rps, prices))
...                                             # launch and terminate
policy.on_event(ReplicaEvent("launch_failed", now_s, zone, "spot", asked_s))
"""

import math
from collections.abc import Sequence
from typing import Any

from jaxstack.fleet.spot.autoscaling import Autoscaler, FixedTarget, PeakHold, RequestRateAutoscaler
from jaxstack.fleet.spot.mixture import DynamicFallback, Mixture, OnDemandOnly, RiskWindow, SpotOnly, StaticMixture
from jaxstack.fleet.spot.placement import (
    Backoff,
    EvenSpread,
    PaperPlacer,
    Placer,
    RoundRobin,
    SingleRegion,
    ZonePlacer,
)
from jaxstack.fleet.spot.rebalancing import PriceRebalancer, RebalanceConfig
from jaxstack.fleet.spot.view import (
    ADVANCE,
    KINDS,
    Census,
    Decision,
    FailureReason,
    FleetView,
    Kind,
    Launch,
    ReplicaEvent,
    ReplicaState,
    ReplicaView,
    Termination,
    ZonePrice,
)
from jaxstack.runtime.errors import UserError

__all__ = [
    "Autoscaler",
    "Backoff",
    "Decision",
    "DynamicFallback",
    "EvenSpread",
    "FailureReason",
    "FixedTarget",
    "FleetView",
    "Kind",
    "Launch",
    "Mixture",
    "OnDemandOnly",
    "PaperPlacer",
    "PeakHold",
    "Placer",
    "RebalanceConfig",
    "ReplicaEvent",
    "ReplicaState",
    "ReplicaView",
    "RequestRateAutoscaler",
    "RiskWindow",
    "RoundRobin",
    "ServingPolicy",
    "SingleRegion",
    "SpotOnly",
    "StaticMixture",
    "Termination",
    "ZonePlacer",
    "ZonePrice",
    "scale_down_order",
    "spothedge",
]

# A service whose launches fail for reasons of its own (image, quota, credentials, a crash) waits this long, doubled.
_SERVICE_BACKOFF = Backoff(base_s=20.0, max_s=600.0)
_REBALANCE = RebalanceConfig()


class ServingPolicy:
    """Decides what to launch and what to stop. It keeps its own state, and reads no clock: time comes with the view.

    Args:
      autoscaler: how many replicas should be ready.
      mixture: how many of them spot and on-demand.
      placer: zones of spot replicas.
      on_demand_placer: zones of on-demand replicas, with records of their own; on-demand can be sold out too.
      rebalance: when to move spot replicas to cheaper zones; needs a `ZonePlacer`. None never moves any.
    """

    def __init__(
        self,
        autoscaler: Autoscaler,
        mixture: Mixture,
        placer: Placer,
        *,
        on_demand_placer: Placer | None = None,
        rebalance: RebalanceConfig | None = None,
    ):
        self.autoscaler, self.mixture = autoscaler, mixture
        self.placers: dict[Kind, Placer] = {"spot": placer, "on_demand": on_demand_placer or ZonePlacer()}
        self.rebalancer: PriceRebalancer | None = None
        if rebalance is not None:
            if not isinstance(placer, ZonePlacer):
                raise UserError(f"rebalance: found a {type(placer).__name__}, expected a ZonePlacer")
            self.rebalancer = PriceRebalancer(rebalance, placer.settled_since_s)
        self._service_failures = 0
        self._hold_until_s = -math.inf
        self._hold_reason = ""

    def decide(self, view: FleetView) -> Decision:
        """What to do now. Asked again with what came of it, it asks for the rest."""
        now_s = view.now_s
        target = self.autoscaler.target(now_s, view.request_rate_rps)
        census = Census.of(view.replicas)
        wanted = self.mixture.wanted(target, census, now_s)
        launches: list[Launch] = []
        terminations: list[Termination] = []
        alerts: list[str] = []
        retry, whole = False, True
        held = now_s < self._hold_until_s
        for kind in KINDS:
            count = wanted.spot if kind == "spot" else wanted.on_demand
            replicas = [r for r in view.replicas if r.kind == kind and r.state in ADVANCE]
            leaving = self._leaving(replicas, count, now_s) if kind == "spot" else None
            missing = count - len(replicas) + (leaving is not None)
            whole &= missing == 0
            if missing > 0 and not held:
                prices = {zone: price.of(kind) for zone, price in view.prices.items()}
                placer = self.placers[kind]
                zones = placer.place(missing, census.launched[kind], prices, now_s)
                launches += [Launch(zone, kind, f"{missing} {kind} missing") for zone in zones]
                retry |= placer.retries_at_once and bool(zones)
                if kind == "on_demand" and not self._any_open(placer, view):
                    alerts.append("no zone has on-demand capacity: fewer replicas than wanted")
            elif missing < 0:
                surplus = sorted(replicas, key=scale_down_order)[:-missing]
                terminations += [Termination(r.replica_id, f"{-missing} {kind} too many") for r in surplus]
            if kind == "spot" and self.rebalancer is not None and not held:
                self._rebalance(view, replicas, leaving, count, launches, terminations)
        if held and (wanted.spot + wanted.on_demand > census.count("spot") + census.count("on_demand")):
            alerts.append(
                f"launches fail for a reason that is the service's own ({self._hold_reason}, {self._service_failures} "
                f"in a row); next try in {self._hold_until_s - now_s:.0f} s"
            )
        quiet_until_s = -math.inf
        if whole and not (launches or terminations or alerts):
            quiet_until_s = self._quiet_until_s(view)
        return Decision(target, tuple(launches), tuple(terminations), retry, tuple(alerts), quiet_until_s)

    def on_event(self, event: ReplicaEvent) -> None:
        """Hears what became of a replica."""
        placer = self.placers[event.kind]
        if event.what == "ready":
            placer.on_ready(event.zone, event.now_s)
            self._service_failures, self._hold_until_s = 0, -math.inf
        elif event.what == "preempted":
            placer.on_preempted(event.zone, event.now_s)
            self.mixture.on_preempted(event.zone, event.now_s)
        elif event.reason == "capacity":
            placer.on_launch_failed(event.zone, event.now_s, event.asked_s)
        elif event.now_s >= self._hold_until_s:  # launches of one decision fail together
            self._service_failures += 1
            self._hold_until_s = event.now_s + _SERVICE_BACKOFF.delay_s("", self._service_failures)
            self._hold_reason = event.reason

    def state_dict(self) -> dict[str, Any]:
        """Everything that a decision depends on, JSON-ready."""
        return {
            "autoscaler": self.autoscaler.state_dict(),
            "mixture": self.mixture.state_dict(),
            "placers": {kind: placer.state_dict() for kind, placer in self.placers.items()},
            "rebalancer": None if self.rebalancer is None else self.rebalancer.state_dict(),
            "service": {
                "failures": self._service_failures,
                "hold_until_s": None if self._hold_until_s == -math.inf else self._hold_until_s,
                "reason": self._hold_reason,
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.autoscaler.load_state_dict(state["autoscaler"])
        self.mixture.load_state_dict(state["mixture"])
        for kind, placer in self.placers.items():
            placer.load_state_dict(state["placers"][kind])
        if self.rebalancer is not None and state["rebalancer"] is not None:
            self.rebalancer.load_state_dict(state["rebalancer"])
        service = state["service"]
        self._service_failures, self._hold_reason = int(service["failures"]), service["reason"]
        self._hold_until_s = -math.inf if service["hold_until_s"] is None else float(service["hold_until_s"])

    # Inside.

    def _leaving(self, spot: Sequence[ReplicaView], wanted: int, now_s: float) -> ReplicaView | None:
        return None if self.rebalancer is None else self.rebalancer.leaving(spot, wanted, now_s)

    def _rebalance(
        self,
        view: FleetView,
        spot: Sequence[ReplicaView],
        leaving: ReplicaView | None,
        wanted: int,
        launches: list[Launch],
        terminations: list[Termination],
    ) -> None:
        """Goes on with the move that is under way, or begins one."""
        assert self.rebalancer is not None
        if leaving is not None:
            if sum(replica.ready for replica in spot if replica is not leaving) >= wanted:
                terminations.append(Termination(leaving.replica_id, "moved to a cheaper zone"))
            return
        prices = {zone: price.spot_usd_per_hour for zone, price in view.prices.items()}
        move = self.rebalancer.move(spot, wanted, prices, view.now_s)
        if move is not None:
            zone, old = move
            launches.append(Launch(zone, "spot", f"cheaper than {old.zone}"))

    def _quiet_until_s(self, view: FleetView) -> float:
        """Until when a whole fleet stays as it is if nothing happens to it."""
        until_s = min(self.autoscaler.steady_until_s(view.request_rate_rps), self.mixture.steady_until_s(view.now_s))
        if self.rebalancer is not None:
            spot = [replica for replica in view.replicas if replica.kind == "spot" and replica.state in ADVANCE]
            prices = {zone: price.spot_usd_per_hour for zone, price in view.prices.items()}
            until_s = min(until_s, self.rebalancer.steady_until_s(spot, prices, view.now_s))
        return until_s

    def _any_open(self, placer: Placer, view: FleetView) -> bool:
        return not isinstance(placer, ZonePlacer) or any(not placer.left_alone(z, view.now_s) for z in view.prices)


def scale_down_order(replica: ReplicaView) -> tuple[float, ...]:
    """Who goes first when there are too many: the least advanced, then the oldest version, then the newest."""
    return (ADVANCE[replica.state], replica.version, -replica.launched_s, *(-ord(c) for c in replica.replica_id))


def spothedge(
    autoscaler: Autoscaler,
    *,
    overprovision: int = 1,
    base_on_demand: int = 0,
    backoff: Backoff | None = None,
    risk_window_s: float | None = None,
    rebalance: RebalanceConfig | None = _REBALANCE,
) -> ServingPolicy:
    """SpotHedge with our placement: replicas over zones, more than needed, on-demand for those that are missing.

    Args:
      overprovision: N_extra, spot replicas beyond the target.
      base_on_demand: replicas that are always on-demand.
      backoff: of zones, spot and on-demand.
      risk_window_s: for so long after a preemption, enough on-demand that its zone may be lost whole. None: no more
        than the fallback.
      rebalance: when to move to cheaper zones; None never.
    """
    mixture: Mixture = DynamicFallback(overprovision, base_on_demand)
    if risk_window_s is not None:
        mixture = RiskWindow(mixture, risk_window_s)
    return ServingPolicy(
        autoscaler, mixture, ZonePlacer(backoff), on_demand_placer=ZonePlacer(backoff), rebalance=rebalance
    )
