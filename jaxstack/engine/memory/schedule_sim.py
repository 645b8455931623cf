"""When each task of a schedule runs: an event simulation over lanes.

Three ways to run the link's lane to the device; the others keep the launch order. `fixed` keeps it there as well.
`paced` takes the first in launch order that could run, but no page of weights before the micro-batch has started that
it goes with: as good as `fixed` when times are as planned, and it passes over what is late. `eager` has no pace and
takes what a micro-batch waits for first: pages run ahead until no slot is free, and then the link idles.
"""

import bisect
import dataclasses
import heapq
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Literal, get_args

from jaxstack.engine.memory.schedule import TO_DEVICE, Schedule, ScheduleFault, Task, TaskId
from jaxstack.runtime.errors import UserError

Dispatch = Literal["fixed", "paced", "eager"]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When each task of `schedule` starts and ends, in seconds, in its order."""

    schedule: Schedule
    dispatch: Dispatch
    starts: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Until all is over."""
        return max(self.ends, default=0.0)

    @cached_property
    def window(self) -> tuple[float, float]:
        """From the end of the first step to that of the last but one: neither start-up nor the end without new pages.

        Raises:
          UserError: fewer than three steps.
        """
        steps = self.schedule.steps
        if steps < 3:
            raise UserError(f"steps: found {steps}, expected at least 3 for a period in the steady state")
        return self.end_of_step(0), self.end_of_step(steps - 2)

    def end_of_step(self, step: int) -> float:
        """When the device is through with the last micro-batch of the last layer."""
        return self.ends[self.place(TaskId("C", step, self.schedule.layers - 1, self.schedule.micro_batches - 1))]

    @property
    def period(self) -> float:
        """Seconds of a layer in the steady state."""
        start, end = self.window
        return (end - start) / ((self.schedule.steps - 2) * self.schedule.layers)

    @cached_property
    def _places(self) -> Mapping[Hashable, int]:
        return {task.id: place for place, task in enumerate(self.schedule.tasks)}

    def place(self, task: Hashable) -> int:
        """Where a task is in the launch order."""
        return self._places[task]

    def busy(self, window: tuple[float, float] | None = None) -> dict[str, float]:
        """The share of the time that each lane works, of all or of a window."""
        start, end = window or (0.0, self.seconds)
        lanes = dict.fromkeys(self.schedule.lanes, 0.0)
        for task, begins, over in zip(self.schedule.tasks, self.starts, self.ends):
            lanes[task.lane] += max(0.0, min(over, end) - max(begins, start))
        return {lane: time / (end - start) if end > start else 0.0 for lane, time in lanes.items()}

    def idle(self, lane: str, window: tuple[float, float] | None = None) -> dict[str, float]:
        """What a lane waited for: kind of task -> the share of the time that it idled while such a one ran.

        A gap before a task is traced back through the tasks that it waited for, each one for the time that it ran;
        "start" is what nothing delayed.
        """
        start, end = window or (0.0, self.seconds)
        causes: dict[str, float] = {}

        def blame(kind: str, begins: float, over: float) -> None:
            length = min(over, end) - max(begins, start)
            if length > 0:
                causes[kind] = causes.get(kind, 0.0) + length / (end - start)

        over = 0.0
        for place in self._by_lane[lane]:
            at, cursor = self.starts[place], place
            while at > over:
                cause = self._delayed_by(cursor)
                if cause is None:
                    blame("start", over, at)
                    break
                begins = max(over, self.starts[cause])
                blame(_kind(self.schedule.tasks[cause]), begins, at)
                at, cursor = begins, cause
            over = self.ends[place]
        return causes

    @cached_property
    def _by_lane(self) -> dict[str, list[int]]:
        """The tasks of each lane in the order in which they ran."""
        order: dict[str, list[int]] = {lane: [] for lane in self.schedule.lanes}
        for place, task in enumerate(self.schedule.tasks):
            order[task.lane].append(place)
        for places in order.values():
            places.sort(key=lambda place: (self.starts[place], self.ends[place], place))
        return order

    @cached_property
    def _lane_starts(self) -> dict[str, list[float]]:
        return {lane: [self.starts[place] for place in places] for lane, places in self._by_lane.items()}

    def _delayed_by(self, place: int) -> int | None:
        """The last one that the task waited for: one that it needs, its pacer, or the one before it on its lane."""
        task = self.schedule.tasks[place]
        candidates = [(self.ends[self._places[need]], self._places[need]) for need in task.needs]
        order = self._by_lane[task.lane]
        rank = bisect.bisect_left(self._lane_starts[task.lane], self.starts[place])
        rank = order.index(place, rank)
        if rank:
            candidates.append((self.ends[order[rank - 1]], order[rank - 1]))
        if self.dispatch == "paced" and task.paced_by is not None and task.lane == TO_DEVICE:
            pacer = self._places[task.paced_by]
            delayed = self._delayed_by(pacer)
            if delayed is not None:
                candidates.append((self.ends[delayed], delayed))
        return max(candidates)[1] if candidates else None

    def peak_bytes(self) -> dict[str, int]:
        """The most that each space holds at once. A slot counts from the start of who fills it to the end of who frees
        it.
        """
        changes: dict[str, list[tuple[float, int]]] = {slot.space: [] for slot in self.schedule.slots.values()}
        full = set()
        for name, _ in self.schedule.initial:
            slot = self.schedule.slots[name]
            changes[slot.space].append((0.0, slot.size_bytes))
            full.add(name)
        for task, begins, over in zip(self.schedule.tasks, self.starts, self.ends):
            for name, _ in task.writes:
                if name not in full:
                    slot = self.schedule.slots[name]
                    changes[slot.space].append((begins, slot.size_bytes))
                    full.add(name)
            for name in task.frees:
                slot = self.schedule.slots[name]
                changes[slot.space].append((over, -slot.size_bytes))
                full.discard(name)
        peaks = {}
        for space, found in changes.items():
            now = peak = 0
            for _, change in sorted(found):
                now += change
                peak = max(peak, now)
            peaks[space] = peak
        return peaks


def simulate(schedule: Schedule, dispatch: Dispatch = "fixed") -> Timeline:
    """Runs the schedule under a virtual clock.

    Raises:
      UserError: an unknown dispatch.
      ScheduleFault: tasks that wait for one another.
    """
    if dispatch not in get_args(Dispatch):
        raise UserError(f"dispatch: found {dispatch!r}, expected one of {', '.join(get_args(Dispatch))}")
    starts, ends = _fixed(schedule) if dispatch == "fixed" else _reordered(schedule, paced=dispatch == "paced")
    return Timeline(schedule, dispatch, tuple(starts), tuple(ends))


def _kind(task: Task) -> str:
    return task.id.kind if isinstance(task.id, TaskId) else str(task.id)


def _fixed(schedule: Schedule) -> tuple[list[float], list[float]]:
    over: dict[Hashable, float] = {}
    free = dict.fromkeys(schedule.lanes, 0.0)
    starts, ends = [], []
    for task in schedule.tasks:
        start = free[task.lane]
        for need in task.needs:
            if need not in over:
                raise ScheduleFault(f"task {task.id} needs {need}, which is not launched before it")
            start = max(start, over[need])
        end = start + task.seconds
        over[task.id] = free[task.lane] = end
        starts.append(start)
        ends.append(end)
    return starts, ends


def _reordered(schedule: Schedule, *, paced: bool) -> tuple[list[float], list[float]]:
    tasks = schedule.tasks
    places = {task.id: place for place, task in enumerate(tasks)}
    waiting = [len(task.needs) for task in tasks]  # for so many more events
    wakes_when_over: list[list[int]] = [[] for _ in tasks]
    wakes_when_started: list[list[int]] = [[] for _ in tasks]
    queues: dict[str, list[int]] = {lane: [] for lane in schedule.lanes}
    for place, task in enumerate(tasks):
        for need in task.needs:
            wakes_when_over[places[need]].append(place)
        if task.lane != TO_DEVICE:
            queues[task.lane].append(place)
        elif paced and task.paced_by is not None:
            waiting[place] += 1
            wakes_when_started[places[task.paced_by]].append(place)
    heads = dict.fromkeys(queues, 0)
    idle = dict.fromkeys(queues, True)
    rank = [0 if paced else task.urgency for task in tasks]
    ready = [(rank[place], place) for place, task in enumerate(tasks) if task.lane == TO_DEVICE and not waiting[place]]
    heapq.heapify(ready)
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    events: list[tuple[float, int]] = []
    now, left = 0.0, len(tasks)

    def wake(who: list[int]) -> None:
        for place in who:
            waiting[place] -= 1
            if not waiting[place] and tasks[place].lane == TO_DEVICE:
                heapq.heappush(ready, (rank[place], place))

    def start(place: int) -> None:
        lane = tasks[place].lane
        idle[lane] = False
        starts[place], ends[place] = now, now + tasks[place].seconds
        heapq.heappush(events, (ends[place], place))
        wake(wakes_when_started[place])

    while left:
        for lane, queue in queues.items():
            if lane == TO_DEVICE or not idle[lane] or heads[lane] == len(queue):
                continue
            head = queue[heads[lane]]
            if not waiting[head]:
                heads[lane] += 1
                start(head)
        # After the others: what starts now lets its page go now.
        if ready and idle[TO_DEVICE]:
            start(heapq.heappop(ready)[1])
        if not events:
            stuck = [str(task.id) for place, task in enumerate(tasks) if waiting[place]]
            raise ScheduleFault(f"tasks that wait for one another: {', '.join(stuck[:4])}")
        now = events[0][0]
        while events and events[0][0] == now:
            _, place = heapq.heappop(events)
            idle[tasks[place].lane] = True
            left -= 1
            wake(wakes_when_over[place])
    return starts, ends
