"""Which replica gets a request. Plain Python, deterministic: a policy routes HTTP and a simulator's requests alike.

`RoundRobin` and `LeastLoad` look at no prompt. `CacheAware`, `Preble` and `D2Lpm` keep a `PrefixTree` of where each
prefix went, and send a request to those who have most of it, each with its own idea of when not to: the first when
loads differ too much, the second when too little is cached, the third when the client has had its share of the replica.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from jaxstack.engine.scheduling.cost import ServiceCost
from jaxstack.runtime.errors import UserError
from jaxstack.serving.prefix_keys import PrefixKeys, keys_of_tokens
from jaxstack.serving.router.deficits import ReplicaDeficits
from jaxstack.serving.router.prefix_tree import PrefixTree


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedRequest:
    """What a policy knows of a request. Two objects are two requests.

    Attributes:
      client: who pays.
      keys: of its prompt's prefixes (`serving/prefix_keys.py`).
      ends: prompt tokens up to the end of each.
      prompt_tokens: of the whole prompt; an estimate where nobody has tokenized it.
      max_tokens: of the answer.
    """

    client: str
    keys: tuple[int, ...]
    ends: tuple[int, ...]
    prompt_tokens: int
    max_tokens: int

    @classmethod
    def of_tokens(
        cls, client: str, token_ids: Sequence[int], max_tokens: int, page_size: int = 16, salt: bytes = b""
    ) -> "RoutedRequest":
        """A request whose prompt has been tokenized; a key is a page."""
        keys, ends, length = keys_of_tokens(token_ids, page_size, salt)
        return cls(client, keys, ends, length, max_tokens)

    @classmethod
    def of_keys(cls, client: str, prefix: PrefixKeys, max_tokens: int, units_per_token: float) -> "RoutedRequest":
        """A request whose prompt's tokens are estimated from its length."""
        ends = tuple(int(end / units_per_token) for end in prefix.ends)
        return cls(client, prefix.keys, ends, math.ceil(prefix.length / units_per_token), max_tokens)

    def tokens(self, depth: int) -> int:
        """Tokens that the first `depth` keys stand for."""
        return self.ends[depth - 1] if depth else 0


class ReplicaView(Protocol):
    """What a policy knows of a replica that may be chosen."""

    @property
    def name(self) -> str: ...
    @property
    def active(self) -> int:
        """Requests sent to it that are not over."""
        ...


_View = TypeVar("_View", bound=ReplicaView)


class RoutingPolicy:
    """Chooses, and is told what came of it. For every request sent: `on_dispatch`, then `on_finish` or `on_failed`.

    This class keeps no account; it is what the others begin with.
    """

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        """One of `replicas`, of which there is at least one."""
        raise NotImplementedError

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        """`request` is sent to `replica`, whose `active` does not count it yet."""

    def on_finish(
        self,
        request: RoutedRequest,
        replica: ReplicaView,
        cached_tokens: int | None,
        output_tokens: int,
        prompt_tokens: int | None = None,
    ) -> None:
        """It has been answered, or its client has left.

        Args:
          cached_tokens: of its prompt, those that the replica had; None if it did not say.
          prompt_tokens: as the replica counted them; None if it did not say.
        """

    def on_failed(self, request: RoutedRequest, replica: ReplicaView) -> None:
        """The replica was lost, or refused it: whatever was charged is given back."""

    def on_evicted(self, replica: ReplicaView, keys: Sequence[int]) -> None:
        """The replica holds these prefixes no more."""

    def on_restart(self, replica: ReplicaView) -> None:
        """The replica holds nothing any more."""

    def cached(self, request: RoutedRequest, replica: ReplicaView) -> int:
        """Tokens of the prompt that the replica is believed to hold."""
        return 0

    def report(self) -> dict[str, Any]:
        """Its state in a few figures, for JSON."""
        return {}


class RoundRobin(RoutingPolicy):
    """In turn.

    Args:
      per_client: every client has a turn of its own.
    """

    def __init__(self, per_client: bool = False):
        self._per_client = per_client
        self._turns: collections.OrderedDict[str, int] = collections.OrderedDict()

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        return replicas[self._turns.get(self._whose(request), 0) % len(replicas)]

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        whose = self._whose(request)
        self._turns[whose] = self._turns.pop(whose, 0) + 1
        if len(self._turns) > 10_000:
            self._turns.popitem(last=False)

    def _whose(self, request: RoutedRequest) -> str:
        return request.client if self._per_client else ""


class LeastLoad(RoutingPolicy):
    """The fewest active requests; among equals whoever was chosen longest ago."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._count = 0

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        return min(replicas, key=lambda replica: (replica.active, self._last.get(replica.name, -1)))

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        self._count += 1
        self._last[replica.name] = self._count


class _PrefixAware(RoutingPolicy):
    """Keeps the tree. Prefixes on their way count as held: whoever follows finds them computed."""

    def __init__(self, *, expiry_s: float = 600.0, clock: Callable[[], float] = time.monotonic):
        self.tree = PrefixTree(expiry_s=_positive("expiry_s", expiry_s))
        self._clock = clock
        # Of every request under way, how much of it was expected to be there.
        self._depth: dict[RoutedRequest, int] = {}
        # By replica, in how many requests under way each key stands.
        self._coming: dict[str, dict[int, int]] = {}

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        self._depth[request] = self._depth_at(request, replica)
        self.tree.insert(request.keys, replica.name, self._clock())
        coming = self._coming.setdefault(replica.name, {})
        for key in request.keys:
            coming[key] = coming.get(key, 0) + 1

    def on_finish(
        self,
        request: RoutedRequest,
        replica: ReplicaView,
        cached_tokens: int | None,
        output_tokens: int,
        prompt_tokens: int | None = None,
    ) -> None:
        # Once more: the replica may have restarted meanwhile.
        self._over(request, replica)
        self.tree.insert(request.keys, replica.name, self._clock())

    def on_failed(self, request: RoutedRequest, replica: ReplicaView) -> None:
        depth = self._over(request, replica)
        self.on_evicted(replica, request.keys[depth:])

    def on_evicted(self, replica: ReplicaView, keys: Sequence[int]) -> None:
        # What is on its way there is computed there, once more if need be.
        coming = self._coming.get(replica.name, {})
        self.tree.evict((key for key in keys if key not in coming), replica.name)

    def _over(self, request: RoutedRequest, replica: ReplicaView) -> int:
        """A request is under way no more; returns how many of its keys were expected to be there."""
        coming = self._coming[replica.name]
        for key in request.keys:
            if coming[key] == 1:
                del coming[key]
            else:
                coming[key] -= 1
        return self._depth.pop(request)

    def on_restart(self, replica: ReplicaView) -> None:
        self.tree.forget(replica.name)

    def cached(self, request: RoutedRequest, replica: ReplicaView) -> int:
        return request.tokens(self._depth_at(request, replica))

    def _depth_at(self, request: RoutedRequest, replica: ReplicaView) -> int:
        return self.tree.match(request.keys, [replica.name], self._clock())[replica.name]

    def report(self) -> dict[str, Any]:
        return {"prefix_marks": len(self.tree)}

    def _holders(self, request: RoutedRequest, replicas: Sequence[_View]) -> tuple[float, list[_View]]:
        """The greatest share of the prompt that a replica holds, and all who hold so much; none for nothing."""
        depths = self.tree.match(request.keys, [replica.name for replica in replicas], self._clock())
        longest = max(depths.values())
        if longest == 0:
            return 0.0, []
        share = request.tokens(longest) / max(1, request.prompt_tokens)
        return share, [replica for replica in replicas if depths[replica.name] == longest]


class CacheAware(_PrefixAware):
    """SGLang's rule. While loads are balanced: whoever holds most of the prompt, if that is more than `cache_threshold`
    of it, else whoever holds least of anything. Otherwise the least loaded.

    Args:
      balance_abs, balance_rel: loads are unbalanced where the greatest exceeds the least by more than the one and by
        more than the other times.
    """

    def __init__(self, cache_threshold: float = 0.3, balance_abs: int = 64, balance_rel: float = 1.5, **of_tree: Any):
        super().__init__(**of_tree)
        self._threshold = _share("cache_threshold", cache_threshold)
        self._balance_abs, self._balance_rel = balance_abs, balance_rel

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        loads = [replica.active for replica in replicas]
        if max(loads) - min(loads) > self._balance_abs and max(loads) > self._balance_rel * min(loads):
            return min(replicas, key=lambda replica: replica.active)
        share, holders = self._holders(request, replicas)
        if holders and share > self._threshold:
            return min(holders, key=lambda replica: replica.active)
        return min(replicas, key=lambda replica: (self.tree.size(replica.name), replica.active))


class Preble(_PrefixAware):
    """Exploit or explore (Preble, arXiv 2407.00023): whoever holds the longest match, if it is more than `threshold` of
    the prompt; else the one that was given least work in the last `window_s`. Its copying of hot prefixes to further
    replicas is left out.
    """

    def __init__(self, threshold: float = 0.5, window_s: float = 180.0, **of_tree: Any):
        super().__init__(**of_tree)
        self._threshold, self._window_s = _share("threshold", threshold), _positive("window_s", window_s)
        self._work: collections.Counter[str] = collections.Counter()
        self._given: collections.deque[tuple[float, str, int]] = collections.deque()

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        share, holders = self._holders(request, replicas)
        self._let_go()
        exploit = holders and share > self._threshold
        return min(holders if exploit else replicas, key=lambda replica: (self._work[replica.name], replica.active))

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        super().on_dispatch(request, replica)
        self._give(replica.name, max(0, request.prompt_tokens - request.tokens(self._depth[request])))

    def on_finish(
        self,
        request: RoutedRequest,
        replica: ReplicaView,
        cached_tokens: int | None,
        output_tokens: int,
        prompt_tokens: int | None = None,
    ) -> None:
        super().on_finish(request, replica, cached_tokens, output_tokens, prompt_tokens)
        self._give(replica.name, 2 * output_tokens)

    def _give(self, name: str, tokens: int) -> None:
        self._given.append((self._clock(), name, tokens))
        self._work[name] += tokens

    def _let_go(self) -> None:
        since = self._clock() - self._window_s
        while self._given and self._given[0][0] < since:
            _, name, tokens = self._given.popleft()
            self._work[name] -= tokens


class D2Lpm(_PrefixAware):
    """Locality within each client's means (arXiv 2501.14312, Algorithm 2): of the replicas where the client has a
    deficit above zero those with the longest match, or all of them if none of these has; of these the one with the
    fewest active requests, then the one of which the client may still ask most.

    Args:
      quantum: what a client may ask of each replica in a round, in service: an extend token is 1, an output token 2.
      charge: at dispatch, the "extend" tokens expected at that replica (corrected at the end by what it says it had
        cached), so that router and replicas count in one currency; or all "input" tokens, as in the paper.
      deficits: for a router that shares them with others; one of its own by default.
    """

    def __init__(
        self,
        quantum: int = 8000,
        charge: Literal["extend", "input"] = "extend",
        *,
        extend: int = 1,
        output: int = 2,
        deficits: ReplicaDeficits | None = None,
        **of_tree: Any,
    ):
        super().__init__(**of_tree)
        self._cost = ServiceCost(extend, output, charge)
        self.deficits = deficits or ReplicaDeficits(quantum)
        # Of every request that is under way: its row, and what it was charged.
        self._charged: dict[RoutedRequest, tuple[str, int]] = {}

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        row = self.deficits.admit(request.client)
        able = set(self.deficits.with_credit(row, [replica.name for replica in replicas]))
        _, holders = self._holders(request, replicas)
        among = [r for r in holders if r.name in able] or [r for r in replicas if r.name in able]
        return min(among, key=lambda replica: (replica.active, -self.deficits.deficit(row, replica.name)))

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        super().on_dispatch(request, replica)
        service = self._of_prompt(request.prompt_tokens, request.tokens(self._depth[request]))
        row = self.deficits.admit(request.client)
        self._charged[request] = row, service
        self.deficits.begin(row)
        self.deficits.charge(row, replica.name, service)

    def on_finish(
        self,
        request: RoutedRequest,
        replica: ReplicaView,
        cached_tokens: int | None,
        output_tokens: int,
        prompt_tokens: int | None = None,
    ) -> None:
        super().on_finish(request, replica, cached_tokens, output_tokens, prompt_tokens)
        row, charged = self._charged.pop(request)
        actual = charged
        if cached_tokens is not None or self._cost.charge == "input":
            prompt = request.prompt_tokens if prompt_tokens is None else prompt_tokens
            actual = self._of_prompt(prompt, cached_tokens or 0)
        self.deficits.charge(row, replica.name, actual - charged + self._cost.of_output(output_tokens))
        self.deficits.end(row)

    def on_failed(self, request: RoutedRequest, replica: ReplicaView) -> None:
        super().on_failed(request, replica)
        row, charged = self._charged.pop(request)
        self.deficits.charge(row, replica.name, -charged)
        self.deficits.end(row)

    def _of_prompt(self, tokens: int, cached: int) -> int:
        return self._cost.of_prompt(tokens, min(cached, tokens))

    def report(self) -> dict[str, Any]:
        shown = self.deficits.clients()[:50]
        return {
            **super().report(),
            "quantum": self.deficits.quantum,
            "clients": len(self.deficits),
            "clients_without_a_row": self.deficits.crowded,
            "deficits": {client: self.deficits.row(client) for client in shown},
        }


_POLICIES: dict[str, Callable[..., RoutingPolicy]] = {
    "round_robin": RoundRobin,
    "client_round_robin": lambda: RoundRobin(per_client=True),
    "least_load": LeastLoad,
    "cache_aware": CacheAware,
    "preble": Preble,
    "d2lpm": D2Lpm,
}
ROUTING_POLICIES = tuple(_POLICIES)


def routing_policy_named(name: str, **options: Any) -> RoutingPolicy:
    """The policy of that name, one of `ROUTING_POLICIES`, with its class's arguments.

    Raises:
      UserError: there is no such policy, or it has no such option.
    """
    if name not in _POLICIES:
        raise UserError(f"policy: found {name!r}, expected one of {', '.join(_POLICIES)}")
    try:
        return _POLICIES[name](**options)
    except TypeError as error:
        raise UserError(f"policy: {name} does not take these options ({error})") from None


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise UserError(f"{name}: found {value!r}, expected a positive number")
    return value


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"{name}: found {value!r}, expected a number from 0 to 1")
    return value
