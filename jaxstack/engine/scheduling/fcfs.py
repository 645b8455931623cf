"""First come, first served."""

from collections.abc import Iterable, Sequence

from jaxstack.engine.scheduling.policy import Schedulable, SchedulerView


class FirstComeFirstServed:
    """By arrival. A preempted request keeps its place, so it comes back before those that arrived after it."""

    def order(self, waiting: Sequence[Schedulable], view: SchedulerView) -> Iterable[Schedulable]:
        return sorted(waiting, key=lambda request: request.order)

    def victim(self, running: Sequence[Schedulable]) -> Schedulable:
        return max(running, key=lambda request: request.order)

    def on_admit(self, request: Schedulable, cached: int) -> None:
        pass

    def on_tokens(self, request: Schedulable, extended: int, generated: int) -> None:
        pass

    def on_finish(self, request: Schedulable) -> None:
        pass
