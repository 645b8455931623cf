"""Replicas that are real processes: started once, found again, killed whole, kept by controllers that are killed."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from in_memory import Killed, Proxy

from jaxstack.fleet.controller import Controller, FleetState, LaunchFailed, LocalProvisioner, Preemptor, ReplicaSpec
from jaxstack.fleet.controller.controller import Service
from jaxstack.fleet.controller.page import build_page, snapshot, table
from jaxstack.fleet.controller.proxy import HttpProbe, ProxyProcess
from jaxstack.fleet.controller.running import FleetConfig, Stop, bring_down, run_fleet
from jaxstack.fleet.controller.service_spec import ReadinessProbe, VirtualZone, read_service
from jaxstack.fleet.spot.autoscaling import FixedTarget
from jaxstack.fleet.spot.placement import Backoff
from jaxstack.fleet.spot.policy import spothedge
from jaxstack.fleet.spot.traces import SpotTrace
from jaxstack.runtime.errors import UserError
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.http_server import Background

ZONES = tuple(VirtualZone(name, capacity=3) for name in "abc")
PROBE = ReadinessProbe("/", initial_delay_s=600.0, timeout_s=30.0, interval_s=0.2)
# The smallest server there is; a process of its own below the shell, as a real one has.
SERVER = """$PYTHON -S -c '
import os, socket
server = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nconnection: close\\r\\ncontent-length: 2\\r\\n\\r\\nok")
    connection.close()
'"""
SPEC = ReplicaSpec(SERVER)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[LocalProvisioner]:
    place = LocalProvisioner(tmp_path, ZONES)
    yield place
    for folder in (tmp_path / "replicas").iterdir():
        place.kill(folder.name)
    for child in place._children:
        child.wait(300)


def until(holds: Callable[[], object], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(place: LocalProvisioner) -> list[str]:
    return [o.replica_id for o in asyncio.run(place.observe()) if o.alive]


def test_a_replica_starts_once_and_is_found_by_another(place: LocalProvisioner, tmp_path: Path) -> None:
    first = asyncio.run(place.launch("s-1", "a", "spot", SPEC))
    other = LocalProvisioner(tmp_path, ZONES)  # of a controller that came later
    assert asyncio.run(other.launch("s-1", "a", "spot", SPEC)) == first
    until(lambda: asyncio.run(place.last_lines("s-1", 1)) == ["listening"])
    assert httpx.get(first.url, trust_env=False, timeout=300).text == "ok"
    (seen,) = asyncio.run(other.observe())
    assert (seen.replica_id, seen.zone, seen.kind, seen.alive, seen.handle) == ("s-1", "a", "spot", True, first)
    # Killed by another; the server goes with its shell.
    asyncio.run(other.terminate("s-1"))
    until(lambda: alive(place) == [])
    with pytest.raises(httpx.ConnectError):
        httpx.get(first.url, trust_env=False, timeout=300)
    with pytest.raises(LaunchFailed, match="is gone"):
        asyncio.run(place.launch("s-1", "a", "spot", SPEC))
    asyncio.run(place.terminate("s-1"))  # once more is as good
    asyncio.run(place.terminate("never-was"))


def test_how_it_ended_is_known(place: LocalProvisioner) -> None:
    by_itself = asyncio.run(place.launch("s-1", "a", "spot", ReplicaSpec("echo last words; exit 3")))
    setup = asyncio.run(place.launch("s-2", "a", "spot", ReplicaSpec(SERVER, setup="false")))
    taken = asyncio.run(place.launch("s-3", "b", "spot", SPEC))
    inner = asyncio.run(place.launch("s-4", "b", "on_demand", SPEC))
    assert by_itself.pid and setup.pid and taken.pid and inner.pid
    until(lambda: asyncio.run(place.last_lines("s-4", 1)))
    os.killpg(taken.pid, signal.SIGKILL)
    # The server alone is killed, not the shell above it.
    children = [int(p.name) for p in Path("/proc").glob("[0-9]*") if parent_of(p) == inner.pid]
    os.kill(children[0], signal.SIGKILL)
    until(lambda: alive(place) == [])
    ended = {o.replica_id: o.exited for o in asyncio.run(place.observe())}
    assert ended == {"s-1": 3, "s-2": 1, "s-3": None, "s-4": None}
    assert asyncio.run(place.last_lines("s-1", 5)) == ["last words"]


def parent_of(folder: Path) -> int:
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return -1


def test_a_zone_is_full_and_the_preemptor_takes_what_is_too_much(place: LocalProvisioner) -> None:
    for number in range(3):
        asyncio.run(place.launch(f"s-{number}", "a", "spot", SPEC))
    with pytest.raises(LaunchFailed, match="no room") as caught:
        asyncio.run(place.launch("s-3", "a", "spot", SPEC))
    assert caught.value.reason == "capacity"
    asyncio.run(place.launch("s-4", "a", "on_demand", SPEC))  # on-demand there always is
    with pytest.raises(LaunchFailed, match="zone 'z'"):
        asyncio.run(place.launch("s-5", "z", "spot", SPEC))
    gone: list[str] = []
    preemptor = Preemptor(place, on_kill=gone.append)
    asyncio.run(preemptor.set_capacity("a", 1))
    until(lambda: len(alive(place)) == 2)
    assert len(gone) == 2 == preemptor.kills and "s-4" in alive(place)
    assert LocalProvisioner(place.folder, ZONES).capacities() == {"a": 1, "b": 3, "c": 3}
    assert asyncio.run(preemptor.strike()) in ("s-0", "s-1", "s-2")
    until(lambda: alive(place) == ["s-4"])
    assert asyncio.run(preemptor.strike()) is None  # on-demand is never taken
    trace = SpotTrace(("x", "y"), 10.0, np.array([[2, 0], [1, 3]]))
    asyncio.run(preemptor.follow(trace, asyncio.Event(), speed=1000.0))
    assert place.capacities() == {"a": 0, "b": 3, "c": 3}


def test_a_zone_has_room_for_one_of_two_that_come_at_once(place: LocalProvisioner) -> None:
    place.set_capacities({"a": 1, "b": 3})  # and nothing is known of c any more

    async def both() -> list[object]:
        asked = [place.launch(f"s-{n}", zone, "spot", SPEC) for n, zone in enumerate("aac")]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(both())
    assert getattr(first, "pid", None) and isinstance(second, LaunchFailed) and isinstance(third, LaunchFailed)
    assert alive(place) == ["s-0"]
    asyncio.run(place.terminate("s-0"))
    assert asyncio.run(place.launch("s-3", "a", "spot", SPEC)).pid


def test_one_that_is_ended_before_it_has_said_its_number(place: LocalProvisioner) -> None:
    for number in range(5):
        folder = place.folder / "replicas" / f"s-{number}"
        place._start(folder, "a", "spot", SPEC)
        if number % 2:
            until((folder / "started").exists)
        asyncio.run(place.terminate(folder.name))
        until(lambda: not any(child.poll() is None for child in place._children))
        assert alive(place) == []


def test_nobody_else_is_killed_for_a_number_that_is_used_again(place: LocalProvisioner) -> None:
    handle = asyncio.run(place.launch("s-1", "a", "spot", SPEC))
    file = place.folder / "replicas" / "s-1" / "process"
    file.write_text(f"{os.getpid()} 12345\n")  # ours, but it started at another time
    assert alive(place) == [] and place.kill("s-1") == 0
    file.write_text(f"{handle.pid} {handle.pid_start}\n")
    assert alive(place) == ["s-1"]


def test_the_proxy_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxstack.fleet.controller.proxy._RETRY_S", 600.0)
    command = SERVER.replace("PORT", "ROUTER_PORT")

    async def life() -> None:
        proxy = ProxyProcess(tmp_path, command)
        assert await proxy.keep()
        pid = proxy.pid
        assert await proxy.keep()
        again = ProxyProcess(tmp_path, command)
        assert again.pid == pid and again.port == proxy.port
        os.killpg(pid or 0, signal.SIGKILL)
        while again.pid is not None:
            await asyncio.sleep(0.02)
        assert not await proxy.keep()  # not in a loop
        assert await again.keep()  # at the same port
        assert again.pid not in (None, pid) and again.port == proxy.port
        await again.stop()
        while again.pid is not None:
            await asyncio.sleep(0.02)
        await proxy._place.observe()

    asyncio.run(life())


def test_a_foreign_server_is_not_taken_for_the_proxy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        proxy = ProxyProcess(tmp_path, "sleep 60", taken.getsockname()[1])
        with pytest.raises(LaunchFailed, match=r"cannot listen on 127\.0\.0\.1"):
            asyncio.run(proxy.keep())
    assert proxy.pid is None and not list((tmp_path / "replicas").iterdir())


def test_a_second_up_changes_nothing_of_the_first(tmp_path: Path) -> None:
    content = {"service": {"readiness_probe": "/", "replicas": 1}, "run": "serve", "jaxstack": {"zones": ["x"]}}
    LocalProvisioner(tmp_path, ZONES)
    before = (tmp_path / "zones.json").read_text()
    state = FleetState(tmp_path, durable=False)
    with contextlib.closing(state), pytest.raises(UserError, match=f"another controller, process {os.getpid()}"):
        asyncio.run(run_fleet(read_service(content), FleetConfig(tmp_path, "sleep 60"), Stop()))
    assert (tmp_path / "zones.json").read_text() == before and not (tmp_path / "proxy").exists()


def test_what_is_on_clouds_is_not_ended_from_here(tmp_path: Path) -> None:
    with contextlib.closing(FleetState(tmp_path, durable=False)) as state, state.transaction("x"):
        state.put("service", {"name": "s", "local": False})
        state.add("s", "gcp/us-central1", "spot", 1, "because")
    with pytest.raises(UserError, match="on clouds"):
        asyncio.run(bring_down(tmp_path))
    (row,) = snapshot(tmp_path)["replicas"]
    assert not row["ended"]


@pytest.mark.parametrize("seed", range(5))
def test_a_controller_killed_anywhere_over_real_processes(place: LocalProvisioner, tmp_path: Path, seed: int) -> None:
    choose, proxy = random.Random(seed), Proxy()
    preemptor = Preemptor(place, seed)
    kills = 0

    def die(where: str) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown <= 0:
            raise Killed(where)

    countdown = 2 + seed

    async def life(turns: int, fault: Callable[[str], None]) -> None:
        """A controller until it is killed or has had its turns."""
        state = FleetState(tmp_path, durable=False, fault=fault)
        policy = spothedge(FixedTarget(2), overprovision=0, backoff=Backoff(0.2, 0.4), rebalance=None)
        service = dataclasses.replace(Service("s", SPEC, PROBE), drain_s=0.2)
        async with httpx.AsyncClient(trust_env=False, timeout=300) as http:
            controller = Controller(service, policy, place, state, proxy, HttpProbe(http), decide_every_s=0.1)
            try:
                for _ in range(turns):
                    await controller.step()
                    await asyncio.sleep(0.05)
                    settled = [row for row in state.replicas() if row.state == "READY" and row.kind == "spot"]
                    if fault is not die and len(settled) == 2 == len(state.replicas()) and turns > 50:
                        return
            finally:
                await controller.close()
                state.close()

    for _ in range(4):
        try:
            asyncio.run(life(8, die))
        except Killed:
            kills += 1
        countdown = choose.randrange(2, 12)
        asyncio.run(preemptor.strike())
    asyncio.run(life(6000, lambda where: None))
    assert kills >= 2
    found = snapshot(tmp_path)
    rows = {row["id"]: row for row in found["replicas"] if not row["ended"]}
    assert sorted(rows) == sorted(alive(place)) and len(rows) == 2
    assert all(row["state"] == "READY" and row["pid"] for row in rows.values())
    shown = table(found)
    assert "2 ready of 2 wanted" in shown and "controller not running" in shown and all(name in shown for name in rows)
    assert asyncio.run(bring_down(tmp_path)) == 2
    until(lambda: alive(place) == [])
    assert not [row for row in snapshot(tmp_path)["replicas"] if not row["ended"]]


def test_the_page_and_what_it_reads(tmp_path: Path) -> None:
    state = FleetState(tmp_path, durable=False)
    with state.transaction("x"):
        state.put("service", {"name": "<b>s</b>", "zones": ["a"]})
        row = state.add("s", "a", "spot", 1, "because")
        state.event("launch", row.id, zone="a")
    config = ServerConfig(port=0)
    with Background(config, lambda config: build_page(tmp_path, config)) as page:
        answer = httpx.get(page.url, trust_env=False, timeout=300)
        assert "fleet/status" in answer.text and "default-src 'none'" in answer.headers["content-security-policy"]
        told = httpx.get(f"{page.url}/fleet/status", trust_env=False, timeout=300).json()
        assert told["service"]["name"] == "<b>s</b>" and told["controller"] == os.getpid()
        assert [row["state"] for row in told["replicas"]] == ["PROVISIONING"] and told["events"][0]["replica"] == "s-1"
        state.close()
        assert httpx.get(f"{page.url}/fleet/status", trust_env=False, timeout=300).json()["controller"] is None


def test_clouds_are_for_who_has_the_package() -> None:
    from jaxstack.fleet.controller.skypilot import SkyPilotProvisioner, reason_of

    places = [{"cloud": "gcp", "region": "us-central1"}, {"cloud": "aws", "region": "us-east-2", "zone": "us-east-2a"}]
    content = {
        "service": {"readiness_probe": "/health", "replicas": 1},
        "resources": {"ports": 8080, "accelerators": "L4:1", "any_of": places},
        "run": "serve",
    }
    for said, reason in (
        ("ResourcesUnavailableError: no capacity in us-east-2a", "capacity"),
        ("Quota 'GPUS_ALL_REGIONS' exceeded, no capacity", "quota"),
        ("NoCloudAccessError: no credentials", "credentials"),
        ("no such image", "other"),
    ):
        assert reason_of(RuntimeError(said)) == reason
    if importlib.util.find_spec("sky") is None:
        with pytest.raises(UserError, match=r"pip install 'jaxstack\[skypilot\]'"):
            SkyPilotProvisioner(read_service(content))
        return
    clouds = SkyPilotProvisioner(read_service(content))
    assert set(clouds.zones()) == {"gcp/us-central1", "aws/us-east-2/us-east-2a"}
    task = clouds.task("gcp/us-central1", "spot", ReplicaSpec("serve", content=content))
    (resources,) = task.resources
    assert resources.use_spot and resources.region == "us-central1" and task.run.strip() == "serve"
