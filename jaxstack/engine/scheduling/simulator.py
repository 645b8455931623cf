"""A replica without a model: the engine's own scheduler, its pages, prefix cache and policy, under a virtual clock.

Nothing is imitated but the device. Requests go through the `Scheduler` in the order of calls in which the engine's
pipeline makes them (plan the next step, launch it, settle the one before), steps take what a cost model says, and
tokens are made up. So with the same arrivals the decisions are the engine's, one for one; `tests` hold it to that.
Plain Python, no jax.
"""

import collections
import itertools

from jaxstack.engine.observer import Observer
from jaxstack.engine.request import FinishReason, Request, SamplingParams, Sequence
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling.driving import Arrival, Outcome
from jaxstack.engine.scheduling.policy import Policy
from jaxstack.engine.scheduling.step_cost import StepCostModel
from jaxstack.engine.step_plan import StepPlan
from jaxstack.runtime.errors import UserError

__all__ = ["SimulatedReplica", "StepCostModel", "UnfairSchedule", "VirtualClock"]

# Made-up tokens are beyond any vocabulary (and within 31 bits); in a billion no two are the same.
_MADE_UP = 1 << 30


class UnfairSchedule(AssertionError):
    """A certified policy gave two waiting clients services further apart than its bound."""


class VirtualClock:
    """A clock that somebody sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, when_s: float) -> None:
        """Goes on to `when_s`, never back."""
        self.now_s = max(self.now_s, when_s)


class SimulatedReplica:
    """A `Server` (see `driving.py`) of virtual time.

    A turn has two halves, so that a fleet can interleave those of many replicas by time: `begin` takes in what has
    arrived, plans a step and launches it; `finish`, at the time that `begin` returned, settles the step before.

    Args:
      scheduler: made with `clock`; drafts are not simulated.
      costs: how long steps take.
      clock: the virtual clock.
      overlap: plan a step while the one before runs, as the engine does.
      max_model_len: of prompt and answer; by default what the pages hold.
      certify: after every step, hold the scheduler's fairness certificate against its bound.

    Attributes:
      observers: told as the engine tells its own.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        costs: StepCostModel,
        clock: VirtualClock,
        *,
        overlap: bool = True,
        max_model_len: int | None = None,
        certify: bool = True,
        number: int = 0,
    ):
        if scheduler.speculation:
            raise UserError(f"speculation: found {scheduler.speculation}, expected 0: the simulator guesses nothing")
        self.scheduler, self.costs, self.clock = scheduler, costs, clock
        self.observers: list[Observer] = []
        self.number = number
        self.launches = self.steps = 0
        self._overlap, self._certify = overlap, certify
        room = scheduler.pool.size * scheduler.page_size
        self._max_model_len = min(max_model_len or room, room)
        self._inbox: collections.deque[tuple[Arrival, Request]] = collections.deque()
        self._gone: list[Outcome] = []  # given up, and not told yet
        self._open: dict[str, tuple[Arrival, Sequence]] = {}
        self._leaving: list[tuple[float, Sequence]] = []
        self._order = itertools.count()
        self._tokens = itertools.count()
        self._planned: StepPlan | None = None
        self._settle_only = False
        self._in_flight: tuple[StepPlan, float, float] | None = None  # the step, when it began and when it ends

    @classmethod
    def of(
        cls,
        policy: Policy,
        costs: StepCostModel,
        *,
        num_pages: int = 384,
        page_size: int = 16,
        max_sequences: int = 16,
        max_batch_tokens: int = 512,
        clock: VirtualClock | None = None,
        overlap: bool = True,
        certify: bool = True,
        number: int = 0,
    ) -> "SimulatedReplica":
        """A replica with an engine's settings."""
        clock = clock or VirtualClock()
        scheduler = Scheduler(
            policy,
            num_pages=num_pages,
            page_size=page_size,
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            clock=clock,
        )
        return cls(scheduler, costs, clock, overlap=overlap, certify=certify, number=number)

    @property
    def now_s(self) -> float:
        return self.clock.now_s

    @property
    def place(self) -> int:
        """Steps launched plus steps settled."""
        return self.launches + self.steps

    @property
    def unfinished(self) -> int:
        """Requests here that are not over."""
        return len(self._open) + len(self._inbox)

    def arrival_of(self, sequence: Sequence) -> Arrival:
        """What an open sequence came as."""
        return self._open[sequence.request_id][0]

    def submit(self, arrival: Arrival) -> None:
        """Lets a request in before the next step is planned.

        Raises:
          UserError: it could never run: prompt and answer are longer than the window or than all pages together.
        """
        wanted = len(arrival.prompt) + (arrival.max_tokens or arrival.output_tokens)
        if not arrival.prompt or arrival.output_tokens < 1 or wanted > self._max_model_len:
            raise UserError(
                f"a request of {arrival.client!r}: found {len(arrival.prompt)} tokens of prompt and "
                f"{wanted - len(arrival.prompt)} to come, expected at least 1 of each and {self._max_model_len} at most"
            )
        order = next(self._order)
        limit = arrival.max_tokens or arrival.output_tokens
        request = Request(
            request_id=f"request-{order}",
            prompt=arrival.prompt,
            sampling=SamplingParams(max_tokens=limit),
            arrival_s=arrival.at_s if 0 < arrival.at_s < self.now_s else self.now_s,
            order=order,
            max_tokens=limit,
            seed=0,
            client=arrival.client,
            namespace=arrival.namespace,
            unfinished=1,
            priority=arrival.priority,
        )
        self._inbox.append((arrival, request))

    def turn(self) -> list[Outcome] | None:
        """One turn of the engine. None when there was nothing to do."""
        due_s = self.begin()
        if due_s is None:
            return None
        self.clock.advance(due_s)
        return self.finish()

    def wait_until(self, when_s: float) -> None:
        self.clock.advance(when_s)

    # The two halves of a turn.

    def begin(self) -> float | None:
        """Takes requests in, plans the next step and launches it. Returns when `finish` is due; None if idle."""
        ends_s = self.now_s if self._in_flight is None else self._in_flight[2]
        if self._settle_only:
            return ends_s
        self._take_in()
        self._planned = self.scheduler.plan()
        if self._planned is not None and self._planned.rows:
            self.scheduler.launched(self._planned)
            self.launches += 1
        elif self._planned is not None and self._in_flight is None and not self._gone:
            return None
        return ends_s

    def finish(self) -> list[Outcome]:
        """Settles the step in flight, whose end the clock shows; returns the requests that are over."""
        began_s = self.now_s
        outcomes = self._settle()
        if self._settle_only:
            self._settle_only = False
            return outcomes
        plan = self._planned
        if plan is None:  # pages were short, and the step in flight had to settle before the next could be planned
            plan = self.scheduler.plan()
            assert plan is not None
            if plan.rows:
                self.scheduler.launched(plan)
                self.launches += 1
        if plan.rows:
            self._in_flight = (plan, began_s, began_s + self.costs.of(plan))
            over = all(row.sequence.finish_reason is not None for row in plan.rows)
            self._settle_only = not self._overlap or over
        return outcomes

    # Inside.

    def _take_in(self) -> None:
        idle = self._in_flight is None and not self._open
        while self._inbox:
            arrival, request = self._inbox[0]
            # A recorded request waits for its place; if that will not come any more, it enters at once.
            if arrival.enters_at is not None and arrival.enters_at > self.place and not idle:
                break
            self._inbox.popleft()
            idle = False
            for observer in self.observers:
                observer.on_enter(request, self.place)
            sequence = Sequence(request, 0, list(request.prompt))
            self._open[request.request_id] = (arrival, sequence)
            self.scheduler.add(sequence)
            if arrival.leaves_after_s is not None:
                self._leaving.append((request.arrival_s + arrival.leaves_after_s, sequence))
        for entry in [entry for entry in self._leaving if entry[0] <= self.now_s]:
            self._leaving.remove(entry)
            if entry[1].finish_reason is None:
                self._gone.append(self._end(entry[1], "abort"))

    def _settle(self) -> list[Outcome]:
        outcomes, self._gone = self._gone, []
        if self._in_flight is None:
            return outcomes
        (plan, began_s, ends_s), self._in_flight = self._in_flight, None
        self.steps += 1
        self.scheduler.settled(plan)
        for observer in self.observers:
            observer.on_step(plan, self.costs.shapes.rows(plan), began_s, ends_s)
        for row in plan.rows:
            sequence = row.sequence
            if not row.samples or sequence.finish_reason is not None:
                continue
            request = sequence.request
            arrival, _ = self._open[request.request_id]
            made = sequence.generated
            answer = arrival.answer
            sequence.tokens.append(self._made_up() if answer is None else answer[made])
            request.token_times.append(self.now_s)
            if request.first_token_s is None:
                request.first_token_s = self.now_s
            if sequence.generated >= arrival.output_tokens:
                reason: FinishReason = "length" if sequence.generated >= request.max_tokens else "stop"
                outcomes.append(self._end(sequence, reason))
        if self._certify:
            self._check_fairness()
        return outcomes

    def _end(self, sequence: Sequence, reason: FinishReason) -> Outcome:
        request = sequence.request
        sequence.finish_reason = reason
        self.scheduler.finish(sequence)
        for observer in self.observers:
            observer.on_leave(request, [sequence], self.place)
        request.unfinished = 0
        arrival, _ = self._open.pop(request.request_id)
        return Outcome(
            arrival,
            request.arrival_s,
            request.scheduled_s,
            request.first_token_s,
            self.now_s,
            request.cached_tokens or 0,
            tuple(sequence.tokens[len(request.prompt) :]),
            reason,
            self.number,
        )

    def _made_up(self) -> int:
        """A token that nobody else has; odd factors scatter them, each replica's otherwise."""
        return _MADE_UP + (next(self._tokens) * 0x9E3779B1 + self.number * 0x85EBCA6B) % _MADE_UP

    def _check_fairness(self) -> None:
        certificate = self.scheduler.steward.certificate
        if certificate.bound is not None and certificate.max_gap > certificate.bound:
            raise UnfairSchedule(
                f"at {self.now_s:.3f} s the services of {certificate.pair} are {certificate.max_gap} apart, more than "
                f"the bound {certificate.bound}"
            )
