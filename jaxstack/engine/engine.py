"""One replica: requests in, tokens out.

A request goes one way: `submit` checks it and puts it in the inbox; `step` takes it out and runs a turn of the
pipeline (`pipeline.py`): plan, pack, launch the compiled step, and turn drawn tokens into text for whoever listens
(`answers.py`). Nothing calls back up. `generate` drives steps itself; `start` gives them a thread of their own, and
then `generate`, `stream` and `submit` work from any thread.
"""

import asyncio
import collections
import itertools
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm import tqdm

from jaxstack.engine.adapters import AdapterRegistry
from jaxstack.engine.answers import Answers
from jaxstack.engine.config import EngineConfig, rows_of, sizes
from jaxstack.engine.guided import GrammarCompiler
from jaxstack.engine.invariance import differing_shapes
from jaxstack.engine.listeners import Collector, Feed, wake_all
from jaxstack.engine.pipeline import Pipeline
from jaxstack.engine.pooling import Pooled, Pooling
from jaxstack.engine.prompt_embeddings import EmbeddingPrompt, GivenEmbeddings, check_embeddings
from jaxstack.engine.prompt_scores import PromptScores
from jaxstack.engine.request import Delta, Listener, Request, RequestOutput, RequestTiming, SamplingParams, Sequence
from jaxstack.engine.runner import Runner
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling import FirstComeFirstServed, Policy
from jaxstack.engine.stats import EngineStats
from jaxstack.models.adapter_slots import add_slots
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.decoder import Decoder
from jaxstack.models.peft_format import read_peft
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.models.tensor_parallel import place, shard_for_serving
from jaxstack.models.tokenizer import Tokenizer, load_tokenizer
from jaxstack.runtime.errors import UserError
from kernels import matmul

log = logging.getLogger(__name__)

Prompt = str | Seq[int]

# Failed steps in a row after which the engine gives up.
_FATAL_FAILURES = 3


class QueueFull(UserError):
    """So many requests wait already that another one is refused; come back later."""


class PromptTooLong(UserError):
    """Prompt and answer together exceed the window."""


class EngineDead(RuntimeError):
    """The step thread has ended; nothing more will be answered."""


class Engine:
    """See the module's docstring.

    Args:
      decoder: the model. Its weights are taken over: do not use it afterwards.
      tokenizer: None for token ids in and out only.
      policy: the scheduling policy; first come, first served by default.

    Raises:
      UserError: settings that do not fit the model or the machine.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        *,
        policy: Policy | None = None,
    ):
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.model_config = model = decoder.config
        if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"tokenizer: found {tokenizer.vocab_size} tokens, expected at most the model's vocab_size = "
                f"{model.vocab_size}"
            )
        on_cpu = jax.default_backend() == "cpu"
        name = config.dtype if config.dtype != "auto" else ("float32" if on_cpu else "bfloat16")
        dtype = jnp.dtype(name)
        # Axes of type Auto, however the caller made them: the programs say themselves where their arrays go.
        self._mesh = None if config.mesh is None else Mesh(config.mesh.devices, config.mesh.axis_names)
        decoder = self._serving_form(decoder, dtype)
        self._adapters = AdapterRegistry(config.max_adapters)
        chosen = sizes(config, model, dtype.itemsize)
        self.max_model_len = chosen.max_model_len
        decoder.config = model.for_context(chosen.max_model_len)
        self.vocab_size = min(model.vocab_size, tokenizer.vocab_size) if tokenizer else model.vocab_size
        self.policy = policy or FirstComeFirstServed()
        self.runner = Runner(
            decoder,
            chosen.shapes,
            num_pages=chosen.num_pages,
            page_size=config.page_size,
            slots=config.max_sequences,
            max_length=chosen.max_model_len,
            vocab_size=self.vocab_size,
            dtype=dtype,
            adapter_rank=config.max_adapter_rank,
            mesh=self._mesh,
        )
        eos = frozenset(model.eos_token_ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
        self._grammars = GrammarCompiler(tokenizer, eos, model.vocab_size)
        self._answers = Answers(tokenizer, eos, self._leave)
        self._pipeline = Pipeline(
            self._new_scheduler(chosen.num_pages),
            self.runner,
            self._answers,
            page_size=config.page_size,
            overlap=config.overlap,
        )
        self._random = random.Random(config.seed)
        self._order = itertools.count()
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._driving = threading.RLock()
        self._wake = threading.Condition()
        self._turned = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._death: BaseException | None = None
        self._failures = 0
        self._proved = False
        self._touched: dict[asyncio.AbstractEventLoop, list[Feed]] = {}

    @property
    def scheduler(self) -> Scheduler:
        """The one in use; a failed step replaces it."""
        return self._pipeline.scheduler

    @classmethod
    def from_folder(
        cls, folder: str | Path, config: EngineConfig | None = None, *, policy: Policy | None = None
    ) -> "Engine":
        """Loads a Hugging Face folder: weights, configuration, tokenizer and chat template.

        Raises:
          UserError: the folder, a file in it, or the settings are wrong.
        """
        config = config or EngineConfig()
        name = config.dtype if config.dtype != "auto" else ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        decoder = load_decoder(folder, param_dtype=jnp.dtype(name))
        return cls(decoder, load_tokenizer(folder), config, policy=policy)

    # Requests.

    def submit(
        self,
        prompt: Prompt | EmbeddingPrompt,
        sampling: SamplingParams | None = None,
        listener: Listener | None = None,
        request_id: str | None = None,
        *,
        client: str = "",
        namespace: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        adapter: str | None = None,
        pooled: Pooled | None = None,
    ) -> str:
        """Queues a prompt; `listener` is called with every piece of every choice, on the thread that steps.

        Args:
          client: whose request it is, for scheduling policies.
          namespace: requests share cached prefixes only within one.
          priority: lower goes first and gives up its pages last; the policy decides among equals.
          timeout_s: so long after its arrival the request ends as it is, with finish_reason "timeout".
          adapter: the name of a loaded LoRA adapter to answer with.
          pooled: gathers the prompt's hidden states in the place of an answer (see `embed`).

        Returns: the request's id.

        Raises:
          UserError: the prompt is empty, holds unknown tokens, or does not fit the window together with `max_tokens`;
            `timeout_s` is not positive; or no such adapter is loaded.
          QueueFull: too many requests wait.
          EngineDead: nobody would answer.
        """
        self._raise_if_dead()
        if self._stopping:
            raise EngineDead("the engine has stopped")
        if not self._room():
            raise QueueFull(f"{self.config.max_waiting} requests wait already, which is the limit; try again later")
        sampling = sampling or SamplingParams()
        tokens, given = self._checked(prompt, sampling, 0 if pooled is not None else sampling.max_tokens or 1)
        if given is not None and sampling.prompt_logprobs is not None:
            raise UserError("prompt_logprobs: found a prompt of embeddings, expected one of tokens")
        _check_timeout(timeout_s)
        order, now = next(self._order), time.perf_counter()
        wanted = sampling.prompt_logprobs
        held = None if adapter is None else self._adapters.acquire(adapter)
        request = Request(
            request_id=request_id or f"request-{order}",
            prompt=tuple(max(token, 0) for token in tokens),
            sampling=sampling,
            arrival_s=now,
            order=order,
            max_tokens=sampling.max_tokens or self.max_model_len - len(tokens),
            seed=self._random.getrandbits(63) if sampling.seed is None else sampling.seed,
            listener=listener,
            client=client,
            namespace=namespace if held is None else held.namespace(namespace),
            adapter=held,
            unfinished=sampling.choices,
            priority=priority,
            deadline_s=None if timeout_s is None else now + timeout_s,
            scores=None if wanted is None else PromptScores(tuple(tokens), wanted),
            grammar=None if sampling.guide is None else self._grammars.compile(sampling.guide),
            given=given,
            pooled=pooled,
        )
        self._post(lambda: self._enter(request))
        return request.request_id

    def check_prompt(self, prompt: Prompt | EmbeddingPrompt, sampling: SamplingParams) -> list[int]:
        """The prompt's token ids, -1 for a vector. Raises UserError for a prompt that could never be answered as
        `sampling` asks.

        Compiles the grammar of a guide, which may take a moment; afterwards it is known.
        """
        return self._checked(prompt, sampling, sampling.max_tokens or 1)[0]

    def _checked(
        self, prompt: Prompt | EmbeddingPrompt, sampling: SamplingParams, wanted: int
    ) -> tuple[list[int], GivenEmbeddings | None]:
        sampling.check_token_ids(self.vocab_size)
        if sampling.guide is not None:
            self._grammars.compile(sampling.guide)
        given = None
        if isinstance(prompt, EmbeddingPrompt):
            tokens, given = check_embeddings(prompt, self.model_config.hidden_size)
        elif isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("prompt: found text, expected token ids (this engine has no tokenizer)")
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            raise UserError("prompt: found no tokens, expected at least one")
        low, high = min(tokens), max(tokens)
        if (low < 0 and given is None) or high >= self.model_config.vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"prompt: found token id {bad}, expected ids from 0 to {self.model_config.vocab_size - 1}")
        if len(tokens) + wanted > self.max_model_len:
            raise PromptTooLong(
                f"prompt: found {len(tokens)} tokens and {wanted} to generate, "
                f"expected at most {self.max_model_len} together"
            )
        return tokens, given

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its listener gets a last piece with finish_reason "abort"."""
        self._post(lambda: self._answers.end_request(request_id, "abort"))

    def generate(
        self,
        prompts: Seq[Prompt | EmbeddingPrompt],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool = False,
        priority: int = 0,
        timeout_s: float | None = None,
        adapter: str | None = None,
    ) -> list[RequestOutput]:
        """Answers all prompts, in the order given. Blocks.

        Args:
          sampling: one for all, or one for each prompt.
          progress: a bar on stderr.
          priority, timeout_s: of every prompt, as in `submit`.
          adapter: the LoRA adapter that answers, as in `submit`.

        Raises:
          UserError: a prompt is wrong (see `submit`); then none is started.
        """
        each = list(sampling) if isinstance(sampling, Seq) else [sampling or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"sampling: found {len(each)}, expected one for each of {len(prompts)} prompts")
        tokens = [self.check_prompt(p, s) for p, s in zip(prompts, each)]
        _check_timeout(timeout_s)
        self.warm_up(progress)
        collectors: dict[str, Collector] = {}
        with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=not progress) as bar:
            try:
                for prompt, ids, params in zip(prompts, tokens, each):
                    asked = prompt if isinstance(prompt, EmbeddingPrompt) else ids
                    self._wait_until(self._room)
                    collector = Collector(ids, params.n, bar.update)
                    name = self.submit(
                        asked, params, collector, priority=priority, timeout_s=timeout_s, adapter=adapter
                    )
                    collectors[name] = collector
                for collector in collectors.values():
                    self._wait_for(collector)
            except BaseException:
                for request_id, collector in collectors.items():
                    if not collector.done.is_set():
                        self.abort(request_id)
                raise
        return [c.output() for c in collectors.values()]

    def embed(
        self, prompts: Seq[Prompt | EmbeddingPrompt], pooling: Pooling = "last", adapter: str | None = None
    ) -> list[Float32[np.ndarray, " D"]]:
        """The final hidden states of each prompt, pooled and not normalised. Blocks; callable from any thread.

        Raises:
          UserError: a prompt is wrong (see `submit`), or the pooling unknown; then none is started.
          RuntimeError: a prompt was aborted, or its hidden states are not finite.
        """
        nothing = SamplingParams(max_tokens=1, temperature=0.0)
        gathered = [Pooled(pooling) for _ in prompts]
        tokens = [self._checked(prompt, nothing, 0)[0] for prompt in prompts]
        self.warm_up(False)
        collectors: dict[str, Collector] = {}
        try:
            for prompt, ids, pooled in zip(prompts, tokens, gathered):
                self._wait_until(self._room)
                collector = Collector(ids, 1, lambda: None)
                asked = prompt if isinstance(prompt, EmbeddingPrompt) else ids
                collectors[self.submit(asked, nothing, collector, adapter=adapter, pooled=pooled)] = collector
            for collector in collectors.values():
                self._wait_for(collector)
        except BaseException:
            for request_id, collector in collectors.items():
                if not collector.done.is_set():
                    self.abort(request_id)
            raise
        vectors = [pooled.vector for pooled in gathered]
        if any(v is None or not np.isfinite(v).all() for v in vectors):
            raise RuntimeError("a prompt could not be embedded: it was aborted, or its hidden states are not finite")
        return [v for v in vectors if v is not None]

    async def stream(
        self,
        prompt: Prompt | EmbeddingPrompt,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        client: str = "",
        namespace: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        adapter: str | None = None,
    ) -> AsyncIterator[Delta]:
        """The pieces of an answer as they are made, until every choice has finished. Needs `start`.

        Closing the iterator early aborts the request. Raises as `submit` does, and EngineDead if the engine dies
        underway.
        """
        sampling = sampling or SamplingParams()
        feed = Feed(asyncio.get_running_loop(), self._touched)
        name = self.submit(
            prompt,
            sampling,
            feed,
            request_id,
            client=client,
            namespace=namespace,
            priority=priority,
            timeout_s=timeout_s,
            adapter=adapter,
        )
        open_choices = sampling.n
        try:
            while open_choices:
                for delta in await feed.take():
                    open_choices -= delta.finish_reason is not None
                    yield delta
        finally:
            if open_choices:
                self.abort(name)

    # Adapters.

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded LoRA adapters."""
        return self._adapters.names

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Loads a PEFT folder; requests may name it from then on. Compiles nothing once the engine is warm. Blocks.

        Raises:
          UserError: the folder is none, or holds what cannot be served; its rank is above `max_adapter_rank`; the name
            is taken; no slot is free.
        """
        self._adapters.check_room(name)
        contents = self.runner.adapter_contents(read_peft(folder), folder)

        def enter() -> None:
            self.runner.write_adapter(self._adapters.load(name).slot, contents)

        self._between_steps(enter)

    def unload_adapter(self, name: str) -> None:
        """Takes no new requests for an adapter, waits until those that use it have ended, and frees its slot.

        Raises:
          UserError: no adapter of that name is loaded.
        """
        adapter = self._adapters.unload(name)
        self._wait_until(lambda: not adapter.users)

        def forget() -> None:
            self._pipeline.settle()  # what has just ended still gives its pages to the cache
            for namespace in adapter.namespaces:
                self.scheduler.tree.drop(namespace)

        self._between_steps(forget)

    def update_weights(self, decoder: Decoder, *, abort: bool = False) -> None:
        """Goes on with other weights of the same model, between two steps. Cached prefixes are forgotten. Blocks.

        Args:
          decoder: as loaded or trained, without adapters. Its weights are taken over.
          abort: end running requests with finish_reason "abort"; otherwise they go on, with what they have so far
            computed anew.

        Raises:
          UserError: another model, or other shapes or dtypes; then nothing has changed.
        """
        if decoder.config != self.model_config:
            raise UserError("weights: found a decoder of another configuration, expected the one that is served")
        fresh = self._serving_form(decoder, self.runner.dtype)

        def exchange() -> None:
            self._pipeline.settle()
            self.runner.replace_weights(fresh)
            for sequence in list(self.scheduler.running):
                if not abort:
                    self.scheduler.preempt(sequence)
                elif sequence.finish_reason is None:
                    self._answers.end_request(sequence.request.request_id, "abort")
            self.scheduler.tree.clear()
            self._answers.weights_version += 1

        self._between_steps(exchange)

    @property
    def weights_version(self) -> int:
        """How often the weights have been exchanged."""
        return self._answers.weights_version

    # The step loop.

    def warm_up(self, progress: bool = True) -> None:
        """Compiles every step. Takes seconds to minutes, once.

        Raises:
          UserError: the engine is to be batch invariant, and this backend is not.
        """
        with self._driving:
            self.runner.warm_up(progress, lambda: self._stopping)
            if self.config.batch_invariant and self.runner.warm and not self._proved:
                self._prove_invariance()

    def _prove_invariance(self) -> None:
        pool = self.scheduler.pool
        differing = differing_shapes(self.runner, page_size=self.config.page_size, num_pages=pool.size)
        if differing:
            raise UserError(
                f"batch_invariant: found other bits for {len(differing)} ways to compute one token ({differing[0]}"
                f"{', ...' if len(differing) > 1 else ''}), expected the same; this backend cannot, set it to False"
            )
        self._proved = True

    def start(self, progress: bool = True) -> None:
        """Warms up and gives the steps a thread of their own."""
        with self._driving:
            self.warm_up(progress)
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
                self._thread.start()

    def close(self, drain_timeout_s: float = 0.0) -> None:
        """Ends the step thread: after the open requests, or after `drain_timeout_s`, when the rest is aborted."""
        deadline = time.perf_counter() + drain_timeout_s
        while self._busy() and self._death is None and time.perf_counter() < deadline:
            time.sleep(0.01)
        self._stopping = True
        with self._wake:
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._driving:
            self._drain_inbox()
            for request_id in list(self._answers.live):
                self._answers.end_request(request_id, "abort")
            if self._death is None:
                self._pipeline.settle()
            self._flush()

    def step(self) -> bool:
        """One turn: take in requests, start the next step, hand out the tokens of the last. False when idle."""
        with self._driving:
            self._drain_inbox()
            self._answers.expire(time.perf_counter())
            worked = self._pipeline.turn()
            self._flush()
            return worked

    def stats(self) -> EngineStats:
        """A reading; callable from any thread."""
        scheduler, pipeline, answers = self.scheduler, self._pipeline, self._answers
        pool, counters = scheduler.pool, scheduler.counters
        return EngineStats(
            running=len(scheduler.running) + len(scheduler.closing),
            waiting=len(scheduler.waiting) + len(self._inbox),
            pages_free=pool.free,
            pages_tree=pool.tree,
            pages_private=pool.private,
            pages_total=pool.size,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            drafted_tokens=counters.drafted_tokens,
            accepted_drafts=counters.accepted_drafts,
            prompt_tokens=answers.prompt_tokens,
            generation_tokens=answers.generation_tokens,
            finished=dict(answers.finished),
            corrupted_requests=answers.corrupted,
            steps=pipeline.steps,
            step_seconds=pipeline.step_seconds,
            host_seconds=pipeline.step_seconds - pipeline.wait_seconds,
            step_rows=pipeline.rows,
            step_padding=pipeline.padding,
            iteration_tokens=dict(pipeline.iteration_tokens),
            recompilations=self.runner.recompilations,
            warm=self.runner.warm,
            warm_progress=self.runner.warm_fraction,
            alive=self._death is None and not self._stopping,
        )

    def on_finish(self, callback: Callable[[RequestTiming], None]) -> None:
        """`callback` is told of every finished request, on the thread that steps."""
        self._answers.on_finish.append(callback)

    # Inside.

    def _serving_form(self, decoder: Decoder, dtype: jnp.dtype) -> Decoder:
        """The decoder, taken over: fused and packed for one device, or cut up for the mesh; with room for adapters."""
        config = self.config
        if self._mesh is not None:
            decoder = shard_for_serving(decoder, self._mesh)
        else:
            packing = config.pack_weights
            if packing is None:
                packing = jax.default_backend() == "cpu" and matmul.available()
            decoder = fuse_for_serving(decoder, pack=packing, dtype=dtype, consume=True)
        if config.max_adapters:
            add_slots(decoder, config.max_adapters, config.max_adapter_rank, dtype)
            if self._mesh is not None:
                place(decoder, self._mesh)
        return decoder

    def _new_scheduler(self, num_pages: int) -> Scheduler:
        return Scheduler(
            self.policy,
            num_pages=num_pages,
            page_size=self.config.page_size,
            max_sequences=self.config.max_sequences,
            max_batch_tokens=self.config.max_batch_tokens,
            prefix_caching=self.config.prefix_caching,
            max_rows=rows_of(self.config),
            speculation=self.config.speculation,
            speculation_rows=self.config.speculation_rows or (4 if jax.default_backend() == "cpu" else 64),
        )

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        with self._wake:
            self._wake.notify_all()

    def _busy(self) -> bool:
        return bool(self._answers.live or self._inbox)

    def _room(self) -> bool:
        return len(self.scheduler.waiting) + len(self._inbox) < self.config.max_waiting

    def _wait_until(self, holds: Callable[[], bool]) -> None:
        """Lets steps pass, or drives them, until a condition that they bring about holds."""
        while not holds():
            if self._thread is None:
                self.step()
            else:
                with self._turned:  # the timeout is for a thread that dies between two looks
                    self._turned.wait_for(lambda: holds() or self._death is not None, timeout=1.0)
                self._raise_if_dead()

    def _between_steps(self, action: Callable[[], None]) -> None:
        """Runs `action` where no other thread plans or launches, and passes on what it raises."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self._post(run)
        if self._thread in (None, threading.current_thread()):
            with self._driving:
                self._drain_inbox()
        self._wait_until(done.done)
        done.result()

    def _wait_for(self, collector: Collector) -> None:
        while not collector.done.is_set():
            if self._thread is None:
                self.step()
            elif not collector.done.wait(timeout=1.0):
                self._raise_if_dead()

    def _raise_if_dead(self) -> None:
        if self._death is not None:
            raise EngineDead("the engine has stopped") from self._death

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    worked = self.step()
                    self._failures = 0 if worked else self._failures
                except Exception as error:
                    self._failures += 1
                    log.exception("step failed (%d in a row)", self._failures)
                    self._fail_running(error)
                    if self._failures >= _FATAL_FAILURES:
                        raise
                    continue
                if not worked:
                    with self._wake:
                        if not self._inbox and not self._stopping:
                            self._wake.wait(timeout=1.0)
        except BaseException as error:
            self._death = error
            log.critical("the engine has died: %s", error)
            with self._driving:
                self._drain_inbox()
                for request_id in list(self._answers.live):
                    self._answers.end_request(request_id, "error")
                self._flush()

    def _fail_running(self, error: BaseException) -> None:
        """A step raised: its requests end, those waiting stay, and memory starts afresh (the cache was donated)."""
        with self._driving:
            old = self.scheduler
            for request_id in {s.request.request_id for s in old.running}:
                self._answers.end_request(request_id, "error")
            fresh = self._new_scheduler(old.pool.size)
            fresh.counters = old.counters
            for sequence in old.waiting:
                fresh.add(sequence)
            self._pipeline.discard(fresh)
            self.runner.reset_cache()
            self._flush()

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _enter(self, request: Request) -> None:
        for sequence in self._answers.open(request):
            self.scheduler.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        request = sequence.request
        if request.adapter is not None and request.unfinished == 1:
            self._adapters.release(request.adapter)

    def _flush(self) -> None:
        """Wakes whoever waits for a turn, and each event loop once, however many of its requests got a token."""
        with self._turned:
            self._turned.notify_all()
        touched = dict(self._touched)
        self._touched.clear()
        for loop, feeds in touched.items():
            try:
                loop.call_soon_threadsafe(wake_all, feeds)
            except RuntimeError:  # the loop is closed; its requests were aborted or will be, by their iterators
                log.debug("an event loop closed with %d open requests", len(feeds))


def _check_timeout(timeout_s: float | None) -> None:
    if timeout_s is not None and not 0 < timeout_s < float("inf"):
        raise UserError(f"timeout_s: found {timeout_s!r}, expected a positive number of seconds")
