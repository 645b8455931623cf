"""One replica: requests in, tokens out.

A request goes one way: `submit` checks it and puts it in the inbox; `step` takes it out, lets the scheduler plan, packs
the plan, launches the compiled step, and turns the drawn tokens into text for whoever listens. Nothing calls back up.
`generate` drives steps itself; `start` gives them a thread of their own, and then `generate`, `stream` and `submit`
work from any thread.
"""

import asyncio
import collections
import dataclasses
import itertools
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxstack.engine.batch import pack
from jaxstack.engine.config import EngineConfig, sizes
from jaxstack.engine.detokenise import IncrementalDetokenizer
from jaxstack.engine.listeners import Collector, Feed, wake_all
from jaxstack.engine.request import (
    Delta,
    FinishReason,
    Listener,
    Request,
    RequestOutput,
    RequestTiming,
    SamplingParams,
    Sequence,
    TokenLogprob,
)
from jaxstack.engine.runner import Runner, StepFuture
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling import FirstComeFirstServed, Policy
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.decoder import Decoder
from jaxstack.models.serving_layout import fuse_for_serving
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


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A reading of the engine. Counts of tokens and requests are totals since the start."""

    running: int
    waiting: int
    pages_free: int
    pages_tree: int
    pages_private: int
    pages_total: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    finished: dict[str, int]
    steps: int
    step_seconds: float
    step_rows: int
    step_padding: int
    recompilations: int
    warm: bool
    warm_progress: float
    alive: bool


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
        packing = config.pack_weights
        if packing is None:
            packing = on_cpu and dtype == jnp.float32 and matmul.available()
        decoder = fuse_for_serving(decoder, pack=packing, consume=True)
        chosen = sizes(config, model, dtype.itemsize)
        self.max_model_len = chosen.max_model_len
        self.vocab_size = min(model.vocab_size, tokenizer.vocab_size) if tokenizer else model.vocab_size
        self.policy = policy or FirstComeFirstServed()
        self.scheduler = self._new_scheduler(chosen.num_pages)
        self.runner = Runner(
            decoder,
            chosen.shapes,
            num_pages=chosen.num_pages,
            page_size=config.page_size,
            vocab_size=self.vocab_size,
            dtype=dtype,
        )
        self._eos = frozenset(model.eos_token_ids) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
        self._random = random.Random(config.seed)
        self._order = itertools.count()
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._live: dict[str, list[Sequence]] = {}
        self._driving = threading.RLock()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._death: BaseException | None = None
        self._failures = 0
        self._touched: dict[asyncio.AbstractEventLoop, list[Feed]] = {}
        self._on_finish: list[Callable[[RequestTiming], None]] = []
        self._finished: collections.Counter[str] = collections.Counter()
        self._prompt_tokens = self._generation_tokens = 0
        self._steps = self._step_rows = self._step_padding = 0
        self._step_seconds = 0.0

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
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        listener: Listener | None = None,
        request_id: str | None = None,
        *,
        client: str = "",
        namespace: str | None = None,
    ) -> str:
        """Queues a prompt; `listener` is called with every piece of every choice, on the thread that steps.

        Args:
          client: whose request it is, for scheduling policies.
          namespace: requests share cached prefixes only within one.

        Returns: the request's id.

        Raises:
          UserError: the prompt is empty, holds unknown tokens, or does not fit the window together with `max_tokens`.
          QueueFull: too many requests wait.
          EngineDead: nobody would answer.
        """
        if self._death is not None or self._stopping:
            raise EngineDead("the engine has stopped") from self._death
        if len(self.scheduler.waiting) + len(self._inbox) >= self.config.max_waiting:
            raise QueueFull(f"{self.config.max_waiting} requests wait already, which is the limit; try again later")
        sampling = sampling or SamplingParams()
        tokens = self.check_prompt(prompt, sampling)
        order = next(self._order)
        request = Request(
            request_id=request_id or f"request-{order}",
            prompt=tuple(tokens),
            sampling=sampling,
            arrival_s=time.perf_counter(),
            order=order,
            max_tokens=sampling.max_tokens or self.max_model_len - len(tokens),
            seed=self._random.getrandbits(63) if sampling.seed is None else sampling.seed,
            listener=listener,
            client=client,
            namespace=namespace,
            unfinished=sampling.n,
        )
        self._post(lambda: self._enter(request))
        return request.request_id

    def check_prompt(self, prompt: Prompt, sampling: SamplingParams) -> list[int]:
        """The prompt's token ids. Raises UserError for a prompt that could never be answered."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("prompt: found text, expected token ids (this engine has no tokenizer)")
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            raise UserError("prompt: found no tokens, expected at least one")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.model_config.vocab_size:
            bad = low if low < 0 else high
            raise UserError(f"prompt: found token id {bad}, expected ids from 0 to {self.model_config.vocab_size - 1}")
        wanted = sampling.max_tokens or 1
        if len(tokens) + wanted > self.max_model_len:
            raise PromptTooLong(
                f"prompt: found {len(tokens)} tokens and {wanted} to generate, "
                f"expected at most {self.max_model_len} together"
            )
        return tokens

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its listener gets a last piece with finish_reason "abort"."""
        self._post(lambda: self._abort(request_id))

    def generate(
        self,
        prompts: Seq[Prompt],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers all prompts, in the order given. Blocks.

        Args:
          sampling: one for all, or one for each prompt.
          progress: a bar on stderr.

        Raises:
          UserError: a prompt is wrong (see `submit`); then none is started.
        """
        each = list(sampling) if isinstance(sampling, Seq) else [sampling or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"sampling: found {len(each)}, expected one for each of {len(prompts)} prompts")
        tokens = [self.check_prompt(p, s) for p, s in zip(prompts, each)]
        self.warm_up(progress)
        collectors: dict[str, Collector] = {}
        with tqdm(total=len(prompts), desc="generating", unit="prompt", disable=not progress) as bar:
            for ids, params in zip(tokens, each):
                while len(self.scheduler.waiting) + len(self._inbox) >= self.config.max_waiting:
                    self._advance()
                collector = Collector(ids, params.n, bar.update)
                collectors[self.submit(ids, params, collector)] = collector
            try:
                while not all(c.done.is_set() for c in collectors.values()):
                    self._advance()
            except BaseException:
                for request_id, collector in collectors.items():
                    if not collector.done.is_set():
                        self.abort(request_id)
                raise
        return [c.output() for c in collectors.values()]

    async def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        client: str = "",
        namespace: str | None = None,
    ) -> AsyncIterator[Delta]:
        """The pieces of an answer as they are made, until every choice has finished. Needs `start`.

        Closing the iterator early aborts the request. Raises as `submit` does, and EngineDead if the engine dies
        underway.
        """
        sampling = sampling or SamplingParams()
        feed = Feed(asyncio.get_running_loop(), self._touched)
        name = self.submit(prompt, sampling, feed, request_id, client=client, namespace=namespace)
        open_choices = sampling.n
        try:
            while open_choices:
                for delta in await feed.take():
                    open_choices -= delta.finish_reason is not None
                    yield delta
        finally:
            if open_choices:
                self.abort(name)

    # The step loop.

    def warm_up(self, progress: bool = True) -> None:
        """Compiles every step. Takes seconds to minutes, once."""
        with self._driving:
            self.runner.warm_up(progress, lambda: self._stopping)

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
            for request_id in list(self._live):
                self._abort(request_id)
            self._flush()

    def step(self) -> bool:
        """One turn: take in requests, plan, compute, hand out tokens. False when there was nothing to compute."""
        with self._driving:
            self._drain_inbox()
            plan = self.scheduler.plan()
            if plan.rows:
                batch = pack(
                    plan, self.runner.shapes, page_size=self.config.page_size, num_pages=self.scheduler.pool.size
                )
                begin = time.perf_counter()
                future = self.runner.launch(batch)
                tokens = future.tokens()
                now = time.perf_counter()
                self._steps += 1
                self._step_seconds += now - begin
                self._step_rows += plan.tokens
                self._step_padding += batch.shape.rows - plan.tokens
                self.scheduler.commit(plan)
                for i, row in enumerate(plan.rows):
                    if row.samples:
                        self._take(row.sequence, tokens[i], future, i, now)
            self._flush()
            return bool(plan.rows)

    def stats(self) -> EngineStats:
        """A reading; callable from any thread."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        counters = scheduler.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(self._inbox),
            pages_free=pool.free,
            pages_tree=pool.tree,
            pages_private=pool.private,
            pages_total=pool.size,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            finished=dict(self._finished),
            steps=self._steps,
            step_seconds=self._step_seconds,
            step_rows=self._step_rows,
            step_padding=self._step_padding,
            recompilations=self.runner.recompilations,
            warm=self.runner.warm,
            warm_progress=self.runner.warm_fraction,
            alive=self._death is None and not self._stopping,
        )

    def on_finish(self, callback: Callable[[RequestTiming], None]) -> None:
        """`callback` is told of every finished request, on the thread that steps."""
        self._on_finish.append(callback)

    # Inside.

    def _new_scheduler(self, num_pages: int) -> Scheduler:
        return Scheduler(
            self.policy,
            num_pages=num_pages,
            page_size=self.config.page_size,
            max_sequences=self.config.max_sequences,
            max_batch_tokens=self.config.max_batch_tokens,
            prefix_caching=self.config.prefix_caching,
        )

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        with self._wake:
            self._wake.notify_all()

    def _busy(self) -> bool:
        return bool(self._live or self._inbox)

    def _advance(self) -> None:
        """One step by whoever waits, or a short rest while the step thread works."""
        if self._thread is None:
            self.step()
        else:
            if self._death is not None:
                raise EngineDead("the engine has stopped") from self._death
            time.sleep(0.001)

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
                for request_id in list(self._live):
                    self._end_request(request_id, "error")
                self._flush()

    def _fail_running(self, error: BaseException) -> None:
        """A step raised: its requests end, those waiting stay, and memory starts afresh (the cache was donated)."""
        with self._driving:
            old = self.scheduler
            hit = {s.request.request_id for s in old.running}
            for request_id in hit:
                self._end_request(request_id, "error")
            self.scheduler = self._new_scheduler(old.pool.size)
            self.scheduler.counters = old.counters
            for sequence in old.waiting:
                self.scheduler.add(sequence)
            self.runner.reset_cache()
            self._flush()

    def _drain_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _enter(self, request: Request) -> None:
        if isinstance(request.listener, Collector):
            request.listener.request = request
        sampling = request.sampling
        sequences = []
        for index in range(sampling.n):
            detokenizer = None
            if self.tokenizer is not None:
                detokenizer = IncrementalDetokenizer(
                    self.tokenizer, sampling.stop, sampling.include_stop_str_in_output, sampling.skip_special_tokens
                )
            sequences.append(Sequence(request, index, list(request.prompt), detokenizer))
        self._live[request.request_id] = sequences
        self._prompt_tokens += len(request.prompt)
        for sequence in sequences:
            self.scheduler.add(sequence)

    def _abort(self, request_id: str) -> None:
        self._end_request(request_id, "abort")

    def _end_request(self, request_id: str, reason: FinishReason) -> None:
        for sequence in list(self._live.get(request_id, ())):
            if sequence.finish_reason is None:
                text = sequence.detokenizer.finish() if sequence.detokenizer else ""
                self._end(sequence, reason, None, text, (), ())

    def _take(self, sequence: Sequence, token: int, future: StepFuture, row: int, now: float) -> None:
        """A token was drawn for `sequence`: keep it, apply the stop rules, tell the listener."""
        request, sampling = sequence.request, sequence.request.sampling
        if token < 0:  # logits were not finite: this answer is lost, the others are not
            self._end(sequence, "error", None, "", (), ())
            return
        sequence.tokens.append(token)
        request.token_times.append(now)
        self._generation_tokens += 1
        if request.first_token_s is None:
            request.first_token_s = now
        logprobs = () if sampling.logprobs is None else (future.logprobs(row, sampling.logprobs),)
        reason: FinishReason | None = None
        why: int | str | None = None
        shown: tuple[int, ...] = (token,)
        if token in sampling.stop_token_ids:
            reason, why, shown = "stop", token, ()
        elif token in self._eos and not sampling.ignore_eos:
            reason, shown = "stop", ()
        text = ""
        if sequence.detokenizer is not None:
            text = sequence.detokenizer.push(shown) if shown else ""
            if reason is None and sequence.detokenizer.stopped is not None:
                reason, why = "stop", sequence.detokenizer.stopped
        if reason is None and sequence.generated >= request.max_tokens:
            reason = "length"
        if reason is not None:
            if sequence.detokenizer is not None:
                text += sequence.detokenizer.finish()
            self._end(sequence, reason, why, text, (token,), logprobs)
        else:
            self._tell(sequence, Delta(sequence.index, text, (token,), logprobs, None, None, *self._counts(request)))

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        why: int | str | None,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
    ) -> None:
        request = sequence.request
        sequence.finish_reason = reason
        self.scheduler.finish(sequence, keep=reason != "error")
        request.unfinished -= 1
        self._tell(sequence, Delta(sequence.index, text, token_ids, logprobs, reason, why, *self._counts(request)))
        if request.unfinished == 0:
            siblings = self._live.pop(request.request_id)
            self._finished[reason] += 1
            now = time.perf_counter()
            timing = RequestTiming(
                arrival_s=request.arrival_s,
                scheduled_s=request.scheduled_s or now,
                first_token_s=request.first_token_s or now,
                finished_s=now,
                prompt_tokens=len(request.prompt),
                generation_tokens=sum(s.generated for s in siblings),
                cached_tokens=request.cached_tokens or 0,
                finish_reason=reason,
                n=request.sampling.n,
                max_tokens=request.sampling.max_tokens,
                token_times=tuple(request.token_times),
            )
            for callback in self._on_finish:
                callback(timing)

    def _counts(self, request: Request) -> tuple[int, int]:
        return len(request.prompt), request.cached_tokens or 0

    def _tell(self, sequence: Sequence, delta: Delta) -> None:
        listener = sequence.request.listener
        if listener is None:
            return
        try:
            listener(delta)
        except Exception:
            log.exception("the listener of %s failed", sequence.request.request_id)

    def _flush(self) -> None:
        """Wakes each event loop once a step, however many of its requests got a token."""
        touched = dict(self._touched)
        self._touched.clear()
        for loop, feeds in touched.items():
            try:
                loop.call_soon_threadsafe(wake_all, feeds)
            except RuntimeError:  # the loop is closed; its requests were aborted or will be, by their iterators
                log.debug("an event loop closed with %d open requests", len(feeds))
