"""How much to keep on the host, decided anew after every window of steps from what it has measured.

Grow a little where requests wait for pages, nothing has stalled, and the next share is predicted to hide; shrink at
once where steps stall, at least to what is predicted to hide. Running requests keep their pages then and drain, so a
stall that goes on meanwhile says nothing of the new share; if it goes on for long, they are to give pages up.

Three things keep it from swinging: growing asks for less stall than shrinking does, a pause follows a shrink, and a
share that has stalled is not tried again while link and layers are much as they were then.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Literal

from jaxstack.engine.memory.swap.config import LARGEST_SHARE, SwapConfig

Decision = Literal["grow", "hold", "shrink", "refuse"]

_SHRINK, _SHRINK_AT_MOST, _PAUSE = 0.05, 4, 4
# Windows in a row with a stall after which running requests are to give up their pages.
_PERSISTENT = 8
# Of the newest window in a measured rate.
_NEWEST = 0.3
# A share that stalled is tried again after so many windows, or when link or layers leave this much more room.
_REMEMBERED, _BETTER = 400, 1.3
# Growing counts on the slowest of so many windows that the link was busy in.
_SLOWEST_OF = 16
# More cached tokens than fit by so much: the batch is still draining.
_OVER = 1.01


@dataclasses.dataclass(frozen=True)
class Window:
    """What some steps in a row have measured.

    Args:
      compute_s: of the device, without waiting for pages.
      stall_s: waiting for pages.
      layer_s: t_l of the steps that compute least: prompt chunks take longer, and would hide what others do not.
      kv_tokens: mean tokens of the running batch, X.
      waited: share of the steps in which requests waited for pages.
      link_bytes, link_s: moved to the device, dead weight included, and how long the link was busy with it.
    """

    compute_s: float
    stall_s: float
    layer_s: float
    kv_tokens: float
    waited: float
    link_bytes: float = 0.0
    link_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Target:
    """The share phi of a full cache to keep on the host from now on, and why.

    `urgent`: stalls persist; running requests are to give up pages, not only to drain.
    """

    share: float
    decision: Decision
    reason: str
    urgent: bool = False


class ExpansionController:
    """See the module's docstring.

    Args:
      layers, kv_bytes: L and kappa.
      capacity: T, tokens that fit by share.
      device_tokens: of these, on the device.
      link_bytes_per_s: host to device as probed, until windows have measured it.
      limit: the largest share that the host's memory allows.
      device_bytes_per_s: with it a layer's time is predicted to grow with the batch; without, to stay.
      share: to begin with.
    """

    def __init__(
        self,
        config: SwapConfig,
        *,
        layers: int,
        kv_bytes: int,
        capacity: Callable[[float], float],
        device_tokens: Callable[[float], float],
        link_bytes_per_s: float,
        limit: float = LARGEST_SHARE,
        device_bytes_per_s: float | None = None,
        share: float = 0.0,
    ):
        self.config, self.limit, self.share = config, min(limit, LARGEST_SHARE), share
        self._layers, self._kv_bytes = layers, kv_bytes
        self._capacity, self._device_tokens = capacity, device_tokens
        self._device_bytes_per_s = device_bytes_per_s
        self.link_bytes_per_s, self.layer_s = link_bytes_per_s, 0.0
        self._probed = link_bytes_per_s
        self._links: collections.deque[float] = collections.deque(maxlen=_SLOWEST_OF)
        self._idle = 0  # windows in a row that nothing was moved in
        self._pause = self._stalled = 0
        self._ceiling: tuple[float, float, int] | None = None  # share, room then, windows to remember it

    def observe(self, window: Window) -> Target:
        """Decides; the new share is also `share`."""
        self._measure(window)
        self._forget()
        stall = window.stall_s / window.compute_s if window.compute_s > 0 else 0.0
        if stall > self.config.shrink_above:
            if window.kv_tokens > _OVER * self._capacity(self.share):
                self._stalled += 1
                urgent = self._stalled >= _PERSISTENT
                return Target(self.share, "hold", "running requests drain after a shrink", urgent)
            if self.share > 0:
                return self._shrink(stall, window)
        self._stalled = 0
        if self._pause:
            self._pause -= 1
            return Target(self.share, "hold", "pausing after a shrink")
        if window.waited < 0.5 or self.share >= self.limit:
            why = "no requests wait for pages" if window.waited < 0.5 else "the host's share is as large as allowed"
            return Target(self.share, "hold", why)
        if stall >= self.config.grow_below:
            return Target(self.share, "hold", f"steps stall for {stall:.1%} of their computing")
        return self._grow(window)

    def _measure(self, window: Window) -> None:
        self.layer_s = window.layer_s if self.layer_s == 0 else self.layer_s + _NEWEST * (window.layer_s - self.layer_s)
        if window.link_s > 0 and window.link_bytes > 0:
            rate, self._idle = window.link_bytes / window.link_s, 0
            self.link_bytes_per_s += (_NEWEST if self._links else 1.0) * (rate - self.link_bytes_per_s)
            self._links.append(rate)
            return
        self._idle += 1
        if self._idle > _REMEMBERED:  # nobody knows any more what it would do now
            self._links.clear()
            self.link_bytes_per_s, self._idle = self._probed, 0

    def _shrink(self, stall: float, window: Window) -> Target:
        share = self.share - _SHRINK * min(max(stall / self.config.shrink_above, 1), _SHRINK_AT_MOST)
        self._stalled += 1
        if self._ceiling is None or self.share < self._ceiling[0]:
            self._ceiling = (self.share, self._room(), _REMEMBERED)
        link = window.link_bytes / window.link_s if window.link_s > 0 else self.link_bytes_per_s
        while share > 0 and not self._hides(share, window, window.layer_s, link)[0]:
            share -= self.config.step
        self.share = share if share >= self.config.step else 0.0
        self._pause = _PAUSE
        return Target(self.share, "shrink", f"steps stall for {stall:.1%} of their computing")

    def _grow(self, window: Window) -> Target:
        share = min(self.share + self.config.step, self.limit)
        if self._ceiling is not None and share >= self._ceiling[0] - 1e-9:
            return Target(self.share, "hold", f"a share of {self._ceiling[0]:.3f} has stalled before")
        link = min([self.link_bytes_per_s, *self._links])
        fits, layer_s, moving_s = self._hides(share, window, self.layer_s, link)
        if fits:
            self.share = share
            return Target(share, "grow", f"a layer computes for {layer_s:.2e} s, moving will take {moving_s:.2e} s")
        why = f"moving would take {moving_s:.2e} s, a layer computes for {layer_s:.2e} s"
        return Target(self.share, "refuse" if self.share == 0 else "hold", why)

    def _hides(self, share: float, window: Window, layer_s: float, link: float) -> tuple[bool, float, float]:
        """Whether a share hides, with a batch as much larger or smaller as it allows; what a layer and moving take."""
        tokens = window.kv_tokens * self._capacity(share) / self._capacity(self.share)
        if self._device_bytes_per_s is not None:
            layer_s += (tokens - window.kv_tokens) * self._kv_bytes / self._device_bytes_per_s
        moving_s = max(0.0, tokens - self._device_tokens(share)) * self._kv_bytes / link
        return moving_s <= self.config.margin * layer_s, layer_s, moving_s

    def _room(self) -> float:
        """Bytes that the link moves while a layer computes: what decides how much hides."""
        return self.link_bytes_per_s * self.layer_s

    def _forget(self) -> None:
        if self._ceiling is None:
            return
        share, room, windows = self._ceiling
        fresh = windows > 0 and self._room() < _BETTER * room
        self._ceiling = (share, room, windows - 1) if fresh else None
