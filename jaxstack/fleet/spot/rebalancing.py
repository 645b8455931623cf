"""Moves replicas to cheaper zones that have recovered, one at a time: the new one first, then the old one goes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxstack.fleet.spot.view import ReplicaView
from jaxstack.runtime.errors import UserError


@dataclass(frozen=True)
class RebalanceConfig:
    """When a move pays.

    Args:
      after_s: how long the cheaper zone must not have failed.
      min_saving: the share of the dearer zone's price that must be saved.
      patience_s: how long a replacement may take to be ready before the move is given up.
    """

    after_s: float = 1800.0
    min_saving: float = 0.1
    patience_s: float = 3600.0

    def __post_init__(self) -> None:
        if not (self.after_s >= 0 and 0 <= self.min_saving < 1 and self.patience_s > 0):
            raise UserError(
                f"rebalance: found after {self.after_s} s, saving {self.min_saving}, patience {self.patience_s} s, "
                "expected >= 0, a share below 1, > 0"
            )


class PriceRebalancer:
    """At most one move is under way. A move never makes the fleet more lopsided: it goes to a zone with fewer replicas.

    Args:
      settled_since: zone -> when its last back-off ended, or will end.
    """

    def __init__(self, config: RebalanceConfig, settled_since: Callable[[str], float]):
        self._config, self._settled_since = config, settled_since
        self._leaving: str | None = None
        self._began_s = -math.inf

    def leaving(self, spot: Sequence[ReplicaView], wanted: int, now_s: float) -> ReplicaView | None:
        """The replica that is being replaced, as long as its replacement is there or may still come.

        Where there is not exactly one replica too many, something was lost or the target has changed: the move is off.
        """
        if self._leaving is not None:
            found = next((replica for replica in spot if replica.replica_id == self._leaving), None)
            if found is not None and len(spot) == wanted + 1 and now_s - self._began_s < self._config.patience_s:
                return found
            self._leaving = None
        return None

    def move(
        self, spot: Sequence[ReplicaView], wanted: int, prices: Mapping[str, float], now_s: float
    ) -> tuple[str, ReplicaView] | None:
        """Begins a move where one pays, and the fleet is whole: the zone to launch in, and the replica to replace."""
        if (
            self._leaving is not None
            or not 0 < wanted == len(spot)
            or not prices
            or not all(replica.ready for replica in spot)
        ):
            return None
        keep = 1 - self._config.min_saving
        if min(prices.values()) >= keep * max(prices.get(replica.zone, math.inf) for replica in spot):
            return None
        counts: dict[str, int] = {}
        for replica in spot:
            counts[replica.zone] = counts.get(replica.zone, 0) + 1
        dearest = sorted(spot, key=lambda replica: (-prices.get(replica.zone, math.inf), replica.launched_s))
        for old in dearest:
            # A zone that is no longer offered has no price: whatever is, is cheaper.
            limit = prices.get(old.zone, math.inf) * keep
            cheaper = [
                zone
                for zone, price in prices.items()
                if price < limit
                and counts.get(zone, 0) < counts[old.zone]
                and now_s - self._settled_since(zone) >= self._config.after_s
            ]
            if cheaper:
                self._leaving, self._began_s = old.replica_id, now_s
                return min(cheaper, key=lambda zone: (prices[zone], zone)), old
        return None

    def steady_until_s(self, spot: Sequence[ReplicaView], prices: Mapping[str, float], now_s: float) -> float:
        """Until when no move begins or ends while the replicas stay as they are."""
        if self._leaving is not None:
            return -math.inf
        dearest = max((prices.get(replica.zone, math.inf) for replica in spot), default=0.0)
        limit = dearest * (1 - self._config.min_saving)
        pay_s = [self._settled_since(zone) + self._config.after_s for zone, price in prices.items() if price < limit]
        return min([when_s for when_s in pay_s if when_s > now_s], default=math.inf)

    def state_dict(self) -> dict[str, Any]:
        return {"leaving": self._leaving, "began_s": None if self._leaving is None else self._began_s}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._leaving = state["leaving"]
        self._began_s = -math.inf if state["began_s"] is None else float(state["began_s"])
