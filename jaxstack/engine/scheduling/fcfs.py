"""First come, first served."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxstack.engine.scheduling.policy import Admission, ClientBlind, SchedulerView, TryAdmit


class FirstComeFirstServed(ClientBlind):
    """By arrival; one that does not fit holds up those behind it. A preempted request keeps its place, so it comes back
    before those that arrived after it.
    """

    name = "fcfs"

    def order(self, waiting: Sequence[Any], view: SchedulerView) -> Iterable[Any]:
        return sorted(waiting, key=lambda request: request.order)

    def schedule(self, waiting: Sequence[Any], view: SchedulerView, try_admit: TryAdmit) -> None:
        for request in self.order(waiting, view):
            if try_admit(request) in (Admission.NO_ROOM, Admission.FULL):
                return
