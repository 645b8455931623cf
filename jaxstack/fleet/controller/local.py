"""Replicas as processes of this machine, in zones that exist by name: each holds so many spot replicas, and what the
others would cost is only said.

A replica is a process group of its own that outlives whoever started it. Its folder says all there is to know: what it
is (`replica.json`, written before it starts), its first process and when that started (`process`, which it writes
itself), what it printed (`log`), and how it ended if it ended by itself (`exit`). Starting makes the folder `started`,
which only one can make: so a replica starts once, however often somebody who was killed in between asks for it.

Processes are known by number and start time, never by name. What a zone holds stands in `zones.json`, where a preemptor
changes it.
"""

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxstack.fleet.controller.provisioner import Handle, LaunchFailed, Observation, ReplicaSpec
from jaxstack.fleet.controller.service_spec import VirtualZone
from jaxstack.fleet.spot.view import Kind, ZonePrice
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically

# Below those that the system gives to whoever connects to something.
_PORTS = (18_000, 32_000)
# A shell was asked to say how its command ended and could not: it was killed with it.
_KILLED = 128 + signal.SIGKILL

# Whoever ends a replica writes `ended` and then looks for its process; this does it the other way round, so that one of
# the two sees the other. One whose number cannot be written, on a full disk, does not run: nobody could end it.
_START = """
mkdir "$FLEET_REPLICA/started" 2>/dev/null || exit 0
if [ -r /proc/$$/stat ]; then start=$(cut -d' ' -f22 /proc/$$/stat); else start=$(ps -o lstart= -p $$); fi
echo "$$ $start" > "$FLEET_REPLICA/process.new" || exit 1
mv "$FLEET_REPLICA/process.new" "$FLEET_REPLICA/process" || exit 1
[ -e "$FLEET_REPLICA/ended" ] && exit 0
( eval "$FLEET_SETUP" ) && ( eval "$FLEET_RUN" ) &
wait $!
status=$?
echo $status > "$FLEET_REPLICA/exit.new" && mv "$FLEET_REPLICA/exit.new" "$FLEET_REPLICA/exit"
"""


class LocalProvisioner:
    """See the module's docstring.

    Args:
      folder: where the replicas' folders are, and `zones.json`.
      zones: what there is; the capacities hold until somebody changes `zones.json`.
      envs: further environment of every replica.

    Raises:
      UserError: the folder has been used with other zones.
    """

    def __init__(self, folder: str | Path, zones: Sequence[VirtualZone], envs: Mapping[str, str] | None = None):
        self.folder, self._zones = Path(folder), {zone.name: zone for zone in zones}
        self._envs = dict(envs or {})
        self._children: list[subprocess.Popen[bytes]] = []
        # Spot replicas that have been started and cannot be seen yet -> their zone.
        self._arriving: dict[str, str] = {}
        self._rng = random.SystemRandom()
        self._replicas.mkdir(parents=True, exist_ok=True)
        known = self.capacities()
        if self._zones and known.keys() != self._zones.keys():
            self.set_capacities({zone.name: known.get(zone.name, zone.capacity) for zone in zones})

    @property
    def _replicas(self) -> Path:
        return self.folder / "replicas"

    def zones(self) -> Mapping[str, ZonePrice]:
        return {zone.name: ZonePrice(zone.spot, zone.on_demand, zone.region) for zone in self._zones.values()}

    def capacities(self) -> dict[str, int]:
        """Zone -> spot replicas that it holds now."""
        try:
            return {name: int(held) for name, held in json.loads((self.folder / "zones.json").read_text()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"zones: {self.folder / 'zones.json'} cannot be read ({error})") from None

    def set_capacities(self, capacities: Mapping[str, int]) -> None:
        write_atomically(self.folder / "zones.json", json.dumps(dict(capacities)))

    async def launch(self, replica_id: str, zone: str, kind: Kind, spec: ReplicaSpec) -> Handle:
        folder = self._replicas / replica_id
        if (folder / "ended").exists():
            raise LaunchFailed("capacity", "it had been launched, and is gone")
        if not (folder / "started").exists():
            if zone not in self._zones:
                raise LaunchFailed("other", f"zone {zone!r} is none of {', '.join(self._zones)}")
            here = {o.replica_id for o in self.observed() if o.alive and o.zone == zone and o.kind == "spot"}
            held = len(here | {name for name, where in self._arriving.items() if where == zone})
            if kind == "spot" and held >= self.capacities().get(zone, 0):
                raise LaunchFailed("capacity", f"{zone} has no room for another spot replica ({held} there)")
            try:
                self._start(folder, zone, kind, spec)
            except OSError as error:
                raise LaunchFailed("other", f"the process cannot be started ({error})") from None
            if kind == "spot":
                self._arriving[replica_id] = zone
        try:
            for _ in range(200):
                observed = self._observe_one(folder)
                if observed is not None and observed.handle.pid is not None:
                    return observed.handle
                await asyncio.sleep(0.02)
        finally:
            self._arriving.pop(replica_id, None)
        raise LaunchFailed("other", f"{folder} says nothing of its process")

    async def observe(self) -> Sequence[Observation]:
        self._children = [child for child in self._children if child.poll() is None]
        return list(self.observed())

    async def terminate(self, replica_id: str) -> None:
        folder = self._replicas / replica_id
        # Whoever comes later with an old intent finds that it has been.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            (folder / "started").mkdir()
        for _ in range(50):
            if not self.kill(replica_id):
                break
            await asyncio.sleep(0.02)
        for child in self._children:
            child.poll()
        with contextlib.suppress(OSError):
            (folder / "ended").touch()
            self.kill(replica_id)  # its process had not said its number before
            self._forget_ended()

    def kill(self, replica_id: str) -> int:
        """SIGKILL to every process of a replica; returns how many there were."""
        pid, start = self._process(self._replicas / replica_id)
        if pid is None:
            return 0
        if _start_of(pid) == start:
            # The group is the first process's own, and cannot be anybody else's while that one is there.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
                return 1
            return 0
        left = [member for member in _members(pid) if _tagged(member, self._replicas / replica_id)]
        for member in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        return len(left)

    async def last_lines(self, replica_id: str, count: int) -> list[str]:
        try:
            with self.log_file(replica_id).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    def log_file(self, replica_id: str) -> Path:
        return self._replicas / replica_id / "log"

    # Inside.

    def _start(self, folder: Path, zone: str, kind: Kind, spec: ReplicaSpec) -> None:
        folder.mkdir(exist_ok=True)
        what = folder / "replica.json"
        if not what.exists():
            write_atomically(what, json.dumps({"zone": zone, "kind": kind, "port": self.free_port()}))
        port = json.loads(what.read_text())["port"]
        environment = {
            **os.environ,
            **self._envs,
            **spec.envs,
            "FLEET_REPLICA": str(folder.resolve()),
            "FLEET_SETUP": spec.setup or ":",
            "FLEET_RUN": spec.run,
            "PORT": str(port),
            "SKYPILOT_SERVE_REPLICA_ID": folder.name.rpartition("-")[2],
            "PYTHON": sys.executable,
        }
        with (folder / "log").open("ab") as log:
            child = subprocess.Popen(
                ["/bin/sh", "-c", _START],
                cwd=spec.workdir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)

    def free_port(self) -> int:
        """A port that nothing listens on, and that no replica has."""
        taken = {int(o.handle.url.rpartition(":")[2]) for o in self.observed()}
        for _ in range(1000):
            port = self._rng.randrange(*_PORTS)
            if port in taken:
                continue
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
        raise LaunchFailed("other", f"no free port from {_PORTS[0]} to {_PORTS[1]}")

    def observed(self) -> Iterator[Observation]:
        """As `observe`."""
        for folder in sorted(self._replicas.iterdir()):
            if not (folder / "ended").exists():
                observed = self._observe_one(folder)
                if observed is not None:
                    yield observed

    def _observe_one(self, folder: Path) -> Observation | None:
        """None of one that has never been started."""
        try:
            what = json.loads((folder / "replica.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        if not (folder / "started").exists():
            return None
        pid, start = self._process(folder)
        handle = Handle(f"http://127.0.0.1:{what['port']}", pid, start)
        # Between the folder and the number there are milliseconds, in which it is taken for alive.
        alive = pid is None or _start_of(pid) == start
        exited = None
        with contextlib.suppress(FileNotFoundError, ValueError):
            exited, alive = int((folder / "exit").read_text()), False
        if exited == _KILLED:
            exited = None
        return Observation(folder.name, what["zone"], what["kind"], alive, handle, exited)

    def _process(self, folder: Path) -> tuple[int | None, str | None]:
        try:
            pid, start = (folder / "process").read_text().strip().split(" ", 1)
            return int(pid), start
        except (FileNotFoundError, ValueError):
            return None, None

    def _forget_ended(self, keep: int = 200) -> None:
        """Removes the folders of replicas that have ended, but for the last ones."""
        ended = [folder for folder in self._replicas.iterdir() if (folder / "ended").exists()]
        ended.sort(key=lambda folder: (folder / "ended").stat().st_mtime)
        for folder in ended[: max(0, len(ended) - keep)]:
            shutil.rmtree(folder, ignore_errors=True)


def _start_of(pid: int) -> str | None:
    """When a process that is alive started, as the system counts; None if it is not."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if rest[0] in "ZX" else rest[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (ProcessLookupError, PermissionError):
        return None
    said = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return said.stdout.strip() or None


def _members(group: int) -> list[int]:
    """The processes of a group whose first has gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            rest = (folder / "stat").read_text().rpartition(")")[2].split()
            if rest[0] not in "ZX" and int(rest[2]) == group:
                found.append(int(folder.name))
    return found


def _tagged(pid: int, folder: Path) -> bool:
    """Whether a process has the environment of the replica in `folder`."""
    try:
        return f"FLEET_REPLICA={folder.resolve()}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
