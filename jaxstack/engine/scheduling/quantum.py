"""How large a quantum should be, if nobody says: large enough for a run of requests with the same prefix."""

import collections
import logging

log = logging.getLogger(__name__)

# Requests looked back on, and after how many the quantum is set anew.
_RECENT, _EVERY = 256, 32


class RecentQuantum:
    """Twice the 95th percentile of what recent requests have cost, no less than the largest of them would cost cold.

    A quantum below the cost of one cold request makes the policy change clients at every request, as virtual counters
    do, and lose the locality it is for; a much larger one only widens the bound. Every client is granted the same
    quantum at the same refills, so changing it between refills leaves the proof of the bound as it is, with the largest
    quantum in it.
    """

    def __init__(self) -> None:
        self._costs: collections.deque[int] = collections.deque(maxlen=_RECENT)
        self._cold: collections.deque[int] = collections.deque(maxlen=_RECENT)
        self._expected = 1
        self._learned = 0
        self.value = 1

    def expect(self, prompt_cost: int) -> None:
        """A request has come whose prompt costs that much cold. What finishes tells more, once there is some."""
        if not self._costs and 2 * prompt_cost > self._expected:
            self._expected = 2 * prompt_cost
            self._set(self._expected)

    def learn(self, cost: int, cold: int) -> None:
        """A request has finished: what it cost, and what it would have cost with nothing cached."""
        self._costs.append(cost)
        self._cold.append(cold)
        self._learned += 1
        if self._learned % _EVERY == 0:
            ordered = sorted(self._costs)
            self._set(max(2 * ordered[-1 - len(ordered) // 20], max(self._cold), 1))

    def _set(self, value: int) -> None:
        if abs(value - self.value) * 4 > self.value:
            log.info("quantum: %d, was %d", value, self.value)
        self.value = value
