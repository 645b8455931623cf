"""What of a cache survives the process: one SQLite file, in WAL mode, written by one thread.

Writes are grouped: a commit each few milliseconds. A process that is killed loses at most its last group, and never
half of one. `flush` returns when everything before it is on file; whoever promises something to a user calls it first.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.entry import Entry
from jaxstack.serving.semantic_cache.store_reader import (
    LABELS_KEPT,
    VERSION,
    StoredLabel,
    StoreReader,
    closed_unless_sound,
    version_of,
)

log = logging.getLogger(__name__)

_GROUP, _GROUP_S = 256, 0.01
# How long a commit waits for another program that has the file.
_BUSY_S = 30.0

_OWNER = "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)"
_OLD_LABELS = f"""
DELETE FROM labels WHERE entry_id = ?1 AND rowid <=
    (SELECT rowid FROM labels WHERE entry_id = ?1 ORDER BY rowid DESC LIMIT 1 OFFSET {LABELS_KEPT})
"""
_SCHEMA = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE entries(
    id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL, scope BLOB NOT NULL, exact BLOB NOT NULL,
    model TEXT NOT NULL, prompt TEXT NOT NULL, response TEXT NOT NULL, semantic INTEGER NOT NULL,
    embedding BLOB, embedder_id TEXT, created_s REAL NOT NULL, expires_s REAL, last_used_s REAL NOT NULL,
    hits INTEGER NOT NULL, saved_s REAL NOT NULL, bytes INTEGER NOT NULL, reports INTEGER NOT NULL DEFAULT 0);
CREATE TABLE labels(
    entry_id INTEGER NOT NULL, s REAL NOT NULL, c INTEGER NOT NULL, tau REAL NOT NULL, source TEXT NOT NULL,
    embedder_id TEXT NOT NULL, at_s REAL NOT NULL);
CREATE INDEX labels_by_entry ON labels(entry_id);
CREATE TABLE owners(owner TEXT NOT NULL, embedder_id TEXT NOT NULL, policy TEXT NOT NULL, state TEXT NOT NULL,
    PRIMARY KEY(owner, embedder_id, policy));
"""


class CacheStore(StoreReader):
    """The file of one cache. One process has it at a time.

    Args:
      collect: called before a commit, on the writer's thread: rows of owners' states, each a tuple (owner, embedder id,
        policy, state as JSON), that go into that commit.

    Raises:
      UserError: the file cannot be read, is another program's, is of a newer version, or is in use.

    Attributes:
      failed: why nothing is written any more; None while all is well.
    """

    def __init__(self, path: str | Path, collect: Callable[[], list[tuple[str, str, str, str]]] | None = None):
        self.path = Path(path)
        self.failed: str | None = None
        self._collect = collect
        self._lock_file = _locked(self.path)
        try:
            super().__init__(_opened(self.path))
        except BaseException:
            os.close(self._lock_file)
            raise
        self._queue: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="cache-store", daemon=True)
        self._closed = False

    # -------------------------------------------------------------------------------------------------------- writing

    def begin(self) -> None:
        """Starts the writer; everything has been read."""
        self._reader.close()
        self._thread.start()

    def put(self, entry: Entry, vector: Float[np.ndarray, "dim"] | None, embedder_id: str) -> None:
        blob = None if vector is None else np.ascontiguousarray(vector, np.float32).tobytes()
        # numpy's integers would be bound as blobs, which equal no number.
        values = (
            *(int(entry.id), entry.owner, entry.scope, entry.exact, entry.model, entry.prompt),
            *(json.dumps(dataclasses.asdict(entry.response)), int(entry.semantic)),
            *(blob, None if blob is None else embedder_id, entry.created_s, entry.expires_s, entry.last_used_s),
            *(int(entry.hits), float(entry.saved_s), int(entry.size_bytes), int(entry.reports)),
        )
        self._put(f"INSERT OR REPLACE INTO entries VALUES ({', '.join('?' * len(values))})", values)

    def touch(self, entry: Entry) -> None:
        """Its use, and reports about it."""
        values = (entry.last_used_s, int(entry.hits), float(entry.saved_s), int(entry.reports), int(entry.id))
        self._put("UPDATE entries SET last_used_s = ?, hits = ?, saved_s = ?, reports = ? WHERE id = ?", values)

    def delete(self, entry: int) -> None:
        self._put("DELETE FROM entries WHERE id = ?", (int(entry),))
        self._put("DELETE FROM labels WHERE entry_id = ?", (int(entry),))

    def label(self, label: StoredLabel, tau: float, source: str, embedder_id: str, at_s: float) -> None:
        values = (int(label.entry), float(label.similarity), int(label.correct), float(tau), source, embedder_id, at_s)
        self._put("INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self._put(_OLD_LABELS, values[:1])

    def flush(self) -> bool:
        """Waits until all that was put is on file. Returns whether it is."""
        if self._closed or not self._thread.is_alive():
            return False
        done = threading.Event()
        self._queue.put(("flush", done))
        done.wait()
        return self.failed is None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        with contextlib.suppress(sqlite3.Error):
            self._reader.close()
        os.close(self._lock_file)

    def _put(self, statement: str, values: Sequence[Any]) -> None:
        if self.failed is None and not self._closed:
            self._queue.put((statement, values))

    def _write(self) -> None:
        connection: sqlite3.Connection | None = None
        try:
            while True:
                group, waiting, last = self._next_group()
                if self.failed is None:
                    try:
                        if connection is None:
                            connection = sqlite3.connect(self.path, isolation_level=None, timeout=_BUSY_S)
                            self._settings(connection)
                        self._commit(connection, self._gathered(group))
                    except Exception as error:  # whatever it is: whoever waits must not wait for ever
                        self._fail(error)
                for done in waiting:
                    done.set()
                if last:
                    return
        finally:
            if connection is not None:
                connection.close()

    @staticmethod
    def _settings(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    def _next_group(self) -> tuple[list[tuple[str, Any]], list[threading.Event], bool]:
        """Waits for something to write and takes what comes with it: statements, who waits, whether to end."""
        group: list[tuple[str, Any]] = []
        waiting: list[threading.Event] = []
        item: tuple[str, Any] | None = self._queue.get()
        while True:
            if item is None:
                return group, waiting, True
            if item[0] == "flush":
                waiting.append(item[1])
            else:
                group.append(item)
            if len(group) >= _GROUP:
                break
            try:
                # Whoever waits shall not wait for more to come.
                item = self._queue.get(timeout=0 if waiting else _GROUP_S)
            except queue.Empty:
                break
        return group, waiting, False

    def _gathered(self, group: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """The group, and behind it what `collect` says."""
        return group if self._collect is None else [*group, *((_OWNER, values) for values in self._collect())]

    def _commit(self, connection: sqlite3.Connection, group: list[tuple[str, Any]]) -> None:
        if not group:
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in group:
                connection.execute(statement, values)
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _fail(self, error: Exception) -> None:
        self.failed = f"{self.path}: {error}"
        log.error("the cache goes on in memory only: %s", self.failed)


def _locked(path: Path) -> int:
    """Takes the file for this process; the system gives it back whatever becomes of us."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"path: {path} cannot be opened: {error.strerror}", exit_code=2) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise UserError(f"path: {path} is in use by another process, expected one of our own", exit_code=2) from None
    return descriptor


def _opened(path: Path) -> sqlite3.Connection:
    """Opens the file, or makes it."""
    connection = sqlite3.connect(path, isolation_level=None)
    with closed_unless_sound(connection, path):
        connection.execute("PRAGMA journal_mode = WAL")
        if version_of(connection, path) is None:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise UserError(f"path: {path} is damaged, expected a sound SQLite file", exit_code=2)
    return connection
