"""The cache itself: lookups, and the ways to an answer.

One lock guards all accounts; nothing slow happens under it. Embedding and searching are done before it is taken,
comparing answers and learning on a thread of their own (`learning.py`), writing on the store's.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError

import numpy as np
from jaxtyping import Float, Int

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.account import Account
from jaxstack.serving.semantic_cache.answers import Answered, Answers, OneAtATime
from jaxstack.serving.semantic_cache.config import CacheConfig
from jaxstack.serving.semantic_cache.embedders import Embedder
from jaxstack.serving.semantic_cache.entry import CachedResponse, Entry
from jaxstack.serving.semantic_cache.flight import Generate
from jaxstack.serving.semantic_cache.index import usable
from jaxstack.serving.semantic_cache.judge import Judge, NormalisedText
from jaxstack.serving.semantic_cache.learning import Learning
from jaxstack.serving.semantic_cache.lookup import Lookup
from jaxstack.serving.semantic_cache.policy import NO_ENTRY
from jaxstack.serving.semantic_cache.scope import CacheRequest, CacheScope

log = logging.getLogger(__name__)

_EMBED_THREADS = 2

# What a search found: ids and similarities of the nearest entries.
_Found = tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]


class SemanticCache(Learning):
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
        super().__init__(embedder, config, judge or NormalisedText())
        self.scope = CacheScope(config)
        self._numbers = itertools.count(1)
        self._embedding = ThreadPoolExecutor(_EMBED_THREADS, thread_name_prefix="cache-embed")
        self._late: list[Future[Float[np.ndarray, "n dim"]]] = []
        self._answers: Answers | None = None
        self._asking = OneAtATime()

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
        fit = {i: requests[i].text for i in near if 0 < len(requests[i].text) <= self.config.max_prompt_chars}
        vectors, failures = self._embed_all(fit)
        seen: dict[int, _Found | None] = {}
        for i, vector in vectors.items():
            try:
                seen[i] = self._search(requests[i], vector)
            except Exception:
                log.exception("a lookup was passed over")
                failures[i] = "index"
        with self._lock:
            for i, failure in failures.items():
                found[i] = self._counted(Lookup(requests[i], "bypass", failure))
            left = [i for i in near if i not in failures]
            for i in [i for i in left if requests[i].mode == "refresh"]:
                left.remove(i)
                found[i] = self._refreshed(requests[i], vectors.get(i))
            for owner in dict.fromkeys(requests[i].owner for i in near):
                mine = [i for i in left if requests[i].owner == owner]
                asked = [(requests[i], vectors.get(i), seen.get(i)) for i in mine]
                for i, lookup in zip(mine, self._decide(owner, asked, now)):
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
        self,
        owner: str,
        asked: list[tuple[CacheRequest, Float[np.ndarray, "dim"] | None, _Found | None]],
        now: float,
    ) -> list[Lookup]:
        """Decides on one owner's requests, each with its vector and what a search has found, in their order."""
        account = self._account(owner)
        self._give_up(account, now)
        if not asked:
            return []
        k = account.policy.k
        ids = np.full((len(asked), k), NO_ENTRY, dtype=np.int64)
        near = np.zeros((len(asked), k), dtype=np.float64)
        fit = [vector is not None and bool(usable(vector[None])[0]) for _, vector, _ in asked]
        for i, (request, vector, seen) in enumerate(asked):
            if seen is not None and vector is not None:
                ids[i], near[i] = self._living(account, request, vector, seen, now)
        u = account.flip(len(asked))
        lower = np.array([request.delta if request.delta is not None else np.inf for request, *_ in asked])
        decided = account.policy.decide(ids, near, u, lower)
        self._changed.add(owner)
        lookups = []
        for i, (request, vector, _) in enumerate(asked):
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

    def _search(self, request: CacheRequest, vector: Float[np.ndarray, "dim"]) -> _Found | None:
        """The nearest entries in the request's scope; None if there are none. Not under the lock: among many entries,
        of which there is no graph yet, it takes milliseconds.
        """
        with self._lock:
            account = self._accounts.get(request.owner)
            index = None if account is None else account.indexes.get(request.scope)
        if account is None or index is None or not usable(vector[None])[0]:
            return None
        ids, near = index.search(vector[None], account.policy.k)
        return ids[0], near[0]

    def _living(
        self, account: Account, request: CacheRequest, vector: Float[np.ndarray, "dim"], seen: _Found, now: float
    ) -> _Found:
        """What was found, unless some of it has gone since or is out of date: then what is left is searched anew."""
        while True:
            entries = [account.entries.get(e) for e in seen[0].tolist() if e != NO_ENTRY]
            if all(entry is not None and entry.good_at(now) for entry in entries):
                return seen
            for entry in entries:
                if entry is not None and not entry.good_at(now):
                    self._remove(account, entry)
            index, k = account.indexes.get(request.scope), len(seen[0])
            if index is None:
                return np.full(k, NO_ENTRY), np.zeros(k)
            ids, near = index.search(vector[None], k)
            seen = ids[0], near[0]

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

    def _embed_all(self, texts: Mapping[int, str]) -> tuple[dict[int, Float[np.ndarray, "dim"]], dict[int, str]]:
        """Vectors by number, and why there are none of some."""
        vectors: dict[int, Float[np.ndarray, dim]] = {}
        failures: dict[int, str] = {}
        until = time.monotonic() + self.config.lookup_timeout_ms / 1e3
        # All together, or else each alone: a text that the embedder refuses is one client's, and the others are not.
        parts = [list(texts)] if texts else []
        while parts:
            part = parts.pop()
            try:
                vectors.update(zip(part, self._embed([texts[i] for i in part], until - time.monotonic())))
            except Exception as error:
                late = isinstance(error, LateError)
                if len(part) > 1 and not late:
                    parts, until = [[i] for i in part], time.monotonic() + self.config.lookup_timeout_ms / 1e3
                    continue
                failures.update(dict.fromkeys(part, "timeout" if late else "embedder"))
                log.warning("a lookup was passed over: %s", " ".join(str(error).split()) or failures[part[0]])
        return vectors, failures

    def _embed(self, texts: list[str], timeout_s: float) -> Float[np.ndarray, "n dim"]:
        # Behind one that has not come back for long nobody needs to wait.
        self._late = [work for work in self._late if not work.done()]
        if len(self._late) >= _EMBED_THREADS:
            raise LateError("the embedder has not answered yet")
        work = self._embedding.submit(self.embedder.embed, texts)
        try:
            vectors = np.asarray(work.result(max(0.0, timeout_s)), dtype=np.float32)
        except LateError:
            if not work.cancel():
                self._late.append(work)
            raise
        if vectors.shape != (len(texts), self._dim):
            raise UserError(f"embedder: found {vectors.shape}, expected {(len(texts), self._dim)}")
        return vectors

    # -------------------------------------------------------------------------------------------------------- answering

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

    def close(self) -> None:
        """Writes what is left. Lookups after this are a mistake."""
        super().close()
        self._embedding.shutdown(wait=False, cancel_futures=True)
        if self._answers is not None:
            self._answers.close()
