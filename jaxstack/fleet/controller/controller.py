"""The controller: looks, decides, acts and writes down, again and again.

One turn (`step`) looks at what the provisioner has and at how replicas answer their probes, tells the policy what has
happened, asks it what to do, and begins that. It is killed anywhere and started again: what it has begun stands in
`state.FleetState` as an intent, and what is there it finds with the provisioner. Replicas and the proxy before them are
processes of their own, and do not notice.

Of an instance and its row: both there, adopted; the instance gone, an event for the policy and the row ends; no row, or
one that has ended, the instance is terminated; an intent without a result, done again under the same id.
"""

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol

from jaxstack.fleet.controller.provisioner import Handle, LaunchFailed, Observation, Provisioner, ReplicaSpec
from jaxstack.fleet.controller.service_spec import ReadinessProbe
from jaxstack.fleet.controller.state import FleetState, ReplicaRow
from jaxstack.fleet.spot.policy import ServingPolicy
from jaxstack.fleet.spot.view import Decision, FailureReason, FleetView, ReplicaEvent, ReplicaState, ReplicaView

log = logging.getLogger(__name__)

_RATE_WINDOW_S = 60.0
_LAST_LINES = 20
# Until its first answer a replica is probed at least this often: it may be needed.
_STARTING_PROBE_S = 1.0
# A launch that fails at once is followed by the next choice in the same turn; so long is a probe waited for, too.
_AT_ONCE_S = 0.3


class Traffic(NamedTuple):
    """Requests that have come since the proxy started, and those that wait because no replica takes them."""

    arrivals: int
    waiting: int


class Proxy(Protocol):
    """The router before the replicas."""

    async def push(self, ready: list[str], lost: list[str]) -> dict[str, int] | None:
        """Says which replicas there are, and which have just been lost; returns how many requests each that is known
        is answering. None: the proxy does not answer.
        """
        ...

    async def traffic(self) -> Traffic | None:
        """None: it does not answer."""
        ...


Probe = Callable[[str, ReadinessProbe], Coroutine[Any, Any, bool]]
"""Whether the replica at a URL answers its probe."""


@dataclasses.dataclass(frozen=True)
class Service:
    """What is kept running.

    Args:
      name: what replicas are called, with a number behind.
      replica: what runs on one.
      version: of it.
      drain_s: how long a replica that is stopped may go on with its answers.
    """

    name: str
    replica: ReplicaSpec
    probe: ReadinessProbe
    version: int = 1
    drain_s: float = 120.0


class Controller:
    """See the module's docstring.

    Args:
      probe: asks a replica.
      decide_every_s: between two decisions of the policy, unless something has happened.

    Attributes:
      decision: the last one.
      trouble: why nothing is decided at the moment; empty otherwise.
    """

    def __init__(
        self,
        service: Service,
        policy: ServingPolicy,
        provisioner: Provisioner,
        state: FleetState,
        proxy: Proxy,
        probe: Probe,
        *,
        decide_every_s: float = 5.0,
    ):
        self.service, self.policy, self.provisioner, self.state = service, policy, provisioner, state
        self.proxy, self._probe_replica = proxy, probe
        self.decision = Decision(0)
        self.trouble = ""
        self.request_rate_rps = 0.0
        self._decide_every_s = decide_every_s
        self._decided_s = float("-inf")
        self._eventful = True
        self._stopping = False
        self._launching: dict[str, asyncio.Task[Handle]] = {}
        self._probed_s: dict[str, float] = {}
        self._probing: dict[str, asyncio.Task[bool]] = {}
        self._arrivals: collections.deque[tuple[float, int]] = collections.deque()
        self._lost: dict[str, float] = {}
        self._active: dict[str, int] | None = None
        self._saved: dict | None = None
        kept = state.get("policy")
        if kept is not None:
            try:
                policy.load_state_dict(kept)
            except (KeyError, TypeError, ValueError) as error:
                log.warning("what the policy knew cannot be used any more (%r); it begins anew", error)

    async def step(self) -> None:
        """One turn. Raises nothing that the next one might not mend."""
        try:
            try:
                await self._look()
            finally:  # a provider that does not answer is no reason to lose sight of what runs
                await self._probe()
                await self._push()
            await self._measure()
            if not self._stopping:
                await self._decide()
            await self._drain()
            await self._push()
            self.trouble = ""
        except Exception as error:  # a full disk, a cloud that does not answer: what runs goes on
            if self.trouble != str(error):
                log.error("nothing is decided for the moment: %s", error, exc_info=error)
            self.trouble = str(error) or repr(error)

    async def shut_down(self, hurry: asyncio.Event | None = None, every_s: float = 0.2) -> None:
        """Drains and ends every replica; at once when `hurry` is set."""
        self._stopping = True
        with self.state.transaction("stopping"):
            self.state.event("stopping")
            for row in self.state.replicas():
                self._begin_to_end(row, "the service is brought down")
        while self.state.replicas():
            if hurry is not None and hurry.is_set():
                with self.state.transaction("hurry"):
                    for row in self.state.replicas():
                        self.state.update(row.id, drain_until_s=self.state.now_s)
            await self.step()
            if self.state.replicas():
                await asyncio.sleep(every_s)
        await self._look()  # what nobody knows of

    async def close(self) -> None:
        """Forgets what is being launched and probed; the next controller finds the intents."""
        tasks: list[asyncio.Task[Any]] = [*self._launching.values(), *self._probing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._launching.clear()
        self._probing.clear()

    # Looking.

    async def _look(self) -> None:
        """Compares what there is with what is written down."""
        # What is launched while the provisioner looks need not be among what it has seen.
        launching = set(self._launching)
        seen = {o.replica_id: o for o in await self.provisioner.observe()}
        await self._finish_launches(seen)
        rows = {row.id: row for row in self.state.replicas()}
        for row in rows.values():
            observed = seen.get(row.id)
            alive = observed is not None and observed.alive
            if row.intent == "launch":
                if row.id not in self._launching:  # of a controller that is no more
                    if alive and observed is not None:
                        self._launched(row, observed.handle)
                    elif observed is not None:
                        await self._gone(row, observed)
                    else:
                        self._launch(row)
            elif not alive and row.id not in launching:
                await self._gone(row, observed)
        for observed in seen.values():
            if observed.alive and observed.replica_id not in rows and observed.replica_id not in launching:
                log.warning("replica %s is nobody's; it is ended", observed.replica_id)
                await self.provisioner.terminate(observed.replica_id)

    async def _gone(self, row: ReplicaRow, observed: Observation | None) -> None:
        """A replica is there no more."""
        now_s = self.state.now_s
        exited = None if observed is None else observed.exited
        if row.url is not None:
            self._lost[row.url] = now_s
            await self._push()  # before anything else: answers wait to go on elsewhere
        state, reason, event = ReplicaState.PREEMPTED, "taken away", None
        if row.state is ReplicaState.SHUTTING_DOWN:
            state, reason = ReplicaState.SHUTTING_DOWN, row.reason
        elif exited is not None:
            lines = await self.provisioner.last_lines(row.id, _LAST_LINES)
            state, reason = ReplicaState.FAILED, f"ended by itself with status {exited}: {(lines or ['no output'])[-1]}"
            event = ReplicaEvent("launch_failed", now_s, row.zone, row.kind, row.created_s, "other", row.id)
        elif row.kind == "spot":
            event = ReplicaEvent("preempted", now_s, row.zone, row.kind, row.created_s, replica_id=row.id)
        else:
            state, reason = ReplicaState.FAILED, "its machine is gone"
        # Before it is written that it has ended: afterwards nobody would look for what is left of it.
        await self.provisioner.terminate(row.id)
        self._end(row, state, reason, event)

    def _end(
        self, row: ReplicaRow, state: ReplicaState, reason: str, event: ReplicaEvent | None, **more: object
    ) -> None:
        with self.state.transaction("ended"):
            self.state.update(row.id, state=state, intent=None, ended_s=self.state.now_s, reason=reason)
            self.state.event("ended", row.id, state=state, zone=row.zone, kind=row.kind, reason=reason, **more)
            self._tell(event)
        self._probed_s.pop(row.id, None)

    def _tell(self, event: ReplicaEvent | None) -> None:
        """The policy hears of something, and what it then knows is written down with it."""
        self._eventful = True
        if event is not None:
            self.policy.on_event(event)
            self._save()

    def _save(self) -> None:
        self._saved = self.policy.state_dict()
        self.state.put("policy", self._saved)

    # Probing.

    async def _probe(self) -> None:
        now_s = self.state.now_s
        rows = {
            row.id: row
            for row in self.state.replicas()
            if row.state in (ReplicaState.STARTING, ReplicaState.READY, ReplicaState.NOT_READY) and row.url
        }
        for row in rows.values():
            every_s = self.service.probe.interval_s
            if row.state is not ReplicaState.READY:
                every_s = min(every_s, _STARTING_PROBE_S)
            if row.id not in self._probing and now_s - self._probed_s.get(row.id, float("-inf")) >= every_s:
                self._probed_s[row.id] = now_s
                self._probing[row.id] = asyncio.ensure_future(self._probe_replica(row.url or "", self.service.probe))
        if self._probing:  # one that hangs holds up no turn
            await asyncio.wait(self._probing.values(), timeout=_AT_ONCE_S)
        for name in [name for name, task in self._probing.items() if task.done()]:
            ready, asked = self._probing.pop(name).result(), rows.get(name)
            if asked is None:  # it has ended meanwhile, or is about to
                continue
            if ready:
                self._answers(asked)
            else:
                await self._answers_not(asked)

    def _answers(self, row: ReplicaRow) -> None:
        if row.state is ReplicaState.READY:
            return
        now_s = self.state.now_s
        event = ReplicaEvent("ready", now_s, row.zone, row.kind, row.created_s, replica_id=row.id)
        with self.state.transaction("ready"):
            ready_s = now_s if row.ready_s is None else row.ready_s
            self.state.update(row.id, state=ReplicaState.READY, ready_s=ready_s, failing_s=None)
            self.state.event("ready", row.id, zone=row.zone, kind=row.kind, after_s=round(now_s - row.created_s, 2))
            self._tell(event)

    async def _answers_not(self, row: ReplicaRow) -> None:
        now_s, probe = self.state.now_s, self.service.probe
        if row.state is ReplicaState.STARTING:
            if now_s - row.created_s <= probe.initial_delay_s:
                return
            lines = await self.provisioner.last_lines(row.id, _LAST_LINES)
            reason = f"not ready after {probe.initial_delay_s:g} s: {(lines or ['no output'])[-1]}"
            await self._give_up(row, ReplicaState.FAILED_INITIAL_DELAY, reason, lines)
        elif row.state is ReplicaState.READY:
            with self.state.transaction("not ready"):
                self.state.update(row.id, state=ReplicaState.NOT_READY, failing_s=now_s)
                self.state.event("not ready", row.id)
                self._eventful = True
        elif row.failing_s is not None and now_s - row.failing_s > probe.failure_threshold_s:
            lines = await self.provisioner.last_lines(row.id, _LAST_LINES)
            reason = f"its probes failed for {probe.failure_threshold_s:g} s"
            await self._give_up(row, ReplicaState.FAILED_PROBING, reason, lines)

    async def _give_up(self, row: ReplicaRow, state: ReplicaState, reason: str, lines: list[str]) -> None:
        """A replica that is there and of no use."""
        if row.url is not None:
            self._lost[row.url] = self.state.now_s
        await self.provisioner.terminate(row.id)
        event = ReplicaEvent("launch_failed", self.state.now_s, row.zone, row.kind, row.created_s, "other", row.id)
        self._end(row, state, reason, event, lines=lines)

    # Deciding.

    async def _measure(self) -> None:
        traffic, now_s, known = await self.proxy.traffic(), self.state.now_s, self._arrivals
        if traffic is None:
            return
        if known and traffic.arrivals < known[-1][1]:  # another proxy
            known.clear()
        known.append((now_s, traffic.arrivals))
        while len(known) > 2 and known[1][0] <= now_s - _RATE_WINDOW_S:
            known.popleft()
        came = known[-1][1] - known[0][1]
        self.request_rate_rps = max(came, min(1, traffic.waiting)) / _RATE_WINDOW_S

    def view(self) -> FleetView:
        """The fleet as the policy sees it: of another version only what has nothing to stand in for it yet."""
        replicas = tuple(
            ReplicaView(row.id, row.zone, row.kind, row.state, row.created_s, row.version)
            for row in self.state.replicas()
            if row.version == self.service.version
        )
        return FleetView(self.state.now_s, replicas, self.request_rate_rps, self.provisioner.zones())

    async def _decide(self) -> None:
        now_s = self.state.now_s
        # Somebody is held who needs the first replica: do not wait.
        waiting = self.request_rate_rps > 0 and self.decision.target == 0
        if not self._eventful and not waiting and now_s - self._decided_s < self._decide_every_s:
            return
        for _ in range(2 + 2 * len(self.provisioner.zones())):
            self._decided_s, self._eventful = now_s, False
            self.decision = decision = self.policy.decide(self.view())
            begun = self._begin(decision)
            if not begun:
                break
            await asyncio.wait([self._launching[name] for name in begun], timeout=_AT_ONCE_S)
            before = {row.id for row in self.state.replicas()}
            await self._finish_launches(None)
            failed = before - {row.id for row in self.state.replicas()}
            if not failed or not decision.retry_at_once:
                break
        self._retire_old_versions()

    def _begin(self, decision: Decision) -> list[str]:
        """Writes down what is to be done, and begins to launch."""
        known = {row.id: row for row in self.state.replicas()}
        ending = [known[t.replica_id] for t in decision.terminations if t.replica_id in known]
        reasons = {t.replica_id: t.reason for t in decision.terminations}
        if not decision.launches and not ending and self.policy.state_dict() == self._saved:
            return []
        rows = []
        with self.state.transaction("decision"):
            for launch in decision.launches:
                row = self.state.add(self.service.name, launch.zone, launch.kind, self.service.version, launch.reason)
                self.state.event("launch", row.id, zone=launch.zone, kind=launch.kind, reason=launch.reason)
                rows.append(row)
            for row in ending:
                self._begin_to_end(row, reasons[row.id])
            for alert in decision.alerts:
                self.state.event("alert", None, text=alert)
            self.state.put("target", decision.target)
            self._save()
        for row in rows:
            self._launch(row)
        return [row.id for row in rows]

    def _launch(self, row: ReplicaRow) -> None:
        work = self.provisioner.launch(row.id, row.zone, row.kind, self.service.replica)
        self._launching[row.id] = asyncio.ensure_future(work)

    async def _finish_launches(self, seen: dict[str, Observation] | None) -> None:
        """Writes down what became of launches that are over."""
        for name in [name for name, task in self._launching.items() if task.done()]:
            task, row = self._launching.pop(name), self.state.replica(name)
            if task.cancelled() or row is None or row.ended_s is not None:
                continue
            error = task.exception()
            if error is None:
                if row.intent == "launch":
                    self._launched(row, task.result())
                continue
            reason: FailureReason = error.reason if isinstance(error, LaunchFailed) else "other"
            words = str(error) if isinstance(error, LaunchFailed) else repr(error)
            event = ReplicaEvent("launch_failed", self.state.now_s, row.zone, row.kind, row.created_s, reason, row.id)
            await self.provisioner.terminate(row.id)
            self._end(row, ReplicaState.FAILED_PROVISION, f"{reason}: {words}", event)
            if seen is not None:
                seen.pop(name, None)

    def _launched(self, row: ReplicaRow, handle: Handle) -> None:
        where = {"url": handle.url, "pid": handle.pid, "pid_start": handle.pid_start}
        with self.state.transaction("launched"):
            self.state.update(row.id, state=ReplicaState.STARTING, intent=None, **where)
            self.state.event("launched", row.id, zone=row.zone, **where)

    # Ending.

    def _begin_to_end(self, row: ReplicaRow, reason: str) -> None:
        """Needs a transaction."""
        if row.state is ReplicaState.SHUTTING_DOWN:
            return
        until_s = self.state.now_s + (self.service.drain_s if row.state is ReplicaState.READY else 0.0)
        self.state.update(
            row.id, state=ReplicaState.SHUTTING_DOWN, intent="terminate", drain_until_s=until_s, reason=reason
        )
        self.state.event("shutting down", row.id, reason=reason)

    async def _drain(self) -> None:
        """Ends those whose answers are over, or whose time is."""
        for row in self.state.replicas():
            if row.state is not ReplicaState.SHUTTING_DOWN:
                continue
            if (launching := self._launching.get(row.id)) is not None:
                if not launching.done():
                    continue  # its end is known soon, and then there is something to end
                self._launching.pop(row.id)
                launching.exception()
            late = self.state.now_s >= (row.drain_until_s or 0.0)
            idle = self._active is not None and row.url not in self._active
            if late or idle:
                await self.provisioner.terminate(row.id)
                self._end(row, ReplicaState.SHUTTING_DOWN, row.reason, None)

    def _retire_old_versions(self) -> None:
        """Replicas of a former version go when as many of this one are ready as are wanted."""
        rows = self.state.replicas()
        old = [
            row for row in rows if row.version != self.service.version and row.state is not ReplicaState.SHUTTING_DOWN
        ]
        ready = sum(row.version == self.service.version and row.state is ReplicaState.READY for row in rows)
        if old and ready >= self.decision.target:
            with self.state.transaction("new version"):
                for row in old:
                    self._begin_to_end(row, f"version {self.service.version} has taken over")

    async def _push(self) -> None:
        """Tells the proxy who is ready. Those that are draining stay known to it until their answers are over."""
        now_s = self.state.now_s
        self._lost = {url: when_s for url, when_s in self._lost.items() if now_s - when_s < 5.0}
        ready = []
        for row in self.state.replicas():
            if row.state is ReplicaState.READY and row.url:
                if row.created_s > self._lost.get(row.url, float("inf")):  # another one at its address
                    del self._lost[row.url]
                if row.url not in self._lost:
                    ready.append(row.url)
        self._active = await self.proxy.push(ready, list(self._lost))
