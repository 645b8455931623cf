"""In which zones missing replicas are tried: our placer, the paper's, and those it is compared with.

All of them see counts, prices and the clock, and hear of what became of their replicas; none reads a trace.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from jaxstack.runtime.errors import UserError


class Placer(Protocol):
    """Chooses zones.

    Attributes:
      retries_at_once: choosing again right after a failure leads elsewhere.
    """

    retries_at_once: bool

    def place(self, missing: int, counts: Mapping[str, int], prices: Mapping[str, float], now_s: float) -> list[str]:
        """A zone for each missing replica, or for some of them, in the order in which they are to be tried.

        Args:
          counts: zone -> replicas there or on their way.
          prices: zone -> price; these are the zones to choose from.
        """
        ...

    def on_ready(self, zone: str, now_s: float) -> None: ...

    def on_preempted(self, zone: str, now_s: float) -> None: ...

    def on_launch_failed(self, zone: str, now_s: float, asked_s: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Backoff:
    """How long a zone is left alone after so many failures in a row: `base_s`, doubled each time, at most `max_s`.

    Args:
      jitter: up to this share longer, the same for the same zone and failure: services that fail together should not
        come back together.
      probe_s: where every zone is left alone and a replica is missing, one zone is asked this often nevertheless.
    """

    base_s: float = 300.0
    max_s: float = 4800.0
    jitter: float = 0.0
    probe_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.base_s <= self.max_s:
            raise UserError(f"backoff: found base {self.base_s} s and maximum {self.max_s} s, expected 0 < base <= max")
        if not (0 <= self.jitter <= 1 and self.probe_s > 0):
            raise UserError(f"backoff: found jitter {self.jitter} and probe {self.probe_s} s, expected 0..1 and > 0")

    def delay_s(self, zone: str, failures: int) -> float:
        delay_s = min(self.max_s, math.ldexp(self.base_s, min(failures, 60) - 1))
        spread = zlib.crc32(f"{zone} {failures}".encode()) / 2**32 if self.jitter else 0.0
        return delay_s * (1 + self.jitter * spread)

    @property
    def longest_s(self) -> float:
        return self.max_s * (1 + self.jitter)


@dataclass
class ZoneRecord:
    """What is remembered of a zone."""

    failures: int = 0
    failed_s: float = -math.inf
    retry_at_s: float = -math.inf
    asked_s: float = -math.inf


class ZonePlacer:
    """The fewest replicas first, then the cheapest, then the one asked longest ago, among zones not left alone.

    A failed launch or a preemption leaves its zone alone for a while that doubles up to a bound; being ready after that
    ends it. Nothing else does: no zone is forgiven because others fail, and none waits for others to fail. So, with
    L the longest back-off and d a cold start:

    P1 a zone that has room for L + d gets replicas, if any are missing;
    P2 while a replica is missing, every zone is asked at least once in L (and the time between two decisions);
    P3 while another zone is not left alone, a dead zone is asked at most 2 + log2(max/base) + T/max times in T;
    P4 counts of zones that never fail differ by at most 1;
    P5 there is always a zone to ask.
    """

    retries_at_once = True

    def __init__(self, backoff: Backoff | None = None):
        self.backoff = backoff or Backoff()
        self.zones: dict[str, ZoneRecord] = {}
        self._probed_s = -math.inf

    def place(self, missing: int, counts: Mapping[str, int], prices: Mapping[str, float], now_s: float) -> list[str]:
        if missing <= 0 or not prices:
            return []
        records = {zone: self._zone(zone) for zone in prices}
        eligible = [zone for zone, record in records.items() if record.retry_at_s <= now_s]
        if not eligible:
            if now_s - self._probed_s < self.backoff.probe_s:
                return []
            self._probed_s = now_s
            zone = min(prices, key=lambda zone: (records[zone].retry_at_s, prices[zone], zone))
            records[zone].asked_s = now_s
            return [zone] * missing
        held = {zone: counts.get(zone, 0) for zone in eligible}
        chosen = []
        for _ in range(missing):
            zone = min(eligible, key=lambda zone: (held[zone], prices[zone], records[zone].asked_s, zone))
            held[zone] += 1
            records[zone].asked_s = now_s
            chosen.append(zone)
        return chosen

    def left_alone(self, zone: str, now_s: float) -> bool:
        """Whether a zone is in back-off."""
        return self._zone(zone).retry_at_s > now_s

    def settled_since_s(self, zone: str) -> float:
        """When the zone's last back-off ended or will end; minus infinity where it never failed."""
        return self._zone(zone).retry_at_s

    def on_ready(self, zone: str, now_s: float) -> None:
        record = self._zone(zone)
        if now_s >= record.retry_at_s:
            record.failures = 0

    def on_preempted(self, zone: str, now_s: float) -> None:
        self._failed(zone, now_s)

    def on_launch_failed(self, zone: str, now_s: float, asked_s: float) -> None:
        record = self._zone(zone)
        # Asked before the last failure was known: the same shortage, seen twice.
        if asked_s > record.failed_s or now_s >= record.retry_at_s:
            self._failed(zone, now_s)

    def _failed(self, zone: str, now_s: float) -> None:
        record = self._zone(zone)
        if now_s > record.failed_s:  # several replicas lost at one moment are one failure
            record.failures += 1
            record.failed_s = now_s
            record.retry_at_s = now_s + self.backoff.delay_s(zone, record.failures)

    def _zone(self, zone: str) -> ZoneRecord:
        record = self.zones.get(zone)
        if record is None:
            record = self.zones[zone] = ZoneRecord()
        return record

    def state_dict(self) -> dict[str, Any]:
        zones = {zone: _finite(asdict(record)) for zone, record in self.zones.items()}
        return {"zones": zones, **_finite({"probed_s": self._probed_s})}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.zones = {zone: ZoneRecord(**_infinite(record)) for zone, record in state["zones"].items()}
        self._probed_s = _infinite({"probed_s": state["probed_s"]})["probed_s"]


class PaperPlacer:
    """The paper's: zones are active or preempting; an active one without a replica first, the cheapest of those.

    Fewer than two active zones make all of them active again. That starves a zone that lives beside two dead ones, and
    a cheap zone that blinked once beside two dear ones (see `ZonePlacer`). It is here to be compared with.

    Args:
      forgive_below: all zones become active when fewer than so many are.
    """

    retries_at_once = False

    def __init__(self, forgive_below: int = 2):
        self._forgive_below = forgive_below
        self._preempting: set[str] = set()
        self._zones: set[str] = set()

    def place(self, missing: int, counts: Mapping[str, int], prices: Mapping[str, float], now_s: float) -> list[str]:
        self._zones |= prices.keys()
        current = {zone for zone, count in counts.items() if count}
        chosen = []
        for _ in range(missing if prices else 0):
            active = [zone for zone in prices if zone not in self._preempting] or list(prices)
            free = [zone for zone in active if zone not in current] or active
            zone = min(free, key=lambda zone: prices[zone])  # the first named of equals
            current.add(zone)
            chosen.append(zone)
        return chosen

    def on_ready(self, zone: str, now_s: float) -> None:
        self._preempting.discard(zone)

    def on_preempted(self, zone: str, now_s: float) -> None:
        self._zones.add(zone)
        self._preempting.add(zone)
        if len(self._zones) - len(self._preempting) < self._forgive_below:
            self._preempting.clear()

    def on_launch_failed(self, zone: str, now_s: float, asked_s: float) -> None:
        self.on_preempted(zone, now_s)

    def state_dict(self) -> dict[str, Any]:
        return {"zones": sorted(self._zones), "preempting": sorted(self._preempting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._zones, self._preempting = set(state["zones"]), set(state["preempting"])


class _Unmoved:
    """A placer that does not learn."""

    retries_at_once = False

    def on_ready(self, zone: str, now_s: float) -> None:
        pass

    def on_preempted(self, zone: str, now_s: float) -> None:
        pass

    def on_launch_failed(self, zone: str, now_s: float, asked_s: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EvenSpread(_Unmoved):
    """The same number of replicas in every zone, whatever the zones have to give.

    Args:
      replicas: of all zones together; zones at even distances in the list hold what is left over.
    """

    def __init__(self, replicas: int):
        self._replicas = replicas

    def place(self, missing: int, counts: Mapping[str, int], prices: Mapping[str, float], now_s: float) -> list[str]:
        zones = sorted(prices)
        each, over = divmod(self._replicas, max(1, len(zones)))
        more = {place * len(zones) // over for place in range(over)}
        chosen: list[str] = []
        for place, zone in enumerate(zones):
            chosen += [zone] * max(0, each + (place in more) - counts.get(zone, 0))
        return chosen[: max(0, missing)]


class RoundRobin(_Unmoved):
    """The next zone each time."""

    def __init__(self) -> None:
        self._next = 0

    def place(self, missing: int, counts: Mapping[str, int], prices: Mapping[str, float], now_s: float) -> list[str]:
        zones = sorted(prices)
        chosen = [zones[(self._next + i) % len(zones)] for i in range(max(0, missing))] if zones else []
        self._next += len(chosen)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = int(state["next"])


class SingleRegion:
    """Another placer, in the zones of one region only, as a pool of spot instances is.

    Args:
      inner: the placer of the zones that are left.
      in_region: whether a zone is one of them.
    """

    def __init__(self, inner: Placer, in_region: Callable[[str], bool]):
        self._inner, self._in_region = inner, in_region
        self.retries_at_once = inner.retries_at_once
        self.on_ready, self.on_preempted = inner.on_ready, inner.on_preempted
        self.on_launch_failed = inner.on_launch_failed
        self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

    def place(self, missing: int, counts: Mapping[str, int], prices: Mapping[str, float], now_s: float) -> list[str]:
        inside = {zone: price for zone, price in prices.items() if self._in_region(zone)}
        return self._inner.place(missing, counts, inside, now_s)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: never is null."""
    return {name: None if value == -math.inf else value for name, value in record.items()}


def _infinite(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: -math.inf if value is None else value for name, value in record.items()}
