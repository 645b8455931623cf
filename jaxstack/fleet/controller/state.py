"""The controller's memory: one SQLite file. What is not in it has not happened.

Every side effect stands in it twice: as an intent, committed before, and as a result, committed behind. A controller
that is killed in between finds the intent, and does it again; provisioners take the second time for the first. What a
policy knows (back-off, autoscaler) is committed with the event that it has heard of.

Write-ahead log, full synchronisation, one writer: a lock on a file beside it says who that is. Others may read.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from jaxstack.fleet.spot.view import Kind, ReplicaState
from jaxstack.runtime.errors import UserError

Intent = Literal["launch", "terminate"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replica (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, zone TEXT NOT NULL, kind TEXT NOT NULL,
  version INTEGER NOT NULL, state TEXT NOT NULL, intent TEXT, url TEXT, pid INTEGER, pid_start TEXT,
  created_s REAL NOT NULL, ready_s REAL, failing_s REAL, drain_until_s REAL, ended_s REAL,
  reason TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS open_replicas ON replica (number) WHERE ended_s IS NULL;
CREATE TABLE IF NOT EXISTS event (
  number INTEGER PRIMARY KEY AUTOINCREMENT, wall_s REAL NOT NULL, what TEXT NOT NULL, replica TEXT,
  content TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS service (version INTEGER PRIMARY KEY, spec TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, content TEXT NOT NULL);
"""
_FILE = "fleet.sqlite"


@dataclasses.dataclass(frozen=True)
class ReplicaRow:
    """What is known of a replica. Times are seconds of the fleet's clock (`FleetState.now_s`).

    Attributes:
      intent: what is being done to it, and was not known to be done when this was written.
      failing_s: since when its probes fail.
      drain_until_s: when it ends at the latest, of one that is shutting down.
    """

    id: str
    zone: str
    kind: Kind
    version: int
    state: ReplicaState
    created_s: float
    intent: Intent | None = None
    url: str | None = None
    pid: int | None = None
    pid_start: str | None = None
    ready_s: float | None = None
    failing_s: float | None = None
    drain_until_s: float | None = None
    ended_s: float | None = None
    reason: str = ""


_COLUMNS = tuple(field.name for field in dataclasses.fields(ReplicaRow))


class FleetState:
    """See the module's docstring.

    Args:
      folder: made if it is not there.
      durable: wait for the disk at every commit; tests that do not cut the power need not.
      fault: called with the name of a place before and behind every commit; a test dies there.
      monotonic: seconds that never run backwards while the machine is up.

    Raises:
      UserError: another controller has it; or the file is none of ours.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        durable: bool = True,
        fault: Callable[[str], None] = lambda place: None,
        monotonic: Callable[[], float] = time.monotonic,
        boot: str | None = None,
    ):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._fault, self._monotonic = fault, monotonic
        self._lock = _lock(self.folder)
        try:
            self._db = sqlite3.connect(self.folder / _FILE, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'OFF'}")
            self._db.executescript(_SCHEMA)
            self._within = False
            # The clock goes on where it stopped if the machine has started anew; the wall clock may be set by anybody.
            boot = _boot() if boot is None else boot
            before = self.get("clock") or {"boot": boot, "now_s": 0.0, "offset_s": 0.0}
            same = before["boot"] == boot
            self._offset_s = before["offset_s"] if same else before["now_s"] - monotonic()
            self._boot = boot
            self._last_s = before["now_s"]
        except sqlite3.DatabaseError as error:
            self.close()
            raise UserError(f"state: {self.folder / _FILE} cannot be used ({error})") from None

    def close(self) -> None:
        if hasattr(self, "_db"):
            self._db.close()
        self._lock.close()

    @property
    def now_s(self) -> float:
        """The fleet's clock: seconds that go on over restarts of the controller and of the machine."""
        self._last_s = max(self._last_s, self._monotonic() + self._offset_s)
        return self._last_s

    # Writing.

    @contextlib.contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """What is written inside is written as a whole, or not at all."""
        assert not self._within, "one transaction at a time"
        self._db.execute("BEGIN IMMEDIATE")
        self._within = True
        try:
            yield
            self.put("clock", {"boot": self._boot, "now_s": self.now_s, "offset_s": self._offset_s})
            self._fault(f"before {name}")
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._within = False
        self._fault(f"behind {name}")

    def add(self, service: str, zone: str, kind: Kind, version: int, reason: str) -> ReplicaRow:
        """A new replica that is about to be launched. Its number was never used before."""
        self._db.execute(
            "INSERT INTO replica (id, zone, kind, version, state, intent, created_s, reason) VALUES (?,?,?,?,?,?,?,?)",
            ("", zone, kind, version, ReplicaState.PROVISIONING, "launch", self.now_s, reason),
        )
        number = self._db.execute("SELECT last_insert_rowid()").fetchone()[0]
        name = f"{service}-{number}"
        self._db.execute("UPDATE replica SET id = ? WHERE number = ?", (name, number))
        row = self.replica(name)
        assert row is not None
        return row

    def update(self, replica_id: str, **changes: Any) -> None:
        assert self._within and changes.keys() <= set(_COLUMNS)
        names = ", ".join(f"{name} = ?" for name in changes)
        self._db.execute(f"UPDATE replica SET {names} WHERE id = ?", (*changes.values(), replica_id))

    def event(self, what: str, replica_id: str | None = None, **content: Any) -> None:
        """A line of the log, which only grows."""
        self._db.execute(
            "INSERT INTO event (wall_s, what, replica, content) VALUES (?,?,?,?)",
            (time.time(), what, replica_id, json.dumps(content)),
        )

    def put(self, name: str, content: Any) -> None:
        assert self._within
        self._db.execute("INSERT OR REPLACE INTO kept (name, content) VALUES (?,?)", (name, json.dumps(content)))

    def put_version(self, spec: Any) -> int:
        """The version of a service with this description: a new one if it is not the last."""
        last = self._db.execute("SELECT version, spec FROM service ORDER BY version DESC LIMIT 1").fetchone()
        text = json.dumps(spec, sort_keys=True)
        if last is not None and last[1] == text:
            return last[0]
        version = 1 if last is None else last[0] + 1
        self._db.execute("INSERT INTO service (version, spec) VALUES (?,?)", (version, text))
        return version

    # Reading.

    def replica(self, replica_id: str) -> ReplicaRow | None:
        rows = _rows(self._db, "WHERE id = ?", replica_id)
        return rows[0] if rows else None

    def replicas(self) -> list[ReplicaRow]:
        """Those that have not ended, the oldest first."""
        return _rows(self._db, "WHERE ended_s IS NULL ORDER BY number")

    def last_event(self) -> int:
        """Its number; 0 if there is none."""
        return self._db.execute("SELECT coalesce(max(number), 0) FROM event").fetchone()[0]

    def events(self, after: int) -> list[tuple[int, str, str | None, dict[str, Any]]]:
        """The lines of the log behind number `after`: number, what, replica and content."""
        found = self._db.execute(
            "SELECT number, what, replica, content FROM event WHERE number > ? ORDER BY number", (after,)
        )
        return [(number, what, replica, json.loads(text)) for number, what, replica, text in found]

    def get(self, name: str) -> Any:
        found = self._db.execute("SELECT content FROM kept WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a file says, for whoever is not its writer.

    Attributes:
      replicas: those that have not ended, and the last that have.
      events: the last ones, the newest last, as (wall time, what, replica, content).
    """

    replicas: list[ReplicaRow]
    events: list[tuple[float, str, str | None, dict[str, Any]]]
    kept: dict[str, Any]
    version: int

    @classmethod
    def of(cls, folder: str | Path, *, ended: int = 10, events: int = 20) -> "Reading":
        """Raises UserError if there is none."""
        file = Path(folder) / _FILE
        if not file.is_file():
            raise UserError(f"workdir: found no fleet in {folder}; start one with: up service.yaml --workdir={folder}")
        try:
            with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as db:
                db.execute("BEGIN")
                rows = _rows(db, "WHERE ended_s IS NULL ORDER BY number")
                old = _rows(db, f"WHERE ended_s IS NOT NULL ORDER BY number DESC LIMIT {int(ended)}")
                said = db.execute(
                    "SELECT wall_s, what, replica, content FROM event ORDER BY number DESC LIMIT ?", (events,)
                ).fetchall()
                kept = {name: json.loads(text) for name, text in db.execute("SELECT name, content FROM kept")}
                version = db.execute("SELECT max(version) FROM service").fetchone()[0] or 0
        except sqlite3.DatabaseError as error:
            raise UserError(f"state: {file} cannot be read ({error})") from None
        told = [(wall_s, what, replica, json.loads(text)) for wall_s, what, replica, text in reversed(said)]
        return cls([*reversed(old), *rows], told, kept, version)


def controller_of(folder: str | Path) -> int | None:
    """The process that has the fleet in `folder`; None if none has."""
    file = Path(folder) / "controller.lock"
    try:
        with file.open("r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return int(lock.read().strip() or 0) or None
    except (OSError, ValueError):
        pass
    return None


def _lock(folder: Path) -> Any:
    # The kernel takes the lock back from whoever is killed.
    lock = os.fdopen(os.open(folder / "controller.lock", os.O_RDWR | os.O_CREAT, 0o644), "r+")
    for _ in range(5):
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        time.sleep(0.02)  # somebody may only be asking whose it is (`controller_of`)
    else:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(f"workdir: {folder} belongs to another controller, process {holder}") from None
    lock.write(f"{os.getpid():<19}\n")  # over the last one, which is as long
    lock.flush()
    return lock


def _rows(db: sqlite3.Connection, where: str, *values: Any) -> list[ReplicaRow]:
    found = db.execute(f"SELECT {', '.join(_COLUMNS)} FROM replica {where}", values).fetchall()
    rows = [dict(zip(_COLUMNS, values)) for values in found]
    return [ReplicaRow(**{**row, "state": ReplicaState(row["state"])}) for row in rows]


def _boot() -> str:
    """Changes when the machine starts anew, and its monotonic clock with it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return f"{psutil.boot_time():.0f}"
