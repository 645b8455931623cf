"""`/metrics`: Prometheus text under vLLM's names, so that its dashboards work, and our own under `jaxstack:`.

Gauges and counters are read from the engine when somebody asks. Histograms are filled when a request finishes, on the
engine's thread, so filling is one numpy call however many tokens there were.
"""

import math
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxstack.engine import Engine, RequestTiming
from jaxstack.engine.memory.swap.reading import SwapReading
from jaxstack.serving.fairness import of_clients
from jaxstack.serving.semantic_cache import SemanticCache
from jaxstack.serving.semantic_cache.account import CacheStats

# vLLM's bucket bounds.
_FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0]
_FIRST_TOKEN += [20.0, 40.0, 80.0, 160.0, 640.0, 2560.0]
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_REQUEST = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0]
_REQUEST += [960.0, 1920.0, 7680.0]
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CHOICES = (1, 2, 5, 10, 20)
_STEP_TOKENS = (1, *(2**power for power in range(3, 15)))


class _Histogram:
    """Counts by bucket; `observe` takes many values at once."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]):
        self.name, self._help, self._bounds = name, help_text, bounds
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, values: float | Sequence[float] | np.ndarray) -> None:
        values = np.atleast_1d(np.asarray(values, np.float64))
        counts = np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        with self._lock:
            self._counts += counts
            self._sum += float(values.sum())

    def family(self, model_name: str) -> HistogramMetricFamily:
        with self._lock:
            counts, total = self._counts.copy(), self._sum
        return _histogram_family(self.name, self._help, model_name, self._bounds, counts, total)


def _histogram_family(
    name: str, help_text: str, model_name: str, bounds: Sequence[float], counts: np.ndarray, total: float
) -> HistogramMetricFamily:
    """`counts`: of each bucket alone, the one without bound last."""
    names = [str(float(bound)) for bound in bounds] + ["+Inf"]
    family = HistogramMetricFamily(name, help_text, labels=["model_name"])
    family.add_metric([model_name], list(zip(names, np.cumsum(counts).tolist())), total)
    return family


class Metrics(Collector):
    """The metrics of one engine, in a registry of their own.

    Args:
      model_name: value of the label `model_name`.
      cache: whose figures are shown, too.
    """

    def __init__(self, engine: Engine, model_name: str, cache: SemanticCache | None = None):
        self._engine, self._model_name = engine, model_name
        self._cache = cache
        seconds = "seconds"
        self._first_token = _Histogram(
            "vllm:time_to_first_token_seconds", f"Arrival to first token, {seconds}.", _FIRST_TOKEN
        )
        self._between = _Histogram("vllm:inter_token_latency_seconds", f"Between tokens, {seconds}.", _PER_TOKEN)
        self._between_old = _Histogram("vllm:time_per_output_token_seconds", "As inter_token_latency.", _PER_TOKEN)
        self._per_token = _Histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of a request between its tokens.", _PER_TOKEN
        )
        self._whole = _Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST)
        self._queue = _Histogram("vllm:request_queue_time_seconds", "Arrival to first computation.", _REQUEST)
        self._prefill = _Histogram("vllm:request_prefill_time_seconds", "First computation to first token.", _REQUEST)
        self._decode = _Histogram("vllm:request_decode_time_seconds", "First token to last.", _REQUEST)
        self._inference = _Histogram(
            "vllm:request_inference_time_seconds", "First computation to last token.", _REQUEST
        )
        self._prompt = _Histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = _Histogram("vllm:request_generation_tokens", "Tokens of an answer, all choices.", _TOKENS)
        self._n = _Histogram("vllm:request_params_n", "Choices asked for.", _CHOICES)
        self._max_tokens = _Histogram("vllm:request_params_max_tokens", "max_tokens asked for.", _TOKENS)
        self._clients: dict[str, None] = {}  # that have a series of their own
        self._histograms = [value for value in vars(self).values() if isinstance(value, _Histogram)]
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        # The engine keeps its callbacks for ever; it shall not keep us.
        alive = weakref.ref(self)

        def on_finish(timing: RequestTiming) -> None:
            metrics = alive()
            if metrics is not None:
                metrics.observe(timing)

        engine.on_finish(on_finish)

    def observe(self, timing: RequestTiming) -> None:
        """Takes a finished request. An aborted one may have no tokens, and then no times either."""
        self._prompt.observe(timing.prompt_tokens)
        self._generated.observe(timing.generation_tokens)
        self._n.observe(timing.n)
        if timing.max_tokens is not None:
            self._max_tokens.observe(timing.max_tokens)
        self._whole.observe(timing.finished_s - timing.arrival_s)
        if not timing.token_times:
            return
        self._first_token.observe(timing.first_token_s - timing.arrival_s)
        self._queue.observe(timing.scheduled_s - timing.arrival_s)
        self._prefill.observe(timing.first_token_s - timing.scheduled_s)
        self._decode.observe(timing.finished_s - timing.first_token_s)
        self._inference.observe(timing.finished_s - timing.scheduled_s)
        # With several choices the times are interleaved; the gaps between them would mean nothing.
        if timing.n == 1 and len(timing.token_times) > 1:
            gaps = np.diff(timing.token_times)
            self._between.observe(gaps)
            self._between_old.observe(gaps)
            self._per_token.observe(float(gaps.mean()))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """Nothing: asked at registration, when reading the engine would be too early."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric family, read now."""
        stats = self._engine.stats()
        used = 1 - stats.pages_free / max(stats.pages_total, 1)
        rows = stats.step_rows + stats.step_padding
        gauge, counter = self._gauge, self._counter
        yield gauge("vllm:num_requests_running", "Answers being generated.", stats.running)
        yield gauge("vllm:num_requests_waiting", "Answers waiting to begin.", stats.waiting)
        yield gauge("vllm:kv_cache_usage_perc", "Pages in use, cached prefixes included; 1 is all.", used)
        yield counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries)
        yield counter("vllm:prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits)
        yield counter("vllm:num_preemptions", "Answers set back for lack of pages.", stats.preemptions)
        yield counter("vllm:prompt_tokens", "Tokens of all prompts.", stats.prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens of all answers.", stats.generation_tokens)
        yield counter(
            "vllm:corrupted_requests", "Answers lost to logits that were not finite.", stats.corrupted_requests
        )
        yield self._step_tokens(stats.iteration_tokens)
        success = CounterMetricFamily(
            "vllm:request_success", "Finished requests.", labels=["model_name", "finished_reason"]
        )
        for reason in sorted({"stop", "length", "abort", "error", "timeout", *stats.finished}):
            success.add_metric([self._model_name, reason], stats.finished.get(reason, 0))
        yield success
        yield counter(
            "jaxstack:compilations", "Steps compiled after warm-up; 0 unless something is wrong.", stats.recompilations
        )
        yield counter("jaxstack:steps", "Steps computed.", stats.steps)
        yield counter("jaxstack:step_seconds", "Time spent in steps.", stats.step_seconds)
        yield counter("jaxstack:host_seconds", "Part of it in which the host worked.", stats.host_seconds)
        yield gauge(
            "jaxstack:padding_ratio", "Share of a step's rows that are padding.", stats.step_padding / max(rows, 1)
        )
        yield gauge("jaxstack:warm_up_progress", "Compiled share of the steps.", stats.warm_progress)
        pages = GaugeMetricFamily("jaxstack:pages", "Pages of the KV cache.", labels=["model_name", "state"])
        for state in ("free", "tree", "private"):
            pages.add_metric([self._model_name, state], getattr(stats, f"pages_{state}"))
        yield pages
        if stats.swap is not None:
            yield from self._swapping(stats.swap)
        if self._cache is not None:
            yield from self._caching(self._cache.stats())
        yield from self._fairness()
        for histogram in self._histograms:
            yield histogram.family(self._model_name)

    def _swapping(self, swap: SwapReading) -> Iterator[Metric]:
        """Keys and values on the host."""
        gauge, counter = self._gauge, self._counter
        pages = GaugeMetricFamily("jaxstack:kv_pages", "Pages by where they are.", labels=["model_name", "space"])
        moved = CounterMetricFamily("jaxstack:swap_bytes", "Keys and values moved.", labels=["model_name", "direction"])
        labels = ["model_name", "decision"]
        decisions = CounterMetricFamily("jaxstack:swap_decision", "Decisions on the host's share.", labels=labels)
        for family, values in ((pages, swap.pages), (moved, swap.bytes), (decisions, swap.decisions)):
            for name, value in values.items():
                family.add_metric([self._model_name, name], value)
            yield family
        yield counter("jaxstack:swap_stall_seconds", "Time that steps waited for pages.", swap.stall_s)
        yield counter("jaxstack:swap_compute_seconds", "Time that the same steps computed.", swap.compute_s)
        yield gauge("jaxstack:swap_host_share", "Share of keys and values to keep on the host.", swap.share)
        yield gauge("jaxstack:swap_link_bytes_per_s", "Host to device, as known.", swap.link_bytes_per_s)
        yield gauge("jaxstack:swap_device_peak_bytes", "Most that keys and values have taken.", swap.device_peak_bytes)

    def _caching(self, stats: CacheStats) -> Iterator[Metric]:
        """The semantic cache, all tenants together. What is not estimated is left out."""
        gauge, counter = self._gauge, self._counter
        labels = ["model_name", "kind"]
        requests = CounterMetricFamily("jaxstack:cache_requests", "Requests, by how they were answered.", labels=labels)
        for kind, count in stats.requests.items():
            requests.add_metric([self._model_name, kind], count)
        refused = CounterMetricFamily(
            "jaxstack:cache_refused", "Answers not kept or removed.", labels=["model_name", "reason"]
        )
        for reason, count in stats.refused.items():
            refused.add_metric([self._model_name, reason], count)
        yield from (requests, refused)
        yield gauge("jaxstack:cache_entries", "Answers in the cache.", stats.entries)
        yield gauge("jaxstack:cache_bytes", "Their size.", stats.size_bytes)
        yield counter("jaxstack:cache_labels", "Comparisons of answers.", stats.labels)
        yield counter("jaxstack:cache_saved_seconds", "Generation that was saved.", stats.saved_s)
        if not math.isnan(stats.delta):
            yield gauge("jaxstack:cache_delta", "Wrong answers a request at most.", stats.delta)
            yield gauge("jaxstack:cache_delta_effective", "Of it, what may be spent now.", stats.delta_eff)
        yield gauge("jaxstack:cache_stopped", "1 while near requests are not answered.", float(bool(stats.stopped)))
        yield gauge("jaxstack:cache_store_failed", "1 if nothing is written any more.", float(bool(stats.store)))
        if not math.isnan(stats.error):
            yield gauge("jaxstack:cache_error", "Wrong answers a request, estimated.", stats.error)
            yield gauge("jaxstack:cache_error_bound", "What that cannot exceed.", stats.bound)

    def _fairness(self) -> Iterator[Metric]:
        """How even the service of clients is, and what each has had. A bound that does not exist is left out."""
        reading = self._engine.fairness()
        gauge, counter = self._gauge, self._counter
        unit = "in prompt tokens' worth per unit of weight"
        yield gauge(
            "jaxstack:fairness_gap", f"Largest gap between clients that waited all the time, {unit}.", reading.max_gap
        )
        if reading.bound is not None:
            yield gauge("jaxstack:fairness_bound", f"What the policy promises as its limit, {unit}.", reading.bound)
        yield counter("jaxstack:scheduler_errors", "Failures of the scheduling policy.", reading.errors)
        yield counter(
            "jaxstack:scheduler_blocked_steps", "Steps with room only for clients in debt.", reading.blocked_steps
        )
        yield counter("jaxstack:clients_sharing_an_account", "Clients beyond the ledger's limit.", reading.crowded)
        labels = ["model_name", "client"]
        service = CounterMetricFamily("jaxstack:client_service", "Service in prompt tokens' worth.", labels=labels)
        deficit = GaugeMetricFamily("jaxstack:client_deficit", "Credit of a client; below 0 a debt.", labels=labels)
        waiting = GaugeMetricFamily("jaxstack:client_waiting", "Requests that wait to begin.", labels=labels)
        wait = SummaryMetricFamily("jaxstack:client_wait_seconds", "Arrival to first computation.", labels=labels)
        for row in of_clients(reading, first=self._clients):
            # Once shown, always shown: a counter that stops being its own would seem to fall.
            self._clients.setdefault(row.client)
            values = [self._model_name, row.client]
            service.add_metric(values, row.service)
            waiting.add_metric(values, row.waiting)
            wait.add_metric(values, count_value=row.starts, sum_value=row.wait_s)
            if row.deficit is not None:
                deficit.add_metric(values, row.deficit)
        yield from (service, deficit, waiting, wait)

    def _step_tokens(self, steps: Mapping[int, int]) -> HistogramMetricFamily:
        """From how many steps computed exactly so many tokens."""
        counts, total = np.zeros(len(_STEP_TOKENS) + 1, np.int64), 0
        for tokens, times in steps.items():
            counts[np.searchsorted(_STEP_TOKENS, tokens)] += times
            total += tokens * times
        return _histogram_family(
            "vllm:iteration_tokens_total", "Tokens computed in a step.", self._model_name, _STEP_TOKENS, counts, total
        )

    def _gauge(self, name: str, help_text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, help_text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, help_text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family
