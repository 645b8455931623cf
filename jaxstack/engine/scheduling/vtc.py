"""Virtual token counters (arXiv 2401.00588): the client that has had least goes next."""

import heapq
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxstack.engine.scheduling.cost import ServiceCost
from jaxstack.engine.scheduling.policy import Admission, ClientBlind, Schedulable, SchedulerView, TryAdmit


class VirtualTokenCounter(ClientBlind):
    """Admits the oldest request of the client with the smallest counter; one that does not fit holds up the rest.

    A counter is the service a client has had, divided by its weight. A client that comes back after having nothing to
    wait for is lifted to the smallest counter of those who wait, so that idle time is no credit.

    Args:
      cost: what service costs.
      weights: shares of clients, integers >= 1; of others 1.
      max_clients: counters kept; beyond, the smallest of those who have nothing in the engine are forgotten.
    """

    name = "vtc"

    def __init__(
        self,
        cost: ServiceCost | None = None,
        weights: Mapping[str, int] = MappingProxyType({}),
        max_clients: int = 10_000,
    ):
        super().__init__(cost, weights)
        # Counters are integers in units of 1 / (what every weight divides).
        self._unit = math.lcm(*self.weights.values()) if self.weights else 1
        self._counters: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self._max_clients = max_clients

    def schedule(self, waiting: Sequence[Any], view: SchedulerView, try_admit: TryAdmit) -> None:
        queues: dict[str, list[Any]] = {}
        for request in sorted(waiting, key=lambda r: r.order, reverse=True):
            queues.setdefault(request.client, []).append(request)  # the oldest last
        heap = [(self._counters.get(client, 0), queue[-1].order, client) for client, queue in queues.items()]
        heapq.heapify(heap)
        put_off: set[str] = set()
        while heap:
            _, order, client = heap[0]
            queue = queues[client]
            if not queue:  # what it has left can start a step later, and it is its turn
                return
            admission = try_admit(queue.pop())
            if admission is Admission.LATER:
                put_off.add(client)
            elif admission in (Admission.ADMITTED, Admission.GONE):
                if queue or client in put_off:
                    order = queue[-1].order if queue else order
                    heapq.heapreplace(heap, (self._counters.get(client, 0), order, client))
                else:
                    heapq.heappop(heap)
            else:
                return

    def on_arrival(self, request: Schedulable, view: SchedulerView) -> None:
        client = request.client
        if not view.waiting_clients.get(client):
            waiting = [self._counters.get(other, 0) for other in view.waiting_clients]
            self._counters[client] = max(self._counters.get(client, 0), min(waiting, default=0))
            self._forget()
        self._open[client] = self._open.get(client, 0) + 1

    def on_admit(self, request: Schedulable, cached: int) -> None:
        self._charge(request.client, self.cost.of_prompt(request.prompt_tokens, cached))

    def on_tokens(self, counts: Mapping[str, int]) -> None:
        for client, tokens in counts.items():
            self._charge(client, self.cost.of_output(tokens))

    def on_finish(self, request: Schedulable, uncomputed: int) -> None:
        self._charge(request.client, -self.cost.extend * uncomputed)
        left = self._open.get(request.client, 0) - 1
        if left > 0:
            self._open[request.client] = left
        else:
            self._open.pop(request.client, None)

    def bound(self, longest_prompt: int, output_tokens: int) -> int | None:
        """`2 (w_e L_in + w_q R)`: the counters of those who wait are never further apart than half of it, since whoever
        was admitted had least, and has had one prompt and its running answers since.

        (The paper's `2 max(w_p L_in, w_q M)` says the same with an M that counts the running batch's prompts, too.)
        """
        return 2 * (self.cost.extend * longest_prompt + self.cost.output * output_tokens)

    def counters(self) -> dict[str, float]:
        """Each client's service per unit of weight, lifts included. Callable from any thread."""
        return {client: value / self._unit for client, value in list(self._counters.items())}

    def deficits(self) -> Mapping[str, int]:
        """How far each client is behind the one that has had most: who has had least goes next."""
        counters = list(self._counters.items())
        most = max((value for _, value in counters), default=0)
        return {client: (most - value) // self._unit for client, value in counters}

    def snapshot(self) -> dict[str, Any]:
        return {"unit": self._unit, "counters": sorted(self._counters.items())}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        self._counters = {client: value * self._unit // snapshot["unit"] for client, value in snapshot["counters"]}

    def _charge(self, client: str, service: int) -> None:
        step = service * self._unit // self.weights.get(client, 1)
        self._counters[client] = self._counters.get(client, 0) + step

    def _forget(self) -> None:
        if len(self._counters) > self._max_clients:
            idle = [(value, client) for client, value in self._counters.items() if client not in self._open]
            for _, client in heapq.nsmallest(max(1, self._max_clients // 10), idle):
                del self._counters[client]
