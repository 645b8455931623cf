"""The decode schedules of MoE-Lightning (arXiv 2411.11217, figure 6 and algorithm 1) as data.

S1 is CGOPipe: attention on the host, look-ahead over micro-batches, the next layer's weights in pages between the
activations. S2 moves them in one piece instead, S3 looks no micro-batch ahead besides. S4 has attention on the device
and the next micro-batch's KV loaded meanwhile; S4_synced also waits for every lane after every micro-batch.

    A   to QKV, on the device              B   attention, on the host or the device
    D1  QKV to the host                    C   from the output projection to the experts, on the device
    D2  attention's output to the device   W   a page of weights to the device
    L   KV to the device                   S   the new KV to the host
"""

import dataclasses
from collections.abc import Callable, Mapping

from jaxstack.engine.memory.schedule import DEVICE, HOST, TO_DEVICE, TO_HOST, Held, Schedule, Slot, Task, TaskId
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class TaskTimes:
    """Seconds of each task of one micro-batch in one layer, but `weights`: all of a layer's that are not resident.

    Args:
      before, after: A and C.
      attention: B, where the schedule has it.
      qkv_to_host, output_to_device: D1 and D2.
      load_kv, store_kv: L and S.
    """

    before: float
    attention: float
    after: float
    weights: float
    qkv_to_host: float = 0.0
    output_to_device: float = 0.0
    load_kv: float = 0.0
    store_kv: float = 0.0


@dataclasses.dataclass(frozen=True)
class SlotBytes:
    """Of one micro-batch's activations and KV in one layer, and of all of a layer's weights that are streamed."""

    hidden: int = 0
    qkv: int = 0
    output: int = 0
    kv: int = 0
    new_kv: int = 0
    weights: int = 0


@dataclasses.dataclass(frozen=True)
class ScheduleShape:
    """How much there is of everything.

    Args:
      layers, micro_batches, steps: of decoding.
      look_ahead: micro-batches whose attention is under way beyond the one that the device is at; 2 in the paper.
      pages: in which a layer's streamed weights come; 0: all are resident. None: one a micro-batch.
      drain: whether a step starts its first micro-batch only after it launched the last one of the step before, as in
        the paper.
      buffer_share: of a layer's streamed weights, what there is room for beside those of the layer that computes; 1 in
        the paper.
    """

    layers: int
    micro_batches: int
    steps: int
    look_ahead: int = 2
    pages: int | None = None
    drain: bool = False
    buffer_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("layers", "micro_batches", "steps", "look_ahead"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.pages is not None and self.pages < 0:
            raise UserError(f"pages: found {self.pages}, expected at least 0")
        if not 0 < self.buffer_share <= 1:
            raise UserError(f"buffer_share: found {self.buffer_share}, expected a share > 0 and <= 1")

    @property
    def pages_per_layer(self) -> int:
        return self.micro_batches if self.pages is None else self.pages

    @property
    def spare_pages(self) -> int:
        """Slots for pages beyond one layer's; at least one."""
        return min(self.pages_per_layer, max(1, int(self.buffer_share * self.pages_per_layer + 1e-9)))


def build_s1(shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None = None) -> Schedule:
    """CGOPipe."""
    return _host_attention("S1", shape, times, sizes)


def build_s2(shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None = None) -> Schedule:
    """Attention on the host as in S1; the weights in one piece at the start of a layer."""
    return _host_attention("S2", _in_one_piece(shape), times, sizes)


def build_s3(shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None = None) -> Schedule:
    """Attention on the host, one micro-batch after the other; the weights in one piece at the start of a layer."""
    return _host_attention("S3", dataclasses.replace(_in_one_piece(shape), look_ahead=1), times, sizes)


def build_s4(shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None = None) -> Schedule:
    """Attention on the device, the next micro-batch's KV loaded meanwhile; the weights in one piece."""
    return _device_attention("S4", _in_one_piece(shape), times, sizes)


def build_s4_paged(shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None = None) -> Schedule:
    """As S4, with the weights in pages between the loads of KV: what S1 is to S2."""
    return _device_attention("S4_paged", shape, times, sizes)


def build_s4_synced(shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None = None) -> Schedule:
    """S4 as FlexGen was released: every lane waits for all others after every micro-batch."""
    return _device_attention("S4_synced", _in_one_piece(shape), times, sizes, synced=True)


BUILDERS: Mapping[str, Callable[[ScheduleShape, TaskTimes, SlotBytes | None], Schedule]] = {
    "S1": build_s1,
    "S2": build_s2,
    "S3": build_s3,
    "S4": build_s4,
    "S4_paged": build_s4_paged,
    "S4_synced": build_s4_synced,
}
"""Name -> what makes the schedule of it."""


def _in_one_piece(shape: ScheduleShape) -> ScheduleShape:
    return dataclasses.replace(shape, pages=min(1, shape.pages_per_layer), buffer_share=1.0)


class _Weights:
    """The stream of weights: pages of layer after layer into a ring of slots, each freed with its layer.

    `turn` counts layers over all steps. A page's slot is free once the layer that last had it is over.
    """

    def __init__(self, shape: ScheduleShape, times: TaskTimes, size_bytes: int):
        self._shape = shape
        self.pages = shape.pages_per_layer
        self._ring = self.pages + shape.spare_pages
        self._seconds = times.weights / self.pages if self.pages else 0.0
        self.slots = {f"page/{n}": Slot("device", -(-size_bytes // self.pages)) for n in range(self._ring)}
        n, early = shape.micro_batches, min(self.pages, shape.spare_pages)
        # All micro-batches get as many, or one more.
        self._gaps: list[list[int]] = [[] for _ in range(n)]
        for page in range(early):
            self._gaps[page * n // early].append(page)
        self._held: tuple[int, tuple[Held, ...]] = (-1, ())

    def held(self, turn: int) -> tuple[Held, ...]:
        """The pages of a turn's layer, where they are."""
        if self._held[0] != turn:
            layer = turn % self._shape.layers
            self._held = turn, tuple(self._place(turn, layer, page) for page in range(self.pages))
        return self._held[1]

    def _place(self, turn: int, layer: int, page: int) -> Held:
        return Held(f"page/{(turn * self.pages + page) % self._ring}", ("weights", layer, page))

    def ids(self, turn: int) -> tuple[TaskId, ...]:
        step, layer = divmod(turn, self._shape.layers)
        return tuple(TaskId("W", step, layer, page) for page in range(self.pages))

    def gap(self, turn: int, index: int) -> list[Task]:
        """The pages of the NEXT turn's layer that go at micro-batch `index`."""
        return [self._task(turn + 1, page, turn, index) for page in self._gaps[index]]

    def late(self, turn: int) -> list[Task]:
        """Those of them that find no free slot before the turn is over."""
        last = self._shape.micro_batches - 1
        return [self._task(turn + 1, p, turn, last) for p in range(self._shape.spare_pages, self.pages)]

    def first(self) -> list[Task]:
        """Those of the first layer."""
        return [self._task(0, page, None, 0) for page in range(self.pages)]

    def _task(self, turn: int, page: int, pace_turn: int | None, pace_index: int) -> Task:
        layers, last = self._shape.layers, self._shape.micro_batches - 1
        step, layer = divmod(turn, layers)
        number = turn * self.pages + page
        needs: tuple[TaskId, ...] = ()
        if number >= self._ring:
            needs = (TaskId("C", *divmod((number - self._ring) // self.pages, layers), last),)
        pace = None if pace_turn is None else TaskId("C", *divmod(pace_turn, layers), pace_index)
        return Task(
            TaskId("W", step, layer, page),
            TO_DEVICE,
            self._seconds,
            needs,
            writes=(self._place(turn, layer, page),),
            paced_by=pace,
            urgency=1,
        )


def _host_attention(name: str, shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None) -> Schedule:
    sizes = sizes or SlotBytes()
    layers, n, turns = shape.layers, shape.micro_batches, shape.layers * shape.steps
    ahead = min(shape.look_ahead, n)
    weights = _Weights(shape, times, sizes.weights)
    tasks: list[Task] = weights.first()

    def attend(turn: int, j: int) -> None:
        """A, D1 and B."""
        step, layer = divmod(turn, layers)
        place = (turn * n + j) % ahead
        hidden = Held(f"hidden/{j}", ("hidden", step, layer, j))
        qkv = ("qkv", step, layer, j)
        on_device, on_host = Held(f"qkv_device/{place}", qkv), Held(f"qkv_host/{place}", qkv)
        kv = f"kv/{layer}/{j}"
        output = Held(f"output_host/{place}", ("output", step, layer, j))
        a, d1, b = (TaskId(kind, step, layer, j) for kind in ("A", "D1", "B"))
        tasks.append(Task(a, DEVICE, times.before, reads=(hidden,), writes=(on_device,)))
        tasks.append(Task(d1, TO_HOST, times.qkv_to_host, (a,), (on_device,), (on_host,), frees=(on_device.slot,)))
        tasks.append(
            Task(
                b,
                HOST,
                times.attention,
                (d1,),
                (on_host, Held(kv, ("kv", step, layer, j))),
                (output, Held(kv, ("kv", step + 1, layer, j))),
                frees=(on_host.slot,),
            )
        )

    # The order of C(0), C(1), ... over all layers and steps; the attention of one goes `ahead` of it.
    for item in range(ahead):
        attend(0, item)
    for turn in range(turns):
        step, layer = divmod(turn, layers)
        for j in range(n):
            place = (turn * n + j) % ahead
            content = ("output", step, layer, j)
            on_host, on_device = Held(f"output_host/{place}", content), Held(f"output_device/{place}", content)
            d2 = TaskId("D2", step, layer, j)
            tasks.append(
                Task(
                    d2,
                    TO_DEVICE,
                    times.output_to_device,
                    (TaskId("B", step, layer, j),),
                    (on_host,),
                    (on_device,),
                    frees=(on_host.slot,),
                )
            )
            if turn + 1 < turns:
                tasks += weights.gap(turn, j)
            tasks.append(_after(turn, j, shape, times, weights, on_device, (d2,)))
            following, next_j = divmod(turn * n + j + ahead, n)
            ends_step = shape.drain and following // layers > step
            if following < turns and not ends_step:
                attend(following, next_j)
        if turn + 1 < turns:
            tasks += weights.late(turn)
            if shape.drain and layer == layers - 1:
                for item in range(ahead):
                    attend(turn + 1, item)
    slots = weights.slots | _layer_slots(shape, sizes)
    for place in range(ahead):
        slots[f"qkv_device/{place}"] = Slot("device", sizes.qkv)
        slots[f"qkv_host/{place}"] = Slot("host", sizes.qkv)
        slots[f"output_host/{place}"] = Slot("host", sizes.output)
        slots[f"output_device/{place}"] = Slot("device", sizes.output)
    return Schedule(name, tuple(tasks), slots, _initial(shape), layers, n, shape.steps)


def _device_attention(
    name: str, shape: ScheduleShape, times: TaskTimes, sizes: SlotBytes | None, *, synced: bool = False
) -> Schedule:
    sizes = sizes or SlotBytes()
    layers, n, turns = shape.layers, shape.micro_batches, shape.layers * shape.steps
    weights = _Weights(shape, times, sizes.weights)
    tasks: list[Task] = weights.first()
    items = turns * n
    # One step with one layer and one micro-batch reads what the step before wrote: nothing to load ahead.
    ahead = min(1, layers * n - 1)

    def load(item: int) -> list[Task]:
        if item >= items:
            return []
        turn, j = divmod(item, n)
        step, layer = divmod(turn, layers)
        # Its slot is free after B of two before; what it reads was stored a step before. One may imply the other: A of
        # two before waited for the store of four before, and a store comes after its B.
        needs = []
        if item >= 2 and not (step and layers * n <= 2):
            needs.append(TaskId("B", *_place(item - 2, n, layers)))
        if step and layers * n < 4:
            needs.append(TaskId("S", step - 1, layer, j))
        content = ("kv", step, layer, j)
        read, written = Held(f"kv/{layer}/{j}", content), Held(f"kv_device/{item % 2}", content)
        return [Task(TaskId("L", step, layer, j), TO_DEVICE, times.load_kv, tuple(needs), (read,), (written,))]

    if ahead:
        tasks += load(0)
    for item in range(items):
        turn, j = divmod(item, n)
        step, layer = divmod(turn, layers)
        group: list[Task] = []
        pages = weights.gap(turn, j) if turn + 1 < turns else []
        # A whole layer's weights go first: they are the longest. Pages let the load before them.
        group += pages + load(item + ahead) if weights.pages == 1 else load(item + ahead) + pages
        hidden = Held(f"hidden/{j}", ("hidden", step, layer, j))
        new_kv = Held(f"new_kv/{item % 2}", ("new_kv", step, layer, j))
        output = Held("output_device/0", ("output", step, layer, j))
        old_kv = Held(f"kv_device/{item % 2}", ("kv", step, layer, j))
        a, b, stored = (TaskId(kind, step, layer, j) for kind in ("A", "B", "S"))
        free = (TaskId("S", *_place(item - 2, n, layers)),) if item >= 2 else ()
        group.append(Task(a, DEVICE, times.before, free, (hidden,), (new_kv,)))
        group.append(
            Task(
                b,
                DEVICE,
                times.attention,
                (TaskId("L", step, layer, j),),
                (new_kv, old_kv),
                (output,),
                frees=(old_kv.slot,),
            )
        )
        group.append(_after(turn, j, shape, times, weights, output, ()))
        kv = f"kv/{layer}/{j}"
        group.append(
            Task(
                stored,
                TO_HOST,
                times.store_kv,
                (b,),
                (new_kv, Held(kv, ("kv", step, layer, j))),
                (Held(kv, ("kv", step + 1, layer, j)),),
                frees=(new_kv.slot,),
            )
        )
        tasks += group
        if j == n - 1 and turn + 1 < turns:
            tasks += weights.late(turn)
    slots = weights.slots | _layer_slots(shape, sizes)
    slots["output_device/0"] = Slot("device", sizes.output)
    for place in range(2):
        slots[f"kv_device/{place}"] = Slot("device", sizes.kv)
        slots[f"new_kv/{place}"] = Slot("device", sizes.new_kv)
    return Schedule(name, _synced(tasks) if synced else tuple(tasks), slots, _initial(shape), layers, n, shape.steps)


def _after(
    turn: int,
    j: int,
    shape: ScheduleShape,
    times: TaskTimes,
    weights: _Weights,
    output: Held,
    needs: tuple[TaskId, ...],
) -> Task:
    """C: the first one of a layer waits for all its pages, the last one frees them."""
    step, layer = divmod(turn, shape.layers)
    slot = f"hidden/{j}"
    held = weights.held(turn)
    return Task(
        TaskId("C", step, layer, j),
        DEVICE,
        times.after,
        needs if j else needs + weights.ids(turn),
        (output, Held(slot, ("hidden", step, layer, j)), *held),
        (Held(slot, ("hidden", *divmod(turn + 1, shape.layers), j)),),
        frees=(output.slot, *(page.slot for page in held if j == shape.micro_batches - 1)),
    )


def _place(item: int, n: int, layers: int) -> tuple[int, int, int]:
    """Step, layer and micro-batch of the `item`th micro-batch of all."""
    turn, j = divmod(item, n)
    return (*divmod(turn, layers), j)


def _layer_slots(shape: ScheduleShape, sizes: SlotBytes) -> dict[str, Slot]:
    slots = {f"hidden/{j}": Slot("device", sizes.hidden) for j in range(shape.micro_batches)}
    for layer in range(shape.layers):
        slots |= {f"kv/{layer}/{j}": Slot("host", sizes.kv) for j in range(shape.micro_batches)}
    return slots


def _initial(shape: ScheduleShape) -> tuple[Held, ...]:
    """The first hidden states, and the KV of the prompts."""
    held = [Held(f"hidden/{j}", ("hidden", 0, 0, j)) for j in range(shape.micro_batches)]
    held += [Held(slot, ("kv", 0, int(slot.split("/")[1]), int(slot.split("/")[2]))) for slot in _kv_names(shape)]
    return tuple(held)


def _kv_names(shape: ScheduleShape) -> list[str]:
    return [f"kv/{layer}/{j}" for layer in range(shape.layers) for j in range(shape.micro_batches)]


def _synced(tasks: list[Task]) -> tuple[Task, ...]:
    """Every task of a micro-batch waits for the last one of each lane of the micro-batch before."""
    synced: list[Task] = []
    barrier: dict[str, TaskId] = {}
    running: dict[str, TaskId] = {}
    for task in tasks:
        extra = tuple(other for lane, other in barrier.items() if lane != task.lane and other not in task.needs)
        synced.append(dataclasses.replace(task, needs=task.needs + extra))
        assert isinstance(task.id, TaskId)
        running[task.lane] = task.id
        if task.id.kind == "S":  # the last one of its micro-batch
            barrier = dict(running)
    return tuple(synced)
