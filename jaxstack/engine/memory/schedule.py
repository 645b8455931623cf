"""A schedule as data: tasks in launch order, each on one lane, with what it needs, reads, writes and frees.

Every task is launched at once, in the order of the list. A lane runs one task at a time, and by default in that order;
a task starts when its lane is free and all that it `needs` are over. The same schedule is checked here, timed by
`schedule_sim.py` and run with real arrays by a runner.

Memory is slots: a place of fixed size in one space, which holds one content or none. A content comes with the task
that writes it and goes with the one that frees it; a task that reads and writes the same slot updates it in place.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

DEVICE, HOST, TO_DEVICE, TO_HOST = "device", "host", "to_device", "to_host"
LANES = (DEVICE, HOST, TO_DEVICE, TO_HOST)
"""Computing on the device and on the host, and the two directions of the link."""


class TaskId(NamedTuple):
    """`index` is the micro-batch, or the page of weights. Any other hashable may name a task as well."""

    kind: str
    step: int
    layer: int
    index: int  # type: ignore[assignment]  # tuples have a method of the name, which nobody needs here

    def __str__(self) -> str:
        return f"{self.kind}({self.step},{self.layer},{self.index})"


class Held(NamedTuple):
    """A content in a slot."""

    slot: str
    content: Hashable


class Slot(NamedTuple):
    """A place of memory.

    Args:
      space: "device" or "host".
      size_bytes: how much of it the slot takes while it holds something.
    """

    space: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One piece of work.

    Args:
      id: unique in its schedule.
      lane: what it occupies.
      seconds: how long, by the model of the machine.
      needs: tasks on OTHER lanes that must be over before it starts; those before it on its own lane are anyway. Where
        a lane may reorder its tasks (see `check`), what matters on that lane is named as well.
      reads, writes: contents in slots.
      frees: slots that hold nothing once it is over.
      paced_by: a task that must have started before this one does. A matter of speed, not of correctness, and kept
        only by dispatchers that reorder a lane.
      urgency: of the tasks that it could start, an eager lane takes the lowest of these first.
    """

    id: Hashable
    lane: str
    seconds: float
    needs: tuple[Hashable, ...] = ()
    reads: tuple[Held, ...] = ()
    writes: tuple[Held, ...] = ()
    frees: tuple[str, ...] = ()
    paced_by: Hashable | None = None
    urgency: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Tasks in launch order.

    Args:
      name: for people.
      tasks: in launch order.
      slots: every slot that a task names.
      initial: what is there before the first task.
      layers, micro_batches, steps: of the decode steps that it runs, if it does.
    """

    name: str
    tasks: tuple[Task, ...]
    slots: Mapping[str, Slot]
    initial: tuple[Held, ...] = ()
    layers: int = 0
    micro_batches: int = 0
    steps: int = 0

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes that have tasks, the usual ones first."""
        used = dict.fromkeys(task.lane for task in self.tasks)
        return tuple(lane for lane in LANES if lane in used) + tuple(lane for lane in used if lane not in LANES)


class ScheduleFault(ValueError):
    """A schedule that would deadlock, or read something that is not there. The message names the task and the slot."""


def check(schedule: Schedule, *, reordered: Iterable[str] = ()) -> None:
    """Proves that whatever the tasks take, nothing reads a content before it has arrived or after it is gone.

    Takes time and memory quadratic in the tasks, a bit for each pair.

    Args:
      reordered: lanes that may run their tasks in another order than that of the list.

    Raises:
      ScheduleFault: a task needs one that is not launched before it (launched in order, that one would never start); a
        read of a content that its slot does not hold, or that is not certain to have been written by then; a write over
        a content that is not freed, or that is not certain to have been read and freed by then; a slot freed empty or
        before its last reader is certain to be over; a slot, or an id, that is unknown or used twice.
    """
    before = _ancestors(schedule.tasks, frozenset(reordered))
    held: dict[str, _Content] = {}
    for slot, content in schedule.initial:
        _known(schedule, slot, "initial")
        if slot in held:
            raise ScheduleFault(f"slot {slot}: found two initial contents, expected one")
        held[slot] = _Content(content)
    for place, task in enumerate(schedule.tasks):
        mine = set()
        for slot, content in task.reads:
            _known(schedule, slot, task.id)
            now = held.get(slot)
            if now is None or now.gone or now.what != content:
                found = "nothing" if now is None or now.gone else f"{now.what}"
                raise ScheduleFault(f"task {task.id} reads {content} from slot {slot}, which holds {found}")
            if now.writer is not None and not before[place] >> now.writer & 1:
                writer = schedule.tasks[now.writer].id
                raise ScheduleFault(f"task {task.id} reads {content} from slot {slot} and does not wait for {writer}")
            now.users.append(place)
            mine.add(slot)
        for slot, content in task.writes:
            _known(schedule, slot, task.id)
            now = held.get(slot)
            if now is not None:
                if not now.gone and slot not in mine:
                    raise ScheduleFault(f"task {task.id} writes over {now.what} in slot {slot}, which nobody freed")
                _all_over(schedule, now, before[place], place, f"writes {content} into slot {slot}")
            held[slot] = _Content(content, place)
        for slot in task.frees:
            now = held.get(slot)
            if now is None or now.gone:
                raise ScheduleFault(f"task {task.id} frees slot {slot}, which holds nothing")
            _all_over(schedule, now, before[place], place, f"frees slot {slot}")
            now.gone = True
            now.users.append(place)


@dataclasses.dataclass
class _Content:
    """What a slot holds, who wrote it, and who reads or frees it, as places in the launch order."""

    what: Hashable
    writer: int | None = None
    users: list[int] = dataclasses.field(default_factory=list)
    gone: bool = False


def _known(schedule: Schedule, slot: str, who: Hashable) -> None:
    if slot not in schedule.slots:
        raise ScheduleFault(f"task {who} names slot {slot!r}, which the schedule does not have")


def _all_over(schedule: Schedule, content: _Content, before: int, place: int, what: str) -> None:
    """Who wrote, read or freed `content` is certain to be over when the task at `place` starts, or is that task."""
    for other in content.users if content.writer is None else [content.writer, *content.users]:
        if other != place and not before >> other & 1:
            raise ScheduleFault(
                f"task {schedule.tasks[place].id} {what} and does not wait for {schedule.tasks[other].id}"
            )


def _ancestors(tasks: Sequence[Task], reordered: frozenset[str]) -> list[int]:
    """For each task, a bit for each one (by place) that is certain to be over when it starts."""
    places: dict[Hashable, int] = {}
    last: dict[str, int] = {}
    before: list[int] = []
    for place, task in enumerate(tasks):
        if task.id in places:
            raise ScheduleFault(f"task {task.id}: found twice, expected ids of their own")
        known = 0
        for need in task.needs:
            other = places.get(need)
            if other is None:
                raise ScheduleFault(f"task {task.id} needs {need}, which is not launched before it")
            known |= before[other] | 1 << other
        if task.lane not in reordered and task.lane in last:
            known |= before[last[task.lane]] | 1 << last[task.lane]
        before.append(known)
        places[task.id] = last[task.lane] = place
    for task in tasks:
        if task.paced_by is not None and task.paced_by not in places:
            raise ScheduleFault(f"task {task.id} is paced by {task.paced_by}, which the schedule does not have")
    return before
