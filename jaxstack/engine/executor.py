"""Runs a schedule's tasks for real, in one of two ways.

`run_in_order` launches task after task from one thread, as one drives an accelerator: most return before their work is
done, and the device itself waits for what an operation reads. Tasks of the host go to a thread of their own.

`run_in_lanes` gives every lane a thread on which tasks last as long as the emulated machine says, each waiting for what
it needs: what a schedule is worth shows in the time it takes.

What a task does is not known here. Nothing waits without an end: whoever waits longer than `timeout_s` raises `Stuck`.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from jaxstack.engine.memory.schedule import DEVICE, HOST, Schedule, Task
from jaxstack.runtime.emulation import EmulatedMachine

Do = Callable[[Task], None]


class Stuck(RuntimeError):
    """A task's needs did not come true in time. The message names the task, what it needs and what each lane is at."""


@dataclasses.dataclass(frozen=True)
class Ran:
    """When a task ran, in seconds of `time.perf_counter`."""

    id: Hashable
    lane: str
    begin_s: float
    end_s: float


def run_in_order(schedule: Schedule, do: Do, host: ThreadPoolExecutor, *, timeout_s: float) -> None:
    """Launches every task from this thread, those of the host lane on `host`, which has one thread.

    Raises:
      Stuck: a task of the host took longer than `timeout_s`.
      Exception: what a task raised; the tasks after it were not launched, and none is running.
    """
    futures: dict[Hashable, Future[None]] = {}
    try:
        for task in schedule.tasks:
            for need in task.needs:
                if need in futures:
                    _wait(futures, need, task, timeout_s)
            if task.lane == HOST:
                futures[task.id] = host.submit(do, task)
            else:
                do(task)
        for name in futures:
            _wait(futures, name, None, timeout_s)
    except BaseException:
        for future in futures.values():
            future.cancel()
        for future in futures.values():  # a step's end is the end of all its work
            if not future.cancelled():
                future.exception(timeout_s)
        raise


def _wait(futures: Mapping[Hashable, Future], need: Hashable, task: Task | None, timeout_s: float) -> None:
    try:
        futures[need].result(timeout_s)
    except FutureTimeoutError:
        if futures[need].done():  # it is what the task itself raised
            raise
        running = [str(name) for name, future in futures.items() if not future.done()]
        who = "the end of the step" if task is None else f"task {task.id} on lane {task.lane}"
        raise Stuck(f"{who} waited {timeout_s:g} s for {need}; on the host: {', '.join(running[:4])}") from None


def run_in_lanes(schedule: Schedule, do: Do, machine: EmulatedMachine, *, timeout_s: float) -> list[Ran]:
    """Runs every lane on a thread of its own, in the order of the list. Tasks that compute last `task.seconds` at
    least; those of the links copy, and thereby last as long as they should.

    Returns: when each task ran, in the order in which they ended.

    Raises:
      Stuck: a task's needs were not there after `timeout_s`.
      Exception: what the first failing task raised; no task is running any more.
    """
    over: dict[Hashable, threading.Event] = {task.id: threading.Event() for task in schedule.tasks}
    stop = threading.Event()
    failures: list[BaseException] = []
    ran: list[Ran] = []
    at: dict[str, Task | None] = {}
    lanes = {DEVICE: machine.device, HOST: machine.host}

    def ready(task: Task) -> bool:
        due = time.perf_counter() + timeout_s
        for need in task.needs:
            while not over[need].wait(min(1.0, max(0.0, due - time.perf_counter()))):
                if stop.is_set():
                    return False
                if time.perf_counter() >= due:
                    unmet = ", ".join(str(n) for n in task.needs if not over[n].is_set())
                    states = "; ".join(f"{lane} at {'its end' if t is None else t.id}" for lane, t in at.items())
                    raise Stuck(f"task {task.id} waited {timeout_s:g} s for {unmet}; lanes: {states}")
        return not stop.is_set()

    def lane(name: str) -> None:
        try:
            for task in schedule.tasks:
                if task.lane != name:
                    continue
                at[name] = task
                if not ready(task):
                    return
                begin = time.perf_counter()
                if name in lanes:
                    lanes[name].run(lambda task=task: do(task), task.seconds)  # type: ignore[misc]
                else:
                    do(task)
                ran.append(Ran(task.id, name, begin, time.perf_counter()))
                over[task.id].set()
            at[name] = None
        except BaseException as error:
            failures.append(error)
            stop.set()
            for event in over.values():  # nobody waits for a step that has failed
                event.set()

    threads = [threading.Thread(target=lane, args=(name,), name=f"lane-{name}") for name in schedule.lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return ran


def period_s(ran: list[Ran], kind: Callable[[Any], bool], count: int) -> float:
    """The mean time between the ends of `count + 1` tasks, those for which `kind` holds of their id."""
    ends = sorted(task.end_s for task in ran if kind(task.id))
    return (ends[-1] - ends[-1 - count]) / count
