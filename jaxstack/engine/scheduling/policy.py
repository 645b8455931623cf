"""The policy protocol: what the scheduler asks a policy, and what it tells it."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol


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
    def order(self) -> tuple[int, int]: ...


class SchedulerView(Protocol):
    """Read-only state of the engine at the time of a decision."""

    @property
    def now_s(self) -> float: ...
    @property
    def free_pages(self) -> int: ...

    def cached_tokens(self, request: Any) -> int:
        """Prompt tokens of `request` that the prefix cache holds now."""
        ...


class Policy(Protocol):
    """Orders the waiting requests and picks whom to preempt. Told of every token, so that it can keep accounts per
    client.
    """

    def order(self, waiting: Sequence[Schedulable], view: SchedulerView) -> Iterable[Schedulable]:
        """The waiting requests, the one to admit first at the front. Must return each of them once.

        The scheduler then moves lower priorities to the front; among equals this order stands.
        """
        ...

    def victim(self, running: Sequence[Schedulable]) -> Schedulable:
        """Which of the running requests (oldest first) gives up its pages when there are none left.

        Asked among those whose priority comes last; the oldest of the first priority is never among them.
        """
        ...

    def on_admit(self, request: Schedulable, cached: int) -> None:
        """`request` starts; `cached` of its prompt tokens came from the prefix cache."""
        ...

    def on_tokens(self, request: Schedulable, extended: int, generated: int) -> None:
        """A step computed `extended` prompt tokens of `request` and produced `generated` new ones."""
        ...

    def on_finish(self, request: Schedulable) -> None:
        """`request` is over, whatever the reason."""
        ...
