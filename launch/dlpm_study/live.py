"""The live part: an engine on a model of random weights, visited by one policy after the other; a small live fleet."""

import dataclasses
import itertools
import queue
import random
import time
from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxstack.engine import Engine, EngineConfig
from jaxstack.engine.live import EngineServer, arrival_sampling, step_shapes
from jaxstack.engine.request import Delta
from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import Arrival, Outcome, Server, drive
from jaxstack.engine.scheduling.measuring import Meter
from jaxstack.engine.scheduling.step_cost import StepLog, StepShapes
from jaxstack.engine.scheduling.workloads import named, well_behaved
from jaxstack.models import Decoder
from jaxstack.models.embedded import embedded_model
from jaxstack.models.hf_config import config_from_folder
from jaxstack.serving.router.policies import RoutedRequest, RoutingPolicy, routing_policy_named
from launch.dlpm_study.config import StudyConfig
from launch.dlpm_study.simulated import describe, fairness
from launch.serve_benchmark.machine import LoadMeter

# Tokens of the live model's window: a document, a question and an answer.
WINDOW = 640
# Steps of a visit that are kept for the fit of the step cost.
_SAMPLES = 1500


def make_engine(study: StudyConfig) -> Engine:
    """An engine on a model of the embedded one's architecture, of the study's size, with random weights."""
    model = config_from_folder(embedded_model())
    model = dataclasses.replace(
        model,
        hidden_size=study.hidden_size,
        intermediate_size=3 * study.hidden_size,
        num_layers=study.layers,
        num_heads=study.heads,
        num_kv_heads=study.heads,
        head_dim=study.hidden_size // study.heads,
        layer_windows=(),
        max_position_embeddings=WINDOW,
    )
    sizes: dict[str, Any] = study.sizes
    settings = EngineConfig(**sizes, max_waiting=4096)
    return Engine(Decoder(model, rngs=nnx.Rngs(0)), None, settings)


def vocabulary(engine: Engine) -> int:
    """Below it are the token ids that a workload may draw."""
    return engine.vocab_size


class LiveStudy:
    """Visits of policies to one engine.

    Args:
      study: the settings.
      tick: called now and then with the seconds that have passed since the last time.
    """

    def __init__(self, study: StudyConfig, tick: Callable[[float], object]):
        self._study, self._tick = study, tick
        self.engine = make_engine(study)
        self.engine.warm_up(progress=True)
        self.shapes: StepShapes = step_shapes(self.engine)

    def visit(self, workload: str, policy: str, *, seed: int, spans: int) -> dict[str, Any]:
        """One policy on one workload: a warm-up, then spans that count. JSON-ready."""
        study, engine = self._study, self.engine
        engine.use_policy(policy_named(policy, **study.policy_options(policy)))
        load = named(workload, seed, vocab=vocabulary(engine))
        server = EngineServer(engine)
        meter, log = Meter(well_behaved(load), offset_s=server.began_s, bucket_s=0.5), StepLog()
        engine.observers.extend((meter, log))
        before = engine.stats().recompilations
        end_s = study.warm_s + spans * study.span_s
        ticker = Ticker(server, self._tick)
        machine = LoadMeter()
        try:
            with machine:
                drive(server, load, until_s=end_s, on_outcome=meter.on_outcome, on_turn=ticker)
        finally:
            engine.observers.remove(meter)
            engine.observers.remove(log)
            gap, bound = fairness(engine.scheduler)
            server.close()
        edges = [study.warm_s + i * study.span_s for i in range(spans + 1)]
        found = describe(meter, meter.row(edges[0], edges[-1], gap=gap, bound=bound), edges[0], edges[-1])
        rows = [meter.row(begin, end) for begin, end in itertools.pairwise(edges)]
        samples = log.samples
        if len(samples) > _SAMPLES:
            samples = random.Random(seed).sample(samples, _SAMPLES)
        return {
            **found,
            "spans": [row.as_json() for row in rows],
            "samples": [dataclasses.astuple(sample) for sample in samples],
            # For a machine that others use: what a second of processor time was worth, the warm-up included.
            "service_per_cpu_s": round(meter.row(0.0, end_s).service_rate * end_s / machine.own_cpu_s, 2),
            "foreign_cores": round(machine.foreign_cores, 3),
            "recompilations": engine.stats().recompilations - before,
        }


class Ticker:
    """Calls back about once a second, on turns."""

    def __init__(self, server: Server, tick: Callable[[float], object]):
        self._server, self._tick, self._last_s = server, tick, 0.0

    def __call__(self) -> None:
        now_s = self._server.now_s
        if now_s - self._last_s >= 1.0:
            self._tick(now_s - self._last_s)
            self._last_s = now_s


class _Target:
    """A live replica as a routing policy sees it."""

    def __init__(self, number: int, engine: Engine):
        self.name, self.number, self.engine, self.active = f"replica-{number}", number, engine, 0


class LiveFleet:
    """Engines of this process, each stepping on a thread of its own, behind a routing policy: a `Server`."""

    def __init__(self, engines: list[Engine], policy: RoutingPolicy):
        self._targets = [_Target(number, engine) for number, engine in enumerate(engines)]
        self._policy = policy
        self._began_s = time.perf_counter()
        self._pieces: queue.SimpleQueue[tuple[str, Delta, float]] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}
        self._submitted = 0
        self.dispatched = [0] * len(engines)

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def submit(self, arrival: Arrival) -> None:
        name = f"fleet-{self._submitted}"
        self._submitted += 1
        target = self._targets[0]
        routed = RoutedRequest.of_tokens(
            arrival.client, arrival.prompt, arrival.output_tokens, target.engine.config.page_size
        )
        target = self._policy.choose(routed, self._targets)
        self._policy.on_dispatch(routed, target)
        target.active += 1
        self.dispatched[target.number] += 1
        self._open[name] = _Open(arrival, routed, target, self.now_s)
        told = lambda delta: self._pieces.put((name, delta, self.now_s))  # noqa: E731
        target.engine.submit(
            list(arrival.prompt), arrival_sampling(arrival), told, name, client=arrival.client
        )  # fmt: skip

    def turn(self) -> list[Outcome] | None:
        """What is over since the last turn; waits for a piece of some answer."""
        if not self._open:
            return None
        outcomes: list[Outcome] = []
        pieces = [self._pieces.get()]
        while not self._pieces.empty():
            pieces.append(self._pieces.get())
        for name, delta, now_s in pieces:
            entry = self._open[name]
            entry.answer += delta.token_ids
            if entry.first_token_s is None:
                entry.first_token_s = now_s
            if delta.finish_reason is not None:
                outcomes.append(self._over(self._open.pop(name), delta, now_s))
        return outcomes

    def wait_until(self, when_s: float) -> None:
        time.sleep(max(0.0, when_s - self.now_s))

    def close(self) -> None:
        """Ends what is open; the engines go on."""
        for name, entry in self._open.items():
            entry.target.engine.abort(name)
        while self._open:
            self.turn()

    def _over(self, entry: "_Open", delta: Delta, now_s: float) -> Outcome:
        target, arrival = entry.target, entry.arrival
        target.active -= 1
        self._policy.on_finish(
            entry.routed, target, delta.cached_tokens, len(entry.answer), prompt_tokens=delta.prompt_tokens
        )
        reason = delta.finish_reason or "stop"
        return Outcome(
            arrival, entry.arrival_s, None, entry.first_token_s, now_s, delta.cached_tokens, entry.answer, reason,
            target.number,
        )  # fmt: skip


@dataclasses.dataclass
class _Open:
    arrival: Arrival
    routed: RoutedRequest
    target: _Target
    arrival_s: float
    answer: tuple[int, ...] = ()
    first_token_s: float | None = None


class LiveFleetStudy:
    """Visits of routing policies to a few engines of this process."""

    def __init__(self, study: StudyConfig, tick: Callable[[float], object]):
        self._study, self._tick = study, tick
        self.engines = [make_engine(study) for _ in range(study.live_replicas)]
        for engine in self.engines:
            engine.start(progress=True)

    def close(self) -> None:
        for engine in self.engines:
            engine.close()

    def visit(self, workload: str, policy: str, router: str, *, seed: int, options: dict[str, int]) -> dict[str, Any]:
        """One pair of policies: a warm-up, then the spans together."""
        study = self._study
        for engine in self.engines:
            engine.use_policy(policy_named(policy, **study.policy_options(policy)))
        route = routing_policy_named(router, **({"quantum": study.router_quantum} if router == "d2lpm" else {}))
        load = named(workload, seed, vocab=vocabulary(self.engines[0]), **options)
        server = LiveFleet(self.engines, route)
        meter = Meter(well_behaved(load), offset_s=time.perf_counter() - server.now_s, bucket_s=0.5)
        for engine in self.engines:
            engine.observers.append(meter)
        end_s = study.warm_s + study.spans * study.span_s / 2
        try:
            drive(server, load, until_s=end_s, on_outcome=meter.on_outcome, on_turn=Ticker(server, self._tick))
        finally:
            worst = max((fairness(e.scheduler) for e in self.engines), key=lambda pair: pair[0] / (pair[1] or 1e18))
            server.close()
            for engine in self.engines:
                engine.observers.remove(meter)
        row = meter.row(study.warm_s, end_s, gap=worst[0], bound=worst[1])
        return {**describe(meter, row, study.warm_s, end_s), "dispatched": server.dispatched}
