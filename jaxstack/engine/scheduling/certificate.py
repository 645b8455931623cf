"""How far apart the service of clients that wait all the time has got, and how far it may: measured as it happens."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float64

from jaxstack.engine.scheduling.cost import ServiceCost

# Clients up to which every pair is measured; beyond, each is measured against the mean.
_PAIRS = 256


class FairnessCertificate:
    """Follows every pair of clients from the moment both are backlogged until one is not.

    A client is backlogged while it has a request waiting at every instant at which the scheduler decides: one whose
    requests all run is not, and comparing it with others would find violations that are none. For a pair with the
    difference `D` of their services per weight, the gap is the largest `|D(t2) - D(t1)|` over `t1 < t2` since both are
    backlogged (theorem 4.1 of arXiv 2501.14312 bounds it), kept exactly by the running minimum of `D` both ways. With
    more than 256 backlogged clients a sufficient form takes its place: how far each has strayed from the mean of all,
    and the sum of the two largest of these ranges.

    Args:
      cost: the currency of the services it is fed.
      bound: on the gap; None where the policy has none. May be changed.
      weights: shares of clients; of others 1.

    Attributes:
      gap: the largest of the pairs that are backlogged now.
      max_gap: the largest ever; `pair` had it, the first of them ahead, backlogged together since `since_s`.
      exact: whether `gap` is the pairs' own, not the sufficient form.
      backlogged: clients that are followed now.
    """

    def __init__(self, cost: ServiceCost, bound: int | None = None, weights: Mapping[str, int] = MappingProxyType({})):
        self.cost, self.bound, self.weights = cost, bound, weights
        self.gap = self.max_gap = 0.0
        self.pair: tuple[str, str] | None = None
        self.since_s: float | None = None
        self.exact = True
        self._clients: list[str] = []
        self._weights = self._served = self._since = np.zeros(0)
        # Per client: how far from the mean it is, and has been. Per pair (i, j): the least that i was ahead of j.
        self._astray = self._lowest = self._highest = np.zeros(0)
        self._low: Float64[np.ndarray, "n n"] = np.zeros((0, 0))

    @property
    def backlogged(self) -> int:
        return len(self._clients)

    @property
    def gap_over_bound(self) -> float | None:
        """`max_gap / bound`; None without a bound."""
        return self.max_gap / self.bound if self.bound else None

    def observe(self, service: Mapping[str, int], backlogged: Collection[str], now_s: float) -> None:
        """One step.

        Args:
          service: what each client has been given since the last call (negative where it was taken back).
          backlogged: the clients with a request waiting after this step's admissions: they waited before them, too,
            or have come since.
          now_s: the time.
        """
        self.gap = 0.0
        if len(backlogged) < 2 and not self._clients:
            return
        if len(backlogged) != len(self._clients) or any(client not in backlogged for client in self._clients):
            self._keep([i for i, client in enumerate(self._clients) if client in backlogged])
        if self._clients:
            self._advance(service)
        known = set(self._clients)
        fresh = sorted(client for client in backlogged if client not in known)
        if fresh:
            self._join(fresh, now_s)

    def _keep(self, places: list[int]) -> None:
        self._clients = [self._clients[i] for i in places]
        for name in ("_weights", "_served", "_since", "_astray", "_lowest", "_highest"):
            setattr(self, name, getattr(self, name)[places])
        if self.exact:
            self._low = self._low[np.ix_(places, places)]

    def _advance(self, service: Mapping[str, int]) -> None:
        given = np.array([service.get(client, 0) for client in self._clients], np.float64) / self._weights
        self._served += given
        self._astray += given - given.mean()
        np.minimum(self._lowest, self._astray, out=self._lowest)
        np.maximum(self._highest, self._astray, out=self._highest)
        if len(self._clients) < 2:
            return
        if self.exact:
            ahead = self._served[:, None] - self._served[None, :]
            np.minimum(self._low, ahead, out=self._low)
            gaps = ahead - self._low
            i, j = (int(place) for place in np.unravel_index(int(gaps.argmax()), gaps.shape))
            self.gap = float(gaps[i, j])
        else:
            ranges = self._highest - self._lowest
            i, j = (int(place) for place in np.argsort(-ranges, kind="stable")[:2])
            self.gap = float(ranges[i] + ranges[j])
        if self.gap > self.max_gap:
            self.max_gap, self.pair = self.gap, (self._clients[i], self._clients[j])
            self.since_s = float(max(self._since[i], self._since[j]))

    def _join(self, fresh: list[str], now_s: float) -> None:
        old, new = len(self._clients), len(fresh)
        self._clients += fresh
        zeros = np.zeros(new)
        weights = np.array([self.weights.get(client, 1) for client in fresh], np.float64)
        self._weights = np.concatenate([self._weights, weights])
        self._since = np.concatenate([self._since, np.full(new, now_s)])
        for name in ("_served", "_astray", "_lowest", "_highest"):
            setattr(self, name, np.concatenate([getattr(self, name), zeros]))
        if old + new > _PAIRS:
            self.exact = False
            return
        low = self._served[:, None] - self._served[None, :]
        if self.exact:
            low[:old, :old] = self._low
        else:  # pairs begin anew
            self.exact, self._since = True, np.full(old + new, now_s)
        self._low = low


def tokens_after_admission(longest_output: int, sequences: int, cache_tokens: int, *, reserve: bool) -> int:
    """The most tokens that a client can be given after its last admission: R of the largest debt `w_e L_in + w_q R`.

    With pages reserved for whole answers it is what the cache holds. With pages on demand it can be more, since as some
    answers end the others use their pages: of those that have got to token p, at most `cache_tokens / p` live.

    Args:
      longest_output: tokens of the longest answer.
      sequences: answers at once.
      cache_tokens: tokens that the cache holds.
      reserve: whether pages for the whole answer are set aside at admission.
    """
    most = sequences * longest_output
    if reserve:
        return min(cache_tokens, most)
    depths = np.arange(1, longest_output + 1, dtype=np.int64)
    return int(np.minimum(sequences, cache_tokens // depths).sum())
