"""A service as SkyPilot's YAML describes it, read strictly: a key that is not known is an error, and so is a value that
would be ignored.

Everything that `sky serve up` knows means here what it means there. What it does not know sits under `jaxstack:`
(virtual zones and their prices, back-off, the delay of scaling to zero, the migration limit), so that the rest stays
valid for it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxstack.fleet.controller.values import (
    as_list,
    as_object,
    integer,
    known,
    list_of_objects,
    number,
    strings,
    text,
    wrong,
)
from jaxstack.runtime.errors import UserError

BALANCERS = {"round_robin": "round_robin", "least_load": "least_load", "instance_aware_least_load": "least_load"}
"""SkyPilot's load balancing policies -> the router's. With one kind of accelerator the last two are the same."""

_TASK_KEYS = [
    "config",
    "envs",
    "event_callback",
    "experimental",
    "file_mounts",
    "inputs",
    "name",
    "num_nodes",
    "outputs",
    "resources",
    "run",
    "secrets",
    "service",
    "setup",
    "volumes",
    "workdir",
    "jaxstack",
]
_SERVICE_KEYS = [
    "readiness_probe",
    "replicas",
    "replica_policy",
    "load_balancing_policy",
    "load_balancer",
    "ports",
    "tls",
    "pool",
    "workers",
]
_NOT_OURS = {
    "pool": "pools run batch jobs, not a service; leave it out",
    "workers": "workers belong to pools, which run batch jobs; use replicas",
}


@dataclasses.dataclass(frozen=True)
class ReadinessProbe:
    """How a replica is asked whether it is ready. Times are seconds.

    Args:
      path: of the URL that answers 200 when it is.
      initial_delay_s: how long a replica may take until it answers for the first time.
      timeout_s: of one probe.
      interval_s: between two.
      failure_threshold_s: how long the probes of a replica that was ready may fail before it is replaced.
      post_data: sent as JSON; None asks with GET.
      headers: of the request.
    """

    path: str
    initial_delay_s: float = 1200.0
    timeout_s: float = 15.0
    interval_s: float = 10.0
    failure_threshold_s: float = 180.0
    post_data: Any = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReplicaPolicy:
    """How many replicas, and of which kind.

    Args:
      max_replicas: None where their number is fixed.
      target_qps: requests a second that a replica is to take, one figure or by accelerator.
      overprovision: spot replicas beyond the target; None is 1 with a spot placer that falls back, else 0.
      fallback: on-demand replicas stand in for spot replicas that are not ready.
      base_on_demand: replicas that are always on-demand.
      spot_placer: "dynamic_fallback", or None.
    """

    min_replicas: int
    max_replicas: int | None = None
    target_qps: float | Mapping[str, float] | None = None
    overprovision: int | None = None
    fallback: bool = False
    base_on_demand: int = 0
    spot_placer: str | None = None
    upscale_delay_s: float = 300.0
    downscale_delay_s: float = 1200.0

    @property
    def fixed(self) -> bool:
        return self.max_replicas is None or self.max_replicas == self.min_replicas


@dataclasses.dataclass(frozen=True)
class VirtualZone:
    """A zone of this machine: how many spot replicas it holds, and what they would cost in dollars an hour."""

    name: str
    region: str = "local"
    capacity: int = 8
    spot: float = 1.0
    on_demand: float = 3.0


@dataclasses.dataclass(frozen=True)
class Additions:
    """What stands under `jaxstack:`.

    Args:
      zones: virtual zones of the local provisioner.
      backoff_base_s, backoff_max_s: how long a zone is left alone after a failure, and at most.
      risk_window_s: see `spot.mixture.RiskWindow`; None is off.
      scale_to_zero_delay_s: None: the delay of every other step down.
      migration_limit: how often an answer may move to another replica.
      hold_s: how long a request waits for a service that wakes from zero.
      drain_s: how long a replica that is stopped may go on with its answers.
    """

    zones: tuple[VirtualZone, ...] = (VirtualZone("local-a"), VirtualZone("local-b"), VirtualZone("local-c"))
    backoff_base_s: float = 300.0
    backoff_max_s: float = 4800.0
    risk_window_s: float | None = None
    scale_to_zero_delay_s: float | None = None
    migration_limit: int = 3
    hold_s: float = 120.0
    drain_s: float = 120.0


@dataclasses.dataclass(frozen=True)
class ServiceSpec:
    """A service.

    Args:
      content: the file as it was read, for a provisioner that speaks SkyPilot.
      name: of the service; letters, digits and hyphens.
      run, setup: shell text of a replica; `setup` runs before `run`.
      envs: their environment.
      workdir: where they run; None is the current folder.
      port: of a replica, where it has a machine of its own.
      use_spot: whether spot instances are wanted at all.
    """

    content: Mapping[str, Any]
    name: str
    probe: ReadinessProbe
    policy: ReplicaPolicy
    run: str
    setup: str = ""
    envs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    workdir: str | None = None
    port: int | None = None
    use_spot: bool = False
    balancer: str = "least_load"
    stream_timeout_s: float = 120.0
    tls: tuple[str, str] | None = None
    more: Additions = dataclasses.field(default_factory=Additions)

    @property
    def spot(self) -> bool:
        """Whether some replicas are spot instances."""
        policy = self.policy
        return self.use_spot or policy.fallback or policy.spot_placer is not None

    @property
    def target_qps(self) -> float | None:
        """Requests a second for a replica; of several accelerators the slowest counts."""
        found = self.policy.target_qps
        return min(found.values()) if isinstance(found, Mapping) else found


def load_service(path: str | Path) -> ServiceSpec:
    """Reads a service file.

    Raises:
      UserError: it cannot be read, or something in it is wrong; one line with the key, what was found and expected.
    """
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"service: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"service: {file} is no UTF-8 text") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f", line {where.line + 1}"
        raise UserError(
            f"service: {file}{line}: no valid YAML ({getattr(error, 'problem', None) or 'unreadable'})"
        ) from None
    try:
        return read_service(content, name=file.stem)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_service(content: Any, *, name: str = "service") -> ServiceSpec:
    """The service that a parsed file describes; `name` is used where it gives none. Raises UserError."""
    task = as_object(content, "the file")
    known(task, _TASK_KEYS, "")
    if "service" not in task:
        raise UserError("service: missing; expected the part that says how replicas are probed and how many there are")
    service = as_object(task["service"], "service")
    for key, why in _NOT_OURS.items():
        if key in service:
            raise UserError(f"service.{key}: not supported: {why}")
    known(service, _SERVICE_KEYS, "service.")
    resources = as_object(task.get("resources") or {}, "resources")
    options = [resources, *list_of_objects(resources, "any_of"), *list_of_objects(resources, "ordered")]
    run = text(task, "run", "run")
    if not run:
        raise UserError("run: missing; expected the command of a replica, which listens on $PORT")
    workdir = task.get("workdir")
    if workdir is not None and not isinstance(workdir, str):
        raise wrong("workdir", workdir, "a folder")
    balancer = service.get("load_balancing_policy", "least_load")
    if balancer not in BALANCERS:
        raise wrong("service.load_balancing_policy", balancer, f"one of {', '.join(BALANCERS)}")
    found = text(task, "name", "name") or name
    clean = "".join(c if c.isalnum() or c == "-" else "-" for c in found.lower()).strip("-") or "service"
    return ServiceSpec(
        content=task,
        name=clean,
        probe=_probe(service),
        policy=_policy(service),
        run=run,
        setup=text(task, "setup", "setup"),
        envs=strings(task.get("envs"), "envs"),
        workdir=workdir,
        port=_port(service, resources),
        use_spot=any(bool(option.get("use_spot")) for option in options),
        balancer=BALANCERS[balancer],
        stream_timeout_s=_balancer_timeout(service),
        tls=_tls(service),
        more=_additions(task),
    )


# Parts.


def _probe(service: Mapping[str, Any]) -> ReadinessProbe:
    where = "service.readiness_probe"
    found = service.get("readiness_probe")
    if found is None:
        raise UserError(f"{where}: missing; expected a path such as /health, or an object with one")
    if isinstance(found, str):
        found = {"path": found}
    found = as_object(found, where)
    keys = [
        "path",
        "initial_delay_seconds",
        "timeout_seconds",
        "endpoint_probe_interval_seconds",
        "post_data",
        "headers",
        "consecutive_failure_threshold_timeout",
    ]
    known(found, keys, f"{where}.")
    path = found.get("path")
    if not isinstance(path, str) or not path.startswith("/"):
        raise wrong(f"{where}.path", path, "a path that begins with /")
    default = ReadinessProbe(path)
    post_data = found.get("post_data")
    if isinstance(post_data, str):
        try:
            post_data = yaml.safe_load(post_data)
        except yaml.YAMLError:
            raise wrong(f"{where}.post_data", post_data, "an object, or JSON text of one") from None
    if post_data is not None and not isinstance(post_data, Mapping):
        raise wrong(f"{where}.post_data", post_data, "an object, or JSON text of one")
    return ReadinessProbe(
        path,
        number(found, "initial_delay_seconds", default.initial_delay_s, where),
        number(found, "timeout_seconds", default.timeout_s, where, least=1e-3),
        number(found, "endpoint_probe_interval_seconds", default.interval_s, where, least=1e-3),
        number(found, "consecutive_failure_threshold_timeout", default.failure_threshold_s, where),
        post_data,
        strings(found.get("headers"), f"{where}.headers"),
    )


def _policy(service: Mapping[str, Any]) -> ReplicaPolicy:
    where = "service.replica_policy"
    if ("replicas" in service) == ("replica_policy" in service):
        many = "both" if "replicas" in service else "neither"
        raise UserError(f"service: found {many} of replicas and replica_policy, expected exactly one of them")
    if "replicas" in service:
        return ReplicaPolicy(integer(service, "replicas", None, "service", least=0))
    found = as_object(service["replica_policy"], where)
    keys = [
        "min_replicas",
        "max_replicas",
        "target_qps_per_replica",
        "num_overprovision",
        "dynamic_ondemand_fallback",
        "base_ondemand_fallback_replicas",
        "spot_placer",
        "upscale_delay_seconds",
        "downscale_delay_seconds",
    ]
    known(found, keys, f"{where}.")
    least = integer(found, "min_replicas", None, where, least=0)
    most = None if found.get("max_replicas") is None else integer(found, "max_replicas", None, where, least=0)
    if most is not None and most < least:
        raise wrong(f"{where}.max_replicas", most, f"at least min_replicas = {least}")
    qps = found.get("target_qps_per_replica")
    if isinstance(qps, Mapping):
        qps = {str(kind): number(qps, kind, None, f"{where}.target_qps_per_replica", least=1e-9) for kind in qps}
        if not qps:
            raise wrong(f"{where}.target_qps_per_replica", {}, "at least one accelerator")
    elif qps is not None:
        qps = number(found, "target_qps_per_replica", None, where, least=1e-9)
    if most is not None and most != least and qps is None:
        raise UserError(
            f"{where}.target_qps_per_replica: missing; with max_replicas != min_replicas it says when to scale"
        )
    if qps is not None and most is None:
        raise UserError(f"{where}.max_replicas: missing; target_qps_per_replica scales up to it")
    placer = found.get("spot_placer")
    if placer not in (None, "dynamic_fallback"):
        raise wrong(f"{where}.spot_placer", placer, "dynamic_fallback")
    fallback = found.get("dynamic_ondemand_fallback", False)
    if not isinstance(fallback, bool):
        raise wrong(f"{where}.dynamic_ondemand_fallback", fallback, "true or false")
    over = found.get("num_overprovision")
    return ReplicaPolicy(
        least,
        most,
        qps,
        None if over is None else integer(found, "num_overprovision", None, where, least=0),
        fallback,
        integer(found, "base_ondemand_fallback_replicas", 0, where, least=0),
        placer,
        number(found, "upscale_delay_seconds", ReplicaPolicy.upscale_delay_s, where),
        number(found, "downscale_delay_seconds", ReplicaPolicy.downscale_delay_s, where),
    )


def _additions(task: Mapping[str, Any]) -> Additions:
    found = as_object(task.get("jaxstack") or {}, "jaxstack")
    keys = "zones backoff risk_window_seconds scale_to_zero_delay_seconds migration_limit hold_seconds drain_seconds"
    known(found, keys.split(), "jaxstack.")
    default, where = Additions(), "jaxstack"
    backoff = as_object(found.get("backoff") or {}, "jaxstack.backoff")
    known(backoff, ["base_seconds", "max_seconds"], "jaxstack.backoff.")
    base = number(backoff, "base_seconds", default.backoff_base_s, "jaxstack.backoff", least=1e-3)
    most = number(backoff, "max_seconds", max(base, default.backoff_max_s), "jaxstack.backoff", least=base)
    zones = default.zones
    if found.get("zones") is not None:
        zones = tuple(_zone(zone, i) for i, zone in enumerate(as_list(found["zones"], "jaxstack.zones")))
        names = [zone.name for zone in zones]
        twice = sorted({zone for zone in names if names.count(zone) > 1})
        if not zones or twice:
            raise wrong("jaxstack.zones", twice[0] if twice else [], "at least one zone, each name once")
    optional = {
        key: None if found.get(key) is None else number(found, key, None, where)
        for key in ("risk_window_seconds", "scale_to_zero_delay_seconds")
    }
    return Additions(
        zones,
        base,
        most,
        optional["risk_window_seconds"],
        optional["scale_to_zero_delay_seconds"],
        integer(found, "migration_limit", default.migration_limit, where, least=0),
        number(found, "hold_seconds", default.hold_s, where),
        number(found, "drain_seconds", default.drain_s, where),
    )


def _zone(found: Any, place: int) -> VirtualZone:
    where = f"jaxstack.zones[{place}]"
    if isinstance(found, str):
        found = {"name": found}
    found = as_object(found, where)
    known(found, [f.name for f in dataclasses.fields(VirtualZone)], f"{where}.")
    name = found.get("name")
    if not isinstance(name, str) or not name:
        raise wrong(f"{where}.name", name, "a name")
    region = found.get("region", VirtualZone.region)
    if not isinstance(region, str):
        raise wrong(f"{where}.region", region, "a name")
    return VirtualZone(
        name,
        region,
        integer(found, "capacity", VirtualZone.capacity, where, least=0),
        number(found, "spot", VirtualZone.spot, where),
        number(found, "on_demand", VirtualZone.on_demand, where),
    )


def _port(service: Mapping[str, Any], resources: Mapping[str, Any]) -> int | None:
    for where, found in (("service.ports", service.get("ports")), ("resources.ports", resources.get("ports"))):
        if isinstance(found, list) and len(found) == 1:
            found = found[0]
        if found is None:
            continue
        if isinstance(found, str) and found.isdigit():
            found = int(found)
        if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= 65535:
            raise wrong(where, found, "one port, a number from 1 to 65535")
        return found
    return None


def _balancer_timeout(service: Mapping[str, Any]) -> float:
    found = as_object(service.get("load_balancer") or {}, "service.load_balancer")
    known(found, ["stream_timeout_seconds"], "service.load_balancer.")
    return number(found, "stream_timeout_seconds", ServiceSpec.stream_timeout_s, "service.load_balancer", least=1e-3)


def _tls(service: Mapping[str, Any]) -> tuple[str, str] | None:
    if service.get("tls") is None:
        return None
    found = as_object(service["tls"], "service.tls")
    known(found, ["keyfile", "certfile"], "service.tls.")
    for key in ("keyfile", "certfile"):
        if not isinstance(found.get(key), str):
            raise wrong(f"service.tls.{key}", found.get(key), "a file")
    return found["keyfile"], found["certfile"]
