"""What comes in after a lookup, and what it teaches: the model's answers, compared with what the cache would have said,
and complaints.

Comparing may take long (a model may be the judge), so it has a thread of its own. While there is nothing to compare,
that thread embeds anew what was on file of another embedder.
"""

import logging
import queue
import threading
import time
from collections import OrderedDict
from typing import NamedTuple

from jaxstack.serving.semantic_cache.account import Account
from jaxstack.serving.semantic_cache.config import CacheConfig
from jaxstack.serving.semantic_cache.embedders import Embedder
from jaxstack.serving.semantic_cache.entry import CachedResponse, Entry
from jaxstack.serving.semantic_cache.holdings import Holdings
from jaxstack.serving.semantic_cache.judge import Judge
from jaxstack.serving.semantic_cache.lookup import Lookup
from jaxstack.serving.semantic_cache.policy import NO_ENTRY

log = logging.getLogger(__name__)

# Complaints after which an entry answers nobody any more.
_REPORTS = 2
# Answers that can still be complained about.
_REMEMBERED = 10_000
_REEMBED = 32
# Answers that wait to be compared, at most: with a slow judge, further ones go without a label.
_WAITING = 1000
# How long the end waits for answers to be compared; what is left has no label, as after a crash.
_LAST_LABELS_S = 10.0


class _Given(NamedTuple):
    """An answer from the cache: by which entry, and if it was near, how near and explored with which probability."""

    entry_id: int
    similarity: float | None
    tau: float


class _Work(NamedTuple):
    """An answer to be compared with what the cache would have said, and the entry that was made of it, if any."""

    lookup: Lookup
    response: CachedResponse
    entry_id: int | None
    now_s: float


class Learning(Holdings):
    """Holdings that learn.

    Args:
      judge: compares answers. An attribute, too, that may be set later.
    """

    def __init__(self, embedder: Embedder, config: CacheConfig, judge: Judge):
        super().__init__(embedder, config)
        self.judge = judge
        self._given: OrderedDict[tuple[str, str], _Given] = OrderedDict()
        self._labels: queue.Queue[_Work | None] = queue.Queue()
        self._over_s: float | None = None
        self._labeller = threading.Thread(target=self._label_loop, name="cache-labels", daemon=True)
        self._labeller.start()

    # ------------------------------------------------------------------------------------------------- answers come in

    def complete(self, lookup: Lookup, response: CachedResponse, now_s: float | None = None) -> None:
        """What the model answered where the cache did not. Returns at once; labels follow in the background."""
        now = time.time() if now_s is None else now_s
        if lookup.kind in ("exact", "hit") and self.config.shadow and not self._overfull:
            self._labels.put(_Work(lookup, response, None, now))
        if lookup.kind not in ("explore", "miss"):
            return
        with self._lock:
            account = self._account(lookup.request.owner)
            explored = lookup.kind == "explore"
            # Whether an explored one becomes an entry that answers near requests is seen when it has been compared.
            vector = None if explored else lookup.vector
            refusal = self._refusal(lookup, response, account)
            entry = None if refusal is not None else self._insert(account, lookup, response, vector, now)
            if not explored or lookup.number not in account.pending:
                return
            if self._overfull:
                self.abandon(lookup)
            else:
                self._labels.put(_Work(lookup, response, None if entry is None else entry.id, now))

    def abandon(self, lookup: Lookup) -> None:
        """There will be no label of this request, mostly because there is no answer."""
        with self._lock:
            account = self._account(lookup.request.owner)
            waited = account.pending.pop(lookup.number, None)
            if waited is not None:
                account.policy.missing(waited[1])

    def _refusal(self, lookup: Lookup, response: CachedResponse, account: Account) -> str | None:
        """Why an answer is not kept; None if it is."""
        reason = None
        if lookup.request.mode == "read":
            return "read"
        if response.finish_reason != "stop":
            reason = "unfinished"
        elif lookup.epoch != account.epoch:
            reason = "invalidated"
        else:
            try:
                size = len(response.text.encode())
                lookup.request.text.encode()
                if size > self.config.max_response_bytes:
                    reason = "too large"
            except (UnicodeError, AttributeError):
                reason = "not text"
        if reason is not None:
            account.refused[reason] += 1
        return reason

    # ----------------------------------------------------------------------------------------------------------- labels

    @property
    def _overfull(self) -> bool:
        return self._labels.qsize() >= _WAITING

    def _give_up(self, account: Account, now: float) -> None:
        """Labels that have not come in time never will."""
        while account.pending:
            number, (deadline, tau) = next(iter(account.pending.items()))
            if now < deadline:
                return
            del account.pending[number]
            account.policy.missing(tau)

    def _label_loop(self) -> None:
        while True:
            try:
                work = self._labels.get(block=not self.strangers)
            except queue.Empty:
                self._reembed_some()
                continue
            try:
                if work is None:
                    return
                if self._over_s is None or time.monotonic() < self._over_s:
                    self._compare(work)
            except Exception:
                log.exception("a label was lost")
            finally:
                self._labels.task_done()

    def _compare(self, work: _Work) -> None:
        lookup = work.lookup
        with self._lock:
            account = self._account(lookup.request.owner)
            if lookup.kind == "explore" and lookup.number not in account.pending:
                return  # was given up
        correct = self._same(lookup, work.response)
        if lookup.kind == "explore":
            self._learn(account, work, correct)
        elif correct is not None and lookup.kind == "hit":
            with self._lock:
                account.shadow_checked += 1
                account.shadow_wrong += not correct

    def _same(self, lookup: Lookup, response: CachedResponse) -> bool | None:
        if lookup.candidate is None or response.finish_reason != "stop":
            return None
        try:
            return self.judge.same(lookup.request.text, response.text, lookup.candidate.text)
        except Exception:
            log.exception("the judge failed")
            return None

    def _learn(self, account: Account, work: _Work, correct: bool | None) -> None:
        lookup = work.lookup
        assert lookup.entry_id is not None and lookup.similarity is not None and lookup.tau is not None
        with self._lock:
            if account.pending.pop(lookup.number, None) is None:
                return
            candidate = account.entries.get(lookup.entry_id)
            if candidate is not None and candidate.response is not lookup.candidate:
                candidate = None  # holds another answer by now
            target = NO_ENTRY if candidate is None else candidate.id
            account.policy.label(target, lookup.similarity, correct, lookup.tau)
            self._changed.add(account.owner)
            if correct is not None:
                account.labels += 1
            if correct is not None and candidate is not None:
                self._keep_label(candidate, lookup.similarity, correct, lookup.tau, "explored")
            if correct and candidate is not None:
                self._agreed(account, candidate, work)
            new = None if work.entry_id is None else account.entries.get(work.entry_id)
            if correct is False and new is not None and lookup.vector is not None:
                self._make_semantic(account, new, lookup.vector)
            policy = account.policy
        if policy.due:
            policy.refresh()

    def _agreed(self, account: Account, entry: Entry, work: _Work) -> None:
        """A new answer says what the entry says: it is as good as new."""
        if entry.expires_s is not None:
            entry.expires_s += max(0.0, work.now_s - entry.created_s)
        entry.created_s = max(entry.created_s, work.now_s)
        vector = account.indexes[entry.scope].vector(entry.id) if entry.semantic else None
        if self.config.refresh_on_agree and work.entry_id is not None:  # was fit to be kept
            entry.response = work.response
            self._resize(account, entry, self._size_of(entry.response.text, entry.prompt, vector))
        if self._store is not None:
            self._store.put(entry, vector, self._embedder_id)
        self._make_room(account, keep=entry.id)

    def _reembed_some(self) -> None:
        """Once there is nothing better to do; what is left at the end is found again at the next start."""
        try:
            self.reembed(self.strangers[:_REEMBED])
            del self.strangers[:_REEMBED]
        except Exception as error:
            log.warning(
                "%d entries of another embedder answer their own requests only, until the next start: %s",
                len(self.strangers),
                " ".join(str(error).split()) or type(error).__name__,
            )
            self.strangers.clear()

    # ------------------------------------------------------------------------------------------------------- complaints

    def remember(self, response_id: str, lookup: Lookup) -> None:
        """Under which name an answer was given, for `feedback`. Answers that are not from the cache are nobody's."""
        if lookup.response is None or lookup.entry_id is None:
            return
        near = lookup.kind == "hit" and lookup.similarity is not None and lookup.tau is not None
        given = _Given(lookup.entry_id, lookup.similarity if near else None, lookup.tau or 0.0)
        with self._lock:
            self._given[lookup.request.owner, response_id] = given
            while len(self._given) > _REMEMBERED:
                self._given.popitem(last=False)

    def feedback(
        self,
        tenant: str,
        correct: bool,
        *,
        response_id: str | None = None,
        entry_id: int | None = None,
        now_s: float | None = None,
    ) -> bool | None:
        """What a user says of an answer from the cache. Each answer counts once; two complaints retire the entry.

        Returns:
          Whether it was taken; False if there is no such answer of this tenant's, None if it reports too often.
        """
        now = time.time() if now_s is None else now_s
        owner = self.config.owner(tenant)
        with self._lock:
            account = self._accounts.get(owner)
            if account is None:
                return False
            while account.reports and account.reports[0] <= now - 60:
                account.reports.popleft()
            if len(account.reports) >= self.config.feedback_per_minute:
                return None
            account.reports.append(now)
            given = None if response_id is None else self._given.pop((owner, response_id), None)
            if response_id is not None and given is None:
                return False
            entry = account.entries.get(given.entry_id if given is not None else entry_id or NO_ENTRY)
            if entry is None:
                return False
            if given is not None and given.similarity is not None:
                tau = 1 - max(0.0, given.tau)
                account.policy.label(entry.id, given.similarity, correct, tau, controls=False)
                account.labels += 1
                self._keep_label(entry, given.similarity, correct, tau, "feedback")
                self._changed.add(owner)
            if not correct:
                entry.reports += 1
                if entry.reports >= _REPORTS:
                    self._remove(account, entry)
                    account.refused["reported"] += 1
                elif self._store is not None:
                    self._store.touch(entry)
        self._on_file()
        return True

    # ---------------------------------------------------------------------------------------------------------- the end

    def flush(self) -> bool:
        """Waits until all that was completed has been compared, learned and written. Returns whether it is on file."""
        self._labels.join()
        return super().flush()

    def close(self) -> None:
        """Compares what is left, for a while, and writes it."""
        if self._closed:
            return
        self._over_s = time.monotonic() + _LAST_LABELS_S
        self._labels.put(None)
        self._labeller.join(2 * _LAST_LABELS_S)
        super().close()
