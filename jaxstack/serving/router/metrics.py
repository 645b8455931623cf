"""`/metrics` of the router, in Prometheus' text format."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from jaxstack.serving.router.dispatch import Dispatcher

_Family = CounterMetricFamily | GaugeMetricFamily


class RouterMetrics(Collector):
    """Reads the dispatcher when somebody asks."""

    def __init__(self, dispatcher: Dispatcher):
        self._dispatcher = dispatcher
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def describe(self) -> Iterable[_Family]:
        return []

    def collect(self) -> Iterator[_Family]:
        counts, replicas = self._dispatcher.counts, self._dispatcher.replicas
        requests = CounterMetricFamily(
            "jaxstack:router_requests", "Requests sent to replicas.", labels=["replica", "outcome"]
        )
        for replica in replicas:
            for outcome in ("answered", "rejected", "refused", "lost", "abandoned"):
                requests.add_metric([replica.name, outcome], counts.outcomes[replica.name, outcome])
        yield requests
        up = GaugeMetricFamily("jaxstack:router_replica_usable", "1: it is sent requests.", labels=["replica"])
        active = GaugeMetricFamily("jaxstack:router_replica_active", "Requests not over.", labels=["replica"])
        for replica in replicas:
            up.add_metric([replica.name], float(replica.usable))
            active.add_metric([replica.name], replica.active)
        yield up
        yield active
        for name, text, value in (
            ("arrivals", "Requests that have come.", counts.arrivals),
            ("resent", "Requests sent to a second replica, or a third.", counts.resent),
            ("resumed", "Answers that another replica went on with.", counts.resumed),
            ("resumed_tokens", "Tokens there were of them already.", counts.resumed_tokens),
            ("lost_answers", "Answers that had begun and could not be ended.", counts.lost_answers),
            ("held", "Requests that waited for a replica.", counts.held),
            ("decisions", "Choices of a replica.", counts.decisions),
            ("decision_seconds", "Time taken by them.", counts.decision_seconds),
            ("prompt_tokens", "Of answered requests, as the replicas count them.", counts.prompt_tokens),
            ("cached_tokens", "Those of them that the replicas had cached.", counts.cached_tokens),
            ("expected_cached_tokens", "Those the router expected to be cached.", counts.expected_cached_tokens),
            ("output_tokens", "Of answers.", counts.output_tokens),
            ("policy_errors", "Failures of the routing policy; 0 unless something is wrong.", counts.policy_errors),
        ):
            family = CounterMetricFamily(f"jaxstack:router_{name}", text)
            family.add_metric([], value)
            yield family
