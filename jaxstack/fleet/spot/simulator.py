"""A serving policy on a trace, under a virtual clock: who was ready when, what it cost, how often it asked in vain.

At each tick zones that have less to give than is held take the newest replicas away; replicas whose cold start is over
become ready; the policy decides, and what it launches is granted as far as there is room. A replica that is stopped is
gone at the next tick's bill. Where nothing is ever stopped, the ready replicas of a zone are the least that it held
during a cold start.
"""

import bisect
import collections
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from jaxstack.fleet.spot.policy import ServingPolicy
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.fleet.spot.view import Decision, FleetView, Kind, ReplicaEvent, ReplicaState, ReplicaView
from jaxstack.runtime.errors import UserError

TICK_S = 30.0
COLD_START_S = 120.0


@dataclass(frozen=True)
class ReadySpan:
    """A replica served from `start_s` on; at `end_s` it was preempted, stopped, or (at the end of time) neither."""

    start_s: float
    end_s: float
    end: Literal["preempted", "stopped", "open"]
    kind: Kind


@dataclass(frozen=True)
class SimulationResult:
    """What a policy did with a trace.

    Args:
      ready: replicas that were ready.
      spot_by_zone: spot replicas that were paid for.
      on_demand: on-demand replicas that were paid for.
      targets: how many should have been ready.
      bill_usd_per_hour: of both kinds together.
      on_demand_usd_per_hour: the lowest price of an on-demand replica.
      warm_ticks: ticks of the first cold start; no score counts them.
      spans: when each replica was ready.
      asks: launches that were tried.
      failures: launches that failed for want of capacity.
      preemptions: replicas taken away.
    """

    ready: Int[np.ndarray, " ticks"]
    spot_by_zone: Int[np.ndarray, "zones ticks"]
    on_demand: Int[np.ndarray, " ticks"]
    targets: Int[np.ndarray, " ticks"]
    bill_usd_per_hour: Float[np.ndarray, " ticks"]
    on_demand_usd_per_hour: float
    tick_s: float
    warm_ticks: int
    spans: tuple[ReadySpan, ...]
    asks: int
    failures: int
    preemptions: int

    @property
    def spot(self) -> Int[np.ndarray, " ticks"]:
        return self.spot_by_zone.sum(0)

    @property
    def availability(self) -> float:
        """The share of time with as many ready as there should be."""
        return float(np.mean((self.ready >= self.targets)[self.warm_ticks :]))

    @property
    def cost(self) -> float:
        """What was paid, as a share of what on-demand replicas alone would have cost."""
        whole = self.on_demand_usd_per_hour * self.targets[self.warm_ticks :].sum()
        return float(self.bill_usd_per_hour[self.warm_ticks :].sum() / whole) if whole else 0.0

    @property
    def shortfall(self) -> float:
        """Mean number of replicas that were missing."""
        return float(np.mean(np.maximum(0, self.targets - self.ready)[self.warm_ticks :]))

    @property
    def none_ready(self) -> float:
        """The share of time with nobody ready, of the time in which someone should be."""
        wanted = self.targets[self.warm_ticks :] > 0
        return float(np.mean(self.ready[self.warm_ticks :][wanted] == 0)) if wanted.any() else 0.0


@dataclass
class _Replica:
    """A replica of the simulator. `ready_tick` is when its cold start is over."""

    view: ReplicaView
    ready_tick: int
    alive: bool = True


@dataclass
class _Zone:
    """What a zone holds, in the order of launches, and may hold."""

    spot: list[_Replica] = field(default_factory=list)
    on_demand: list[_Replica] = field(default_factory=list)

    def of(self, kind: Kind) -> list[_Replica]:
        return self.spot if kind == "spot" else self.on_demand


def simulate(
    trace: SpotTrace,
    policy: ServingPolicy,
    *,
    tick_s: float = TICK_S,
    cold_start_s: float = COLD_START_S,
    request_rates_rps: Sequence[float] | None = None,
    on_demand_capacity: int | None = None,
    on_tick: Callable[[FleetView, Decision], None] | None = None,
) -> SimulationResult:
    """Runs a policy over a whole trace.

    Args:
      cold_start_s: from launch to ready, for both kinds; rounded up to ticks.
      request_rates_rps: what the autoscaler is told at each tick; by default 0.
      on_demand_capacity: on-demand replicas that a zone has room for; None: any number.
      on_tick: told the view and the first decision of each tick. Without it, ticks are passed over at which nothing
        happens and the policy has said that it has nothing to do.

    Raises:
      UserError: the trace has no tick, or the rates are not as many as the ticks.
    """
    capacity = trace.ticks(tick_s)
    ticks = capacity.shape[1]
    if not ticks or (request_rates_rps is not None and len(request_rates_rps) != ticks):
        raise UserError(
            f"{trace.name}: found {ticks} ticks of {tick_s} s and "
            f"{'no' if request_rates_rps is None else len(request_rates_rps)} request rates, expected as many, > 0"
        )
    run = _Run(trace, policy, tick_s, math.ceil(cold_start_s / tick_s - 1e-9), on_demand_capacity)
    rows = capacity.T.tolist()
    changes = (np.flatnonzero((capacity[:, 1:] != capacity[:, :-1]).any(0)) + 1).tolist()
    told = [] if request_rates_rps is None else request_rates_rps
    rate_changes = [t for t in range(1, len(told)) if told[t] != told[t - 1]]
    ready, on_demand, targets = (np.zeros(ticks, np.int64) for _ in range(3))
    spot_by_zone, bill = np.zeros((len(trace.zones), ticks), np.int64), np.zeros(ticks)
    tick = 0
    while tick < ticks:
        rate = 0.0 if request_rates_rps is None else request_rates_rps[tick]
        target, quiet_until_s = run.tick(tick, rows[tick], rate, on_tick)
        end = tick + 1
        if on_tick is None and quiet_until_s > end * tick_s:
            end = run.next_event(tick, rows, changes, quiet_until_s)
            place = bisect.bisect_right(rate_changes, tick)
            end = min([end, *rate_changes[place : place + 1]])
        held = [len(zone.spot) for zone in run.zones.values()]
        if end == tick + 1:
            targets[tick], ready[tick], on_demand[tick], bill[tick] = target, run.ready, run.on_demand, run.bill
            spot_by_zone[:, tick] = held
        else:
            now = slice(tick, end)
            targets[now], ready[now], on_demand[now], bill[now] = target, run.ready, run.on_demand, run.bill
            spot_by_zone[:, now] = np.array(held)[:, None]
        tick = end
    return SimulationResult(
        ready,
        spot_by_zone,
        on_demand,
        targets,
        bill,
        min(price.on_demand_usd_per_hour for price in trace.zone_prices.values()),
        tick_s,
        min(run.cold_ticks, ticks - 1),
        run.finish(ticks),
        run.asks,
        run.failures,
        run.preemptions,
    )


class _Run:
    """The state of one simulation: counters that change with events, so that a quiet tick costs next to nothing."""

    def __init__(
        self, trace: SpotTrace, policy: ServingPolicy, tick_s: float, cold_ticks: int, on_demand_capacity: int | None
    ):
        self.policy, self.tick_s, self.cold_ticks = policy, tick_s, cold_ticks
        self.prices, self.names = trace.zone_prices, trace.zones
        self.zones = {name: _Zone() for name in trace.zones}
        self.on_demand_room = math.inf if on_demand_capacity is None else on_demand_capacity
        self.room: dict[str, int] = {}
        self.replicas: dict[str, _Replica] = {}
        self.starting: collections.deque[_Replica] = collections.deque()
        self.views: tuple[ReplicaView, ...] | None = ()
        self.ready, self.bill = 0, 0.0
        self.on_demand = 0
        self.asks = self.failures = self.preemptions = 0
        self.spans: list[ReadySpan] = []
        self._ids = itertools.count()

    def tick(
        self, tick: int, room: Sequence[int], rate: float, on_tick: Callable[[FleetView, Decision], None] | None
    ) -> tuple[int, float]:
        """Returns the target, and until when the policy has nothing to do."""
        now_s = tick * self.tick_s
        self.room = dict(zip(self.names, room))
        for name, zone in self.zones.items():
            while len(zone.spot) > self.room[name]:
                self._preempt(zone.spot[-1], tick)
        self._become_ready(tick)
        view = self._view(now_s, rate)
        decision = self.policy.decide(view)
        if on_tick is not None:
            on_tick(view, decision)
        target = decision.target
        # A zone that fails is not asked again at this tick, so that there is an end to it.
        for _ in range(2 * len(self.names) + 2):
            failed = self._act(decision, tick)
            if not (failed and decision.retry_at_once):
                break
            decision = self.policy.decide(self._view(now_s, rate))
        return target, decision.quiet_until_s

    def next_event(self, tick: int, rows: Sequence[Sequence[int]], changes: Sequence[int], quiet_until_s: float) -> int:
        """The next tick at which a replica is ready or lost, the policy wants to be asked, or time is over."""
        while self.starting and not self.starting[0].alive:
            self.starting.popleft()
        end = len(rows)
        if quiet_until_s < end * self.tick_s:
            end = math.ceil(quiet_until_s / self.tick_s - 1e-9)
        if self.starting:
            end = min(end, self.starting[0].ready_tick)
        held = [(place, len(zone.spot)) for place, zone in enumerate(self.zones.values()) if zone.spot]
        for change in changes[bisect.bisect_right(changes, tick) :]:
            if change >= end:
                break
            room = rows[change]
            if any(room[place] < count for place, count in held):
                return change
        return max(end, tick + 1)

    def finish(self, ticks: int) -> tuple[ReadySpan, ...]:
        """All spans, by their start; those still ready end with the trace."""
        for replica in self.replicas.values():
            self._close(replica, ticks, "open")
        return tuple(sorted(self.spans, key=lambda span: (span.start_s, span.end_s)))

    def _view(self, now_s: float, rate: float) -> FleetView:
        if self.views is None:
            self.views = tuple(replica.view for replica in self.replicas.values())
        return FleetView(now_s, self.views, rate, self.prices)

    def _become_ready(self, tick: int) -> None:
        while self.starting and self.starting[0].ready_tick <= tick:
            replica = self.starting.popleft()
            if not replica.alive:
                continue
            old = replica.view
            replica.view = ReplicaView(
                old.replica_id, old.zone, old.kind, ReplicaState.READY, old.launched_s, old.version
            )
            self.ready += 1
            self.views = None
            self._tell("ready", tick, replica)

    def _act(self, decision: Decision, tick: int) -> bool:
        """Stops and launches. Returns whether any launch failed."""
        for termination in decision.terminations:
            replica = self.replicas.get(termination.replica_id)
            if replica is not None:
                self._remove(replica, tick, "stopped")
        full: set[tuple[str, Kind]] = set()
        now_s = tick * self.tick_s
        for launch in decision.launches:
            name, kind = launch.zone, launch.kind
            if (name, kind) in full:
                continue
            self.asks += 1
            zone = self.zones[name].of(kind)
            if len(zone) >= (self.room[name] if kind == "spot" else self.on_demand_room):
                full.add((name, kind))
                self.failures += 1
                self.policy.on_event(ReplicaEvent("launch_failed", now_s, name, kind, now_s))
                continue
            replica = _Replica(
                ReplicaView(f"r{next(self._ids)}", name, kind, ReplicaState.STARTING, now_s), tick + self.cold_ticks
            )
            zone.append(replica)
            self.replicas[replica.view.replica_id] = replica
            self.starting.append(replica)
            self.on_demand += kind == "on_demand"
            self.bill += self.prices[name].of(kind)
            self.views = None
        return bool(full)

    def _preempt(self, replica: _Replica, tick: int) -> None:
        self.preemptions += 1
        self._remove(replica, tick, "preempted")
        self._tell("preempted", tick, replica)

    def _remove(self, replica: _Replica, tick: int, how: Literal["preempted", "stopped"]) -> None:
        self._close(replica, tick, how)
        view = replica.view
        replica.alive = False
        self.ready -= view.ready
        self.on_demand -= view.kind == "on_demand"
        self.bill -= self.prices[view.zone].of(view.kind)
        self.zones[view.zone].of(view.kind).remove(replica)
        del self.replicas[view.replica_id]
        self.views = None

    def _close(self, replica: _Replica, tick: int, how: Literal["preempted", "stopped", "open"]) -> None:
        if replica.view.ready:
            span = (replica.ready_tick * self.tick_s, tick * self.tick_s)
            self.spans.append(ReadySpan(*span, how, replica.view.kind))

    def _tell(self, what: Literal["ready", "preempted"], tick: int, replica: _Replica) -> None:
        view = replica.view
        now_s = tick * self.tick_s
        self.policy.on_event(
            ReplicaEvent(what, now_s, view.zone, view.kind, view.launched_s, replica_id=view.replica_id)
        )
