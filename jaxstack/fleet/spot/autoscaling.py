"""How many replicas should be ready: fixed, by the request rate with hysteresis, or by the highest rate of late."""

import collections
import math
from typing import Any, Protocol

from jaxstack.runtime.errors import UserError


class Autoscaler(Protocol):
    """Says how many replicas should be ready."""

    def target(self, now_s: float, request_rate_rps: float) -> int: ...

    def steady_until_s(self, request_rate_rps: float) -> float:
        """Until when the last target stands at this rate, whether `target` is called meanwhile or not."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedTarget:
    """Always the same number."""

    def __init__(self, replicas: int):
        if replicas < 0:
            raise UserError(f"replicas: found {replicas}, expected an integer >= 0")
        self._replicas = replicas

    def target(self, now_s: float, request_rate_rps: float) -> int:
        return self._replicas

    def steady_until_s(self, request_rate_rps: float) -> float:
        return math.inf

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _ByRate:
    """The bounds and the rate of a replica that autoscalers by request rate share."""

    def __init__(self, min_replicas: int, max_replicas: int, target_qps_per_replica: float):
        if not 0 <= min_replicas <= max_replicas:
            raise UserError(f"replicas: found min {min_replicas} and max {max_replicas}, expected 0 <= min <= max")
        if not (target_qps_per_replica > 0 and math.isfinite(target_qps_per_replica)):
            raise UserError(f"target_qps_per_replica: found {target_qps_per_replica}, expected a number > 0")
        self._min, self._max, self._qps = min_replicas, max_replicas, target_qps_per_replica

    def candidate(self, request_rate_rps: float) -> int:
        """What the rate alone asks for."""
        # A rate that is a whole number of replicas must not become one more by the last bit.
        wanted = math.ceil(request_rate_rps / self._qps - 1e-9)
        return min(self._max, max(self._min, wanted))


class RequestRateAutoscaler(_ByRate):
    """What the rate of the last minute asks for, once it has asked for more, or for less, long enough (section 5).

    Args:
      min_replicas, max_replicas: bounds of the target.
      target_qps_per_replica: requests a second that a replica is to take.
      upscale_delay_s, downscale_delay_s: how long the rate must ask for more or for less. From a target of 0 the way up
        is immediate.
      scale_to_zero_delay_s: how long there must be nothing to do before the last replica goes; by default
        `downscale_delay_s`.
    """

    def __init__(
        self,
        min_replicas: int,
        max_replicas: int,
        target_qps_per_replica: float,
        *,
        upscale_delay_s: float = 300.0,
        downscale_delay_s: float = 1200.0,
        scale_to_zero_delay_s: float | None = None,
    ):
        super().__init__(min_replicas, max_replicas, target_qps_per_replica)
        self._up_s, self._down_s = upscale_delay_s, downscale_delay_s
        self._zero_s = downscale_delay_s if scale_to_zero_delay_s is None else scale_to_zero_delay_s
        self._target = min_replicas
        self._above_since_s: float | None = None
        self._below_since_s: float | None = None
        self._idle_since_s: float | None = None

    def target(self, now_s: float, request_rate_rps: float) -> int:
        wanted = self.candidate(request_rate_rps)
        self._above_since_s = _since(self._above_since_s, wanted > self._target, now_s)
        self._below_since_s = _since(self._below_since_s, wanted < self._target, now_s)
        self._idle_since_s = _since(self._idle_since_s, wanted == 0, now_s)
        if self._above_since_s is not None and (self._target == 0 or now_s - self._above_since_s >= self._up_s):
            self._settle(wanted)
        elif self._idle_since_s is not None and now_s - self._idle_since_s >= self._zero_s:
            self._settle(0)
        elif self._below_since_s is not None and now_s - self._below_since_s >= self._down_s:
            # The last replica goes by its own delay.
            self._settle(max(wanted, min(1, self._target)))
        return self._target

    def steady_until_s(self, request_rate_rps: float) -> float:
        return math.inf if self.candidate(request_rate_rps) == self._target else -math.inf

    def _settle(self, target: int) -> None:
        self._target, self._above_since_s, self._below_since_s = target, None, None

    def state_dict(self) -> dict[str, Any]:
        since = [self._above_since_s, self._below_since_s, self._idle_since_s]
        return {"target": self._target, "since_s": since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._target = min(self._max, max(self._min, int(state["target"])))
        self._above_since_s, self._below_since_s, self._idle_since_s = state["since_s"]


class PeakHold(_ByRate):
    """What the highest rate of the last hour asks for: proactive, as MArk is."""

    def __init__(
        self, min_replicas: int, max_replicas: int, target_qps_per_replica: float, *, window_s: float = 3600.0
    ):
        super().__init__(min_replicas, max_replicas, target_qps_per_replica)
        self._window_s = window_s
        self._rates: collections.deque[tuple[float, float]] = (
            collections.deque()
        )  # falling rates: the first is the peak

    def target(self, now_s: float, request_rate_rps: float) -> int:
        while self._rates and self._rates[-1][1] <= request_rate_rps:
            self._rates.pop()
        self._rates.append((now_s, request_rate_rps))
        while self._rates[0][0] < now_s - self._window_s:
            self._rates.popleft()
        return self.candidate(self._rates[0][1])

    def steady_until_s(self, request_rate_rps: float) -> float:
        return -math.inf  # it has to hear how long a rate lasts

    def state_dict(self) -> dict[str, Any]:
        return {"rates": [list(pair) for pair in self._rates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rates = collections.deque((float(when), float(rate)) for when, rate in state["rates"])


def _since(before_s: float | None, holds: bool, now_s: float) -> float | None:
    """Since when something holds without a break."""
    return (now_s if before_s is None else before_s) if holds else None
