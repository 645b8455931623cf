"""Schedules raced on this machine: a tiny mixture of experts decodes real tokens, while every task lasts as long as it
would on the machine that its times were computed for (`jaxstack.runtime.emulation`).

The weights, the copies, the dependencies and the threads are real; only time is made. So whatever a simulation of the
same schedule leaves out shows as a difference: see `EmulatedDecode.timeline`, which has its form.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from jaxstack.engine.batch import BatchShape, HostBatch, cut, size
from jaxstack.engine.executor import run_in_lanes
from jaxstack.engine.memory.offload_plan import Policy
from jaxstack.engine.memory.schedule import TaskId
from jaxstack.engine.memory.schedule_build import BUILDERS, ScheduleShape, TaskTimes
from jaxstack.engine.memory.schedule_sim import Timeline
from jaxstack.engine.offload import OffloadConfig
from jaxstack.engine.page_store import DEVICE
from jaxstack.engine.pipelined_runner import PipelinedRunner
from jaxstack.models.decoder import Decoder
from jaxstack.models.decoder_config import DecoderConfig, MoeConfig
from jaxstack.runtime.emulation import EmulatedMachine, Usage

TINY_MIXTRAL = DecoderConfig(
    architecture="MixtralForCausalLM",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=96,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=96),
    initializer_range=0.3,
)

_PROMPT = 5
_PAGE_SIZE = 8


@dataclasses.dataclass(frozen=True)
class EmulatedDecode:
    """What one schedule did.

    Attributes:
      timeline: when each task began and ended, from the first one's beginning; `timeline.period` is a layer's time in
        the steady state.
      tokens: drawn, by step and sequence.
      usage: of each lane. `late_s` is by how much real work exceeded its emulated time: not much, or the
        run says little.
      device_peak_bytes: of the ledger.
    """

    timeline: Timeline
    tokens: Int[np.ndarray, "steps sequences"]
    usage: Mapping[str, Usage]
    device_peak_bytes: int


def emulate(
    name: str,
    times: TaskTimes,
    *,
    steps: int = 4,
    micro_batches: int = 6,
    micro_batch: int = 2,
    look_ahead: int = 2,
    pages: int = 24,
    drain: bool = False,
    config: DecoderConfig = TINY_MIXTRAL,
    seed: int = 0,
) -> EmulatedDecode:
    """Decodes `steps` tokens of `micro_batches * micro_batch` sequences by the schedule `name` of `BUILDERS`.

    Args:
      times: of the tasks, in seconds; all weights but none that stay are streamed in `times.weights`.
      look_ahead, drain: as `ScheduleShape` has them.
      pages: about so many a layer is cut into; S1 and S4_paged move them one by one.
      config, seed: the model, its weights random.

    Raises:
      RuntimeError: a task failed, or never came to run.
    """
    rows = micro_batches * micro_batch
    table = -(-(_PROMPT + steps + 1) // _PAGE_SIZE)
    shape = BatchShape(rows, rows, table, rows)
    policy = Policy(micro_batch, micro_batches, attention_on_device=name.startswith("S4"))
    # The tokens decide nothing here, so the ledger has no limit to keep; its peak is reported.
    offload = OffloadConfig(2**62, policy, schedule=name, fill=False, pages=pages)
    with EmulatedMachine() as machine:
        runner = PipelinedRunner(
            Decoder(config, rngs=nnx.Rngs(seed)),
            [shape],
            num_pages=rows * table,
            page_size=_PAGE_SIZE,
            slots=rows,
            max_length=table * _PAGE_SIZE,
            vocab_size=config.vocab_size,
            dtype=jnp.dtype(jnp.float32),
            offload=offload,
            emulated=machine,
        )
        try:
            runner.warm_up(progress=False)
            return _decode(runner, machine, shape, name, times, steps, look_ahead, drain)
        finally:
            runner.close()


def resident_tokens(
    *,
    steps: int = 4,
    micro_batches: int = 6,
    micro_batch: int = 2,
    config: DecoderConfig = TINY_MIXTRAL,
    seed: int = 0,
) -> Int[np.ndarray, "steps sequences"]:
    """The tokens that `emulate` must draw, with all weights and all keys and values on the device."""
    rows = micro_batches * micro_batch
    table = -(-(_PROMPT + steps + 1) // _PAGE_SIZE)
    shape = BatchShape(rows, rows, table, rows)
    policy = Policy(rows, 1, attention_on_device=True, weight_resident=1.0, kv_resident=1.0)
    runner = PipelinedRunner(
        Decoder(config, rngs=nnx.Rngs(seed)),
        [shape],
        num_pages=rows * table,
        page_size=_PAGE_SIZE,
        slots=rows,
        max_length=table * _PAGE_SIZE,
        vocab_size=config.vocab_size,
        dtype=jnp.dtype(jnp.float32),
        offload=OffloadConfig(2**62, policy, fill=False),
    )
    try:
        runner.warm_up(progress=False)
        last, out = _read_prompts(runner, shape), []
        for step in range(steps):
            logits = runner.launch(HostBatch(None, shape, _ints(shape, _PROMPT + step, last))).logits  # type: ignore[arg-type]
            last = np.asarray(jnp.argmax(logits, axis=-1)).astype(np.int32)
            out.append(last)
        return np.stack(out)
    finally:
        runner.close()


def _decode(
    runner: PipelinedRunner,
    machine: EmulatedMachine,
    shape: BatchShape,
    name: str,
    times: TaskTimes,
    steps: int,
    look_ahead: int,
    drain: bool,
) -> EmulatedDecode:
    work, pieces = runner.work, runner.pieces
    last = _read_prompts(runner, shape)
    runner.store.reset()  # the schedule brings its first pages itself
    # A part's own rows, counted from 0, hold what it drew last.
    own_row = np.arange(shape.rows, dtype=np.int32) % runner.parts(shape)[0].rows
    cut_up = [
        runner.split(shape, _ints(shape, _PROMPT + step, -1 - own_row if step else last)) for step in range(steps + 1)
    ]
    parts = {(step, j): part for step, row in enumerate(cut_up) for j, part in enumerate(row)}
    count = len(cut_up[0])
    part_shape = parts[0, 0].shape

    def onward(weights: Any, ints: Array, following: Array, x: Array) -> Any:
        logits, _ = pieces.head(part_shape, weights, ints, x)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        x, cos, sin = pieces.embed(part_shape, weights, following, tokens)
        return tokens, x, (cos, sin)

    first = parts[0, 0].ints_on_device
    hidden = jnp.zeros((part_shape.rows, pieces.config.hidden_size), pieces.dtype)
    go_on = jax.jit(onward).lower(pieces.weights, first, first, hidden).compile()
    drawn: dict[tuple[int, int], np.ndarray] = {}

    def finish(task: TaskId, x: Array) -> tuple[Array, Any]:
        now, following = parts[task.step, task.index], parts[task.step + 1, task.index]
        tokens, x, turn = go_on(pieces.weights, now.ints_on_device, following.ints_on_device, x)
        drawn[task.step, task.index] = np.asarray(tokens)
        return x, turn

    schedule = BUILDERS[name](
        ScheduleShape(
            layers=pieces.config.num_layers,
            micro_batches=count,
            steps=steps,
            look_ahead=look_ahead,
            pages=runner.transfers,
            drain=drain,
        ),
        times,
        None,
    )
    lanes = {"device": machine.device, "host": machine.host, "to_device": machine.to_device, "to_host": machine.to_host}
    for lane in lanes.values():
        lane.usage = Usage()
    runner.ledger.reset_peak()
    work.begin(parts, [runner.embed(parts[0, j], runner.sampler.last_token) for j in range(count)])
    work.finish = finish
    try:
        ran = run_in_lanes(schedule, work.do, machine, timeout_s=60.0)
    finally:
        work.finish = None
        work.fail()
    begun = {task.id: task for task in ran}
    start = min(task.begin_s for task in ran)
    timeline = Timeline(
        schedule,
        "fixed",
        tuple(begun[task.id].begin_s - start for task in schedule.tasks),
        tuple(begun[task.id].end_s - start for task in schedule.tasks),
    )
    tokens = np.stack([np.concatenate([drawn[step, j] for j in range(count)]) for step in range(steps)])
    usage = {lane: machine_lane.usage for lane, machine_lane in lanes.items()}
    return EmulatedDecode(timeline, tokens[:, : shape.rows], usage, runner.ledger.peak(DEVICE))


def _read_prompts(runner: PipelinedRunner, shape: BatchShape) -> np.ndarray:
    """Fills the cache with each sequence's prompt; the tokens that follow."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(0, runner.config.vocab_size, (_PROMPT, shape.rows)).astype(np.int32)
    logits: Any = None
    for position, tokens in enumerate(prompts):
        logits = runner.launch(HostBatch(None, shape, _ints(shape, position, tokens))).logits  # type: ignore[arg-type]
    return np.asarray(jnp.argmax(logits, axis=-1)).astype(np.int32)


def _ints(shape: BatchShape, position: int, tokens: np.ndarray) -> np.ndarray:
    """A decode step at one position in all sequences."""
    ints = np.zeros(size(shape.int_fields), np.int32)
    f = cut(ints, shape.int_fields)
    f["tokens"][:] = tokens
    f["positions"][:] = position
    f["kv_lens"][:] = position + 1
    f["query_starts"][:] = np.arange(shape.rows + 1)
    f["num_decodes"][...] = shape.rows
    f["block_tables"][:] = np.arange(shape.rows * shape.table_pages).reshape(shape.rows, -1)
    f["write_slots"][:] = f["block_tables"][:, position // _PAGE_SIZE] * _PAGE_SIZE + position % _PAGE_SIZE
    return ints
