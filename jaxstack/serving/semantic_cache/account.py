"""What a cache keeps for one owner: its entries, its policy, its coin. Two owners share nothing."""

import collections
import dataclasses
import hashlib
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxstack.serving.semantic_cache.config import CacheConfig
from jaxstack.serving.semantic_cache.entry import Entry
from jaxstack.serving.semantic_cache.eviction import Evictor
from jaxstack.serving.semantic_cache.index import NeighbourIndex
from jaxstack.serving.semantic_cache.policies import BayesThreshold, make_policy
from jaxstack.serving.semantic_cache.policy import Policy

KINDS = ("exact", "hit", "coalesced", "explore", "miss", "bypass")


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """How a cache does, for one tenant or for all.

    Attributes:
      requests: by kind; see `Lookup`.
      refused: answers that were not kept, by reason.
      error: estimated share of wrong answers among the requests that the policy decided; `half_width` is of its 95 %
        interval. NaN where the policy estimates none.
      bound: what that share cannot exceed, whatever the labels say; NaN where nothing is promised.
      pending: explored requests whose label is still to come.
      delta, delta_eff: what the policy promises, and what it may spend at present; NaN for a policy without a delta.
      stopped: why nothing is answered from near requests; None while all is well.
      shadow_checked, shadow_wrong: in shadow mode, would-be answers compared and found wrong.
      store: why the store no longer writes; None while it does or there is none.
    """

    requests: dict[str, int]
    refused: dict[str, int]
    entries: int
    size_bytes: int
    labels: int
    pending: int
    saved_s: float
    error: float
    half_width: float
    bound: float
    delta: float
    delta_eff: float
    stopped: str | None
    shadow_checked: int
    shadow_wrong: int
    store: str | None

    @property
    def hit_rate(self) -> float:
        """Answers of the semantic tier among what came to it."""
        hits, asked = self.requests["hit"], sum(self.requests[kind] for kind in ("hit", "explore", "miss"))
        return hits / asked if asked else 0.0

    def as_json(self) -> dict[str, Any]:
        fields = {**dataclasses.asdict(self), "hit_rate": self.hit_rate}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


class Account:
    """One owner's part of a cache. Under the cache's lock."""

    def __init__(self, owner: str, config: CacheConfig, dim: int):
        self.owner, self._config, self._dim = owner, config, dim
        self.delta, self.quota = config.delta_of(owner), config.quota_of(owner)
        self.policy = new_policy(config, self.delta)
        self.entries: dict[int, Entry] = {}
        self.exact: dict[tuple[bytes, bytes], int] = {}
        self.indexes: dict[bytes, NeighbourIndex] = {}
        self.evictor = Evictor(config.eviction)
        self.size_bytes = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.labels = 0
        self.saved_s = 0.0
        self.shadow_checked = self.shadow_wrong = 0
        self.epoch = 0  # invalidations
        self.pending: dict[int, tuple[float, float]] = {}  # lookup -> when it is given up, tau
        self.reports: collections.deque[float] = collections.deque()
        self.draws = 0
        self._coin = self._new_coin()

    def _new_coin(self) -> np.random.Generator:
        seed = hashlib.blake2b(f"{self._config.seed}|{self.owner}".encode("utf-8", "replace"), digest_size=16).digest()
        coin = np.random.PCG64(int.from_bytes(seed))
        coin.advance(self.draws)
        return np.random.Generator(coin)

    def flip(self, count: int) -> Float[np.ndarray, "count"]:
        """The next numbers of the coin: the same after a restart as without one."""
        self.draws += count
        return self._coin.random(count)

    def index(self, scope: bytes) -> NeighbourIndex:
        found = self.indexes.get(scope)
        if found is None:
            found = self.indexes[scope] = NeighbourIndex(self._dim)
        return found

    def add(self, entry: Entry) -> None:
        self.entries[entry.id] = entry
        self.exact[entry.scope, entry.exact] = entry.id
        self.size_bytes += entry.size_bytes
        self.touch(entry)

    def touch(self, entry: Entry) -> None:
        # An entry that has not been used yet is hoped to be, once.
        self.evictor.touch(entry.id, max(entry.saved_s, entry.response.generation_s, 1e-3), entry.size_bytes)

    def remove(self, entry: Entry) -> None:
        self.entries.pop(entry.id, None)
        if self.exact.get((entry.scope, entry.exact)) == entry.id:
            del self.exact[entry.scope, entry.exact]
        index = self.indexes.get(entry.scope)
        if index is not None:
            index.remove(entry.id)
            if not len(index):
                del self.indexes[entry.scope]
        self.size_bytes -= entry.size_bytes
        self.evictor.remove(entry.id)
        self.policy.forget(entry.id)

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"draws": self.draws, "policy": self.policy.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.draws = int(state.get("draws", 0))
        self._coin = self._new_coin()
        self.policy.restore(state.get("policy", {}))

    def stats(self, store: str | None) -> CacheStats:
        error = half_width = bound = math.nan
        delta = delta_eff = self.delta if self._config.promises else math.nan
        if isinstance(self.policy, BayesThreshold):
            budget = self.policy.budget
            (error, half_width, _), bound, delta_eff = budget.estimate(), budget.bound, budget.delta_eff
        return CacheStats(
            requests={kind: self.counts[kind] for kind in KINDS},
            refused=dict(self.refused),
            entries=len(self.entries),
            size_bytes=self.size_bytes,
            labels=self.labels,
            pending=len(self.pending),
            saved_s=self.saved_s,
            error=error,
            half_width=half_width,
            bound=bound,
            delta=delta,
            delta_eff=delta_eff,
            stopped=self.policy.stopped,
            shadow_checked=self.shadow_checked,
            shadow_wrong=self.shadow_wrong,
            store=store,
        )


def new_policy(config: CacheConfig, delta: float) -> Policy:
    extra = {"max_pending": config.max_pending, "strict_labels": config.strict_labels}
    policy = make_policy(
        config.policy,
        delta=delta,
        tau_min=config.tau_min,
        k=config.k,
        threshold=config.threshold,
        **(extra if config.policy == "bayes" else {}),
    )
    policy.refreshes_itself = False
    return policy


def together(parts: list[CacheStats], delta: float, store: str | None) -> CacheStats:
    """Of all owners: counts added up; of error, bound and what may be spent, the worst."""

    def worst(name: str) -> float:
        values = [v for p in parts if not math.isnan(v := getattr(p, name))]
        return max(values, default=math.nan)

    stopped = sorted({p.stopped for p in parts if p.stopped is not None})
    return CacheStats(
        requests={kind: sum(p.requests[kind] for p in parts) for kind in KINDS},
        refused=dict(sum((collections.Counter(p.refused) for p in parts), collections.Counter())),
        entries=sum(p.entries for p in parts),
        size_bytes=sum(p.size_bytes for p in parts),
        labels=sum(p.labels for p in parts),
        pending=sum(p.pending for p in parts),
        saved_s=sum(p.saved_s for p in parts),
        error=worst("error"),
        half_width=worst("half_width"),
        bound=worst("bound"),
        delta=delta,
        delta_eff=min((p.delta_eff for p in parts), default=delta),
        stopped=", ".join(stopped) or None,
        shadow_checked=sum(p.shadow_checked for p in parts),
        shadow_wrong=sum(p.shadow_wrong for p in parts),
        store=store,
    )
