"""The file of the engine that owns device arrays: weights, the KV cache, and one compiled program per batch shape; the
sampler's are with `sampler.py`.

Every shape is compiled by `warm_up`; a step then calls the compiled program itself, so a batch of an unforeseen shape
is an error and never a silent compilation. The cache is donated: each step updates it in place.

A step is two programs, launched one after the other without waiting: the forward pass (`launch`: tokens to logits) and
the sampler (`draw`: logits to tokens). A drawn token also stays on the device, in `last_token` of its sequence's slot,
where the next forward pass finds it before the host has read it. The device runs what it is given in order, so a step
sees all that earlier ones wrote.
"""

import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from jaxstack.engine.batch import BatchShape, HostBatch, cut, size
from jaxstack.engine.draws import HostDraws, no_draws
from jaxstack.engine.memory import PagePool
from jaxstack.engine.memory.swap.reading import SwapReading
from jaxstack.engine.placement import Placement
from jaxstack.engine.request import MAX_LOGPROBS, TokenLogprob
from jaxstack.engine.sampler import Sampler
from jaxstack.engine.sampling import Sampled
from jaxstack.engine.scoring import Scores, score
from jaxstack.models.adapter_slots import slot_contents, slot_sites, write_slot
from jaxstack.models.decoder import Decoder
from jaxstack.models.linear import AdapterFactors, AdapterStack
from jaxstack.models.peft_format import PeftAdapter
from jaxstack.models.serving_layout import count_rows
from jaxstack.models.tensor_parallel import AXIS, cached_kv_heads
from jaxstack.runtime.compilation import CompileWatch
from jaxstack.runtime.errors import UserError
from kernels.kv_write import kv_write
from kernels.paged_attention import paged_attention, ragged


@dataclasses.dataclass(frozen=True)
class Launched:
    """A forward pass that the device has been given. `hidden` is that of every token row, None in a decode step."""

    batch: HostBatch
    logits: Float[Array, "samples vocab"]
    hidden: Float[Array, "rows D"] | None = None
    scores: Scores | None = None


@dataclasses.dataclass(frozen=True)
class StepFuture:
    """A step that the device has been given whole. `tokens()` waits for it."""

    batch: HostBatch
    sampled: Sampled
    scores: Scores | None = None
    hidden: Float[Array, "rows D"] | None = None

    def tokens(self) -> list[int]:
        """One token per sequence row; -1 where the logits were not finite. Only rows that sample count."""
        return np.asarray(self.sampled.token).tolist()

    def logprobs(self, row: int, alternatives: int) -> TokenLogprob:
        """Of the token drawn in `row`, with the likeliest `alternatives`."""
        ids = np.asarray(self.sampled.top_tokens)[row, :alternatives].tolist()
        values = np.asarray(self.sampled.top_logprobs)[row, :alternatives].tolist()
        token = int(np.asarray(self.sampled.token)[row])
        return TokenLogprob(token, float(np.asarray(self.sampled.logprob)[row]), tuple(zip(ids, values)))


class Runner:
    """Runs steps of one decoder.

    Args:
      decoder: the weights; may be in serving layout (`jaxstack.models.serving_layout`).
      shapes: the batch shapes to compile.
      num_pages, page_size: the KV cache holds one page more, where padding rows write.
      slots, max_length: sequences running at once, and tokens of the longest one.
      vocab_size: token ids at or beyond it are never drawn (a model's table may be padded beyond its tokenizer's).
      dtype: of activations and cache.
      adapter_rank: of the decoder's adapter slots, if it has any.
      mesh: the devices over which `jaxstack.models.tensor_parallel` has laid the decoder out; None for one.
    """

    def __init__(
        self,
        decoder: Decoder,
        shapes: Seq[BatchShape],
        *,
        num_pages: int,
        page_size: int,
        slots: int,
        max_length: int,
        vocab_size: int,
        dtype: jnp.dtype,
        adapter_rank: int = 0,
        mesh: Mesh | None = None,
    ):
        self.config = decoder.config
        self.shapes = tuple(shapes)
        self.page_size = page_size
        self.dtype = jnp.dtype(dtype)
        self._vocab_size, self._rank = vocab_size, adapter_rank
        self._sites = slot_sites(decoder)
        graph, adapters, weights = nnx.split(decoder, AdapterFactors, ...)
        self._graph: nnx.GraphDef = graph
        self._weights = (adapters, weights)
        self._write_adapter: Callable | None = None
        self._placement = Placement(mesh)
        heads, head_dim = self.config.num_kv_heads, self.config.head_dim
        if mesh is not None:
            heads = cached_kv_heads(self.config, mesh.shape[AXIS])
        self._cache_shape = (self.config.num_layers, num_pages + 1, page_size, 2 * heads, head_dim)
        self._cache: Array
        place = self._placement
        columns = jax.eval_shape(decoder.logits, place.struct((1, self.config.hidden_size), self.dtype)).shape[-1]
        self.sampler = Sampler(
            slots=slots, length=max_length, vocab=self.config.vocab_size, columns=columns, placement=place
        )
        self.reset_cache()
        self._steps: dict[BatchShape, Callable] = {}
        self._scorers: dict[BatchShape, Callable] = {}
        self._nothing_given: dict[BatchShape, Array] = {}
        self.watch = CompileWatch()
        self.lost_pages = False  # whether the last step failed because pages could not be copied

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    @property
    def warm(self) -> bool:
        return len(self._steps) == len(self.shapes)

    @property
    def warm_fraction(self) -> float:
        """How much of the warm-up is done, 0 to 1."""
        return len(self._steps) / len(self.shapes)

    @property
    def recompilations(self) -> int:
        """Programs compiled by turns, which come after the warm-up. Zero is the promise."""
        return self.watch.count

    def swap_reading(self) -> SwapReading | None:
        """What swapping does; None without."""
        return None

    def warm_up(self, progress: bool = True, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compiles every shape and runs it once, so that the first request meets no surprise.

        Args:
          progress: a bar on stderr.
          stopped: asked before each shape; True leaves the rest undone.
        """
        if self.warm:
            return
        self.sampler.compile_writer()
        todo = [shape for shape in self.shapes if shape not in self._steps]
        bar = tqdm(todo, desc="compiling", unit="step", file=sys.stderr, disable=not progress, leave=False)
        with concurrent.futures.ThreadPoolExecutor(_compilers()) as pool:
            samplers = {rows: pool.submit(self.sampler.compile, rows) for rows in {shape.samples for shape in todo}}
            steps = {shape: pool.submit(self.compile, shape) for shape in todo}
            scorers = {shape: pool.submit(self.compile_scorer, shape) for shape in todo if not shape.decode}
            try:
                for shape in bar:
                    if stopped():
                        return
                    samplers[shape.samples].result()
                    self._run_once(shape, steps[shape].result(), scorers[shape].result() if shape in scorers else None)
            finally:
                pool.shutdown(cancel_futures=True)
        self._compile_adapter_writer()

    def _run_once(self, shape: BatchShape, step: Callable, scorer: Callable | None) -> None:
        """What a program does the first time alone is done now; from here on the shape is known."""
        ints = np.zeros(size(shape.int_fields), np.int32)
        cut(ints, shape.int_fields)["write_slots"][:] = (self._cache_shape[1] - 1) * self.page_size
        given = None
        if not shape.decode:
            nothing = np.zeros((shape.rows, self.config.hidden_size), np.float32)
            given = self._nothing_given[shape] = self._placement.put(nothing)
        logits, hidden = self._forward_once(shape, step, ints, given)
        if scorer is not None:
            self._scorers[shape] = scorer
            scorer(self._weights, hidden, np.full(shape.rows, -1, np.int32))
        for kind in self.sampler.kinds:
            draws = dataclasses.replace(no_draws(shape.samples, self.sampler.scrap_slot), kind=kind)
            jax.block_until_ready(self.sampler.draw(logits, draws))
        self._steps[shape] = step

    def _forward_once(self, shape: BatchShape, step: Callable, ints: np.ndarray, given: Array | None):
        self._cache, logits, hidden = step(self._weights, self._cache, ints, self.sampler.last_token, given)
        return logits, hidden

    def compile(self, shape: BatchShape):
        """The compiled forward pass of one shape (`jax.stages.Compiled`): weights, cache, ints, last tokens, given
        embeddings (None in a decode step) -> cache, logits, and hidden states unless every row has logits.
        """
        place = self._placement
        ints = place.struct((size(shape.int_fields),), jnp.int32)

        given = None if shape.decode else place.struct((shape.rows, self.config.hidden_size), jnp.float32)

        def step(weights, cache, ints, last_token, given):
            return self._step(shape, weights, cache, ints, last_token, given)

        jitted = jax.jit(
            step, donate_argnums=(1,), out_shardings=place.all_of(place.cache, place.logits, place.everywhere)
        )
        # Told of the cache and not given it: another program may be taking it away just now.
        cache = place.struct(self._cache_shape, self.dtype, place.cache)
        return jitted.lower(self._weights, cache, ints, self.sampler.last_token, given).compile()

    def compile_scorer(self, shape: BatchShape):
        """The compiled scorer of prompt tokens: weights, hidden states, targets -> `Scores`."""
        alternatives = min(MAX_LOGPROBS, self.config.vocab_size)

        def scorer(weights, hidden, targets):
            decoder = nnx.merge(self._graph, *weights)
            return score(lambda rows: self._logits(decoder, rows), hidden, targets, alternatives)

        place = self._placement
        hidden = place.struct((shape.rows, self.config.hidden_size), self.dtype)
        targets = place.struct((shape.rows,), jnp.int32)
        return jax.jit(scorer, out_shardings=place.everywhere).lower(self._weights, hidden, targets).compile()

    def launch(self, batch: HostBatch) -> Launched:
        """Starts the forward pass of a step and returns at once."""
        given = self._nothing_given.get(batch.shape) if batch.embeddings is None else batch.embeddings
        step = self._steps[batch.shape]
        self._cache, logits, hidden = step(self._weights, self._cache, batch.ints, self.sampler.last_token, given)
        return Launched(batch, logits, hidden)

    def score(self, launched: Launched, targets: Int32[np.ndarray, " rows"]) -> Launched:
        """Starts to score `targets` (-1 for none), one for each token row of a step that is no decode step."""
        scores = self._scorers[launched.batch.shape](self._weights, launched.hidden, targets)
        return dataclasses.replace(launched, scores=scores)

    def draw(self, launched: Launched, draws: HostDraws) -> StepFuture:
        """Starts the sampler of a launched step and returns at once. Comes before the next `launch`."""
        sampled = self.sampler.draw(launched.logits, draws)
        sampled.token.copy_to_host_async()
        return StepFuture(launched.batch, sampled, launched.scores, launched.hidden)

    def replace_weights(self, decoder: Decoder) -> None:
        """Takes the weights of another decoder of the same form, for steps launched from now on; adapters stay.

        Raises:
          UserError: an array of another shape or dtype.
        """
        adapters, old = self._weights
        _, _, new = nnx.split(decoder, AdapterFactors, ...)
        shapes = [{jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(t)} for t in (old, new)]
        for name, x in shapes[0].items():
            found = shapes[1].get(name)
            if found is None or (found.shape, found.dtype) != (x.shape, x.dtype):
                what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise UserError(f"weights: {name}: found {what}, expected {x.dtype} {list(x.shape)}")
        self._weights = (adapters, new)

    def adapter_contents(self, adapter: PeftAdapter, source: str | Path) -> list[AdapterStack]:
        """What `write_adapter` puts into a slot for a PEFT adapter: host arrays. Raises as `slot_contents` does."""
        contents = slot_contents(self._sites, adapter, self._rank, self.dtype, source=source)
        return [contents[tuple(map(str, path[:-2]))] for path, _ in nnx.to_flat_state(self._weights[0])]

    def write_adapter(self, slot: int, contents: list[AdapterStack]) -> None:
        """Replaces the adapter in a slot, for steps launched from now on."""
        write = self._compile_adapter_writer()
        adapters, weights = self._weights
        variables = nnx.to_flat_state(adapters)
        stacks = write([v.get_value() for _, v in variables], np.int32(slot), contents)
        adapters = nnx.from_flat_state([(path, v.replace(stack)) for (path, v), stack in zip(variables, stacks)])
        self._weights = (adapters, weights)

    def _compile_adapter_writer(self) -> Callable:
        if self._write_adapter is None:
            stacks = [v.get_value() for _, v in nnx.to_flat_state(self._weights[0])]
            place = self._placement
            contents = jax.tree.map(lambda x: place.struct((x.shape[0], *x.shape[2:]), x.dtype), stacks)
            kept = None if place.mesh is None else jax.tree.map(lambda x: x.sharding, stacks)
            write = jax.jit(write_slot, donate_argnums=(0,), out_shardings=kept)
            self._write_adapter = write.lower(stacks, place.struct((), jnp.int32), contents).compile()
        return self._write_adapter

    def new_pool(self, num_pages: int) -> PagePool:
        """A page pool for the cache, all pages free."""
        return PagePool(num_pages)

    def reset_cache(self) -> None:
        """A new empty cache, for when a failed step has consumed the old one."""
        place = self._placement
        self._cache = place.zeros(self._cache_shape, self.dtype, place.cache)
        self.sampler.reset()

    def _step(self, shape: BatchShape, weights, cache, ints, last_token, given):
        def forward(weights, cache, ints, last_token, given):
            f = cut(ints, shape.int_fields)
            known = f["tokens"]
            tokens = jnp.where(known >= 0, known, last_token[jnp.maximum(-1 - known, 0)])
            batch = ragged(f["block_tables"], f["kv_lens"], f["query_starts"], f["num_decodes"], rows=shape.rows)
            options: dict[str, Any] = {"scale": self.config.attention_scale}
            if self.config.attention_softcap is not None:
                options["softcap"] = self.config.attention_softcap

            def attend(q, k, v, layer, cache):
                cache = kv_write(cache, k, v, layer.index, f["write_slots"])
                return paged_attention(q, cache, layer.index, batch, window=layer.window, **options), cache

            decoder = nnx.merge(self._graph, *weights)
            count_rows(decoder.layers, f["query_starts"][-1])
            hidden, cache = decoder.hidden(
                tokens,
                f["positions"],
                attend,
                cache,
                adapter_ids=f["adapters"],
                input_embeddings=given,
                use_embeddings=None if given is None else f["use_embeddings"] > 0,
                compute_dtype=self.dtype,
            )
            return cache, hidden

        cache, hidden = self._placement.shared(forward, self._weights)(weights, cache, ints, last_token, given)
        decoder, f = nnx.merge(self._graph, *weights), cut(ints, shape.int_fields)
        starts = f["query_starts"]
        count_rows(decoder.lm_head, (starts[1:] > starts[:-1]).sum())
        last = jnp.maximum(starts[1:] - 1, 0)
        logits = self._logits(decoder, hidden if shape.decode else hidden[last])
        logits = jnp.pad(logits, ((0, shape.samples - shape.sequences), (0, 0)))
        return cache, logits, None if shape.decode else hidden

    def _logits(self, decoder: Decoder, hidden: Float[Array, "rows D"]) -> Float[Array, "rows vocab"]:
        """float32, -inf for ids that no token has."""
        logits = decoder.logits(hidden)
        if logits.shape[-1] > self._vocab_size:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self._vocab_size, logits, -jnp.inf)
        return logits


def _compilers() -> int:
    """How many programs to compile at a time. XLA's compiler for CPUs occupies all of them by itself."""
    return 1 if jax.default_backend() == "cpu" else min(8, os.cpu_count() or 1)
