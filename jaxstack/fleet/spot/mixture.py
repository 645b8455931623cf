"""How many of the wanted replicas are spot and how many on-demand.

A mixture takes the target and who is ready where, and says how many replicas of each kind should be launched.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from jaxstack.fleet.spot.view import Census
from jaxstack.runtime.errors import UserError


class Wanted(NamedTuple):
    """Replicas that should be launched, ready or not."""

    spot: int
    on_demand: int


class Mixture(Protocol):
    """Splits a target into spot and on-demand replicas."""

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted: ...

    def steady_until_s(self, now_s: float) -> float:
        """Until when the answer stands for the same target and census."""
        ...

    def on_preempted(self, zone: str, now_s: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Stateless:
    def steady_until_s(self, now_s: float) -> float:
        return math.inf

    def on_preempted(self, zone: str, now_s: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class DynamicFallback(_Stateless):
    """More spot replicas than needed, and on-demand ones for those that are not ready (section 3.2 of the paper).

        spot      = N_tar + N_extra - base
        on-demand = min(N_tar, base + max(0, spot - ready spot))

    Args:
      overprovision: N_extra.
      base_on_demand: replicas that are on-demand always.
      cover_extra: also stand in for a missing extra replica, as the paper does: the fleet then gets its on-demand
        replica going while the target is still met. False waits until fewer than the target are ready.
    """

    overprovision: int = 1
    base_on_demand: int = 0
    cover_extra: bool = True

    def __post_init__(self) -> None:
        for name in ("overprovision", "base_on_demand"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: found {getattr(self, name)}, expected an integer >= 0")

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted:
        if target == 0:
            return Wanted(0, 0)
        spot = max(0, target + self.overprovision - self.base_on_demand)
        covered = spot if self.cover_extra else max(0, target - self.base_on_demand)
        short = max(0, covered - census.count("spot", ready=True))
        return Wanted(spot, min(target, self.base_on_demand + short))


@dataclass(frozen=True)
class SpotOnly(_Stateless):
    """Spot replicas alone."""

    overprovision: int = 0

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted:
        return Wanted(target + self.overprovision if target else 0, 0)


@dataclass(frozen=True)
class OnDemandOnly(_Stateless):
    """No spot replicas."""

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted:
        return Wanted(0, target)


@dataclass(frozen=True)
class StaticMixture(_Stateless):
    """A fixed share of on-demand replicas, rounded up, as an autoscaling group has it."""

    on_demand_share: float = 0.1
    overprovision: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.on_demand_share <= 1:
            raise UserError(f"on_demand_share: found {self.on_demand_share}, expected a number from 0 to 1")

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted:
        whole = target + self.overprovision if target else 0
        on_demand = math.ceil(whole * self.on_demand_share - 1e-9)
        return Wanted(whole - on_demand, on_demand)


class RiskWindow:
    """Another mixture, and for a while after a preemption so many on-demand replicas that the zone may be lost whole.

    Args:
      inner: the mixture when there is no risk.
      window_s: how long after a preemption its zone is at risk.
    """

    def __init__(self, inner: Mixture, window_s: float):
        if not window_s > 0:
            raise UserError(f"risk_window_s: found {window_s}, expected a number > 0")
        self._inner, self._window_s = inner, window_s
        self._preempted_s: dict[str, float] = {}

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted:
        plain = self._inner.wanted(target, census, now_s)
        on_demand, ready = plain.on_demand, census.ready["spot"]
        spot = sum(ready.values())
        for zone, when_s in self._preempted_s.items():
            if now_s - when_s < self._window_s:
                on_demand = max(on_demand, target - (spot - ready.get(zone, 0)))
        return Wanted(plain.spot, min(target, on_demand))

    def steady_until_s(self, now_s: float) -> float:
        ends = [when_s + self._window_s for when_s in self._preempted_s.values()]
        return min([end_s for end_s in ends if end_s > now_s], default=self._inner.steady_until_s(now_s))

    def on_preempted(self, zone: str, now_s: float) -> None:
        self._preempted_s[zone] = now_s
        self._inner.on_preempted(zone, now_s)

    def state_dict(self) -> dict[str, Any]:
        return {"preempted_s": dict(self._preempted_s), "inner": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found: Mapping[str, float] = state["preempted_s"]
        self._preempted_s = {zone: float(when_s) for zone, when_s in found.items()}
        self._inner.load_state_dict(state["inner"])
