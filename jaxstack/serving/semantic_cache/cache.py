"""The cache itself: lookups, answers that come in, labels, complaints.

One lock guards all accounts; nothing slow happens under it. Embedding is done before it is taken, comparing answers
and learning on a thread of their own, writing on the store's.
"""

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.account import Account
from jaxstack.serving.semantic_cache.answers import Answered, Answers, OneAtATime
from jaxstack.serving.semantic_cache.config import CacheConfig
from jaxstack.serving.semantic_cache.embedders import Embedder
from jaxstack.serving.semantic_cache.entry import CachedResponse, Entry
from jaxstack.serving.semantic_cache.flight import Generate
from jaxstack.serving.semantic_cache.holdings import Holdings
from jaxstack.serving.semantic_cache.index import usable
from jaxstack.serving.semantic_cache.judge import Judge, NormalisedText
from jaxstack.serving.semantic_cache.lookup import Lookup
from jaxstack.serving.semantic_cache.policy import NO_ENTRY
from jaxstack.serving.semantic_cache.scope import CacheRequest, CacheScope

log = logging.getLogger(__name__)

# Complaints after which an entry answers nobody any more.
_REPORTS = 2
# Answers that can still be complained about.
_REMEMBERED = 10_000
_EMBED_THREADS = 2
_REEMBED = 32


class SemanticCache(Holdings):
    """Answers from earlier answers, with an error rate of at most delta.

        cache = SemanticCache(HashedNgramEmbedder(), CacheConfig(delta=0.02, path="answers.sqlite"))
        print(cache.ask("What is the capital of France?", model))

    Thread-safe. Close it, or use it as a context manager.

    Requests are made by `scope`; `ask` makes them itself.

    Args:
      embedder: its vectors are compared by cosine.
      judge: compares answers; by default their normalised texts. An attribute, too, that may be set later.

    Raises:
      UserError: the store cannot be had.
    """

    def __init__(self, embedder: Embedder, config: CacheConfig | None = None, judge: Judge | None = None):
        config = config or CacheConfig()
        self.scope = CacheScope(config)
        self.judge: Judge = judge or NormalisedText()
        self._numbers = itertools.count(1)
        self._given: OrderedDict[tuple[str, str], Lookup] = OrderedDict()
        self._embedding = ThreadPoolExecutor(_EMBED_THREADS, thread_name_prefix="cache-embed")
        self._labels: queue.Queue[tuple[Any, ...] | None] = queue.Queue()
        self._labeller = threading.Thread(target=self._label_loop, name="cache-labels", daemon=True)
        self._answers: Answers | None = None
        self._asking = OneAtATime()
        super().__init__(embedder, config)
        for first in range(0, len(self.strangers), _REEMBED):
            self._labels.put(("reembed", self.strangers[first : first + _REEMBED]))
        self._labeller.start()

    def __enter__(self) -> "SemanticCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------------------- looking

    def lookup(self, requests: Sequence[CacheRequest], now_s: float | None = None) -> list[Lookup]:
        """What the cache says to each request: first the exact tier, then near entries of the request's own scope.

        Args:
          now_s: wall time; the present by default.
        """
        now = time.time() if now_s is None else now_s
        found: list[Lookup | None] = [None] * len(requests)
        with self._lock:
            for i, request in enumerate(requests):
                found[i] = self._repeat(request, now)
        near = [i for i, lookup in enumerate(found) if lookup is None]
        texts = [i for i in near if 0 < len(requests[i].text) <= self.config.max_prompt_chars]
        vectors: dict[int, Float[np.ndarray, dim] | None] = dict.fromkeys(near)
        failure: str | None = None
        if texts:
            try:
                vectors.update(zip(texts, self._embed([requests[i].text for i in texts])))
            except Exception as error:
                failure = "timeout" if isinstance(error, LateError) else "embedder"
                log.warning("a lookup was passed over: %s", " ".join(str(error).split()) or failure)
        with self._lock:
            for owner in dict.fromkeys(requests[i].owner for i in near):
                mine = [i for i in near if requests[i].owner == owner]
                if failure is not None:
                    late = [i for i in mine if i in texts]
                    for i in late:
                        found[i] = self._counted(Lookup(requests[i], "bypass", failure))
                    mine = [i for i in mine if i not in late]
                for i in [i for i in mine if requests[i].mode == "refresh"]:
                    mine.remove(i)
                    found[i] = self._refreshed(requests[i], vectors[i])
                for i, lookup in zip(mine, self._decide(owner, [(requests[i], vectors[i]) for i in mine], now)):
                    found[i] = lookup
        return [lookup for lookup in found if lookup is not None]

    def repeat(self, request: CacheRequest, now_s: float | None = None) -> Lookup | None:
        """What can be said without embedding anything: a repeat of an answered request, or none of our business."""
        with self._lock:
            return self._repeat(request, time.time() if now_s is None else now_s)

    def _repeat(self, request: CacheRequest, now: float) -> Lookup | None:
        if request.bypass is not None:
            return self._counted(Lookup(request, "bypass", request.bypass))
        account = self._account(request.owner)
        if request.mode == "refresh":
            return None
        entry_id = account.exact.get((request.scope, request.exact))
        entry = None if entry_id is None else account.entries[entry_id]
        if entry is None:
            return None
        if not entry.good_at(now):
            self._remove(account, entry)
            return None
        return self._answered(account, entry, Lookup(request, "exact", "repeat", similarity=1.0), now)

    def _decide(
        self, owner: str, asked: list[tuple[CacheRequest, Float[np.ndarray, "dim"] | None]], now: float
    ) -> list[Lookup]:
        """Decides on one owner's requests, in their order."""
        account = self._account(owner)
        self._give_up(account, now)
        if not asked:
            return []
        k = account.policy.k
        ids = np.full((len(asked), k), NO_ENTRY, dtype=np.int64)
        near = np.zeros((len(asked), k), dtype=np.float64)
        fit = [vector is not None and bool(usable(vector[None])[0]) for _, vector in asked]
        for i, (request, vector) in enumerate(asked):
            index = account.indexes.get(request.scope)
            if index is not None and fit[i] and vector is not None:
                ids[i], near[i] = self._nearest(account, index, vector, k, now)
        u = account.flip(len(asked))
        lower = np.array([request.delta if request.delta is not None else np.inf for request, _ in asked])
        decided = account.policy.decide(ids, near, u, lower)
        self._changed.add(owner)
        lookups = []
        for i, (request, vector) in enumerate(asked):
            number, column, tau = next(self._numbers), int(decided.column[i]), float(decided.tau[i])
            base = Lookup(
                request,
                "miss",
                "no entry" if fit[i] else "text",
                number,
                tau=tau,
                u=float(u[i]),
                vector=vector if fit[i] else None,
                epoch=account.epoch,
            )
            if column < 0:
                lookups.append(self._counted(base))
                continue
            entry = account.entries[int(ids[i, column])]
            alpha = float(decided.alpha[i])
            base = dataclasses.replace(
                base, similarity=float(near[i, column]), alpha=None if np.isnan(alpha) else alpha, entry_id=entry.id
            )
            if decided.hit[i]:
                lookups.append(
                    self._answered(account, entry, dataclasses.replace(base, kind="hit", reason="sure"), now)
                )
            elif account.policy.learns:
                account.pending[number] = (now + self.config.label_timeout_s, tau)
                reason = account.policy.stopped or ("unsure" if tau >= 1 else "coin")
                base = dataclasses.replace(base, kind="explore", reason=reason, candidate=entry.response)
                lookups.append(self._counted(base))
            else:
                lookups.append(self._counted(dataclasses.replace(base, reason="too far")))
        return lookups

    def _refreshed(self, request: CacheRequest, vector: Float[np.ndarray, "dim"] | None) -> Lookup:
        epoch = self._account(request.owner).epoch
        fit = vector is not None and bool(usable(vector[None])[0])
        kept = vector if fit else None
        return self._counted(Lookup(request, "miss", "refresh", next(self._numbers), vector=kept, epoch=epoch))

    def _nearest(
        self, account: Account, index: Any, vector: Float[np.ndarray, "dim"], k: int, now: float
    ) -> tuple[np.ndarray, np.ndarray]:
        while True:
            ids, near = index.search(vector[None], k)
            late = [
                account.entries[e] for e in ids[0].tolist() if e != NO_ENTRY and not account.entries[e].good_at(now)
            ]
            if not late:
                return ids[0], near[0]
            for entry in late:
                self._remove(account, entry)

    def _answered(self, account: Account, entry: Entry, lookup: Lookup, now: float) -> Lookup:
        entry.hits += 1
        entry.last_used_s = now
        entry.saved_s += entry.response.generation_s
        account.saved_s += entry.response.generation_s
        account.touch(entry)
        if self._store is not None:
            self._store.touch(entry)
        response = None if self.config.shadow else entry.response
        return self._counted(
            dataclasses.replace(
                lookup,
                response=response,
                candidate=entry.response,
                entry_id=entry.id,
                age_s=max(0.0, now - entry.created_s),
                epoch=account.epoch,
            )
        )

    def _counted(self, lookup: Lookup) -> Lookup:
        self._account(lookup.request.owner).counts[lookup.kind] += 1
        return lookup

    def pass_over(self, request: CacheRequest, reason: str) -> Lookup:
        """Of a request that the cache has no part in."""
        with self._lock:
            return self._counted(Lookup(request, "bypass", reason))

    def count_coalesced(self, request: CacheRequest) -> Lookup:
        """Of a request that waits for another's answer."""
        with self._lock:
            return self._counted(Lookup(request, "coalesced", "in flight"))

    def _embed(self, texts: list[str]) -> Float[np.ndarray, "n dim"]:
        work = self._embedding.submit(self.embedder.embed, texts)
        try:
            vectors = np.asarray(work.result(self.config.lookup_timeout_ms / 1e3), dtype=np.float32)
        except LateError:
            work.cancel()
            raise
        if vectors.shape != (len(texts), self._dim):
            raise UserError(f"embedder: found {vectors.shape}, expected {(len(texts), self._dim)}")
        return vectors

    # -------------------------------------------------------------------------------------------------------- answering

    def complete(self, lookup: Lookup, response: CachedResponse, now_s: float | None = None) -> None:
        """What the model answered where the cache did not. Returns at once; labels follow in the background."""
        now = time.time() if now_s is None else now_s
        request = lookup.request
        shadowed = self.config.shadow and lookup.kind in ("exact", "hit")
        if lookup.kind in ("bypass", "coalesced") or (lookup.kind in ("exact", "hit") and not shadowed):
            return
        with self._lock:
            account = self._account(request.owner)
            if shadowed:
                self._labels.put(("shadow", lookup, response))
                return
            explored = lookup.kind == "explore"
            waited = account.pending.pop(lookup.number, None) is not None
            refusal = self._refusal(lookup, response, account)
            if explored:
                # Whether it becomes an entry that answers near requests is seen when it has been compared.
                entry = self._insert(account, lookup, response, None, now) if refusal is None else None
                if waited:
                    self._labels.put(("label", lookup, response, None if entry is None else entry.id))
            elif refusal is None:
                self._insert(account, lookup, response, lookup.vector, now)

    def abandon(self, lookup: Lookup) -> None:
        """There will be no answer to this request."""
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

    async def answer(self, request: CacheRequest, generate: Generate) -> Answered:
        """The answer to a request, from the cache or from `generate`; equal requests at once share one call of it.

        Use `contextlib.aclosing` around the result: leaving early ends the generation if nobody else listens. All calls
        must come from one event loop.
        """
        if self._answers is None:
            self._answers = Answers(self)
        return await self._answers.answer(request, generate)

    def ask(
        self, prompt: str, generate: Callable[[str], str], *, tenant: str = "", model: str = "", system: str = ""
    ) -> str:
        """The answer to a prompt, from the cache or from `generate(prompt)`. For programs without an event loop; equal
        prompts asked at once, from several threads, are put to `generate` once.
        """
        request = self.scope.prompt(prompt, tenant=tenant, model=model, system=system)
        with self._asking.of((request.partition, request.exact)):
            lookup = self.lookup([request])[0]
            if lookup.response is not None:
                return lookup.response.text
            began = time.monotonic()
            try:
                text = generate(prompt)
            except BaseException:
                self.abandon(lookup)
                raise
            self.complete(lookup, CachedResponse(text, generation_s=time.monotonic() - began))
            return text

    # ----------------------------------------------------------------------------------------------------------- labels

    def _give_up(self, account: Account, now: float) -> None:
        """Labels that have not come in time never will."""
        while account.pending:
            number, (deadline, tau) = next(iter(account.pending.items()))
            if now < deadline:
                return
            del account.pending[number]
            account.policy.missing(tau)

    def _label_loop(self) -> None:
        while (work := self._labels.get()) is not None:
            try:
                getattr(self, f"_do_{work[0]}")(*work[1:])
            except Exception:
                log.exception("a label was lost")
            finally:
                self._labels.task_done()
        self._labels.task_done()

    def _same(self, lookup: Lookup, response: CachedResponse) -> bool | None:
        if lookup.candidate is None or response.finish_reason != "stop":
            return None
        try:
            return self.judge.same(lookup.request.text, response.text, lookup.candidate.text)
        except Exception:
            log.exception("the judge failed")
            return None

    def _do_label(self, lookup: Lookup, response: CachedResponse, entry_id: int | None) -> None:
        correct = self._same(lookup, response)
        assert lookup.entry_id is not None and lookup.similarity is not None and lookup.tau is not None
        with self._lock:
            account = self._account(lookup.request.owner)
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
                self._agreed(account, candidate, response)
            new = None if entry_id is None else account.entries.get(entry_id)
            if correct is False and new is not None and lookup.vector is not None:
                new.semantic = True
                account.index(new.scope).add([new.id], lookup.vector[None])
                if self._store is not None:
                    self._store.put(new, lookup.vector, self._embedder_id)
            policy = account.policy
        if policy.due:
            policy.refresh()

    def _agreed(self, account: Account, entry: Entry, response: CachedResponse) -> None:
        """A new answer says what the entry says: it is as good as new."""
        now = time.time()
        if entry.expires_s is not None:
            entry.expires_s += max(0.0, now - entry.created_s)
        entry.created_s = max(entry.created_s, now)
        if self.config.refresh_on_agree:
            account.size_bytes += (more := len(response.text.encode()) - len(entry.response.text.encode()))
            entry.size_bytes += more
            entry.response = response
        if self._store is not None:
            vector = account.indexes[entry.scope].vector(entry.id) if entry.semantic else None
            self._store.put(entry, vector, self._embedder_id)

    def _do_shadow(self, lookup: Lookup, response: CachedResponse) -> None:
        correct = self._same(lookup, response)
        with self._lock:
            account = self._account(lookup.request.owner)
            if correct is not None and lookup.kind == "hit":
                account.shadow_checked += 1
                account.shadow_wrong += not correct

    def _do_reembed(self, entries: list[tuple[Account, int]]) -> None:
        self.reembed(entries)

    # ------------------------------------------------------------------------------------------------------- complaints

    def remember(self, response_id: str, lookup: Lookup) -> None:
        """Under which name an answer was given, for `feedback`."""
        with self._lock:
            self._given[lookup.request.owner, response_id] = lookup
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
            account = self._account(owner)
            while account.reports and account.reports[0] <= now - 60:
                account.reports.popleft()
            if len(account.reports) >= self.config.feedback_per_minute:
                return None
            account.reports.append(now)
            lookup = None if response_id is None else self._given.pop((owner, response_id), None)
            if response_id is not None and lookup is None:
                return False
            entry = account.entries.get(lookup.entry_id if lookup is not None and lookup.entry_id else entry_id or -1)
            if entry is None:
                return False
            if lookup is not None and lookup.kind == "hit" and lookup.similarity is not None and lookup.tau is not None:
                account.policy.label(entry.id, lookup.similarity, correct, 1 - max(0.0, lookup.tau), controls=False)
                account.labels += 1
                self._keep_label(entry, lookup.similarity, correct, 1 - max(0.0, lookup.tau), "feedback")
                self._changed.add(owner)
            if not correct:
                entry.reports += 1
                if entry.reports >= _REPORTS:
                    self._remove(account, entry)
                    account.refused["reported"] += 1
                elif self._store is not None:
                    self._store.touch(entry)
        self.flush()
        return True

    # ---------------------------------------------------------------------------------------------------------- the end

    def flush(self) -> bool:
        """Waits until all that was completed has been compared, learned and written. Returns whether it is on file."""
        if threading.current_thread() is not self._labeller:
            self._labels.join()
        return super().flush()

    def close(self) -> None:
        """Writes what is left. Lookups after this are a mistake."""
        if self._closed:
            return
        self._labels.put(None)
        self._labeller.join()
        super().close()
        self._embedding.shutdown(wait=False, cancel_futures=True)
        if self._answers is not None:
            self._answers.close()
