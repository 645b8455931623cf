"""How a model larger than its device is served: what stays there, what is streamed, and whether that fits.

The floor of a budget is what must be on the device whatever the policy: all weights but those of the experts (or MLPs),
two layers of streamed pages (of one that computes and one that is on its way), the activations of a step, and the keys
and values where attention is on the device. What the budget leaves keeps pages on the device for good.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxstack.engine.batch import BatchShape
from jaxstack.engine.memory.offload_plan import Policy
from jaxstack.engine.memory.schedule import DEVICE, HOST, TO_DEVICE, TO_HOST, Held, Schedule, Slot, Task, TaskId
from jaxstack.engine.memory.schedule_build import BUILDERS, ScheduleShape, TaskTimes
from jaxstack.models.decoder_config import DecoderConfig
from jaxstack.models.paged_experts import PageLayout, choose_layouts
from jaxstack.runtime.errors import UserError

SCHEDULES = ("S1", "S2", "S3", "S4", "S4_paged", "S4_synced")

# The host's experts compute in the order of the micro-batches; more ahead would only need more room.
_HOST_EXPERTS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class OffloadConfig:
    """Settings of an engine that keeps weights on the host.

    Args:
      device_budget_bytes: what the device may hold at once; refused at the start if it cannot do, and never exceeded.
      policy: how a step is cut and placed; `micro_batch` says nothing here, a step's rows are cut into
        `n_micro_batches` equal parts. `kv_resident` is 1 or 0: all keys and values on the device, or none.
      schedule: one of `SCHEDULES`; None: S1 with attention on the host, S4_paged with attention on the device.
      fill: keep as many pages on the device as the budget allows instead of the policy's `weight_resident`.
      pages: about so many a layer has.
      timeout_s: a step in which anything waits longer than this fails.

    Raises:
      UserError: settings that contradict each other.
    """

    device_budget_bytes: int
    policy: Policy
    schedule: str | None = None
    fill: bool = True
    pages: int = 8
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if self.device_budget_bytes < 1:
            raise UserError(f"device_budget_bytes: found {self.device_budget_bytes}, expected a number > 0")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise UserError(f"schedule: found {self.schedule!r}, expected one of {', '.join(SCHEDULES)}")
        on_device = self.policy.attention_on_device
        if self.schedule is not None and self.schedule.startswith("S4") != on_device:
            where = "the device" if on_device else "the host"
            raise UserError(f"schedule: found {self.schedule} with attention on {where}")
        if self.policy.kv_resident not in (0, 1) or (self.policy.kv_resident and not on_device):
            raise UserError(
                f"kv_resident: found {self.policy.kv_resident}, expected 0, or 1 with attention on the device"
            )
        if self.pages < 1 or not self.timeout_s > 0:
            raise UserError(f"pages, timeout_s: found {self.pages}, {self.timeout_s}, expected numbers > 0")

    @property
    def schedule_name(self) -> str:
        if not self.policy.ffn_on_device:
            return "host_experts"
        return self.schedule or ("S4_paged" if self.policy.attention_on_device else "S1")

    @property
    def one_piece(self) -> bool:
        """Whether a layer's streamed weights come in one transfer."""
        return self.schedule_name in ("S2", "S3", "S4", "S4_synced")

    @property
    def streams(self) -> bool:
        return self.policy.ffn_on_device and self.policy.weight_resident < 1


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What the device holds, by what it is for.

    Attributes:
      kept: weights that are no pages.
      resident: pages that stay.
      buffers: pages that pass through.
      kv: keys and values.
      activations: of a step, and what programs need besides.
    """

    kept: int
    resident: int
    buffers: int
    kv: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def refuse_unsupported(config: DecoderConfig) -> None:
    """Raises UserError for a model whose feed-forward weights cannot be paged."""
    if config.mlp_bias and config.dense_layers:
        raise UserError("offload: found a model whose MLPs have biases (mlp_bias), expected one without")


def plan_bytes(
    config: DecoderConfig,
    offload: OffloadConfig,
    layouts: Mapping[bool, PageLayout],
    shapes: Sequence[BatchShape],
    *,
    itemsize: int,
    kv_bytes: int,
    resident_share: float,
    kept_bytes: int | None = None,
) -> DeviceBytes:
    """What a policy puts on the device, by sizes alone.

    Args:
      kv_bytes: of all keys and values.
      resident_share: of pages.
      kept_bytes: of weights that are no pages, where they are known already; None for about what they will be.
    """
    layers = [layouts[layer in config.sparse_layers] for layer in range(config.num_layers)]
    page_bytes = [layout.page_elements * itemsize for layout in layers]
    stay = [int(layout.pages * resident_share + 1e-9) for layout in layers]
    policy = offload.policy
    resident = sum(s * b for s, b in zip(stay, page_bytes)) if policy.ffn_on_device else 0
    streamed = [(layout.pages - s) * b for layout, s, b in zip(layers, stay, page_bytes)]
    buffers = 2 * max(streamed) if policy.ffn_on_device else 0
    return DeviceBytes(
        kept=_kept_elements(config) * itemsize if kept_bytes is None else kept_bytes,
        resident=resident,
        buffers=buffers,
        kv=_kv_on_device(config, offload, shapes, kv_bytes),
        activations=_activation_bytes(config, offload, layouts, shapes, itemsize),
    )


def resident_share(
    config: DecoderConfig,
    offload: OffloadConfig,
    layouts: Mapping[bool, PageLayout],
    shapes: Sequence[BatchShape],
    *,
    itemsize: int,
    kv_bytes: int,
    kept_bytes: int | None = None,
) -> tuple[float, DeviceBytes]:
    """The share of pages that stays on the device, and what is there then. Arguments as `plan_bytes` has them.

    Raises:
      UserError: the budget is below the floor; the message names floor, budget and the largest term.
    """
    options: dict[str, Any] = {"itemsize": itemsize, "kv_bytes": kv_bytes, "kept_bytes": kept_bytes}
    plan = lambda share: plan_bytes(config, offload, layouts, shapes, resident_share=share, **options)  # noqa: E731
    budget = offload.device_budget_bytes
    fixed = 0.0 if offload.fill or not offload.policy.ffn_on_device else offload.policy.weight_resident
    floor = plan(fixed)
    if floor.total > budget:
        name, most = max(dataclasses.asdict(floor).items(), key=lambda item: item[1])
        raise UserError(
            f"device budget: found {budget / 1e9:.3g} GB, expected at least {floor.total / 1e9:.3g} GB, of which "
            f"{most / 1e9:.3g} GB are {_WORDS[name]}"
        )
    if not offload.fill or not offload.policy.ffn_on_device:
        return fixed, floor
    most_pages = max(layout.pages for layout in layouts.values())
    shares = [n / most_pages for n in range(most_pages + 1)]
    share = max(share for share in shares if plan(share).total <= budget)
    return share, plan(share)


_WORDS = {
    "kept": "weights other than experts and MLPs",
    "resident": "pages that stay",
    "buffers": "two layers of pages",
    "kv": "keys and values",
    "activations": "activations of a step",
}


def layouts_for(config: DecoderConfig, offload: OffloadConfig) -> dict[bool, PageLayout]:
    """How the layers are cut into pages."""
    return choose_layouts(config, max(offload.pages, offload.policy.n_micro_batches))


def _kept_elements(config: DecoderConfig) -> int:
    """Of all weights that are no pages."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden = config.hidden_size
    layer = hidden * (queries + 2 * keys) + queries * hidden + 4 * hidden + 2 * config.head_dim
    layer += (queries + 2 * keys if config.qkv_bias else 0) + (hidden if config.attention_out_bias else 0)
    routers = len(config.sparse_layers) * hidden * (config.moe.num_experts if config.moe else 0)
    # A tied output matrix may exist a second time, in another layout.
    return layer * config.num_layers + routers + 2 * config.vocab_size * hidden + hidden


def _kv_on_device(config: DecoderConfig, offload: OffloadConfig, shapes: Sequence[BatchShape], kv_bytes: int) -> int:
    policy = offload.policy
    if not policy.attention_on_device:
        return 0
    if policy.kv_resident:
        return kv_bytes
    # Of two micro-batches in one layer; a step with prompts in it is staged as a whole.
    parts = policy.n_micro_batches if all(shape.decode for shape in shapes) else 1
    return 2 * kv_bytes // config.num_layers // parts


def _activation_bytes(
    config: DecoderConfig,
    offload: OffloadConfig,
    layouts: Mapping[bool, PageLayout],
    shapes: Sequence[BatchShape],
    itemsize: int,
) -> int:
    """Of the largest step, generously: programs' own scratch memory is known only once they are compiled."""
    rows = max(shape.rows for shape in shapes)
    samples = max(shape.samples for shape in shapes)
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    of_step = rows * (2 * config.hidden_size * itemsize + 4 * config.head_dim * 4 + heads * itemsize)
    part = -(-rows // offload.policy.n_micro_batches)
    scratch = 0
    for sparse, layout in layouts.items():
        given = part * (config.moe.experts_per_token if sparse and config.moe else 1)
        most = min(given, part * layout.experts_per_page) if sparse else part
        inner = layout.inner // layout.chunks
        scratch = max(scratch, 4 * ((given + most) * 3 * layout.hidden + 3 * most * inner))
    return (
        int(1.5 * (of_step + scratch)) + 3 * 4 * samples * config.vocab_size + 2 * itemsize * rows * config.hidden_size
    )


# Schedules of one step.


def step_schedule(offload: OffloadConfig, *, layers: int, micro_batches: int, transfers: int) -> Schedule:
    """The tasks of one step, of many that follow each other: its first layer's pages are there before it begins, and it
    brings those of the next step's first layer.

    Args:
      transfers: in which a layer's streamed pages come; 0 for none.
    """
    policy = offload.policy
    if not policy.ffn_on_device:
        return host_experts(layers, micro_batches, attention_on_device=policy.attention_on_device)
    # Two steps, of which all but the second's first pages is left away.
    shape = ScheduleShape(
        layers=layers,
        micro_batches=micro_batches,
        steps=2,
        look_ahead=micro_batches if policy.look_ahead is None else policy.look_ahead,
        pages=transfers,
        drain=True,
        buffer_share=policy.buffer_share or 1.0,
    )
    whole = BUILDERS[offload.schedule_name](shape, TaskTimes(0.0, 0.0, 0.0, 0.0), None)
    kept, first = [], []
    for task in whole.tasks:
        assert isinstance(task.id, TaskId)
        if task.id.kind == "W" and task.id.step == task.id.layer == 0:
            first.append(task)
        elif task.id.step == 0 or (task.id.kind == "W" and task.id.layer == 0):
            kept.append(task)
    before = {task.id for task in first}
    tasks = tuple(
        dataclasses.replace(task, needs=tuple(need for need in task.needs if need not in before)) for task in kept
    )
    there = tuple(held for task in first for held in task.writes)
    return dataclasses.replace(whole, tasks=tasks, initial=(*whole.initial, *there), steps=1)


def host_experts(layers: int, micro_batches: int, *, attention_on_device: bool) -> Schedule:
    """One step with the feed-forward on the host: no weights move, a micro-batch's hidden state does instead.

    A, then D1 to the host, B and C there, and D2 back; with attention on the device B comes before D1.
    """
    slots: dict[str, Slot] = {}
    tasks: list[Task] = []
    ahead = min(_HOST_EXPERTS_AHEAD, micro_batches)
    items = layers * micro_batches

    def ids(item: int) -> dict[str, TaskId]:
        layer, j = divmod(item, micro_batches)
        return {kind: TaskId(kind, 0, layer, j) for kind in ("A", "B", "C", "D1", "D2")}

    def slot(name: str, j: int, space: str) -> str:
        slots.setdefault(f"{name}/{j}", Slot(space, 0))
        return f"{name}/{j}"

    def start(item: int) -> None:
        if item >= items:
            return
        layer, j = divmod(item, micro_batches)
        name, what = ids(item), (0, layer, j)
        hidden = Held(slot("hidden", j, "device"), ("hidden", *what))
        qkv, sent = Held(slot("qkv", j, "device"), ("qkv", *what)), Held(slot("sent", j, "host"), ("sent", *what))
        back = (TaskId("D2", 0, layer - 1, j),) if layer else ()
        tasks.append(Task(name["A"], DEVICE, 0.0, back, (hidden,), (qkv,)))
        if attention_on_device:
            found = Held(slot("found", j, "device"), ("found", *what))
            tasks.append(Task(name["B"], DEVICE, 0.0, (), (qkv,), (found,), (qkv.slot,)))
            tasks.append(
                Task(name["D1"], TO_HOST, 0.0, (name["B"],), (found, hidden), (sent,), (found.slot, hidden.slot))
            )
            return
        found = Held(slot("found", j, "host"), ("found", *what))
        tasks.append(Task(name["D1"], TO_HOST, 0.0, (name["A"],), (qkv, hidden), (sent,), (qkv.slot, hidden.slot)))
        tasks.append(Task(name["B"], HOST, 0.0, (name["D1"],), (sent,), (found,)))

    for item in range(ahead):
        start(item)
    for item in range(items):
        layer, j = divmod(item, micro_batches)
        name, what = ids(item), (0, layer, j)
        sent = Held(slot("sent", j, "host"), ("sent", *what))
        made = Held(slot("made", j, "host"), ("made", *what))
        reads = [sent] if attention_on_device else [sent, Held(slot("found", j, "host"), ("found", *what))]
        tasks.append(Task(name["C"], HOST, 0.0, (name["D1"],), tuple(reads), (made,), tuple(r.slot for r in reads)))
        after = Held(slot("hidden", j, "device"), ("hidden", *divmod(layer + 1, layers), j))
        tasks.append(Task(name["D2"], TO_DEVICE, 0.0, (name["C"],), (made,), (after,), (made.slot,)))
        start(item + ahead)
    first = tuple(Held(f"hidden/{j}", ("hidden", 0, 0, j)) for j in range(micro_batches))
    return Schedule("host_experts", tuple(tasks), slots, first, layers, micro_batches, 1)


def total_page_bytes(config: DecoderConfig, layouts: Mapping[bool, PageLayout], dtype: jnp.dtype) -> int:
    """Of all feed-forward weights."""
    layers = (layouts[layer in config.sparse_layers] for layer in range(config.num_layers))
    return sum(layout.pages * layout.page_elements for layout in layers) * jnp.dtype(dtype).itemsize


def kv_shape(config: DecoderConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    """Of the KV cache, with its scrap page."""
    return (config.num_layers, num_pages + 1, page_size, 2 * config.num_kv_heads, config.head_dim)


def kv_cache_bytes(config: DecoderConfig, num_pages: int, page_size: int, itemsize: int) -> int:
    return math.prod(kv_shape(config, num_pages, page_size)) * itemsize
