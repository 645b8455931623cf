"""The ways of moving weights that are compared. All compute with the same compiled pieces.

cgopipe   S1: attention on the host, pages of weights between the activations on the link
s4        attention on the device, each micro-batch's keys and values loaded while the one before it computes, a
          layer's weights in one piece; from page-locked memory as well
hooked    as accelerate's cpu_offload has it: before a module runs, its weights are copied from ordinary memory, and
          nothing else happens meanwhile; keys and values stay on the device, which limits the batch
resident  all weights on the device: for checks
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstack.engine.batch import BatchShape, HostBatch, cut
from jaxstack.engine.memory.offload_plan import Policy
from jaxstack.engine.memory.weight_pages import PageTable
from jaxstack.engine.offload import OffloadConfig, layouts_for
from jaxstack.engine.page_store import DEVICE, SpacePages, fill_page
from jaxstack.engine.pipelined_runner import PipelinedRunner
from jaxstack.engine.pipelined_step import MicroBatch, Mover, Staging
from jaxstack.models.paged_experts import ExpertPage, PageLayout
from jaxstack.runtime.emulation import ByteLedger, aligned_empty
from jaxstack.runtime.memory_spaces import Space, Spaces, probe_spaces
from launch.offload_benchmark.model import Setting, expert_matrices, stripped_decoder


class HookedPages:
    """Pages in ordinary memory, each array copied and waited for when it is asked for."""

    def __init__(self, spaces: Spaces, pages: list[list[ExpertPage]], table: PageTable, ledger: ByteLedger):
        self.table, self._spaces, self._pages, self._ledger = table, spaces, pages, ledger
        self._held = 0

    def bring(self, layer: int, transfer: int, seconds: float) -> None:
        """Nothing is brought ahead."""

    def drop(self, layer: int, transfer: int) -> None:
        self.reset()

    def on_device(self, layer: int) -> tuple[ExpertPage, ...]:
        self.reset()
        out = []
        for page in self._pages[layer]:
            size = sum(x.nbytes for x in page)
            self._ledger.take(DEVICE, size, "weights of the module")
            self._held += size
            out.append(ExpertPage(*(jax.block_until_ready(self._spaces.put(x, Space.DEVICE)) for x in page)))
        return tuple(out)

    def on_host(self, layer: int) -> tuple[ExpertPage, ...]:
        return tuple(self._pages[layer])

    def reset(self) -> None:
        self._ledger.give(DEVICE, self._held, "weights of the module")
        self._held = 0


class PinnedBlocks(Staging):
    """Keys and values in page-locked blocks, one for each layer and micro-batch, copied to the device whole.

    For measuring only: new ones are copied to the host, and what was there before stays.
    """

    def __init__(self, spaces: Spaces, layers: int, parts: int, block: tuple[int, ...], dtype: Any):
        super().__init__(np.zeros((0, 0, block[2], 0, 0), dtype), block[1] - 1)
        zeros = aligned_empty(block, dtype)
        zeros[...] = 0
        self._blocks = [[spaces.put(zeros, Space.HOST) for _ in range(parts)] for _ in range(layers)]
        jax.block_until_ready(self._blocks)
        self._last: Any = None

    def localise(self, shape: BatchShape, ints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        local = ints.copy()
        f = cut(local, shape.int_fields)
        first = int(f["block_tables"].min())
        f["block_tables"] -= first
        f["write_slots"] -= first * self.numbers.shape[2]
        np.minimum(f["write_slots"], self.room * self.numbers.shape[2], out=f["write_slots"])  # padding
        return np.array([first // self.room]), local

    def load(self, layer: int, pages: np.ndarray, mover: Mover, seconds: float) -> Any:
        return mover.to_device(self._blocks[layer][int(pages[0])], seconds)

    def store(self, layer: int, part: MicroBatch, new: Any) -> None:
        self._last = new


class BlockRunner(PipelinedRunner):
    """Stages keys and values from `PinnedBlocks`."""

    def make_staging(self, shape: tuple[int, ...], room: int) -> Staging:
        (step,) = self.shapes
        parts = self.parts(step)
        room = parts[0].rows * parts[0].table_pages
        return PinnedBlocks(probe_spaces(), shape[0], len(parts), (1, room + 1, *shape[2:]), self.dtype)


@dataclasses.dataclass
class Pages:
    """The experts of all layers: page-locked for those who stream them, ordinary for who does not know better."""

    layout: PageLayout
    pinned: SpacePages
    ordinary: list[list[ExpertPage]]


def make_pages(setting: Setting, say: Callable[[str], None], *, alike: bool) -> Pages:
    """Args:
    alike: every layer has the same numbers; their copies are apart all the same, but for the ordinary ones.
    """
    spaces, config = probe_spaces(), setting.model
    layout = layouts_for(config, _offload(setting, "cgopipe", 2**62))[True]
    table = PageTable([layout.pages] * config.num_layers, 0.0, layout.pages)
    began = time.perf_counter()
    first = expert_matrices(config, setting.dtype, 0)
    matrices = [first if alike else expert_matrices(config, setting.dtype, layer) for layer in range(config.num_layers)]
    dtype = jnp.dtype(setting.dtype)
    ordinary: list[list[ExpertPage]] = []
    for layer in range(config.num_layers):
        if alike and ordinary:
            ordinary.append(ordinary[0])
            continue
        pages = [ExpertPage(*(np.empty(s, dtype) for s in layout.shapes)) for _ in range(layout.pages)]  # type: ignore
        for number, page in enumerate(pages):
            fill_page(layout, matrices[layer], number, page)
        ordinary.append(pages)
    say(f"drew weights in {time.perf_counter() - began:.1f} s")
    began = time.perf_counter()
    ledger = ByteLedger({DEVICE: None, "host": None})
    pinned = SpacePages(spaces, [layout] * config.num_layers, matrices, table, dtype=dtype, ledger=ledger)
    total = config.num_layers * setting.layer_bytes
    say(f"put {total / 1e9:.1f} GB into page-locked memory in {time.perf_counter() - began:.1f} s")
    return Pages(layout, pinned, ordinary)


def make_runner(kind: str, setting: Setting, pages: Pages, budget: int, *, blocks: bool) -> PipelinedRunner:
    """A contestant, compiled.

    Args:
      budget: bytes of the device; exceeding it raises.
      blocks: s4 keeps keys and values in `PinnedBlocks`: faster, and only for measuring.
    """
    offload = _offload(setting, kind, budget)

    def store(table: PageTable, ledger: ByteLedger) -> Any:
        if kind == "hooked":
            return HookedPages(probe_spaces(), pages.ordinary, table, ledger)
        if kind == "resident":
            return _Resident(pages.pinned, table, ledger)
        return pages.pinned.shared(table, ledger)

    runner = (BlockRunner if kind == "s4" and blocks else PipelinedRunner)(
        stripped_decoder(setting.model, setting.dtype),
        [setting.shape],
        num_pages=setting.sequences * setting.table_pages,
        page_size=setting.page_size,
        slots=1,
        max_length=64,
        vocab_size=setting.model.vocab_size,
        dtype=jnp.dtype(setting.dtype),
        offload=offload,
        pages=store,
        wait=kind == "hooked",
    )
    runner.warm_up(progress=False)
    return runner


class _Resident:
    """Every page on the device."""

    def __init__(self, pinned: SpacePages, table: PageTable, ledger: ByteLedger):
        self.table = table
        spaces = probe_spaces()
        self._pages = [
            tuple(ExpertPage(*(spaces.put(x, Space.DEVICE) for x in page)) for page in pinned.on_host(layer))
            for layer in range(len(table.pages))
        ]
        ledger.take(DEVICE, sum(x.nbytes for layer in self._pages for page in layer for x in page), "pages that stay")

    def bring(self, layer: int, transfer: int, seconds: float) -> None:
        """They are there."""

    def drop(self, layer: int, transfer: int) -> None:
        """They stay."""

    def on_device(self, layer: int) -> tuple[ExpertPage, ...]:
        return self._pages[layer]

    on_host = on_device

    def reset(self) -> None:
        """They stay."""


def _offload(setting: Setting, kind: str, budget: int) -> OffloadConfig:
    n = setting.micro_batches
    mu = -(-setting.sequences // n)
    policy = {
        "cgopipe": Policy(mu, n, look_ahead=min(n, 4)),
        "s4": Policy(mu, n, attention_on_device=True),
        "hooked": Policy(setting.sequences, 1, attention_on_device=True, kv_resident=1.0),
        "resident": Policy(mu, n, attention_on_device=True, kv_resident=1.0, weight_resident=1.0),
    }[kind]
    schedule = {"cgopipe": "S1", "s4": "S4", "hooked": "S4", "resident": "S4_paged"}[kind]
    return OffloadConfig(budget, policy, schedule=schedule, fill=False, pages=max(8, n))


def step_seconds(runner: PipelinedRunner, setting: Setting, deadline_s: float) -> list[float]:
    """Seconds of each step, the first one apart; fewer than asked for where time is up."""
    out: list[float] = []
    for step in range(setting.steps + 1):
        start = time.perf_counter()
        batch = HostBatch(None, setting.shape, setting.ints(setting.context + step))  # type: ignore[arg-type]
        jax.block_until_ready(runner.launch(batch).logits)
        out.append(time.perf_counter() - start)
        if time.perf_counter() > deadline_s and len(out) > 1:
            break
    return out[1:]


def greedy(runner: PipelinedRunner, setting: Setting, prompt: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens drawn after prompts `[length, sequences]`, and the logits of each step."""
    tokens, drawn, logits = None, [], []
    for position in range(len(prompt) + steps):
        tokens = prompt[position] if position < len(prompt) else tokens
        batch = HostBatch(None, setting.shape, setting.ints(position, tokens))  # type: ignore[arg-type]
        found = np.asarray(runner.launch(batch).logits)
        tokens = found.argmax(axis=-1).astype(np.int32)
        if position >= len(prompt) - 1:
            drawn.append(tokens)
            logits.append(found)
    return np.stack(drawn), np.stack(logits)


def link_bandwidth(pages: Pages, layers: int) -> float:
    """Bytes/s of page-locked pages to the device, one after the other, nothing else going on."""
    spaces, best = probe_spaces(), 0.0
    for _ in range(3):
        start, moved = time.perf_counter(), 0
        for page in pages.pinned.on_host(layers - 1):
            for x in page:
                jax.block_until_ready(spaces.put(x, Space.DEVICE))
                moved += x.nbytes
        best = max(best, moved / (time.perf_counter() - start))
    return best
