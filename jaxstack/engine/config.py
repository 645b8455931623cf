"""The engine's settings, checked on construction, and the sizes that follow from them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import psutil
from jax.sharding import Mesh

from jaxstack.engine.batch import BatchShape
from jaxstack.engine.memory.swap.config import SwapConfig
from jaxstack.engine.offload import OffloadConfig
from jaxstack.engine.scheduling import Policy, policy_named
from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.tensor_parallel import cached_kv_heads, check_mesh
from jaxstack.runtime.errors import UserError

_SMALLEST_MIXED_STEP = 64
# The sampler exists for so many rows and for `max_sequences`; steps between are padded to the next.
_FEW_SAMPLES = 8
# XLA on CPU adds up a row in another order where there are fewer (norms, log-sum-exp; float32, jax 0.10: fewer than 16
# rows of 256 numbers), whatever the products do.
_INVARIANT_ROWS = 16
_CPU_CACHE_SHARE, _CPU_CACHE_BYTES = 0.25, 4 * 2**30
# Of an accelerator's memory, weights and cache together; steps need the rest.
_ACCELERATOR_SHARE = 0.9
# Of the budget of a device that streams its weights.
_OFFLOAD_CACHE_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Settings of one replica. None means: chosen from the model and the machine.

    Args:
      max_sequences: answers generated at once.
      max_batch_tokens: tokens of one step; longer prompts are computed in chunks.
      max_model_len: prompt and answer together, in tokens; at most what the model was made for.
      page_size: tokens in a page of the KV cache, a power of two.
      num_pages: pages of the KV cache; by default a quarter of the free memory, 4 GiB at the most; on an accelerator
        what weights leave of nine tenths of its memory.
      prefix_caching: keep the keys and values of finished prompts and answers for later prompts that begin alike.
      dtype: of weights, activations and cache; "auto" is float32 on CPU and bfloat16 elsewhere.
      pack_weights: lay weights out for the CPU kernel of `kernels.matmul`; by default wherever that kernel runs.
      max_adapters: LoRA adapters loaded at once; each slot takes memory whether it is used or not.
      max_adapter_rank: the largest rank that an adapter may have.
      mesh: devices that share the model and its cache, on an axis "tensor"; None for one.
      max_waiting: requests waiting beyond which a new one is refused.
      policy: who goes next. "fcfs": by arrival. "lpm": the longest cached prefix, whosever it is. "vtc": the client
        that has had least. "dlpm": the longest cached prefix among clients with credit, fair and local at once.
      quantum: with "dlpm", the credit that clients in debt are granted at a time, in prompt tokens; by default it goes
        by what recent requests cost. More is faster and less even.
      client_weights: shares of clients, integers >= 1; of others 1.
      reserve_pages: start a request only if the pages of its longest answer are free too. Nobody is preempted, and the
        bound on unfairness is smaller, but fewer answers are generated at once.
      batch_invariant: an answer's bits do not depend on who else is served, on what is cached, on how a prompt is cut
        into chunks, on preemption or guesses. No step has fewer than 16 rows, and the start-up fails with a line if
        this backend gives the same token other bits in another step. On CPU it needs the compiled kernels.
      speculation: tokens guessed ahead of a sequence from its own past (3 or 4 are usual; 0: none). Answers stay the
        same; where they repeat themselves or their prompts, they take fewer steps.
      speculation_rows: guess only while a step, guesses included, has at most so many rows; by default 4 on CPU, where
        they cost what one does, and 64 elsewhere.
      kv_swap: keep part of the KV cache in the host's memory, streamed past the layers in every step; `num_pages` is
        then what all of it may take of the device, streaming included. None: everything on the device.
      offload: keep weights on the host and stream them, for a model larger than its device; None for a model that fits.
        Refused together with adapters, a mesh, speculation, batch invariance and `kv_swap`; steps do not overlap then.
      overlap: start a step before the results of the one before have been read; False takes one after the other.
      seed: of the generator that gives seeds to requests without one.
    """

    max_sequences: int = 32
    max_batch_tokens: int = 512
    max_model_len: int | None = None
    page_size: int = 16
    num_pages: int | None = None
    prefix_caching: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    pack_weights: bool | None = None
    max_adapters: int = 0
    max_adapter_rank: int = 16
    mesh: Mesh | None = None
    max_waiting: int = 1024
    policy: str = "fcfs"
    quantum: int | None = None
    client_weights: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    reserve_pages: bool = False
    batch_invariant: bool = False
    speculation: int = 0
    speculation_rows: int | None = None
    kv_swap: SwapConfig | None = None
    offload: OffloadConfig | None = None
    overlap: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_batch_tokens", "page_size", "max_waiting", "max_adapter_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}, expected an integer >= 1")
        if self.max_adapters < 0:
            raise UserError(f"max_adapters: found {self.max_adapters}, expected an integer >= 0")
        if not 0 <= self.speculation <= 16:
            raise UserError(f"speculation: found {self.speculation}, expected an integer from 0 to 16")
        if self.speculation_rows is not None and self.speculation_rows < 2:
            raise UserError(f"speculation_rows: found {self.speculation_rows}, expected an integer >= 2")
        if self.page_size & (self.page_size - 1):
            raise UserError(f"page_size: found {self.page_size}, expected a power of two")
        if self.max_batch_tokens < self.max_sequences:
            raise UserError(
                f"max_batch_tokens: found {self.max_batch_tokens}, expected at least max_sequences = "
                f"{self.max_sequences}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype: found {self.dtype!r}, expected auto, float32 or bfloat16")
        for name in ("max_model_len", "num_pages"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UserError(f"{name}: found {value}, expected an integer >= 2")
        if self.offload is not None:
            named = {
                "max_adapters": self.max_adapters,
                "mesh": self.mesh is not None,
                "speculation": self.speculation,
                "batch_invariant": self.batch_invariant,
                "kv_swap": self.kv_swap is not None,
            }
            if asked := [name for name, value in named.items() if value]:
                raise UserError(f"offload: found {' and '.join(asked)} besides, which it cannot be combined with")
        self.scheduling_policy()

    def scheduling_policy(self) -> Policy:
        """A new policy as the settings say. Raises UserError where they do not make one."""
        options: dict[str, Any] = {"weights": self.client_weights}
        if self.quantum is not None:
            options["quantum"] = self.quantum
        return policy_named(self.policy, **options)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What `EngineConfig` comes to for one model."""

    max_model_len: int
    num_pages: int
    shapes: tuple[BatchShape, ...]


def sizes(config: EngineConfig, model: DecoderConfig, dtype_bytes: int) -> Sizes:
    """Window, pages and batch shapes.

    Raises:
      UserError: a window beyond the model's positions, or fewer than two pages for each running sequence.
    """
    window = config.max_model_len or model.max_position_embeddings
    if window > model.max_position_embeddings:
        raise UserError(
            f"max_model_len: found {window}, expected at most the model's max_position_embeddings = "
            f"{model.max_position_embeddings}"
        )
    pages = config.num_pages
    if pages is None:
        kv_heads = model.num_kv_heads if config.mesh is None else cached_kv_heads(model, check_mesh(config.mesh, model))
        page_bytes = model.num_layers * config.page_size * 2 * kv_heads * model.head_dim * dtype_bytes
        room = _cache_bytes(config.offload) * (1 if config.mesh is None else config.mesh.size)
        useful = 4 * config.max_sequences * -(-window // config.page_size)
        pages = min(int(room // page_bytes), useful)
    if pages < 2 * config.max_sequences:
        raise UserError(
            f"num_pages: found {pages}, expected at least 2 for each of max_sequences = {config.max_sequences}; "
            "lower max_sequences or free memory"
        )
    window = min(window, pages * config.page_size)
    table = -(-window // config.page_size)
    many = rows_of(config)
    few = many if config.batch_invariant else min(_FEW_SAMPLES, many)
    smallest = _INVARIANT_ROWS if config.batch_invariant else 1
    # A step that streams its weights takes the time of their copy, however few rows it has: one shape will do.
    decode_rows = _decode_rows(many) if config.offload is None else [many]
    decode = (BatchShape(rows, rows, table, few if rows <= few else many) for rows in decode_rows if rows >= smallest)
    mixed = (BatchShape(rows, many, table, many) for rows in _mixed_rows(config.max_batch_tokens, many))
    return Sizes(window, pages, (*decode, *mixed))


def _cache_bytes(offload: OffloadConfig | None) -> float:
    """What the cache may take of one device, the weights being there; or of the host, if it lives there."""
    if offload is not None and offload.policy.kv_resident:
        return _OFFLOAD_CACHE_SHARE * offload.device_budget_bytes
    device = jax.local_devices()[0]
    memory = None if device.platform == "cpu" or offload is not None else device.memory_stats()
    if memory is None:
        return min(_CPU_CACHE_SHARE * psutil.virtual_memory().available, _CPU_CACHE_BYTES)
    return max(0.0, _ACCELERATOR_SHARE * memory["bytes_limit"] - memory["bytes_in_use"])


def rows_of(config: EngineConfig) -> int:
    """Sampled rows of a full step: one a sequence, and no fewer than a lone sequence with its guesses can use, or than
    batch invariance needs.
    """
    return max(config.max_sequences, _INVARIANT_ROWS if config.batch_invariant else 4 if config.speculation else 1)


def _decode_rows(limit: int) -> list[int]:
    """1, 4, 8, 16, 24, 32, 48, 64, 96, ...: beyond 8 rows at most a third of a full step is padding."""
    rows = [1, 4, 8] + [size for power in range(4, 20) for size in (2**power, 3 * 2 ** (power - 1))]
    return [r for r in rows if r < limit] + [limit]


def _mixed_rows(tokens: int, sequences: int) -> list[int]:
    """Powers of two from 64 up to the token budget, always more than the sequences so that they are no decode steps."""
    rows, size = [], _SMALLEST_MIXED_STEP
    while size <= sequences:
        size *= 2
    while size < tokens:
        rows.append(size)
        size *= 2
    return [*rows, max(tokens, sequences + 1)]
