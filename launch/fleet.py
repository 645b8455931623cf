"""Keeps a service running on replicas that may be taken away at any time.

    python -m launch.fleet up service.yaml --port=8000      until Ctrl-C, which drains and ends it; a second one hurries
    python -m launch.fleet status                           what there is, as a table; --json for programs
    python -m launch.fleet logs REPLICA                     what a replica (or `proxy`) has printed
    python -m launch.fleet down                             ends the service, whether its controller runs or not

The service file is SkyPilot's; replicas are processes of this machine in virtual zones. One is probed until it is
ready, gets requests through one endpoint, http://127.0.0.1:PORT/v1, and is replaced when it is lost; an answer that it
had begun goes on with another, token by token. Zones that take replicas away are left alone for a while. What the
controller knows is in WORKDIR/fleet.sqlite: it may be killed, and started again with `up`, and no stream notices.

    service:
      readiness_probe: /health
      replica_policy: {min_replicas: 2, spot_placer: dynamic_fallback, dynamic_ondemand_fallback: true}
    run: $PYTHON -m launch.serve --port=$PORT --trust_client_id
"""

import asyncio
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.fleet.controller import LocalProvisioner, Preemptor, Provisioner, ServiceSpec, load_service
from jaxstack.fleet.controller.page import snapshot, table
from jaxstack.fleet.controller.running import DOWN, FleetConfig, Stop, bring_down, run_fleet
from jaxstack.fleet.controller.state import controller_of
from jaxstack.fleet.spot.traces import load_trace_dir
from jaxstack.runtime.errors import UserError
from launch import job

_WORKDIR = flags.DEFINE_string("workdir", "work/fleet", "where the fleet's files are")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "up: address of the endpoint; 0.0.0.0 lets other machines in")
_PORT = flags.DEFINE_integer("port", None, "up: port of the endpoint; default: the one it had, or a free one")
_PAGE = flags.DEFINE_integer("page_port", 0, "up: port of the live page; 0 takes a free one, -1 is without")
_KEY = flags.DEFINE_string("api_key", None, "up: key that clients must send as bearer token")
_KEEP = flags.DEFINE_bool("keep_replicas", False, "up: leave replicas and endpoint running at the end, for the next up")
_PROVISIONER: Any = flags.DEFINE_enum("provisioner", "local", ["local", "skypilot"], "up: who has the machines")
_PREEMPT = flags.DEFINE_float("preempt_every_s", None, "up: kill a spot replica at random so often, to watch", 0.1)
_TRACE = flags.DEFINE_string("trace", None, "up: folder of a spot trace; virtual zones give and take as it says")
_SPEED = flags.DEFINE_float("trace_speed", 1.0, "up: how many times as fast", 1e-3)
_SEED = flags.DEFINE_integer("seed", 0, "up: which replicas are killed")
_JSON = flags.DEFINE_bool("json", False, "status: as JSON")
_LINES = flags.DEFINE_integer("lines", 40, "logs: lines from the end", lower_bound=1)
_FOLLOW = flags.DEFINE_bool("follow", False, "logs: go on as more comes")
_WAIT = flags.DEFINE_float("timeout_s", 300.0, "down: how long to wait for the controller")

COMMANDS = {"up": "a service file", "status": "", "logs": "the id of a replica, or proxy", "down": ""}
_words: list[str] = []


def take_command(argv: list[str]) -> list[str]:
    """Takes the command and what it is about off the command line; absl sees the flags."""
    words = []
    for argument in argv[1:]:
        if argument.startswith("-"):
            break
        words.append(argument)
    _words[:] = words
    return [argv[0], *argv[1 + len(words) :]]


def run() -> dict[str, Any] | None:
    if not _words or _words[0] not in COMMANDS:
        found = repr(_words[0]) if _words else "none"
        raise job.BadUsage(f"command: found {found}, expected one of {', '.join(COMMANDS)}")
    command, *about = _words
    if len(about) != bool(COMMANDS[command]):
        raise job.BadUsage(f"{command}: found {len(about)} further words, expected {COMMANDS[command] or 'none'}")
    folder = Path(_WORKDIR.value)
    if command == "up":
        return asyncio.run(_up(load_service(about[0]), folder))
    if command == "status":
        fleet = snapshot(folder)
        print(json.dumps(fleet) if _JSON.value else table(fleet), flush=True)
        return None
    if command == "logs":
        _logs(folder, about[0])
        return None
    return _down(folder)


def router_command(spec: ServiceSpec, host: str = "127.0.0.1", api_key: str | None = None) -> str:
    """Shell text that starts the router before the replicas of a service."""
    more = spec.more
    options = {
        "host": host,
        "policy": spec.balancer,
        "migration_limit": more.migration_limit,
        # What has not begun may be sent as often; only time ends it.
        "retries": max(2, more.migration_limit),
        "hold_timeout_s": more.hold_s,
        "resume_timeout_s": max(1.0, more.hold_s),
        "silence_timeout_s": spec.stream_timeout_s,
        "health_interval_s": 0.5,
    }
    words = [
        sys.executable,
        "-m",
        "launch.route",
        "--managed",
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    if api_key is not None:
        words.append(f"--api_key={api_key}")
    return f"exec {shlex.join(words)} --port=$ROUTER_PORT"


async def _up(spec: ServiceSpec, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    config = FleetConfig(
        folder,
        router_command(spec, _HOST.value, _KEY.value),
        port=_PORT.value,
        page_port=None if _PAGE.value < 0 else _PAGE.value,
        api_key=_KEY.value,
    )
    stop, loop = Stop(), asyncio.get_running_loop()
    stop.leave = _KEEP.value

    def obey() -> None:
        if stop.asked.is_set():
            stop.hurry.set()
        else:
            print("draining; once more to hurry", file=sys.stderr, flush=True)
            stop.asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, obey)

    def on_proxy(url: str, page: str | None) -> None:
        print(f"service {spec.name} at {url}/v1" + (f", page at {page}" if page else ""), flush=True)

    def on_event(what: str, replica: str | None, content: dict[str, Any]) -> None:
        about = " ".join(str(content[key]) for key in ("state", "kind", "zone") if content.get(key))
        why = content.get("text") or content.get("reason") or ""
        if "after_s" in content:
            why = f"after {content['after_s']} s"
        told = " ".join(filter(None, (what, replica or "", about)))
        print(f"{time.strftime('%H:%M:%S')} {told}" + (f": {why}" if why else ""), file=sys.stderr, flush=True)
        for line in content.get("lines", ()):
            print(f"    {line}", file=sys.stderr, flush=True)

    taking: list[asyncio.Task[None]] = []

    def make_provisioner() -> Provisioner:
        provisioner: Any
        if _PROVISIONER.value == "skypilot":
            from jaxstack.fleet.controller.skypilot import SkyPilotProvisioner

            provisioner = SkyPilotProvisioner(spec)
        else:
            provisioner = LocalProvisioner(folder, spec.more.zones)
        taking.extend(asyncio.create_task(work) for work in _takers(provisioner, stop))
        for task in taking:
            task.add_done_callback(_taken)
        return provisioner

    try:
        return await run_fleet(
            spec, config, stop, make_provisioner=make_provisioner, on_proxy=on_proxy, on_event=on_event
        )
    finally:
        for task in taking:
            task.cancel()
        await asyncio.gather(*taking, return_exceptions=True)


def _taken(task: asyncio.Task[None]) -> None:
    """Whoever takes replicas away does so no more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        print(f"no replica is taken away any more: {error}", file=sys.stderr, flush=True)


def _takers(provisioner: Any, stop: Stop) -> list[Any]:
    """What takes replicas away, if that was asked for."""
    if _PREEMPT.value is None and _TRACE.value is None:
        return []
    if not isinstance(provisioner, LocalProvisioner):
        raise job.BadUsage("--preempt_every_s, --trace: only for replicas of this machine")
    preemptor = Preemptor(provisioner, _SEED.value)
    if _TRACE.value is not None:
        trace = load_trace_dir(_TRACE.value)
        zones = list(provisioner.capacities())
        if len(trace.zones) < len(zones):
            raise UserError(
                f"--trace: found {len(trace.zones)} zones in {_TRACE.value}, expected one for each of "
                f"{', '.join(zones)}"
            )
        played = ", ".join(f"{zone} as {theirs}" for zone, theirs in zip(zones, trace.zones))
        print(f"zones give and take as in the trace: {played}", file=sys.stderr, flush=True)
        return [preemptor.follow(trace, stop.asked, speed=_SPEED.value)]

    every_s = float(_PREEMPT.value or 0.0)

    async def strike() -> None:
        while True:
            await asyncio.sleep(every_s)
            await preemptor.strike()

    return [strike()]


def _logs(folder: Path, name: str) -> None:
    if name == "proxy":
        files = sorted((folder / "proxy" / "replicas").glob("proxy-*/log"), key=lambda file: file.stat().st_mtime)
        file = files[-1] if files else folder / "proxy" / "log"
    else:
        file = folder / "replicas" / name / "log"
    if "/" in name or not file.is_file():
        here = sorted(path.parent.name for path in (folder / "replicas").glob("*/log"))
        raise UserError(f"logs: found no {name!r}, expected proxy or one of {', '.join(here) or 'no replica yet'}")
    with file.open(errors="replace") as log:
        for line in log.readlines()[-_LINES.value :]:
            print(line, end="")
        while _FOLLOW.value:
            more = log.read()
            print(more, end="", flush=True)
            if not more:
                time.sleep(0.3)


def _down(folder: Path) -> dict[str, Any]:
    snapshot(folder)  # or there is none
    controller = controller_of(folder)
    if controller is None:
        return {"ended": asyncio.run(bring_down(folder)), "controller": None}
    (folder / DOWN).touch()
    print(f"asked the controller, process {controller}, to drain and end the service", file=sys.stderr, flush=True)
    until, left = time.monotonic() + _WAIT.value, None
    while controller_of(folder) == controller:
        if (now := sum(not row["ended"] for row in snapshot(folder)["replicas"])) != left:
            left = now
            print(f"{left} replicas left", file=sys.stderr, flush=True)
        if time.monotonic() > until:
            raise UserError(f"down: the controller, process {controller}, is still there after {_WAIT.value:g} s")
        time.sleep(0.2)
    if any(not row["ended"] for row in snapshot(folder)["replicas"]):  # it was killed meanwhile
        return {"ended": asyncio.run(bring_down(folder)), "controller": None}
    return {"ended": None, "controller": controller}


if __name__ == "__main__":
    sys.argv = take_command(sys.argv)
    job.main(run)
