"""One simulated run: a replica, or a fleet of them, a workload and policies, on a fitted step cost. No jax.

A run is described by plain data, so that it can be sent to another process.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling import policy_named
from jaxstack.engine.scheduling.driving import Server, Workload, drive
from jaxstack.engine.scheduling.measuring import Meter, Row
from jaxstack.engine.scheduling.programs import Programs
from jaxstack.engine.scheduling.simulator import SimulatedReplica, VirtualClock
from jaxstack.engine.scheduling.step_cost import StepCostModel, StepShapes
from jaxstack.engine.scheduling.workloads import named, well_behaved
from jaxstack.serving.router.policies import RoutingPolicy, routing_policy_named
from jaxstack.serving.router.simulator import SimulatedFleet

_CLOCKED = ("cache_aware", "preble", "d2lpm")


@dataclasses.dataclass(frozen=True)
class Simulation:
    """What is simulated.

    Args:
      workload, options: as in `workloads.named`.
      policy, policy_options: of each replica.
      router, router_options: between them; no router means one replica.
      costs: of a step, as keyword arguments of `StepCostModel`, its shapes as two lists.
      sizes: a replica's settings.
      warm_s, span_s: what counts begins after the one and lasts for the other.
    """

    workload: str
    policy: str
    costs: Mapping[str, Any]
    sizes: Mapping[str, int]
    warm_s: float
    span_s: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    policy_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    router: str | None = None
    router_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    replicas: int = 1
    seed: int = 0


def costs_of(model: StepCostModel) -> dict[str, Any]:
    """A cost model as plain data."""
    return dataclasses.asdict(model)


def model_of(costs: Mapping[str, Any]) -> StepCostModel:
    """A cost model of plain data."""
    shapes = costs.get("shapes", {})
    return StepCostModel(
        **{name: value for name, value in costs.items() if name != "shapes"},
        shapes=StepShapes(*(tuple(shapes.get(kind, ())) for kind in ("decode", "mixed"))),
    )


def workload_of(run: Simulation) -> Workload:
    if run.workload == "long_documents":
        from jaxstack.engine.scheduling.arrivals import long_documents

        return long_documents(run.seed, until_s=run.warm_s + run.span_s, **run.options)
    return named(run.workload, run.seed, **run.options)


def simulate(run: Simulation) -> dict[str, Any]:
    """Runs it. Raises UnfairSchedule where a certified policy breaks its bound."""
    began = time.perf_counter()
    costs = model_of(run.costs)

    def replica(number: int, clock: VirtualClock) -> SimulatedReplica:
        policy = policy_named(run.policy, **run.policy_options)
        settings: dict[str, Any] = dict(run.sizes)
        return SimulatedReplica.of(policy, costs, clock=clock, number=number, **settings)

    def router(clock: VirtualClock) -> RoutingPolicy:
        assert run.router is not None
        options = dict(run.router_options)
        return routing_policy_named(run.router, **options, **({"clock": clock} if run.router in _CLOCKED else {}))

    server: Server
    if run.router is None:
        server = replica(0, VirtualClock())
        replicas = [server]
    else:
        server = SimulatedFleet(replica, run.replicas, router)
        replicas = server.replicas
    workload = workload_of(run)
    meter = Meter(well_behaved(workload))
    for each in replicas:
        each.observers.append(meter)
    end_s = run.warm_s + run.span_s
    drive(server, workload, until_s=end_s, on_outcome=meter.on_outcome)
    worst = max((fairness(each.scheduler) for each in replicas), key=lambda pair: pair[0] / pair[1] if pair[1] else 0)
    row = meter.row(run.warm_s, end_s, gap=worst[0], bound=worst[1])
    found = describe(meter, row, run.warm_s, end_s)
    if isinstance(workload, Programs):
        found["programs"] = programs_of(workload, run.warm_s, end_s)
    if isinstance(server, SimulatedFleet):
        found["dispatched"] = server.dispatched
    return {**found, "wall_s": round(time.perf_counter() - began, 1)}


def fairness(scheduler: Scheduler) -> tuple[float, int | None]:
    """The largest gap so far of a scheduler's certificate, and the bound."""
    certificate = scheduler.steward.certificate
    return certificate.max_gap, certificate.bound


def describe(meter: Meter, row: Row, begin_s: float, end_s: float) -> dict[str, Any]:
    """A row with what the plots need, JSON-ready."""
    times, services = meter.service_over_time()
    latencies = meter.latencies(begin_s, end_s)
    return {
        "row": row.as_json(),
        "times_s": [round(t, 3) for t in times],
        "service": services,
        "latency": {client: [each.p50_s, each.p99_s] for client, each in latencies.items()},
    }


def programs_of(workload: Programs, begin_s: float, end_s: float) -> dict[str, Any]:
    """Whole programs of the well-behaved clients that ended in the span."""
    from jaxstack.engine.scheduling.measuring import Latency

    spans = [
        run.ended_s - run.began_s
        for run in workload.finished
        if run.client in workload.well_behaved and begin_s < run.ended_s <= end_s
    ]
    latency = Latency.of(spans)
    return {"finished": len(spans), "p50_s": latency.p50_s, "p99_s": latency.p99_s}
