"""Between scheduler and policy: passes on what happens, keeps the accounts, stands in when the policy fails."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxstack.engine.scheduling.accounts import ClientAccount, ClientAccounts
from jaxstack.engine.scheduling.certificate import FairnessCertificate, tokens_after_admission
from jaxstack.engine.scheduling.fcfs import FirstComeFirstServed
from jaxstack.engine.scheduling.policy import Policy, SchedulerView, TryAdmit

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Room:
    """What bounds the tokens that a client may still get once it is in debt.

    Args:
      sequences: answers generated at once.
      cache_tokens: tokens that the KV cache holds.
      reserve: whether pages for whole answers are set aside at admission.
      in_flight: tokens of steps that are under way while the next is planned.
      lock_step: a step gives each answer one token at most (no guesses).
    """

    sequences: int
    cache_tokens: int
    reserve: bool = False
    in_flight: int = 0
    lock_step: bool = True

    def output_tokens(self, longest_output: int) -> int:
        """R of the largest debt, for answers of at most `longest_output` tokens."""
        if not self.lock_step:
            return self.sequences * longest_output + self.in_flight
        after = tokens_after_admission(longest_output, self.sequences, self.cache_tokens, reserve=self.reserve)
        return after + self.in_flight


@dataclasses.dataclass(frozen=True)
class FairnessReading:
    """What the accounts, the policy and the certificate say.

    Attributes:
      policy: its name.
      gap, max_gap, bound, pair, since_s, exact: see `FairnessCertificate`.
      backlogged: clients compared now.
      errors: failures of the policy.
      blocked_steps: steps whose room only clients in debt could have used.
      crowded: clients that share one account because the ledger is full.
      clients: every client's account.
      waiting: how many requests of a client wait; only those with some.
      deficits: every client's credit, below 0 a debt.
    """

    policy: str
    gap: float
    max_gap: float
    bound: int | None
    pair: tuple[str, str] | None
    since_s: float | None
    exact: bool
    backlogged: int
    errors: int
    blocked_steps: int
    crowded: int
    clients: Mapping[str, ClientAccount]
    waiting: Mapping[str, int]
    deficits: Mapping[str, int]

    @property
    def gap_over_bound(self) -> float | None:
        return self.max_gap / self.bound if self.bound else None


class Steward:
    """See the module's docstring. Used by one thread at a time, but for what is said to be callable from any.

    A policy that raises is logged, once, and counted in `errors`; first come, first served decides in that step, and
    nobody is lost. `policy` may be replaced between two steps.
    """

    def __init__(self, policy: Policy, room: Room):
        self.policy = policy
        self.accounts = ClientAccounts()
        self.certificate = FairnessCertificate(policy.cost, None, policy.weights)
        self.errors = 0
        self._room = room
        self._longest_prompt = self._longest_output = self._output_tokens = 0
        self._uncomputed: dict[Any, int] = {}
        self._stand_in = FirstComeFirstServed()

    # What happens to requests.

    def arrived(self, sequence: Any, view: SchedulerView) -> None:
        """`sequence` is about to wait."""
        prompt, output = sequence.prompt_tokens, sequence.max_tokens
        if prompt > self._longest_prompt or output > self._longest_output:
            self._longest_prompt = max(self._longest_prompt, prompt)
            self._longest_output = max(self._longest_output, output)
            self._output_tokens = self._room.output_tokens(self._longest_output)
        self._tell(self.policy.on_arrival, sequence, view)
        self.accounts.arrived(sequence.client)

    def started(self, sequence: Any, cached: int, wait_s: float) -> None:
        """The first choice of a request was admitted: its prompt is charged."""
        client, prompt = sequence.client, sequence.prompt_tokens
        self._uncomputed[sequence.request] = prompt - cached
        self.accounts.started(client, wait_s)
        self.accounts.given(client, self.policy.cost.of_prompt(prompt, cached))
        self._tell(self.policy.on_admit, sequence, cached)

    def computes(self, sequence: Any, end: int) -> None:
        """A launched step computes the tokens of `sequence` up to `end`."""
        left = self._uncomputed.get(sequence.request)
        if left is not None:
            left = min(left, sequence.prompt_tokens - end)
            if left > 0:
                self._uncomputed[sequence.request] = left
            else:
                del self._uncomputed[sequence.request]

    def preempted(self, sequence: Any) -> None:
        """`sequence` waits again. It has been charged, and will not be given back what it computes twice."""
        self._uncomputed.pop(sequence.request, None)
        self.accounts.waits(sequence.client)

    def generated(self, counts: Mapping[str, int]) -> None:
        """A step's tokens by client."""
        if counts:
            for client, tokens in counts.items():
                self.accounts.given(client, self.policy.cost.of_output(tokens))
            self._tell(self.policy.on_tokens, counts)

    def left(self, sequence: Any, *, last: bool) -> None:
        """`sequence` is over; `last` if it was the last choice of its request."""
        uncomputed = self._uncomputed.pop(sequence.request, 0) if last else 0
        if uncomputed:
            self.accounts.given(sequence.client, -self.policy.cost.extend * uncomputed)
        self.accounts.left(sequence.client)
        self._tell(self.policy.on_finish, sequence, uncomputed)

    def stepped(self, *, one_priority: bool, now_s: float) -> None:
        """A step has been planned. Clients that wait on different priorities are not compared: nobody promises it."""
        service = self.accounts.take()
        waiting = self.accounts.waiting if one_priority else {}
        if len(waiting) > 1:
            self.certificate.bound = self._bound()
        self.certificate.observe(service, waiting.keys(), now_s)

    # Decisions.

    def schedule(self, waiting: Sequence[Any], view: SchedulerView, try_admit: TryAdmit) -> None:
        """As `Policy.schedule`. What `try_admit` raises passes through."""
        own: list[BaseException] = []

        def admit(request: Any) -> Any:
            try:
                return try_admit(request)
            except BaseException as error:
                own.append(error)
                raise

        try:
            self.policy.schedule(waiting, view, admit)
        except Exception as error:
            if own:
                raise
            self._failed(error)
            self._stand_in.schedule(waiting, view, try_admit)

    def victim(self, running: Sequence[Any]) -> Any:
        """As `Policy.victim`."""
        try:
            victim = self.policy.victim(running)
            if any(victim is one for one in running):
                return victim
            raise ValueError(f"victim: found {victim!r}, expected one of those asked about")
        except Exception as error:
            self._failed(error)
            return self._stand_in.victim(running)

    def reading(self) -> FairnessReading:
        """Callable from any thread."""
        policy, certificate = self.policy, self.certificate
        try:
            deficits = policy.deficits()
        except Exception as error:
            self._failed(error)
            deficits = {}
        ledger = getattr(policy, "ledger", None)
        return FairnessReading(
            policy=policy.name,
            gap=certificate.gap,
            max_gap=certificate.max_gap,
            bound=certificate.bound,
            pair=certificate.pair,
            since_s=certificate.since_s,
            exact=certificate.exact,
            backlogged=certificate.backlogged,
            errors=self.errors,
            blocked_steps=getattr(policy, "blocked_steps", 0),
            crowded=0 if ledger is None else ledger.crowded,
            clients=self.accounts.all(),
            waiting=dict(self.accounts.waiting),
            deficits=deficits,
        )

    def _bound(self) -> int | None:
        try:
            return self.policy.bound(self._longest_prompt, self._output_tokens)
        except Exception as error:
            self._failed(error)
            return None

    def _tell(self, listener: Callable[..., None], *what: Any) -> None:
        try:
            listener(*what)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.errors += 1
        if self.errors == 1:
            log.error(
                "the scheduling policy %s failed; first come, first served stands in", self.policy.name, exc_info=error
            )
