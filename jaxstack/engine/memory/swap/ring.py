"""In which order segments come and go: layer after layer, step after step, through d places on the device.

A segment is what one layer reads of the host's pages. Layers run in a cycle, so what comes next is known for ever: the
segment at position n (layer n mod L of step n div L) goes to place n mod d as soon as the layer at position n - d has
run, also where that was in the step before.
"""

import dataclasses
from collections.abc import Sequence

from jaxstack.engine.memory.schedule import DEVICE, TO_DEVICE, TO_HOST, Held, Schedule, Slot, Task, TaskId


@dataclasses.dataclass
class SegmentRing:
    """The state of the ring.

    Attributes:
      issued: positions whose segments are on their way or there.
      ran: positions whose layers have run.
    """

    layers: int
    staging: int
    issued: int = 0
    ran: int = 0

    def place(self, position: int) -> int:
        """Where a position's segment lies."""
        return position % self.staging

    def layer(self, position: int) -> int:
        return position % self.layers

    @property
    def may_issue(self) -> bool:
        """Whether a place is free for the next segment."""
        return self.issued < self.ran + self.staging

    def issue(self) -> int:
        """The next segment is on its way; returns its position."""
        assert self.may_issue, f"segment {self.issued} has no place: only {self.ran} layers have run"
        self.issued += 1
        return self.issued - 1

    def run(self) -> int:
        """The next layer has run, and its segment's place is free; returns its position."""
        assert self.ran < self.issued, f"layer {self.ran} has run without its segment"
        self.ran += 1
        return self.ran - 1

    def rewind(self) -> None:
        """Nothing is on its way any more."""
        self.issued = self.ran

    def restart(self) -> None:
        """Forgets what is on its way: a step failed, or begins anew."""
        self.issued = self.ran = 0


def streamed_layers(layers: int, k: int) -> tuple[int, ...]:
    """The k layers, evenly spaced, that static placement streams."""
    return tuple(i * layers // k for i in range(k))


def swap_schedule(
    layers: int,
    steps: int,
    layer_s: float,
    moving_s: float,
    *,
    streamed: Sequence[int] | None = None,
    staging: int = 2,
    segment_bytes: int = 1,
    write_back_s: float | None = None,
) -> Schedule:
    """Steps as tasks: `put` on the lane to the device, `layer` on the device, and `out` to the host.

    Args:
      layer_s, moving_s: of one layer, and of its segment.
      streamed: the layers that have segments, in order; None for all (striped pages, or the ring).
      write_back_s: a segment is written back to the host before its place is free, as the ring does; None: dropped.
    """
    chosen = set(range(layers) if streamed is None else streamed)
    slots = {f"staging{i}": Slot("device", segment_bytes) for i in range(staging)}
    tasks: list[Task] = []
    last_user: list[TaskId | None] = [None] * staging
    puts = 0

    def put(step: int, layer: int) -> None:
        nonlocal puts
        place = puts % staging
        user = last_user[place]
        held = Held(f"staging{place}", ("segment", step, layer))
        tasks.append(
            Task(
                TaskId("put", step, layer, 0),
                TO_DEVICE,
                moving_s,
                needs=() if user is None else (user,),
                writes=(held,),
            )
        )
        last_user[place] = TaskId("layer" if write_back_s is None else "out", step, layer, 0)
        puts += 1

    order = [(step, layer) for step in range(steps) for layer in range(layers) if layer in chosen]
    number = {position: i for i, position in enumerate(order)}
    ahead = 0
    for step in range(steps):
        for layer in range(layers):
            # Launched in order: a segment's task comes after the layer that frees its place, and before its own layer.
            while ahead < len(order) and (ahead < staging or _has_run(last_user[ahead % staging], step, layer)):
                put(*order[ahead])
                ahead += 1
            mine = TaskId("layer", step, layer, 0)
            if layer not in chosen:
                tasks.append(Task(mine, DEVICE, layer_s))
                continue
            slot = f"staging{number[step, layer] % staging}"
            held = Held(slot, ("segment", step, layer))
            frees = (slot,) if write_back_s is None else ()
            need = TaskId("put", step, layer, 0)
            tasks.append(Task(mine, DEVICE, layer_s, needs=(need,), reads=(held,), frees=frees))
            if write_back_s is not None:
                out = TaskId("out", step, layer, 0)
                tasks.append(Task(out, TO_HOST, write_back_s, needs=(mine,), reads=(held,), frees=(slot,)))
    return Schedule("swap", tuple(tasks), slots, layers=layers, steps=steps)


def _has_run(user: TaskId | None, step: int, layer: int) -> bool:
    return user is None or (user.step, user.layer) < (step, layer)
