"""What a fleet is doing, for people: a table in a terminal, JSON, and a live page in a browser."""

import contextlib
import time
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from jaxstack.fleet.controller.state import Reading, ReplicaRow, controller_of
from jaxstack.fleet.spot.view import ReplicaState
from jaxstack.serving.application import Endpoint, application
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.exchange import Exchange

_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def snapshot(folder: str | Path, *, ended: int = 12, events: int = 30) -> dict[str, Any]:
    """The fleet in `folder`, JSON-ready. Raises UserError if there is none."""
    reading = Reading.of(folder, ended=ended, events=events)
    clock, policy = reading.kept.get("clock") or {}, reading.kept.get("policy") or {}
    now_s = time.monotonic() + clock.get("offset_s", 0.0)
    zones: dict[str, dict[str, Any]] = {}
    for kind, placer in (policy.get("placers") or {}).items():
        for zone, record in (placer.get("zones") or {}).items():
            left = (record.get("retry_at_s") or now_s) - now_s
            zones.setdefault(zone, {})[kind] = {
                "failures": record["failures"],
                "left_alone_s": round(max(0.0, left), 1),
            }
    ready = sum(row.state is ReplicaState.READY for row in reading.replicas)
    return {
        "service": reading.kept.get("service") or {},
        "version": reading.version,
        "controller": controller_of(folder),
        "target": reading.kept.get("target", 0),
        "ready": ready,
        "replicas": [_row(row, now_s) for row in reading.replicas],
        "zones": zones,
        "proxy": reading.kept.get("proxy") or {},
        "events": [
            {"when": time.strftime("%H:%M:%S", time.localtime(wall_s)), "what": what, "replica": replica, **content}
            for wall_s, what, replica, content in reading.events
        ],
    }


def _row(row: ReplicaRow, now_s: float) -> dict[str, Any]:
    until_s = now_s if row.ended_s is None else row.ended_s
    return {
        "id": row.id,
        "zone": row.zone,
        "kind": row.kind,
        "version": row.version,
        "state": row.state,
        "age_s": round(until_s - row.created_s, 1),
        "cold_start_s": None if row.ready_s is None else round(row.ready_s - row.created_s, 1),
        "url": row.url,
        "pid": row.pid,
        "ended": row.ended_s is not None,
        "reason": row.reason,
    }


def table(found: dict[str, Any]) -> str:
    """`snapshot` for a terminal."""
    service, proxy = found["service"], found["proxy"]
    controller = f"process {found['controller']}" if found["controller"] else "not running"
    lines = [
        f"service {service.get('name', '?')}, version {found['version']}: {found['ready']} ready of "
        f"{found['target']} wanted",
        f"endpoint {proxy.get('url', '?')}/v1   page {service.get('page', '?')}   controller {controller}",
        "",
    ]
    rows = [("REPLICA", "ZONE", "KIND", "STATE", "AGE", "READY AFTER", "URL OR REASON")]
    for row in found["replicas"]:
        after = "" if row["cold_start_s"] is None else _duration(row["cold_start_s"])
        told = row["reason"] if row["ended"] else row["url"] or ""
        rows.append((row["id"], row["zone"], row["kind"], row["state"], _duration(row["age_s"]), after, told))
    widths = [max(len(str(row[i])) for row in rows) for i in range(6)]
    lines += ["  ".join([*(str(row[i]).ljust(widths[i]) for i in range(6)), row[6]]).rstrip() for row in rows]
    alone = [
        f"{zone} ({kind}) for {_duration(told['left_alone_s'])} after {told['failures']} failures"
        for zone, kinds in found["zones"].items()
        for kind, told in kinds.items()
        if told["left_alone_s"] > 0
    ]
    if alone:
        lines += ["", "left alone: " + "; ".join(alone)]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class FleetPage:
    """The page's server state; see `application.Service`. It reads the fleet's file, and nothing else.

    Args:
      folder: of the fleet.
    """

    failure: BaseException | None = None
    draining = False
    active = 0
    ready = True
    dead = False

    def __init__(self, folder: str | Path):
        self._folder = folder
        self._html = resources.files(__package__).joinpath("page.html").read_bytes()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield

    async def end_all(self) -> None:
        pass

    async def show_page(self, exchange: Exchange) -> None:
        await exchange.answer_bytes(self._html, "text/html; charset=utf-8", headers=_HEADERS)

    async def show_snapshot(self, exchange: Exchange) -> None:
        await exchange.answer(snapshot(self._folder), headers={"cache-control": "no-store"})


def build_page(folder: str | Path, config: ServerConfig) -> Starlette:
    """The ASGI application of the page."""
    service = FleetPage(folder)
    routes = [
        Route("/", Endpoint(service.show_page, config, needs_key=False), methods=["GET"]),
        Route("/fleet/status", Endpoint(service.show_snapshot, config, needs_key=False), methods=["GET"]),
    ]
    return application(routes, config, service)
