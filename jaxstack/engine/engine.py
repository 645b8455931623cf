"""One replica: requests in, tokens out.

A request goes one way: `submit` checks it (`prompts.py`) and posts it; `step` takes it in and runs a turn of the
pipeline (`pipeline.py`): plan, pack, launch the compiled step, and turn drawn tokens into text for whoever listens
(`answers.py`). Nothing calls back up. `generate` takes the steps itself; `start` gives them a thread of their own
(`driver.py`), and then `generate`, `stream` and `submit` work from any thread.
"""

import asyncio
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32
from tqdm import tqdm

from jaxstack.engine.adapters import AdapterRegistry
from jaxstack.engine.answers import Answers
from jaxstack.engine.asking import Ask, ask_all
from jaxstack.engine.config import EngineConfig, rows_of, sizes
from jaxstack.engine.driver import Driver
from jaxstack.engine.errors import EngineDead, QueueFull
from jaxstack.engine.guided import GrammarCompiler
from jaxstack.engine.invariance import prove
from jaxstack.engine.listeners import Feed
from jaxstack.engine.memory.swap import Rates
from jaxstack.engine.observer import Observer
from jaxstack.engine.pipeline import Pipeline
from jaxstack.engine.pipelined_runner import PipelinedRunner
from jaxstack.engine.pooling import Pooled, Pooling
from jaxstack.engine.prompt_embeddings import EmbeddingPrompt
from jaxstack.engine.prompt_scores import PromptScores
from jaxstack.engine.prompts import Prompt, PromptChecker, check_emitted, check_timeout
from jaxstack.engine.request import (
    Delta,
    FinishReason,
    Listener,
    Request,
    RequestOutput,
    RequestTiming,
    SamplingParams,
    Sequence,
)
from jaxstack.engine.runner import Runner
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling import FairnessReading, Policy
from jaxstack.engine.stats import EngineStats, reading
from jaxstack.engine.swap_movers import EmulatedMachine
from jaxstack.engine.swap_start import start_swapping
from jaxstack.engine.swapping_runner import SwappingRunner
from jaxstack.engine.weights import loading_place, served_dtype, serving_form
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.decoder import Decoder
from jaxstack.models.peft_format import read_peft
from jaxstack.models.tokenizer import Tokenizer, load_tokenizer
from jaxstack.runtime.errors import UserError


class Engine:
    """See the module's docstring.

    Args:
      decoder: the model. Its weights are taken over: do not use it afterwards.
      tokenizer: None for token ids in and out only.
      policy: the scheduling policy; by default what `config` says.
      emulate, rates: with `config.kv_swap`, the times of a machine that is not there, and what a machine does, by which
        it is decided whether to swap; None measures this one.

    Attributes:
      notes: lines for whoever starts the engine, about what it has decided.

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
        emulate: EmulatedMachine | None = None,
        rates: Rates | None = None,
    ):
        self.config = config = config or EngineConfig()
        self.tokenizer = tokenizer
        self.model_config = model = decoder.config
        if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
            raise UserError(
                f"tokenizer: found {tokenizer.vocab_size} tokens, expected at most the model's vocab_size = "
                f"{model.vocab_size}"
            )
        dtype = served_dtype(config)
        offload = config.offload
        # Axes of type Auto, however the caller made them: the programs say themselves where their arrays go.
        self._mesh = None if config.mesh is None else Mesh(config.mesh.devices, config.mesh.axis_names)
        if offload is None:
            decoder = serving_form(decoder, config, self._mesh, dtype)
        self._adapters = AdapterRegistry(config.max_adapters)
        chosen = sizes(config, model, dtype.itemsize)
        self.notes: list[str] = []
        swapping = None
        if config.kv_swap is not None:
            swapping = start_swapping(decoder, config, config.kv_swap, chosen, dtype, rates)
            self.notes.append(swapping.line)
            if swapping.plan is not None:
                config_with = dataclasses.replace(config, num_pages=swapping.plan.pages)
                chosen = sizes(config_with, model, dtype.itemsize)
        self.max_model_len = chosen.max_model_len
        decoder.config = model.for_context(chosen.max_model_len)
        self.vocab_size = min(model.vocab_size, tokenizer.vocab_size) if tokenizer else model.vocab_size
        self.policy = policy or config.scheduling_policy()
        more: dict[str, Any] = {"adapter_rank": config.max_adapter_rank, "mesh": self._mesh}
        options: dict[str, Any] = {
            "page_size": config.page_size,
            "slots": config.max_sequences,
            "max_length": chosen.max_model_len,
            "vocab_size": self.vocab_size,
            "dtype": dtype,
        }
        self.runner: Runner
        if offload is not None:
            pack = config.pack_weights
            self.runner = PipelinedRunner(
                decoder, chosen.shapes, num_pages=chosen.num_pages, offload=offload, pack=pack, **options
            )
        elif swapping is None or swapping.plan is None:
            self.runner = Runner(decoder, chosen.shapes, num_pages=chosen.num_pages, **more, **options)
        else:
            assert config.kv_swap is not None
            self.runner = SwappingRunner(
                decoder,
                chosen.shapes,
                plan=swapping.plan,
                swap=config.kv_swap,
                kv_device_bytes=swapping.kv_device_bytes,
                controller=swapping.controller,
                emulate=emulate,
                **more,
                **options,
            )
        eos = frozenset(model.eos_token_ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
        self._grammars = GrammarCompiler(tokenizer, eos, model.vocab_size)
        self._prompts = PromptChecker(
            model,
            tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            grammars=self._grammars,
        )
        self._answers = Answers(tokenizer, eos, self._leave)
        self._pipeline = Pipeline(
            self._new_scheduler(chosen.num_pages),
            self.runner,
            self._answers,
            page_size=config.page_size,
            # A step that streams weights keeps the host until it is over: its tokens should not wait for the next.
            overlap=config.overlap and offload is None,
        )
        self._random = random.Random(config.seed)
        self._order = itertools.count()
        self._repeated: set[str] = set()  # requests computed anew after a failure, which a second one would end
        self._proved = False
        self._driver = Driver(
            turn=self._turn,
            busy=lambda: bool(self._answers.live),
            recover=self._recover,
            give_up=functools.partial(self._end_all, "error"),
            watch=self.runner.watch,
        )

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
        with loading_place(config, folder):
            decoder = load_decoder(folder, param_dtype=served_dtype(config))
        return cls(decoder, load_tokenizer(folder), config, policy=policy)

    # Requests.

    def submit(
        self,
        prompt: Prompt,
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
        emitted: Seq[Seq[int] | None] | None = None,
    ) -> str:
        """Queues a prompt; `listener` is called with every piece of every choice, on the thread that steps.

        Args:
          client: whose request it is, for scheduling policies.
          namespace: requests share cached prefixes only within one.
          priority: lower goes first and gives up its pages last; the policy decides among equals.
          timeout_s: so long after its arrival the request ends as it is, with finish_reason "timeout".
          adapter: the name of a loaded LoRA adapter to answer with.
          pooled: gathers the prompt's hidden states in the place of an answer (see `embed`).
          emitted: the tokens that another engine, which was lost, has drawn of each choice; None for a choice that has
            ended. The answer goes on behind them, with the tokens it would have had there: a draw depends on the seed
            and on its place in the answer alone, so give the seed. Pieces have only what is new.

        Returns: the request's id.

        Raises:
          UserError: the prompt is empty, holds unknown tokens, or does not fit the window together with `max_tokens`;
            `timeout_s` is not positive; no such adapter is loaded; or no answer can go on behind `emitted`.
          QueueFull: too many requests wait.
          EngineDead: nobody would answer.
        """
        self._driver.check_alive()
        if not self._room():
            raise QueueFull(f"{self.config.max_waiting} requests wait already, which is the limit; try again later")
        sampling = sampling or SamplingParams()
        tokens, given = self._prompts.check(prompt, sampling, 0 if pooled is not None else sampling.max_tokens or 1)
        if given is not None and sampling.prompt_logprobs is not None:
            raise UserError("prompt_logprobs: found a prompt of embeddings, expected one of tokens")
        check_timeout(timeout_s)
        max_tokens, kept = sampling.max_tokens or self.max_model_len - len(tokens), None
        if emitted is not None:
            kept = check_emitted(emitted, sampling, max_tokens, self.model_config.vocab_size)
        order, now = next(self._order), time.perf_counter()
        wanted = sampling.prompt_logprobs
        held = None if adapter is None else self._adapters.acquire(adapter)
        request = Request(
            request_id=request_id or f"request-{order}",
            prompt=tuple(max(token, 0) for token in tokens),
            sampling=sampling,
            arrival_s=now,
            order=order,
            max_tokens=max_tokens,
            seed=self._random.getrandbits(63) if sampling.seed is None else sampling.seed,
            listener=listener,
            client=client,
            namespace=namespace if held is None else held.namespace(namespace),
            adapter=held,
            unfinished=sampling.choices if kept is None else sum(begun is not None for begun in kept),
            priority=priority,
            deadline_s=None if timeout_s is None else now + timeout_s,
            scores=None if wanted is None else PromptScores(tuple(tokens), wanted),
            grammar=None if sampling.guide is None else self._grammars.compile(sampling.guide),
            given=given,
            pooled=pooled,
            emitted=kept,
        )
        try:
            self._driver.post(lambda: self._enter(request), while_alive=True)
        except EngineDead:
            if held is not None:
                self._adapters.release(held)
            raise
        return request.request_id

    def check_prompt(self, prompt: Prompt, sampling: SamplingParams) -> list[int]:
        """The prompt's token ids, -1 for a vector. Raises UserError for a prompt that could never be answered as
        `sampling` asks.

        Compiles the grammar of a guide, which may take a moment; afterwards it is known.
        """
        return self._prompts.check(prompt, sampling, sampling.max_tokens or 1)[0]

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its listener gets a last piece with finish_reason "abort"."""
        self._driver.post(lambda: self._answers.end_request(request_id, "abort"))

    def generate(
        self,
        prompts: Seq[Prompt],
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
        check_timeout(timeout_s)
        self.warm_up(progress)
        options: dict[str, Any] = {"priority": priority, "timeout_s": timeout_s, "adapter": adapter}
        asks = [
            Ask(ids, params.n, self._submitter(prompt, ids, params, **options))
            for prompt, ids, params in zip(prompts, tokens, each)
        ]
        with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=not progress) as bar:
            collectors = ask_all(asks, self._driver, room=self._room, abort=self.abort, on_done=bar.update)
        return [collector.output() for collector in collectors]

    def embed(
        self, prompts: Seq[Prompt], pooling: Pooling = "last", adapter: str | None = None, *, client: str = ""
    ) -> list[Float32[np.ndarray, " D"]]:
        """The final hidden states of each prompt, pooled and not normalised. Blocks; callable from any thread.

        Raises:
          UserError: a prompt is wrong (see `submit`), or the pooling unknown; then none is started.
          RuntimeError: a prompt was aborted, or its hidden states are not finite.
        """
        nothing = SamplingParams(max_tokens=1, temperature=0.0)
        gathered = [Pooled(pooling) for _ in prompts]
        tokens = [self._prompts.check(prompt, nothing, 0)[0] for prompt in prompts]
        self.warm_up(False)
        asks = [
            Ask(ids, 1, self._submitter(prompt, ids, nothing, adapter=adapter, pooled=pooled, client=client))
            for prompt, ids, pooled in zip(prompts, tokens, gathered)
        ]
        ask_all(asks, self._driver, room=self._room, abort=self.abort)
        vectors = [pooled.vector for pooled in gathered]
        if any(v is None or not np.isfinite(v).all() for v in vectors):
            raise RuntimeError("a prompt could not be embedded: it was aborted, or its hidden states are not finite")
        return [v for v in vectors if v is not None]

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        client: str = "",
        namespace: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        adapter: str | None = None,
        whole: bool = False,
        emitted: Seq[Seq[int] | None] | None = None,
    ) -> AsyncIterator[Delta]:
        """The pieces of an answer as they are made, until every choice has finished. Needs `start`.

        With `whole` they come only when a choice has ended, for a reader that wants nothing earlier. Closing the
        iterator early aborts the request. Raises as `submit` does, and EngineDead if the engine dies underway.
        """
        sampling = sampling or SamplingParams()
        feed = Feed(asyncio.get_running_loop(), self._driver.touched, whole=whole)
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
            emitted=emitted,
        )
        open_choices = sampling.n if emitted is None else sum(begun is not None for begun in emitted)
        try:
            while open_choices:
                for delta in await feed.take():
                    open_choices -= delta.finish_reason is not None
                    yield delta
        finally:
            if open_choices:
                self.abort(name)

    def cached_pages(self, tokens: Seq[int], adapter: str | None = None) -> list[int]:
        """Pages of the prefix cache that hold the beginning of a prompt now. Callable from any thread.

        Raises:
          UserError: no such adapter is loaded.
        """
        size = self.config.page_size
        keys = [tuple(tokens[start : start + size]) for start in range(0, len(tokens) - size + 1, size)]
        namespace = None if adapter is None else self._adapters.find(adapter).namespace(None)
        return self.scheduler.tree.held(keys, namespace)

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

        self._driver.between_turns(enter)

    def unload_adapter(self, name: str) -> None:
        """Takes no new requests for an adapter, waits until those that use it have ended, and frees its slot.

        Raises:
          UserError: no adapter of that name is loaded.
        """
        adapter = self._adapters.unload(name)
        self._driver.wait_until(lambda: not adapter.users)

        def forget() -> None:
            self._pipeline.settle()  # what has just ended still gives its pages to the cache
            for namespace in adapter.namespaces:
                self.scheduler.tree.drop(namespace)

        self._driver.between_turns(forget)

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
        fresh = serving_form(decoder, self.config, self._mesh, self.runner.dtype)

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

        self._driver.between_turns(exchange)

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
        with self._driver.lock:
            self.runner.warm_up(progress, lambda: self._driver.stopping)
            if self.config.batch_invariant and self.runner.warm and not self._proved:
                prove(self.runner, page_size=self.config.page_size, num_pages=self.scheduler.pool.size)
                self._proved = True

    def start(self, progress: bool = True) -> None:
        """Warms up and gives the steps a thread of their own."""
        with self._driver.lock:
            self.warm_up(progress)
            self._driver.start()

    def close(self, drain_timeout_s: float = 0.0) -> None:
        """Ends the step thread: after the open requests, or after `drain_timeout_s`, when the rest is aborted."""
        self._driver.stop(drain_timeout_s)
        with self._driver.lock:
            self._driver.take_in()
            self._end_all("abort")
            if self._driver.death is None:
                self._pipeline.settle()
            self._driver.flush()

    def step(self) -> bool:
        """One turn: take in requests, start the next step, hand out the tokens of the last. False when idle."""
        return self._driver.step()

    def stats(self) -> EngineStats:
        """A reading; callable from any thread."""
        return reading(self._pipeline, self._answers, self.runner, posted=self._driver.posted, alive=self._driver.alive)

    def fairness(self) -> FairnessReading:
        """What each client has had, and how even that is; callable from any thread."""
        return self.scheduler.steward.reading()

    @property
    def observers(self) -> list[Observer]:
        """Told of every request and step, on the thread that steps. Add to it while no turn is under way."""
        return self._pipeline.observers

    def use_policy(self, policy: Policy) -> None:
        """Schedules by `policy` from the next step on, with an empty prefix cache. Compiles nothing.

        Raises:
          UserError: requests are open, of which the policy could know nothing.
        """

        def exchange() -> None:
            if self._answers.live:
                raise UserError(f"policy: found {len(self._answers.live)} open requests, expected none to change it")
            self._pipeline.settle()
            self.policy = policy
            self._pipeline.discard(self._new_scheduler(self.scheduler.pool.size))

        self._driver.between_turns(exchange)

    def on_finish(self, callback: Callable[[RequestTiming], None]) -> None:
        """`callback` is told of every finished request, on the thread that steps."""
        self._answers.on_finish.append(callback)

    # Inside.

    def _turn(self) -> bool:
        self._answers.expire(time.perf_counter())
        return self._pipeline.turn()

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
            reserve=self.config.reserve_pages,
            pool=self.runner.new_pool(num_pages),
        )

    def _room(self) -> bool:
        return len(self.scheduler.waiting) + self._driver.posted < self.config.max_waiting

    def _submitter(
        self, prompt: Prompt, tokens: list[int], sampling: SamplingParams, **options: Any
    ) -> Callable[[Listener], str]:
        """What queues a prompt, whose text has been made `tokens` of already, for a listener."""
        asked = prompt if isinstance(prompt, EmbeddingPrompt) else tokens
        return lambda listener: self.submit(asked, sampling, listener, **options)

    def _end_all(self, reason: FinishReason) -> None:
        for request_id in list(self._answers.live):
            self._answers.end_request(request_id, reason)

    def _recover(self) -> None:
        """A step raised: its requests end, those waiting stay, and memory starts afresh (the cache was donated). If it
        was pages that could not be copied, they are computed anew, once.
        """
        old = self.scheduler
        again = [s for s in old.running if self.runner.lost_pages and self._may_repeat(s)]
        self._repeated.update(s.request.request_id for s in again)
        for request_id in {s.request.request_id for s in old.running if s not in again}:
            self._answers.end_request(request_id, "error")
        fresh = self._new_scheduler(old.pool.size)
        fresh.take_over(old, again)
        self._pipeline.discard(fresh)
        self.runner.reset_cache()

    def _may_repeat(self, sequence: Sequence) -> bool:
        request = sequence.request
        return request.request_id not in self._repeated and request.pooled is None and request.scores is None

    def _enter(self, request: Request) -> None:
        for observer in self.observers:
            observer.on_enter(request, self._pipeline.place)
        for sequence in self._answers.open(request):
            self.scheduler.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        request = sequence.request
        if request.unfinished == 1:
            for observer in self.observers:
                observer.on_leave(request, self._answers.live[request.request_id], self._pipeline.place)
        if request.unfinished == 1:
            self._repeated.discard(request.request_id)
        if request.adapter is not None and request.unfinished == 1:
            self._adapters.release(request.adapter)
