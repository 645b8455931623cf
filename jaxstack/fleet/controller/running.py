"""A fleet from its first turn to its last: the controller, the router before the replicas, and the page."""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxstack.fleet.controller.controller import Controller, Service
from jaxstack.fleet.controller.local import LocalProvisioner
from jaxstack.fleet.controller.page import build_page
from jaxstack.fleet.controller.policy import policy_of
from jaxstack.fleet.controller.provisioner import LaunchFailed, Provisioner, ReplicaSpec
from jaxstack.fleet.controller.proxy import ProxyProcess, RouterClient, http_clients
from jaxstack.fleet.controller.service_spec import ServiceSpec
from jaxstack.fleet.controller.state import FleetState
from jaxstack.runtime.errors import UserError
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.http_server import Background

log = logging.getLogger(__name__)

DOWN = "down"
"""A file of that name in a fleet's folder asks its controller to bring the service down."""
_PROXY_S = 120.0
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """How a fleet is run.

    Args:
      folder: where its file, its replicas' folders and the proxy's are.
      router_command: shell text that starts a managed router on the port `$ROUTER_PORT`.
      port: of the proxy; None takes the one it had, or a free one.
      page_port: of the page; 0 takes a free one, None is without.
      api_key: of the proxy.
      every_s: between two turns.
      decide_every_s: between two decisions, unless something has happened.
      durable: wait for the disk at every commit.
    """

    folder: Path
    router_command: str
    port: int | None = None
    page_port: int | None = 0
    api_key: str | None = None
    every_s: float = 0.5
    decide_every_s: float = 5.0
    durable: bool = True


class Stop:
    """What ends a fleet. `leave` ends the controller alone; `hurry` waits for no answer."""

    def __init__(self) -> None:
        self.asked, self.hurry, self.leave = asyncio.Event(), asyncio.Event(), False


async def run_fleet(
    spec: ServiceSpec,
    config: FleetConfig,
    stop: Stop,
    *,
    make_provisioner: Callable[[], Provisioner] | None = None,
    on_proxy: Callable[[str, str | None], None] = lambda url, page: None,
    on_event: Callable[[str, str | None, dict[str, Any]], None] = lambda what, replica, content: None,
) -> dict[str, Any]:
    """Keeps a service running until `stop`, then drains and ends it. Returns a summary.

    Args:
      make_provisioner: makes the one who has the machines, once the folder is ours; by default this machine, with the
        zones of the service file.
      on_proxy: told the URLs of proxy and page when requests are taken.
      on_event: told what is written into the log.

    Raises:
      UserError: another controller has the folder; a port cannot be had; or nothing can be written down any more.
    """
    try:
        return await _run_fleet(spec, config, stop, make_provisioner, on_proxy, on_event)
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _OF_DISKS:
            raise
        left = f"what runs is left running; when that is mended, end it with: down --workdir={config.folder}"
        raise UserError(f"workdir: {config.folder} cannot be used ({error}); {left}") from error


async def _run_fleet(
    spec: ServiceSpec,
    config: FleetConfig,
    stop: Stop,
    make_provisioner: Callable[[], Provisioner] | None,
    on_proxy: Callable[[str, str | None], None],
    on_event: Callable[[str, str | None, dict[str, Any]], None],
) -> dict[str, Any]:
    if spec.tls is not None:
        raise UserError("service.tls: not supported by this proxy; put one that ends TLS before it")
    state = FleetState(config.folder, durable=config.durable)
    with contextlib.closing(state), contextlib.ExitStack() as opened:
        (config.folder / DOWN).unlink(missing_ok=True)
        local = lambda: LocalProvisioner(config.folder, spec.more.zones)  # noqa: E731
        provisioner = (make_provisioner or local)()
        proxy = ProxyProcess(config.folder / "proxy", config.router_command, config.port)
        page = None
        if config.page_port is not None:
            http = ServerConfig(port=config.page_port)
            page = opened.enter_context(Background(http, lambda http: build_page(config.folder, http))).url
        replica = ReplicaSpec(spec.run, spec.setup, spec.envs, spec.workdir, spec.port, spec.content)
        with state.transaction("start"):
            what = {"run": spec.run, "setup": spec.setup, "envs": dict(spec.envs), "workdir": spec.workdir}
            version = state.put_version({**what, "resources": spec.content.get("resources")})
            where = {"zones": list(provisioner.zones()), "local": isinstance(provisioner, LocalProvisioner)}
            state.put("service", {"name": spec.name, "page": page, **where})
            state.put("proxy", {"url": proxy.url})
            state.event("controller started", None, pid=os.getpid(), version=version)
        service = Service(
            spec.name, dataclasses.replace(replica, version=version), spec.probe, version, spec.more.drain_s
        )
        async with http_clients(proxy.url, config.api_key) as (router, probe):
            controller = Controller(
                service, policy_of(spec), provisioner, state, router, probe, decide_every_s=config.decide_every_s
            )
            told = state.last_event()
            await _start_proxy(proxy, router, stop, lambda: on_event("waiting for the endpoint to answer", None, {}))
            if not stop.asked.is_set():
                on_proxy(proxy.url, page)
            while not stop.asked.is_set():
                await _keep(proxy)
                await controller.step()
                told = _tell(state, told, on_event)
                if (config.folder / DOWN).exists():
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.asked.wait(), config.every_s)
            if stop.leave:
                await controller.close()
            else:
                ending = asyncio.create_task(controller.shut_down(stop.hurry))
                while not ending.done():
                    await asyncio.wait([ending], timeout=0.5)
                    told = _tell(state, told, on_event)
                await ending
                await proxy.stop()
                (config.folder / DOWN).unlink(missing_ok=True)
            counts = router.status
    return {
        "service": spec.name,
        "version": version,
        "requests": counts.get("arrivals", 0),
        "resumed": counts.get("resumed", 0),
        "lost_answers": counts.get("lost_answers", 0),
        "left_running": stop.leave,
    }


async def bring_down(folder: Path) -> int:
    """Ends what a controller that is no more has left: replicas and proxy, without draining. Returns how many replicas.

    Raises:
      UserError: there is no fleet, its controller runs, or its replicas are not on this machine.
    """
    state = FleetState(folder)
    with contextlib.closing(state):
        if state.replicas() and not (state.get("service") or {}).get("local", True):
            raise UserError(
                f"down: the replicas of {folder} are on clouds, which only a controller can end; start it again with "
                "up --provisioner=skypilot, and bring it down then"
            )
        provisioner = LocalProvisioner(folder, [])
        ended = {row.id for row in state.replicas()}
        ended |= {o.replica_id for o in await provisioner.observe() if o.alive}
        for replica_id in sorted(ended):
            await provisioner.terminate(replica_id)
        await ProxyProcess(folder / "proxy", "").stop()
        with state.transaction("down"):
            for row in state.replicas():
                changes = {"state": "SHUTTING_DOWN", "intent": None, "ended_s": state.now_s}
                state.update(row.id, **changes, reason="the service is brought down")
            state.event("brought down", None, replicas=len(ended))
        (folder / DOWN).unlink(missing_ok=True)
    return len(ended)


async def _start_proxy(proxy: ProxyProcess, router: RouterClient, stop: Stop, waiting: Callable[[], None]) -> None:
    """Returns when the proxy answers, or `stop` is asked; `waiting` is called where that takes long."""
    found = proxy.pid is not None
    await _keep(proxy, strict=True)
    for turn in range(int(_PROXY_S / 0.1)):
        if proxy.pid is None:  # it has ended
            break
        if await router.traffic() is not None or stop.asked.is_set():
            return
        if turn == 50:
            waiting()
        await asyncio.sleep(0.1)
    lines = await proxy.last_lines(1)
    if not found:
        await proxy.stop()
    raise UserError(f"proxy: it does not answer at {proxy.url}: {(lines or ['it said nothing'])[-1]}")


async def _keep(proxy: ProxyProcess, *, strict: bool = False) -> bool:
    try:
        return await proxy.keep()
    except (LaunchFailed, OSError) as error:
        if strict:
            raise UserError(f"proxy: {error}") from None
        log.error("the proxy cannot be started: %s", error)
        return False


def _tell(state: FleetState, told: int, on_event: Callable[[str, str | None, dict[str, Any]], None]) -> int:
    for number, what, replica, content in state.events(told):
        on_event(what, replica, content)
        told = number
    return told
