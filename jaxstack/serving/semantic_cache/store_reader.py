"""Reading the file of a cache: what a start takes up, and what a person looks at while a server has it open."""

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.entry import CachedResponse, Entry

VERSION = 1
LABELS_KEPT = 256
"""Of each entry, the newest."""
_TABLES = {"meta", "entries", "labels", "owners"}

_FIELDS = "id, owner, scope, exact, model, prompt, response, semantic, created_s, expires_s, last_used_s, hits, "
_FIELDS += "saved_s, bytes, reports, embedding, embedder_id"


@dataclasses.dataclass(frozen=True)
class StoredLabel:
    """One label, as `Policy.label` takes it."""

    entry: int
    similarity: float
    correct: bool


class StoreReader:
    """What is on file."""

    def __init__(self, connection: sqlite3.Connection):
        self._reader = connection

    def entries(self, embedder_id: str | None = None) -> Iterator[tuple[Entry, Float[np.ndarray, "dim"] | None]]:
        """All entries, oldest first, each with its vector if that is of this embedder."""
        for row in self._reader.execute(f"SELECT {_FIELDS} FROM entries ORDER BY id"):
            embedding, of = row[15:]
            mine = embedding is not None and of == embedder_id
            yield _entry(row), np.frombuffer(embedding, np.float32) if mine else None

    def entry(self, entry_id: int) -> Entry | None:
        row = self._reader.execute(f"SELECT {_FIELDS} FROM entries WHERE id = ?", (entry_id,)).fetchone()
        return None if row is None else _entry(row)

    def labels(self, embedder_id: str) -> Iterator[StoredLabel]:
        """The newest labels of each entry, in the order in which they came."""
        ranked = "SELECT rowid, entry_id, s, c, row_number() OVER (PARTITION BY entry_id ORDER BY rowid DESC) AS age "
        ranked += "FROM labels WHERE embedder_id = ?"
        query = f"SELECT entry_id, s, c FROM ({ranked}) WHERE age <= {LABELS_KEPT} ORDER BY rowid"
        for entry, s, c in self._reader.execute(query, (embedder_id,)):
            yield StoredLabel(entry, s, bool(c))

    def labels_of(self, entry_id: int) -> list[tuple[float, bool, str, float]]:
        """The labels of an entry that are kept, oldest first: similarity, whether it was right, who said so, when."""
        query = "SELECT s, c, source, at_s FROM labels WHERE entry_id = ? ORDER BY rowid"
        return [(s, bool(c), source, at_s) for s, c, source, at_s in self._reader.execute(query, (entry_id,))]

    def label_counts(self) -> dict[str, tuple[int, int]]:
        """Labels of each owner's entries, and how many of them say wrong."""
        query = "SELECT owner, count(*), sum(1 - c) FROM labels JOIN entries ON id = entry_id GROUP BY owner"
        return {owner: (count, wrong) for owner, count, wrong in self._reader.execute(query)}

    def owner_states(self, embedder_id: str, policy: str) -> dict[str, dict[str, Any]]:
        query = "SELECT owner, state FROM owners WHERE embedder_id = ? AND policy = ?"
        return {owner: json.loads(state) for owner, state in self._reader.execute(query, (embedder_id, policy))}

    def all_states(self) -> list[tuple[str, str, str, dict[str, Any]]]:
        """Owner, embedder, policy, and what that policy has learned."""
        query = "SELECT owner, embedder_id, policy, state FROM owners ORDER BY owner, embedder_id, policy"
        return [(*row[:3], json.loads(row[3])) for row in self._reader.execute(query)]

    def next_id(self) -> int:
        """An entry id that was never used."""
        row = self._reader.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
        return 1 if row is None else int(row[0]) + 1


def _entry(row: tuple[Any, ...]) -> Entry:
    values = (*row[:6], CachedResponse(**json.loads(row[6])), bool(row[7]), *row[8:15])
    return Entry(*values)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[StoreReader]:
    """The file of a cache, only to be read; a server may be writing it meanwhile.

    Raises:
      UserError: there is none, or it is not a cache's.
    """
    if not Path(path).is_file():
        raise UserError(f"path: found no file {path}, expected a cache's", exit_code=2)
    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    with closed_unless_sound(connection, path):
        if version_of(connection, path) is None:
            raise UserError(f"path: {path} is empty, expected a cache's file", exit_code=2)
    try:
        # One state of it, however much is written while we read.
        connection.execute("BEGIN")
        yield StoreReader(connection)
    finally:
        connection.close()


def version_of(connection: sqlite3.Connection, path: str | Path) -> int | None:
    """The version of the file; None of one with nothing in it. Raises UserError for one that is not ours to read."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if version > VERSION:
        raise UserError(f"path: {path} has version {version}, expected at most {VERSION}", exit_code=2)
    if tables and not (version and tables.issuperset(_TABLES)):
        raise UserError(f"path: {path} is a database of another program, expected a cache's", exit_code=2)
    return version or None


@contextlib.contextmanager
def closed_unless_sound(connection: sqlite3.Connection, path: str | Path) -> Iterator[None]:
    """Closes the connection if what is done to it fails. SQLite's errors become UserError."""
    try:
        yield
    except sqlite3.Error as error:
        connection.close()
        raise UserError(f"path: {path} cannot be read as a cache: {error}", exit_code=2) from None
    except UserError:
        connection.close()
        raise
