"""The policy protocol: what the scheduler asks a policy, and what it tells it."""

import enum
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from jaxstack.engine.scheduling.cost import ServiceCost
from jaxstack.engine.scheduling.ledger import check_weights


class Schedulable(Protocol):
    """What a policy may know of a request."""

    @property
    def request_id(self) -> str: ...
    @property
    def client(self) -> str: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def order(self) -> tuple[int, int]:
        """Place in order of arrival; no two are the same."""
        ...

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def generated(self) -> int:
        """Tokens of its answer so far."""
        ...


class Admission(enum.Enum):
    """What became of a request that a policy chose."""

    ADMITTED = "it runs from the next step on, and has been charged for"
    NO_ROOM = "its pages do not fit now; a smaller one may"
    LATER = "a running prompt is computing the prefix it needs: the next step may find it cached"
    GONE = "it does not wait any more"
    FULL = "nothing more goes into the step"


TryAdmit = Callable[[Any], Admission]


class SchedulerView(Protocol):
    """Read-only state of the engine at the time of a decision."""

    @property
    def now_s(self) -> float: ...
    @property
    def free_pages(self) -> int: ...
    @property
    def full(self) -> bool:
        """Whether nothing more goes into the step being planned: `try_admit` would say FULL."""
        ...

    @property
    def waiting_clients(self) -> Mapping[str, int]:
        """How many requests of each client wait; only those with some."""
        ...

    def cached_tokens(self, request: Any) -> int:
        """Tokens of `request` that the prefix cache holds now."""
        ...

    def prefix_lengths(self, waiting: Sequence[Any]) -> list[int]:
        """`cached_tokens` of each of the waiting requests, quickly."""
        ...


class Policy(Protocol):
    """Decides who is admitted, and whom to preempt. Told of every token, so that it can keep accounts per client.

    Attributes:
      name: as `policy_named` knows it.
      cost: the currency of its accounts.
      weights: shares of clients; 1 of those not in it.
    """

    name: str
    cost: ServiceCost
    weights: Mapping[str, int]

    def schedule(self, waiting: Sequence[Any], view: SchedulerView, try_admit: TryAdmit) -> None:
        """Calls `try_admit`, which is the scheduler's own, with requests in the order in which they should start.

        `waiting` are those of one priority; the scheduler asks for lower ones when nothing of these lacks memory. Stop
        when told FULL. Memory is never the policy's guess: `try_admit` evicts, allocates and says what came of it.
        """
        ...

    def victim(self, running: Sequence[Any]) -> Any:
        """Which of the running requests gives up its pages when there are none left.

        Asked among those whose priority comes last; the oldest of the first priority is never among them.
        """
        ...

    def on_arrival(self, request: Schedulable, view: SchedulerView) -> None:
        """`request` has come; the view does not count it yet. Told of every choice of a request."""
        ...

    def on_admit(self, request: Schedulable, cached: int) -> None:
        """`request` starts; `cached` of its prompt tokens came from the prefix cache.

        Told once: not of its other choices, which find the prompt computed, and not again after a preemption, which
        is not the client's doing.
        """
        ...

    def on_tokens(self, counts: Mapping[str, int]) -> None:
        """A step has generated so many tokens for each client."""
        ...

    def on_finish(self, request: Schedulable, uncomputed: int) -> None:
        """`request` is over, whatever the reason. Told of every choice.

        `uncomputed` of its prompt tokens were charged at its admission and will never be computed.
        """
        ...

    def bound(self, longest_prompt: int, output_tokens: int) -> int | None:
        """The most by which the service of two clients that wait all the time may differ, per unit of weight.

        Args:
          longest_prompt: in tokens.
          output_tokens: that a client can be given after its last admission.

        Returns: None where there is no such bound.
        """
        ...

    def deficits(self) -> Mapping[str, int]:
        """The credit of each client (below 0 a debt); empty if none is kept. Callable from any thread."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Its accounts, as plain lists and numbers."""
        ...

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a snapshot."""
        ...


class ClientBlind:
    """What policies without accounts do when they are told something: nothing."""

    def __init__(self, cost: ServiceCost | None = None, weights: Mapping[str, int] = MappingProxyType({})):
        self.cost, self.weights = cost or ServiceCost(), check_weights(weights)

    def victim(self, running: Sequence[Any]) -> Any:
        """The one that came last."""
        return max(running, key=lambda request: request.order)

    def on_arrival(self, request: Schedulable, view: SchedulerView) -> None:
        pass

    def on_admit(self, request: Schedulable, cached: int) -> None:
        pass

    def on_tokens(self, counts: Mapping[str, int]) -> None:
        pass

    def on_finish(self, request: Schedulable, uncomputed: int) -> None:
        pass

    def bound(self, longest_prompt: int, output_tokens: int) -> int | None:
        return None

    def deficits(self) -> Mapping[str, int]:
        return {}

    def snapshot(self) -> dict[str, Any]:
        return {}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        pass
