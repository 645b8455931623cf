"""What a schedule is worth: throughput, service and fairness, latencies, over a span of a run.

*Service rate* is the clients' view: all prompt tokens, cached ones among them, and twice the output tokens, of the
requests that ended in the span, a second. *Actual service* is what was computed for them: prompt tokens that were not
cached, and twice the output tokens, step by step. *Jain* is Jain's index of the clients' actual services, 1 where they
are equal and 1/n where one of n has everything. Plain Python, no jax.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from jaxstack.engine.observer import Silent
from jaxstack.engine.scheduling.driving import Outcome
from jaxstack.engine.step_plan import StepPlan

_OUTPUT_PRICE = 2


def jain(services: Iterable[float]) -> float:
    """Jain's fairness index, (sum x)^2 / (n sum x^2); 1 where nobody got anything."""
    values = [float(value) for value in services]
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that is no less than `share` of them; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds; None where nothing of the kind ended in the span."""

    p50_s: float | None
    p99_s: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Latency":
        return cls(percentile(values, 0.5), percentile(values, 0.99))


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy on one workload over a span. Rates are a second; latencies are the well-behaved clients'.

    `served` of them had at least one request answered.
    """

    seconds: float
    requests: int
    requests_rate: float
    service_rate: float
    actual_rate: float
    hit_rate: float
    jain: float
    served: int
    clients: int
    first_token: Latency
    end_to_end: Latency
    gap: float | None = None
    bound: float | None = None
    steps: int = 0

    @property
    def gap_over_bound(self) -> float | None:
        return None if self.gap is None or not self.bound else self.gap / self.bound

    def as_json(self) -> dict[str, Any]:
        rounded = lambda value: None if value is None else round(value, 4)  # noqa: E731
        return {
            "requests_per_s": rounded(self.requests_rate),
            "service_rate": rounded(self.service_rate),
            "actual_service": rounded(self.actual_rate),
            "hit_rate": rounded(self.hit_rate),
            "jain": rounded(self.jain),
            "ttft_p50_s": rounded(self.first_token.p50_s),
            "ttft_p99_s": rounded(self.first_token.p99_s),
            "e2e_p50_s": rounded(self.end_to_end.p50_s),
            "e2e_p99_s": rounded(self.end_to_end.p99_s),
            "gap": rounded(self.gap),
            "bound": rounded(self.bound),
            "gap_over_bound": rounded(self.gap_over_bound),
            "clients_served": self.served,
            "clients": self.clients,
            "requests": self.requests,
            "steps": self.steps,
            "span_s": rounded(self.seconds),
        }


class Meter(Silent):
    """An observer and a listener to outcomes that keeps what `row` needs. One may watch many replicas.

    Args:
      well_behaved: the clients whose latencies count; empty for all.
      offset_s: what the steps' clock shows at the outcomes' zero.
      bucket_s: grain of `service_over_time`.
    """

    def __init__(self, well_behaved: AbstractSet[str] = frozenset(), *, offset_s: float = 0.0, bucket_s: float = 1.0):
        self._well_behaved, self._offset_s, self._bucket_s = well_behaved, offset_s, bucket_s
        self.outcomes: list[Outcome] = []
        self.clients: set[str] = set()
        self._steps: list[tuple[float, dict[str, int]]] = []
        self._computed: dict[int, int] = {}

    def on_outcome(self, outcome: Outcome) -> None:
        self.clients.add(outcome.client)
        self.outcomes.append(outcome)

    def on_enter(self, request, place: int) -> None:
        self.clients.add(request.client)

    def on_step(self, plan: StepPlan, rows: int, launched_s: float, settled_s: float) -> None:
        served: dict[str, int] = defaultdict(int)
        for row in plan.rows:
            sequence = row.sequence
            if sequence.finish_reason is not None:
                continue
            # What a preempted sequence computes once more is no service: the client has had it.
            prompt, end = len(sequence.request.prompt), row.start + row.count
            done = self._computed.get(id(sequence), row.start)
            if done < prompt:
                self._computed[id(sequence)] = min(end, prompt)
                served[sequence.client] += max(0, min(end, prompt) - max(done, row.start))
            served[sequence.client] += _OUTPUT_PRICE * row.samples
        self._steps.append((settled_s - self._offset_s, served))

    def on_leave(self, request, sequences, place: int) -> None:
        for sequence in sequences:
            self._computed.pop(id(sequence), None)

    def row(self, begin_s: float, end_s: float, *, gap: float | None = None, bound: float | None = None) -> Row:
        """What happened in `(begin_s, end_s]`."""
        seconds = end_s - begin_s
        ended = [o for o in self.outcomes if begin_s < o.finished_s <= end_s and o.finish_reason in ("length", "stop")]
        steps = [served for when, served in self._steps if begin_s < when <= end_s]
        services = dict.fromkeys(self.clients, 0)
        for served in steps:
            for client, service in served.items():
                services[client] = services.get(client, 0) + service
        prompts = sum(o.prompt_tokens for o in ended)
        good = [o for o in ended if not self._well_behaved or o.client in self._well_behaved]
        return Row(
            seconds=seconds,
            requests=len(ended),
            requests_rate=len(ended) / seconds,
            service_rate=(prompts + _OUTPUT_PRICE * sum(o.output_tokens for o in ended)) / seconds,
            actual_rate=sum(services.values()) / seconds,
            hit_rate=sum(o.cached_tokens for o in ended) / prompts if prompts else 0.0,
            jain=jain(services.values()) if services else 1.0,
            served=len({o.client for o in good}),
            clients=len(self._well_behaved or self.clients),
            first_token=Latency.of([t for o in good if (t := o.time_to_first_token_s) is not None]),
            end_to_end=Latency.of([o.latency_s for o in good]),
            gap=gap,
            bound=bound,
            steps=len(steps),
        )

    def service_over_time(self) -> tuple[list[float], dict[str, list[float]]]:
        """Ends of the buckets, and each client's actual service up to then."""
        last = max((when for when, _ in self._steps), default=0.0)
        buckets = int(last / self._bucket_s) + 1
        sums = {client: [0.0] * buckets for client in sorted(self.clients)}
        for when, served in self._steps:
            for client, service in served.items():
                sums.setdefault(client, [0.0] * buckets)[int(max(when, 0.0) / self._bucket_s)] += service
        for values in sums.values():
            for i in range(1, buckets):
                values[i] += values[i - 1]
        return [(i + 1) * self._bucket_s for i in range(buckets)], sums

    def latencies(self, begin_s: float, end_s: float) -> dict[str, Latency]:
        """Of each client that had anything answered in the span."""
        found: dict[str, list[float]] = defaultdict(list)
        for o in self.outcomes:
            if begin_s < o.finished_s <= end_s:
                found[o.client].append(o.latency_s)
        return {client: Latency.of(values) for client, values in sorted(found.items())}
