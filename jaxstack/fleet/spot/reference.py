"""The simulator said plainly: every replica looked at, at every tick, from a list. The oracle of `simulator`."""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxstack.fleet.spot.policy import ServingPolicy
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.fleet.spot.view import FleetView, ReplicaEvent, ReplicaState, ReplicaView


def simulate_plainly(
    trace: SpotTrace, policy: ServingPolicy, *, tick_s: float, cold_ticks: int
) -> dict[str, Int[np.ndarray, " ticks"]]:
    """Counts at each tick: `ready`, `spot`, `on_demand`. On-demand capacity is without bound."""
    capacity = trace.ticks(tick_s)
    replicas: list[dict[str, Any]] = []
    made = 0
    counts: dict[str, list[int]] = {"ready": [], "spot": [], "on_demand": []}

    def tell(what: Any, replica: dict[str, Any], now_s: float) -> None:
        policy.on_event(ReplicaEvent(what, now_s, replica["zone"], replica["kind"], replica["tick"] * tick_s))

    def view(tick: int) -> FleetView:
        views = [
            ReplicaView(
                r["id"],
                r["zone"],
                r["kind"],
                ReplicaState.READY if r["told"] else ReplicaState.STARTING,
                r["tick"] * tick_s,
            )
            for r in replicas
        ]
        return FleetView(tick * tick_s, tuple(views), 0.0, trace.zone_prices)

    for tick in range(capacity.shape[1]):
        room = dict(zip(trace.zones, capacity[:, tick].tolist()))
        for zone in trace.zones:
            here = [r for r in replicas if r["zone"] == zone and r["kind"] == "spot"]
            for replica in sorted(here, key=lambda r: r["number"], reverse=True)[: max(0, len(here) - room[zone])]:
                replicas.remove(replica)
                tell("preempted", replica, tick * tick_s)
        for replica in replicas:
            if not replica["told"] and tick - replica["tick"] >= cold_ticks:
                replica["told"] = True
                tell("ready", replica, tick * tick_s)
        again = True
        while again:
            decision = policy.decide(view(tick))
            again = False
            for termination in decision.terminations:
                replicas = [r for r in replicas if r["id"] != termination.replica_id]
            refused = set()
            for launch in decision.launches:
                here = [r for r in replicas if r["zone"] == launch.zone and r["kind"] == launch.kind]
                if (launch.zone, launch.kind) in refused:
                    continue
                fresh = {
                    "id": f"r{made}", "number": made, "zone": launch.zone, "kind": launch.kind, "tick": tick,
                    "told": False,
                }  # fmt: skip
                if launch.kind == "spot" and len(here) >= room[launch.zone]:
                    refused.add((launch.zone, launch.kind))
                    tell("launch_failed", fresh, tick * tick_s)
                    again = decision.retry_at_once
                else:
                    replicas.append(fresh)
                    made += 1
        counts["ready"].append(sum(r["told"] for r in replicas))
        for kind in ("spot", "on_demand"):
            counts[kind].append(sum(r["kind"] == kind for r in replicas))
    return {name: np.array(row) for name, row in counts.items()}


def ready_by_windowed_minimum(held: Int[np.ndarray, "zones ticks"], cold_ticks: int) -> Int[np.ndarray, " ticks"]:
    """Ready replicas where none is ever stopped: the least that each zone held during the last cold start."""
    zones, ticks = held.shape
    ready = np.zeros(ticks, np.int64)
    for tick in range(cold_ticks, ticks):
        for zone in range(zones):
            ready[tick] += min(held[zone, tick - lag] for lag in range(cold_ticks + 1))
    return ready
