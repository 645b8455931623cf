"""Deficit longest prefix match (arXiv 2501.14312, algorithm 1): SGLang's order among the clients that have credit."""

import collections
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from jaxstack.engine.scheduling.cost import ServiceCost, check_integer
from jaxstack.engine.scheduling.ledger import DeficitLedger
from jaxstack.engine.scheduling.lpm import by_cached_prefix
from jaxstack.engine.scheduling.policy import Admission, ClientBlind, Schedulable, SchedulerView, TryAdmit
from jaxstack.engine.scheduling.quantum import RecentQuantum

# Requests found too large for the free memory in one step, after which no smaller ones are looked for.
_MOST_REFUSED = 16


class DeficitLongestPrefixMatch(ClientBlind):
    """Of the clients with credit, the request with the longest cached prefix; when nobody who waits has any, every
    debtor gets a quantum.

    A request that does not fit holds up nobody with credit, and a client's cold requests wait behind its cached ones.
    But once `max_overtakes` requests that came later have been admitted before it, because they fitted or as those of
    the same client, it goes first, and the next free memory is kept for it. (Other clients get before it until they are
    in debt; that needs no count.)

    Two clients that wait all the time get the same refills, so their service per weight differs by `2 (U + Q)` at most,
    U being the largest debt (theorem 4.1; `bound`). Credit is granted only when nobody who waits has any left, be it
    that there is no memory for him: it is not strictly work-conserving, and `blocked_steps` counts where that showed.

    Args:
      quantum: credit granted at a refill to a client of weight 1; None goes by what recent requests cost.
      cost: what service costs.
      weights: shares of clients, integers >= 1; of others 1.
      max_overtakes: see above; None for no limit.
      max_clients: accounts kept (`DeficitLedger`).

    Attributes:
      blocked_steps: steps that had room which only clients without credit could have used.
      refills: how many there were.

    Raises:
      UserError: a value outside its range; the message names it.
    """

    name = "dlpm"

    def __init__(
        self,
        quantum: int | None = None,
        cost: ServiceCost | None = None,
        weights: Mapping[str, int] = MappingProxyType({}),
        *,
        max_overtakes: int | None = 64,
        max_clients: int = 10_000,
    ):
        super().__init__(cost, weights)
        if max_overtakes is not None:
            check_integer("max_overtakes", max_overtakes, 1)
        self._recent = RecentQuantum() if quantum is None else None
        self.ledger: DeficitLedger[str] = DeficitLedger(1 if quantum is None else quantum, self.weights, max_clients)
        self.max_overtakes = max_overtakes
        self.blocked_steps = self.refills = 0
        self._open: collections.Counter[str] = collections.Counter()
        self._overtaken: dict[Any, int] = {}
        self._paid: dict[str, int] = {}  # of the prompts of open requests, for the default quantum

    @property
    def quantum(self) -> int:
        return self.ledger.quantum

    def schedule(self, waiting: Sequence[Any], view: SchedulerView, try_admit: TryAdmit) -> None:
        deficit = self.ledger.deficit
        left = self._ordered(waiting, view)
        clients = collections.Counter(request.client for request in left)
        held: list[Any] = []  # had credit, and cannot start in this step
        started: set[Any] = set()
        refused: set[Any] = set()  # of these, the ones for lack of memory
        credit_waits: bool | None = None  # whether a client that waits has credit; None: look again
        changed = True
        while changed and left:
            changed, passed = False, []
            for request in left:
                client = request.client
                if deficit(client) <= 0:
                    if credit_waits is None:
                        credit_waits = any(deficit(c) > 0 for c in clients)
                    if not credit_waits:
                        # Not where it helps nobody: the prompt that filled the step has been charged and is computed
                        # in part, and if it is aborted, what it gets back must not come on top of a refill.
                        if view.full:
                            return
                        self._refill(clients)
                        credit_waits = True
                    if deficit(client) <= 0:
                        passed.append(request)
                        continue
                admission = try_admit(request)
                if admission is Admission.FULL:
                    return
                if admission in (Admission.ADMITTED, Admission.GONE):
                    clients[client] -= 1
                    if not clients[client]:
                        del clients[client]
                    changed, credit_waits = True, None
                    started.add(request)
                    if admission is Admission.ADMITTED:
                        self._count_overtakes(request, waiting, started, refused)
                    continue
                held.append(request)
                if admission is Admission.NO_ROOM:
                    refused.add(request)
                    if len(refused) >= _MOST_REFUSED or self._is_due(request):
                        self.blocked_steps += bool(passed)
                        return
            left = passed
        self.blocked_steps += bool(left and held)

    def _ordered(self, waiting: Sequence[Any], view: SchedulerView) -> list[Any]:
        ranked = by_cached_prefix(waiting, view)
        if self.max_overtakes is None or not self._overtaken:
            return ranked
        if not any(count >= self.max_overtakes for count in self._overtaken.values()):
            return ranked
        due = sorted(filter(self._is_due, ranked), key=lambda request: request.order)
        return due + [request for request in ranked if not self._is_due(request)]

    def _is_due(self, request: Any) -> bool:
        return self.max_overtakes is not None and self._overtaken.get(request, 0) >= self.max_overtakes

    def _count_overtakes(self, admitted: Any, waiting: Sequence[Any], started: Set[Any], refused: Set[Any]) -> None:
        """`admitted` goes before older requests: those of its client that still wait, and those that did not fit."""
        self._overtaken.pop(admitted, None)
        if self.max_overtakes is None:
            return
        order, client = admitted.order, admitted.client
        for other in waiting:
            passed_by = other.client == client or other in refused
            if passed_by and other.order < order and other not in started:
                self._overtaken[other] = self._overtaken.get(other, 0) + 1

    def _refill(self, waiting_clients: Mapping[str, int]) -> None:
        if self._recent is not None:
            self.ledger.quantum = self._recent.value
        self.refills += self.ledger.refill_until_credit(waiting_clients)

    def on_arrival(self, request: Schedulable, view: SchedulerView) -> None:
        self.ledger.seen(request.client)
        self._open[request.client] += 1
        if self._recent is not None:
            self._recent.expect(self.cost.of_prompt(request.prompt_tokens, 0))

    def on_admit(self, request: Schedulable, cached: int) -> None:
        paid = self.cost.of_prompt(request.prompt_tokens, cached)
        self.ledger.charge(request.client, paid)
        if self._recent is not None:
            self._paid[request.request_id] = paid

    def on_tokens(self, counts: Mapping[str, int]) -> None:
        for client, tokens in counts.items():
            self.ledger.charge(client, self.cost.of_output(tokens))

    def on_finish(self, request: Schedulable, uncomputed: int) -> None:
        client = request.client
        if uncomputed:
            self.ledger.charge(client, -self.cost.extend * uncomputed)
        self._overtaken.pop(request, None)
        self._open[client] -= 1
        if self._open[client] <= 0:
            del self._open[client]
            self.ledger.idle(client)
        paid = self._paid.pop(request.request_id, None)
        if self._recent is not None and paid is not None:
            output = self.cost.of_output(request.generated)
            self._recent.learn(paid + output, self.cost.of_prompt(request.prompt_tokens, 0) + output)

    def bound(self, longest_prompt: int, output_tokens: int) -> int | None:
        """`2 (U + Q)` with `U = w_e L_in + w_q R`: a deficit stays above -U and never exceeds a client's grant."""
        debt = self.cost.extend * longest_prompt + self.cost.output * output_tokens
        return 2 * (debt + self.ledger.largest_quantum)

    def deficits(self) -> Mapping[str, int]:
        return self.ledger.deficits()

    def snapshot(self) -> dict[str, Any]:
        return self.ledger.snapshot()

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        self.ledger.restore(snapshot)
