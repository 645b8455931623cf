"""A stream through a policy, request by request, as the cache would serve it; and through all static thresholds.

Every request's nearest entries are earlier requests of the stream, so all similarities are computed once for all
replays, and each request's nearest predecessors are sorted beforehand: the nearest entry is the first of them that has
become one.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxstack.serving.semantic_cache.policy import NO_ENTRY, Policy
from jaxstack.serving.semantic_cache.policy import cosines as rounded
from jaxstack.serving.semantic_cache.streams import Stream

_NEAREST = 256
_BLOCK = 512


class Neighbours:
    """The nearest predecessors of every request."""

    def __init__(self, vectors: Float[np.ndarray, "n dim"]):
        self.vectors = np.asarray(vectors, np.float32)
        n = len(vectors)
        width = min(_NEAREST, n)
        self.order = np.zeros((n, width), np.int32)
        self.similarity = np.full((n, width), -2.0, np.float32)
        for start in range(0, n, _BLOCK):
            stop = min(n, start + _BLOCK)
            s = self.vectors[start:stop] @ self.vectors[:stop].T
            s[np.arange(start, stop)[:, None] <= np.arange(stop)] = -2.0  # only what came before
            keep = min(width, stop)
            nearest = np.argpartition(-s, keep - 1, axis=1)[:, :keep]
            found = np.take_along_axis(s, nearest, axis=1)
            sort = np.argsort(-found, axis=1, kind="stable")
            self.order[start:stop, :keep] = np.take_along_axis(nearest, sort, axis=1)
            self.similarity[start:stop, :keep] = np.take_along_axis(found, sort, axis=1)

    def entries(
        self, request: int, is_entry: Bool[np.ndarray, "n"], count: int
    ) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k"]]:
        """The `count` nearest entries, or all there are, and their cosines."""
        order = self.order[request]
        there = np.flatnonzero(is_entry[order] & (self.similarity[request] > -1.5))[:count]
        if len(there) == count or len(order) >= request:
            return order[there], self.similarity[request, there]
        among = np.flatnonzero(is_entry[:request])
        s = self.vectors[among] @ self.vectors[request]
        best = np.argsort(-s, kind="stable")[:count]
        return among[best], s[best]


@dataclass(frozen=True)
class Replay:
    """What became of each request.

    Attributes:
      hit: answered from the cache.
      wrong: of these, wrongly.
      labels: that the policy was given: entry, similarity, whether its answer would have been right.
    """

    hit: Bool[np.ndarray, "requests"]
    wrong: Bool[np.ndarray, "requests"]
    labels: list[tuple[int, float, bool]]

    @property
    def hits(self) -> float:
        """Hits a request."""
        return float(self.hit.mean())

    @property
    def error(self) -> float:
        """Wrong hits a request."""
        return float(self.wrong.mean())


def replay(stream: Stream, near: Neighbours, policy: Policy, seed: int) -> Replay:
    """The whole stream; requests are entries' ids. The coins are the same for every policy with the same seed."""
    n, k = len(stream), policy.k
    coins = np.random.default_rng([seed, 1]).random(n)
    answers = stream.answers
    is_entry, hit, wrong = (np.zeros(n, bool) for _ in range(3))
    ids, s = np.full((1, k), NO_ENTRY), np.zeros((1, k))
    labels: list[tuple[int, float, bool]] = []
    for i in range(n):
        found, cosines = near.entries(i, is_entry, k)
        ids[0, : len(found)], ids[0, len(found) :] = found, NO_ENTRY
        s[0, : len(found)], s[0, len(found) :] = cosines, 0.0
        made = policy.decide(ids, s, coins[i : i + 1])
        column = int(made.column[0])
        if made.hit[0]:
            hit[i] = True
            wrong[i] = answers[ids[0, column]] != answers[i]
            continue
        insert = True
        if column >= 0 and policy.learns:
            entry, similarity = int(ids[0, column]), float(s[0, column])
            right = bool(answers[entry] == answers[i])
            policy.label(entry, similarity, right, float(made.tau[0]))
            labels.append((entry, similarity, right))
            insert = not right
        is_entry[i] = insert
    return Replay(hit, wrong, labels)


def replay_static(
    stream: Stream, near: Neighbours, thresholds: Float[np.ndarray, "thresholds"]
) -> tuple[Float[np.ndarray, "thresholds"], Float[np.ndarray, "thresholds"]]:
    """Hits and wrong hits a request of each static threshold: whatever misses becomes an entry."""
    n, columns = len(stream), np.arange(len(thresholds))
    is_entry = np.zeros((n, len(thresholds)), bool)
    hits, wrong = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    least = thresholds.min() - 5e-4  # similarities are compared with three decimals
    for i in range(n):
        order, near_by = near.order[i], near.similarity[i]
        reach = int(np.searchsorted(-near_by, -least, side="right"))  # entries further off answer nobody
        there = is_entry[order[:reach]]
        if reach == len(order) and i > reach and not there.any(axis=0).all():
            # The nearest entry may come after the end of the list.
            order = np.argsort(-(near.vectors[:i] @ near.vectors[i]), kind="stable")
            near_by = near.vectors[order] @ near.vectors[i]
            there = is_entry[order]
        if not len(there):
            is_entry[i] = True
            continue
        first = there.argmax(axis=0)
        hit = there[first, columns] & (rounded(near_by[first].astype(np.float64)) >= thresholds)
        hits += hit
        wrong += hit & (stream.answers[order[first]] != stream.answers[i])
        is_entry[i] = ~hit
    return hits / n, wrong / n
