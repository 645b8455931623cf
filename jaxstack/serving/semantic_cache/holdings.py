"""What a cache holds, in memory and on file: accounts with their entries, put in, removed, evicted, and read back."""

import dataclasses
import json
import logging
import math
import sqlite3
import threading
import time

import numpy as np
from jaxtyping import Float

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.account import Account, CacheStats, together
from jaxstack.serving.semantic_cache.config import CacheConfig
from jaxstack.serving.semantic_cache.embedders import Embedder
from jaxstack.serving.semantic_cache.entry import CachedResponse, Entry
from jaxstack.serving.semantic_cache.index import usable
from jaxstack.serving.semantic_cache.lookup import Lookup
from jaxstack.serving.semantic_cache.policy import NO_ENTRY
from jaxstack.serving.semantic_cache.store import CacheStore, StoredLabel

log = logging.getLogger(__name__)

# How often what policies have learned is written.
_STATE_S = 1.0
# Entries removed before others have their turn.
_REMOVED_AT_ONCE = 256


class Holdings:
    """The accounts of a cache, under one lock, and their file.

    Attributes:
      strangers: entries of another embedder that were found on file, with their accounts; see `reembed`.

    Raises:
      UserError: the file cannot be had.
    """

    def __init__(self, embedder: Embedder, config: CacheConfig):
        self.config, self.embedder = config, embedder
        self._embedder_id, self._dim = embedder.id, embedder.dim
        self._lock = threading.RLock()
        self._accounts: dict[str, Account] = {}
        self._entries = self._size_bytes = 0  # of all accounts
        self._changed: set[str] = set()
        self._written_s = 0.0
        self._next_id = 1
        self._closed = False
        self._store: CacheStore | None = None
        self.strangers: list[tuple[Account, int]] = []
        if config.path is not None:
            self._store = CacheStore(config.path, self._states)
            try:
                self._load(self._store)
            except BaseException as error:
                self._store.close()
                known = isinstance(error, sqlite3.Error | ValueError | TypeError | KeyError)
                if not known or isinstance(error, UserError):
                    raise
                raise UserError(f"path: {config.path} cannot be read as a cache: {error}", exit_code=2) from error
            self._store.begin()

    def flush(self) -> bool:
        """Waits until all that was put is on file. Returns whether it is."""
        return self._on_file()

    def _on_file(self) -> bool:
        return self._store is not None and self._store.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._closed = True
        if self._store is not None:
            self._store.close()

    def invalidate(
        self,
        tenant: str,
        *,
        entry_id: int | None = None,
        model: str | None = None,
        prompt_prefix: str | None = None,
        older_than_s: float | None = None,
        everything: bool = False,
        now_s: float | None = None,
    ) -> int:
        """Removes the tenant's entries that fit all that is given; on file when this returns. How many there were.

        Answers that are being generated meanwhile are not kept.

        Raises:
          UserError: nothing is given.
        """
        now = time.time() if now_s is None else now_s
        given = (entry_id, model, prompt_prefix, older_than_s)
        if not everything and all(value is None for value in given):
            raise UserError(
                "invalidate: found nothing to go by, expected one of entry_id, model, prompt_prefix, "
                "older_than_s, everything"
            )
        with self._lock:
            account = self._accounts.get(self.config.owner(tenant))
            if account is None:
                return 0
            account.epoch += 1
            fit = [
                entry
                for entry in account.entries.values()
                if (entry_id is None or entry.id == entry_id)
                and (model is None or entry.model == model)
                and (prompt_prefix is None or entry.prompt.startswith(prompt_prefix))
                and (older_than_s is None or now - entry.created_s > older_than_s)
            ]
        gone = self._remove_all(account, fit)
        self._on_file()
        return gone

    def invalidate_model(self, model: str) -> int:
        """Removes every tenant's entries of a model: another goes by that name now."""
        with self._lock:
            fit = []
            for account in self._accounts.values():
                account.epoch += 1
                fit.append((account, [entry for entry in account.entries.values() if entry.model == model]))
        gone = sum(self._remove_all(account, entries) for account, entries in fit)
        self._on_file()
        return gone

    def _remove_all(self, account: Account, entries: list[Entry]) -> int:
        """Removes those that are still there, a few at a time: lookups need not wait for the end of it."""
        gone = 0
        for first in range(0, len(entries), _REMOVED_AT_ONCE):
            with self._lock:
                for entry in entries[first : first + _REMOVED_AT_ONCE]:
                    if account.entries.get(entry.id) is entry:
                        self._remove(account, entry)
                        gone += 1
            time.sleep(0)  # whoever waits for the lock shall have it
        return gone

    def epoch(self, owner: str) -> int:
        """How often entries of this owner have been invalidated."""
        with self._lock:
            account = self._accounts.get(owner)
            return 0 if account is None else account.epoch

    def entry(self, tenant: str, entry_id: int) -> Entry | None:
        """A copy of one of the tenant's own entries."""
        with self._lock:
            account = self._accounts.get(self.config.owner(tenant))
            found = None if account is None else account.entries.get(entry_id)
            return None if found is None else dataclasses.replace(found)

    def stats(self, tenant: str | None = None) -> CacheStats:
        """Of one tenant; of all with None."""
        store = self.store_failed
        with self._lock:
            if tenant is not None:
                owner = self.config.owner(tenant)
                # One that has asked nothing yet is not remembered for having looked.
                account = self._accounts.get(owner) or Account(owner, self.config, self._dim)
                return account.stats(store)
            delta = self.config.delta if self.config.promises else math.nan
            return together([a.stats(store) for a in self._accounts.values()], delta, store)

    @property
    def store_failed(self) -> str | None:
        """Why nothing is written any more; None while it is, or if there is no file."""
        return None if self._store is None else self._store.failed

    def _insert(
        self,
        account: Account,
        lookup: Lookup,
        response: CachedResponse,
        vector: Float[np.ndarray, "dim"] | None,
        now: float,
    ) -> Entry | None:
        """Puts an answer in; without a vector it answers only its own request again."""
        request = lookup.request
        old = account.exact.get((request.scope, request.exact))
        if old is not None:
            self._remove(account, account.entries[old])
        limits = [ttl for ttl in (self.config.ttl_s, request.ttl_s) if ttl is not None]
        size = self._size_of(response.text, request.text, vector)
        if size > self.config.max_bytes:
            account.refused["too large"] += 1
            return None
        entry = Entry(
            self._next_id,
            account.owner,
            request.scope,
            request.exact,
            request.model,
            request.text,
            response,
            vector is not None,
            now,
            now + min(limits) if limits else None,
            now,
            size_bytes=size,
        )
        self._next_id += 1
        self._add(account, entry)
        if vector is not None:
            account.index(request.scope).add([entry.id], vector[None])
        if self._store is not None:
            self._store.put(entry, vector, self._embedder_id)
        self._make_room(account, keep=entry.id)
        return entry

    def _size_of(self, answer: str, prompt: str, vector: Float[np.ndarray, "dim"] | None) -> int:
        return len(answer.encode()) + len(prompt.encode()) + (0 if vector is None else 4 * self._dim)

    def _make_room(self, account: Account, keep: int) -> None:
        while len(account.entries) > account.quota:
            self._evict(account, keep)
        # Who has most gives way, so nobody can push another out.
        while self._entries > self.config.max_entries:
            self._evict(max(self._accounts.values(), key=lambda a: len(a.entries)), keep)
        while self._size_bytes > self.config.max_bytes:
            self._evict(max(self._accounts.values(), key=lambda a: a.size_bytes), keep)

    def _evict(self, account: Account, keep: int) -> None:
        victim = account.evictor.victim()
        if victim == keep and len(account.entries) > 1:
            account.evictor.remove(keep)
            victim = account.evictor.victim()
            account.touch(account.entries[keep])
        assert victim is not None
        self._remove(account, account.entries[victim])
        account.refused["evicted"] += 1

    def _add(self, account: Account, entry: Entry) -> None:
        account.add(entry)
        self._entries += 1
        self._size_bytes += entry.size_bytes

    def _resize(self, account: Account, entry: Entry, size_bytes: int) -> None:
        """Room must be made by the caller."""
        account.size_bytes += size_bytes - entry.size_bytes
        self._size_bytes += size_bytes - entry.size_bytes
        entry.size_bytes = size_bytes
        account.touch(entry)

    def _remove(self, account: Account, entry: Entry) -> None:
        self._entries -= 1
        self._size_bytes -= entry.size_bytes
        account.remove(entry)
        if self._store is not None:
            self._store.delete(entry.id)

    def _keep_label(self, entry: Entry, similarity: float, correct: bool, tau: float, source: str) -> None:
        if self._store is not None:
            label = StoredLabel(entry.id, similarity, correct)
            self._store.label(label, tau, source, self._embedder_id, time.time())

    def _account(self, owner: str) -> Account:
        found = self._accounts.get(owner)
        if found is None:
            found = self._accounts[owner] = Account(owner, self.config, self._dim)
        return found

    def _states(self) -> list[tuple[str, str, str, str]]:
        """What the store's next commit takes along: the state of accounts that have learned something."""
        now = time.monotonic()
        if now - self._written_s < _STATE_S and not self._closed:
            return []
        with self._lock:
            self._written_s = now
            changed, self._changed = self._changed, set()
            states = [(owner, self._accounts[owner].state()) for owner in sorted(changed)]
        # Spelling out is slow, and lookups do not wait for it.
        return [(owner, self._embedder_id, self.config.policy, json.dumps(state)) for owner, state in states]

    def _load(self, store: CacheStore) -> None:
        now = time.time()
        rows: dict[tuple[str, bytes], list[tuple[int, Float[np.ndarray, dim]]]] = {}
        for entry, vector in store.entries(self._embedder_id):
            account = self._account(entry.owner)
            if not entry.good_at(now):
                store.delete(entry.id)
                continue
            self._add(account, entry)
            if entry.semantic and vector is not None and vector.shape == (self._dim,):
                rows.setdefault((entry.owner, entry.scope), []).append((entry.id, vector))
            elif entry.semantic:
                self.strangers.append((account, entry.id))
        used = [(entry.last_used_s, id_, a) for a in self._accounts.values() for id_, entry in a.entries.items()]
        for _, entry_id, account in sorted(used, key=lambda use: use[:2]):
            account.touch(account.entries[entry_id])  # those used last are to stay longest
        for (owner, scope), found in rows.items():
            ids, vectors = zip(*found)
            self._accounts[owner].index(scope).add(ids, np.stack(vectors))
        of = {entry: account for account in self._accounts.values() for entry in account.entries}
        for label in store.labels(self._embedder_id):
            account = of.get(label.entry)  # type: ignore[assignment]
            if account is not None:
                account.policy.label(label.entry, label.similarity, label.correct, 1.0, controls=False)
                account.labels += 1
        states = store.owner_states(self._embedder_id, self.config.policy)
        for owner, account in self._accounts.items():
            if owner not in states and account.policy.due:
                account.policy.refresh()
        for owner, state in states.items():
            self._account(owner).restore(state)
        self._next_id = store.next_id()
        for account in list(self._accounts.values()):
            self._make_room(account, keep=NO_ENTRY)

    def reembed(self, entries: list[tuple[Account, int]]) -> None:
        """Embeds entries of another embedder, which until now only answered their own requests again."""
        with self._lock:
            there = [(account, account.entries[e]) for account, e in entries if e in account.entries]
        if not there:
            return
        vectors = np.asarray(self.embedder.embed([entry.prompt for _, entry in there]), dtype=np.float32)
        with self._lock:
            for (account, entry), vector, fit in zip(there, vectors, usable(vectors)):
                if fit and entry.id in account.entries:
                    self._make_semantic(account, entry, vector)

    def _make_semantic(self, account: Account, entry: Entry, vector: Float[np.ndarray, "dim"]) -> None:
        """From now on it answers near requests, too."""
        entry.semantic = True
        account.index(entry.scope).add([entry.id], vector[None])
        self._resize(account, entry, self._size_of(entry.response.text, entry.prompt, vector))
        if self._store is not None:
            self._store.put(entry, vector, self._embedder_id)
        self._make_room(account, keep=entry.id)
