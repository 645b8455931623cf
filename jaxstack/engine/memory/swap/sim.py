"""Whole workloads through a roofline engine that swaps, under a virtual clock: throughput, latency, stalls.

A step has one new token for each running request that generates, and prompt chunks as far as the step's token budget
goes. It takes what `capacity.py` says a step takes. Device pages fill first: a step streams only what lies beyond them.
"""

import dataclasses
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from jaxstack.engine.memory.swap.capacity import CacheShape, Rates, capacity_tokens, step_seconds
from jaxstack.engine.memory.swap.config import Placement, SwapConfig
from jaxstack.engine.memory.swap.controller import ExpansionController, Window

AdmissionRule = Literal["preempt", "reserve"]
"""preempt: a prompt that fits is let in, pages are taken as tokens come, and the youngest gives its own up (to compute
them again) when none is left. reserve: let in once the pages of prompt and whole answer are free."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A request: when it comes, and its lengths in tokens."""

    arrival_s: float
    prompt: int
    output: int


def workload(
    count: int,
    seed: int,
    *,
    per_second: float | None = None,
    prompt_mean: float = 161,
    output_mean: float = 338,
    sigma: float = 0.9,
    prompt_range: tuple[int, int] = (4, 512),
    output_range: tuple[int, int] = (4, 768),
) -> list[Job]:
    """Requests with log-normal lengths, clipped. `per_second`: Poisson arrivals; None: all at once."""
    draw = random.Random(seed)

    def length(mean: float, limits: tuple[int, int]) -> int:
        drawn = draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)
        return min(max(round(drawn), limits[0]), limits[1])

    jobs, now = [], 0.0
    for _ in range(count):
        if per_second is not None:
            now += draw.expovariate(per_second)
        jobs.append(Job(now, length(prompt_mean, prompt_range), length(output_mean, output_range)))
    return jobs


_DEFAULT = SwapConfig(host_bytes=1 << 62)


@dataclasses.dataclass(frozen=True)
class SimEngine:
    """A roofline engine.

    Args:
      kv_device_bytes: M.
      share: phi that is kept; None: the controller's.
      placement, admission: see there.
      page_size: tokens.
      staging: d.
      batch_tokens: tokens of a step, prompt chunks included.
      max_running: requests at once.
      link_bytes_per_s: a link that changes, by time; None: that of `rates`.
      all_on_host: everything is on the host, and moving and computing a layer take turns (FlexGen's schedule).
      config: of the controller.
    """

    shape: CacheShape
    rates: Rates
    kv_device_bytes: float
    share: float | None = 0.0
    placement: Placement = "page_striped"
    admission: AdmissionRule = "preempt"
    page_size: int = 16
    staging: int = 2
    batch_tokens: int = 512
    max_running: int = 1024
    link_bytes_per_s: Callable[[float], float] | None = None
    all_on_host: bool = False
    config: SwapConfig = _DEFAULT


@dataclasses.dataclass(frozen=True)
class Sample:
    """A moment of a run: totals so far, and the share on the host that the engine aims at."""

    time_s: float
    output_tokens: int
    share: float
    stall_s: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
      steady_rate: output tokens a second, from a fifth of all tokens on until nobody waits.
      stall_share: of all steps, time waiting over time computing.
      latencies: seconds per output token of each request, from its arrival.
      share: at the end.
      tpot_s: mean time of a step, while requests ran.
    """

    steady_rate: float
    stall_share: float
    latencies: tuple[float, ...]
    share: float
    preemptions: int
    makespan_s: float
    tpot_s: float
    samples: tuple[Sample, ...]

    @property
    def latency(self) -> float:
        """Mean seconds per output token."""
        return sum(self.latencies) / len(self.latencies)

    @property
    def latency_p99(self) -> float:
        return sorted(self.latencies)[math.ceil(0.99 * len(self.latencies)) - 1]


class _Running:
    """A request that holds pages: `length` tokens known, keys and values of `computed` there."""

    __slots__ = ("computed", "job", "length", "pages")

    def __init__(self, job: Job, generated: int, pages: int):
        self.job, self.length, self.pages, self.computed = job, job.prompt + generated, pages, 0

    @property
    def done(self) -> bool:
        return self.length - self.job.prompt >= self.job.output


def simulate(engine: SimEngine, jobs: Sequence[Job], *, sample_every: int = 64) -> Outcome:
    """Runs `jobs`, sorted by arrival, to the end.

    Raises:
      ValueError: a request that alone exceeds the cache.
    """
    return _Simulation(engine, jobs, sample_every).run()


class _Simulation:
    def __init__(self, engine: SimEngine, jobs: Sequence[Job], sample_every: int):
        self.engine, self.jobs, self.sample_every = engine, jobs, sample_every
        self.controller = None if engine.share is not None else self._make_controller()
        self.share = engine.share if engine.share is not None else 0.0
        self._aim()
        longest = max(self._pages(job.prompt + job.output) for job in jobs)
        if longest > self.pages:
            raise ValueError(f"a request needs {longest} pages, the cache has {self.pages}")
        self.now = self.compute_s = self.stall_s = 0.0
        self.steps = self.output = self.preemptions = 0
        self.waiting: deque[tuple[Job, int]] = deque()  # and what it had generated
        self.running: list[_Running] = []
        self.used = 0  # pages
        self.draining = False  # after a shrink: nobody is let in, and nobody loses pages
        self.kv_tokens = 0
        self.latencies: list[float] = []
        self.samples: list[Sample] = []
        self._fifth: tuple[float, int] | None = None
        self._emptied: tuple[float, int] | None = None
        self._window: list[tuple[float, float, float, bool, float]] = []
        self._window_link_s = 0.0

    def _make_controller(self) -> ExpansionController:
        e = self.engine
        return ExpansionController(
            e.config,
            layers=e.shape.layers,
            kv_bytes=e.shape.kv_bytes,
            capacity=self._capacity,
            device_tokens=lambda share: (1 - share) * self._capacity(share),
            link_bytes_per_s=e.rates.link_bytes_per_s,
            device_bytes_per_s=e.rates.device_bytes_per_s,
        )

    def _capacity(self, share: float) -> float:
        e = self.engine
        return capacity_tokens(e.shape, e.kv_device_bytes, share, placement=e.placement, staging=e.staging)

    def _aim(self) -> None:
        """What follows from `share`."""
        e = self.engine
        tokens = self._capacity(self.share)
        self.device_tokens = (1 - self.share) * tokens
        self.pages = 1 << 40 if e.all_on_host else int(tokens / e.page_size)
        self.watermark = 0 if e.admission == "reserve" else self.pages // 100

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.engine.page_size)

    def run(self) -> Outcome:
        arriving, count, total = 0, len(self.jobs), sum(job.output for job in self.jobs)
        while len(self.latencies) < count:
            while arriving < count and self.jobs[arriving].arrival_s <= self.now:
                self.waiting.append((self.jobs[arriving], 0))
                arriving += 1
            if not self.running and not self.waiting:
                self.now = self.jobs[arriving].arrival_s
                continue
            self._step()
            if self._fifth is None and self.output >= total / 5:
                self._fifth = (self.now, self.output)
            if arriving == count and not self.waiting and self._emptied is None:
                self._emptied = (self.now, self.output)
            if self.steps % self.sample_every == 0:
                self.samples.append(Sample(self.now, self.output, self.share, self.stall_s))
        return self._outcome()

    def _outcome(self) -> Outcome:
        (from_s, before), (to_s, after) = self._fifth or (0.0, 0), self._emptied or (self.now, self.output)
        if to_s <= from_s:
            from_s, before, to_s, after = 0.0, 0, self.now, self.output
        return Outcome(
            (after - before) / (to_s - from_s),
            self.stall_s / self.compute_s,
            tuple(self.latencies),
            self.share,
            self.preemptions,
            self.now,
            (self.compute_s + self.stall_s) / self.steps,
            tuple(self.samples),
        )

    def _step(self) -> None:
        decoding = self._decode()
        budget = self.engine.batch_tokens - len(decoding)
        for request in self.running:  # prompts under way, in order of admission
            if budget > 0 and request.length - request.computed > 1:
                budget -= self._compute(request, budget)
        budget, short = self._admit(budget)
        self._advance(self.engine.batch_tokens - budget, short)

    def _decode(self) -> list[_Running]:
        """The next token of every request that generates. The youngest requests give their pages up for it."""
        size, decoding = self.engine.page_size, [r for r in self.running if r.length - r.computed == 1]
        for request in decoding:
            if request.length > request.pages * size and request.pages:
                while self.used >= self.pages and not self.draining and request.pages:
                    self._preempt(self.running[-1])
                if request.pages:
                    request.pages += 1
                    self.used += 1
        decoding = [r for r in decoding if r.pages]
        for request in decoding:
            request.computed += 1
        self.kv_tokens += len(decoding)
        return decoding

    def _preempt(self, request: _Running) -> None:
        self.running.remove(request)
        self.used -= request.pages
        self.kv_tokens -= request.computed
        request.pages = 0
        self.waiting.appendleft((request.job, request.length - request.job.prompt))
        self.preemptions += 1

    def _compute(self, request: _Running, budget: int) -> int:
        count = min(budget, request.length - request.computed)
        request.computed += count
        self.kv_tokens += count
        return count

    def _admit(self, budget: int) -> tuple[int, bool]:
        """Lets waiting requests in while pages and budget last; the budget left, and whether pages were missing."""
        e = self.engine
        while self.waiting and budget > 0 and len(self.running) < e.max_running:
            job, generated = self.waiting[0]
            need = self._pages(job.prompt + (job.output if e.admission == "reserve" else generated))
            if self.draining or need > self.pages - self.used - (self.watermark if self.running else 0):
                return budget, True
            self.waiting.popleft()
            self.running.append(_Running(job, generated, need))
            self.used += need
            budget -= self._compute(self.running[-1], budget)
        return budget, False

    def _advance(self, new_tokens: int, short: bool) -> None:
        """Lets the step take its time and hands out its tokens."""
        layer_s, step_s, moved_s = self._times(new_tokens)
        computing = self.engine.shape.layers * layer_s
        self.now += step_s
        self.compute_s += computing
        self.stall_s += step_s - computing
        self.steps += 1
        if self.controller is not None:
            self._observe(computing, step_s - computing, layer_s, short, moved_s)
        leaving = False
        for request in self.running:
            if request.computed == request.length:
                request.length += 1
                self.output += 1
                leaving = leaving or request.done
        if leaving:
            self._leave()

    def _leave(self) -> None:
        for request in self.running:
            if request.done:
                self.used -= request.pages
                self.kv_tokens -= request.computed
                self.latencies.append((self.now - request.job.arrival_s) / request.job.output)
        self.running = [request for request in self.running if not request.done]
        self.draining = self.draining and self.used > self.pages

    def _times(self, new_tokens: int) -> tuple[float, float, float]:
        """t_l, the step, and how long the link is busy in it."""
        e = self.engine
        layers, tokens = e.shape.layers, self.kv_tokens
        layer_s = e.rates.layer_s(e.shape, tokens, new_tokens)
        link = e.rates.link_bytes_per_s if e.link_bytes_per_s is None else e.link_bytes_per_s(self.now)
        moving_s = tokens * e.shape.kv_bytes / link
        if e.all_on_host:
            return layer_s, layers * (layer_s + moving_s), layers * moving_s
        if self.share == 0 and not self.draining:
            return layer_s, layers * layer_s, 0.0
        if e.placement == "page_striped":
            k = layers * self._host_part(tokens)
            busy = k * moving_s
        else:
            k = round(self.share * layers)
            busy = moving_s * (k if e.placement == "static_layers" else layers)
        step_s = step_seconds(layers, k, layer_s, moving_s, placement=e.placement, staging=e.staging)
        return layer_s, step_s, busy

    def _host_part(self, tokens: float) -> float:
        """Of the running batch, what lies beyond the device's pages."""
        e = self.engine
        device = self.device_tokens
        if self.draining:  # more than the share allows: staging takes room from pages
            most = e.kv_device_bytes / e.shape.kv_bytes
            device = min(device, max(0.0, (most - e.staging * tokens) / (e.shape.layers - e.staging)))
        return max(0.0, 1 - device / tokens) if tokens else 0.0

    def _observe(self, computing: float, stall: float, layer_s: float, short: bool, moved_s: float) -> None:
        self._window.append((computing, stall, layer_s, short, self.kv_tokens))
        self._window_link_s += moved_s
        assert self.controller is not None
        if len(self._window) < self.engine.config.window_steps:
            return
        steps, n = self._window, len(self._window)
        link = self.engine.rates.link_bytes_per_s
        if self.engine.link_bytes_per_s is not None:
            link = self.engine.link_bytes_per_s(self.now)
        target = self.controller.observe(
            Window(
                compute_s=sum(s[0] for s in steps),
                stall_s=sum(s[1] for s in steps),
                layer_s=min(s[2] for s in steps),
                kv_tokens=sum(s[4] for s in steps) / n,
                waited=sum(s[3] for s in steps) / n,
                link_bytes=self._window_link_s * link,
                link_s=self._window_link_s,
            )
        )
        self._window, self._window_link_s = [], 0.0
        if target.share != self.share:
            self.share = target.share
            self._aim()
            self.draining = self.used > self.pages
        if target.urgent:
            while self.used > self.pages and len(self.running) > 1:
                self._preempt(self.running[-1])
            self.draining = self.used > self.pages
