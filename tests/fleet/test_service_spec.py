"""Service files: what SkyPilot's mean here, and one clear line for each that means nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxstack.fleet.controller.policy import policy_of
from jaxstack.fleet.controller.service_spec import ServiceSpec, load_service, read_service
from jaxstack.fleet.spot.view import FleetView
from jaxstack.runtime.errors import UserError

# As published services on spot instances write it, with every key that there is.
FULL = """
name: Vicuna_13B
service:
  readiness_probe:
    path: /v1/chat/completions
    initial_delay_seconds: 1800
    timeout_seconds: 20
    endpoint_probe_interval_seconds: 5
    consecutive_failure_threshold_timeout: 60
    post_data: '{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'
    headers: {authorization: Bearer x}
  replica_policy:
    min_replicas: 2
    max_replicas: 8
    target_qps_per_replica: {A100: 2.5, L4: 1}
    num_overprovision: 2
    dynamic_ondemand_fallback: true
    base_ondemand_fallback_replicas: 1
    spot_placer: dynamic_fallback
    upscale_delay_seconds: 60
    downscale_delay_seconds: 600
  load_balancing_policy: round_robin
  load_balancer: {stream_timeout_seconds: 90}
  tls: {keyfile: k.pem, certfile: c.pem}
resources:
  ports: 8080
  accelerators: {A100: 8}
  any_of:
    - {cloud: gcp, region: us-central1, use_spot: true}
    - {cloud: aws, region: us-east-2, use_spot: true}
envs: {MODEL: m, N: 3}
workdir: .
setup: pip list
run: |
  serve --port 8080
jaxstack:
  zones: [local-x, {name: local-y, region: far, capacity: 2, spot: 0.5, on_demand: 2.0}]
  backoff: {base_seconds: 10, max_seconds: 40}
  risk_window_seconds: 600
  scale_to_zero_delay_seconds: 30
  migration_limit: 5
  hold_seconds: 20
  drain_seconds: 7
"""


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text(FULL)
    spec = load_service(file)
    assert spec.name == "vicuna-13b" and spec.run == "serve --port 8080" and spec.setup == "pip list"
    probe = spec.probe
    assert (probe.path, probe.initial_delay_s, probe.timeout_s) == ("/v1/chat/completions", 1800.0, 20.0)
    assert probe.post_data["max_tokens"] == 1 and probe.headers == {"authorization": "Bearer x"}
    assert (probe.interval_s, probe.failure_threshold_s) == (5.0, 60.0)
    policy = spec.policy
    assert (policy.min_replicas, policy.max_replicas, policy.overprovision) == (2, 8, 2)
    assert spec.target_qps == 1.0 and policy.fallback and policy.base_on_demand == 1 and not policy.fixed
    assert (policy.upscale_delay_s, policy.downscale_delay_s) == (60.0, 600.0)
    assert spec.balancer == "round_robin" and spec.stream_timeout_s == 90.0 and spec.tls == ("k.pem", "c.pem")
    assert spec.port == 8080 and spec.use_spot and spec.spot and spec.envs == {"MODEL": "m", "N": "3"}
    more = spec.more
    assert [(z.name, z.region, z.capacity, z.spot) for z in more.zones] == [
        ("local-x", "local", 8, 1.0), ("local-y", "far", 2, 0.5)
    ]  # fmt: skip
    assert (more.backoff_base_s, more.backoff_max_s, more.risk_window_s) == (10.0, 40.0, 600.0)
    assert (more.scale_to_zero_delay_s, more.migration_limit, more.hold_s, more.drain_s) == (30.0, 5, 20.0, 7.0)
    # What was read says the same when it is written and read again.
    assert read_service(yaml.safe_load(yaml.safe_dump(dict(spec.content))), name="service") == spec
    assert "jaxstack" not in {k for k in spec.content if k != "jaxstack"}


def test_defaults_are_those_of_sky_serve() -> None:
    spec = read_service({"service": {"readiness_probe": "/health", "replicas": 2}, "run": "x"}, name="my service")
    assert spec.name == "my-service" and spec.policy.fixed and spec.policy.min_replicas == 2
    probe = spec.probe
    assert (probe.initial_delay_s, probe.timeout_s, probe.interval_s) == (1200.0, 15.0, 10.0)
    assert (spec.policy.upscale_delay_s, spec.policy.downscale_delay_s) == (300.0, 1200.0)
    assert spec.balancer == "least_load" and spec.stream_timeout_s == 120.0 and not spec.spot


def kinds(spec: ServiceSpec, ready: bool = False) -> tuple[int, int]:
    """Spot and on-demand replicas that the policy of a service begins with."""
    zones = {"a": (1.0, 3.0), "b": (1.0, 3.0)}
    from jaxstack.fleet.spot.view import ZonePrice

    view = FleetView(0.0, (), 0.0, {zone: ZonePrice(*price) for zone, price in zones.items()})
    launches = policy_of(spec).decide(view).launches
    return sum(launch.kind == "spot" for launch in launches), sum(launch.kind == "on_demand" for launch in launches)


@pytest.mark.parametrize(
    ("policy", "resources", "expected"),
    [
        ({"min_replicas": 3}, {}, (0, 3)),
        ({"min_replicas": 3}, {"use_spot": True}, (3, 0)),
        ({"min_replicas": 3, "spot_placer": "dynamic_fallback"}, {}, (3, 0)),
        ({"min_replicas": 3, "num_overprovision": 2}, {"use_spot": True}, (5, 0)),
        ({"min_replicas": 3, "dynamic_ondemand_fallback": True}, {"use_spot": True}, (4, 3)),
        ({"min_replicas": 3, "base_ondemand_fallback_replicas": 1}, {"use_spot": True}, (2, 1)),
        ({"min_replicas": 1, "max_replicas": 4, "target_qps_per_replica": 1}, {}, (0, 1)),
        ({"min_replicas": 0, "max_replicas": 4, "target_qps_per_replica": 1}, {"use_spot": True}, (0, 0)),
    ],
)
def test_the_policy_that_a_file_asks_for(policy: Any, resources: Any, expected: tuple[int, int]) -> None:
    content = {"service": {"readiness_probe": "/", "replica_policy": policy}, "resources": resources, "run": "x"}
    assert kinds(read_service(content)) == expected


def changed(path: str, value: Any) -> Any:
    content = copy.deepcopy(yaml.safe_load(FULL))
    *way, last = path.split(".")
    inner = content
    for key in way:
        inner = inner[key]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("servce", {}, "servce: no such key; did you mean 'service'?"),
        ("service", KeyError, "service: missing"),
        ("service", [], "service: found [], expected an object"),
        ("run", KeyError, "run: missing; expected the command of a replica"),
        ("service.readiness_probe", KeyError, "service.readiness_probe: missing"),
        (
            "service.readiness_probe",
            "health",
            "readiness_probe.path: found 'health', expected a path that begins with /",
        ),
        ("service.readiness_probe.timeout_secs", 3, "timeout_secs: no such key; did you mean 'timeout_seconds'?"),
        ("service.readiness_probe.timeout_seconds", "3", "timeout_seconds: found '3', expected a number > 0"),
        ("service.readiness_probe.post_data", "[1]", "post_data: found [1], expected an object"),
        ("service.readiness_probe.headers", {"a": [1]}, "headers.a: found [1], expected text"),
        ("service.replicas", 2, "found both of replicas and replica_policy"),
        ("service.replica_policy", KeyError, "found neither of replicas and replica_policy"),
        ("service.replica_policy.min_replicas", -1, "min_replicas: found -1, expected an integer >= 0"),
        ("service.replica_policy.min_replicas", True, "min_replicas: found True, expected an integer"),
        ("service.replica_policy.max_replicas", 1, "max_replicas: found 1, expected at least min_replicas = 2"),
        ("service.replica_policy.max_replicas", None, "max_replicas: missing; target_qps_per_replica scales up to it"),
        ("service.replica_policy.target_qps_per_replica", None, "target_qps_per_replica: missing"),
        ("service.replica_policy.target_qps_per_replica", {"A100": 0}, "target_qps_per_replica.A100: found 0"),
        ("service.replica_policy.spot_placer", "best", "spot_placer: found 'best', expected dynamic_fallback"),
        ("service.replica_policy.dynamic_ondemand_fallback", 1, "found 1, expected true or false"),
        ("service.load_balancing_policy", "random", "load_balancing_policy: found 'random', expected one of"),
        ("service.pool", True, "service.pool: not supported: pools run batch jobs"),
        ("service.workers", 2, "service.workers: not supported"),
        ("service.ports", [80, 81], "service.ports: found [80, 81], expected one port"),
        ("service.tls", {"keyfile": "k"}, "service.tls.certfile: found None, expected a file"),
        ("jaxstack.migration_limits", 1, "migration_limits: no such key; did you mean 'migration_limit'?"),
        ("jaxstack.zones", ["a", "a"], "jaxstack.zones: found 'a', expected at least one zone, each name once"),
        ("jaxstack.zones", [{"name": "a", "spot": -1}], "zones[0].spot: found -1, expected a number >= 0"),
        ("jaxstack.backoff.max_seconds", 1, "max_seconds: found 1, expected a number >= 10"),
    ],
)
def test_one_line_for_each_mistake(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(UserError) as caught:
        load_service(file)
    assert message in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_service(tmp_path / "none.yaml")
    for content, message in ((b"a: [1", "line 1: no valid YAML"), (b"\xff\xfe", "UTF-8"), (b"3", "an object")):
        (tmp_path / "x.yaml").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_service(tmp_path / "x.yaml")
