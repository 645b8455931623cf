"""Which entry goes when there is no room: the one used longest ago, or the one that has saved least for its size."""

import heapq


class Evictor:
    """An order of one owner's entries. "cost" is GreedyDual: an entry is worth the seconds that it has saved for each
    byte, on top of what the last victim was worth when it went, so that what was once useful ages.

    Args:
      rule: "lru" or "cost".
    """

    def __init__(self, rule: str):
        self._rule = rule
        self._age = 0.0
        self._clock = 0
        self._current: dict[int, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, int]] = []  # with entries that are out of date

    def __len__(self) -> int:
        return len(self._current)

    def touch(self, entry: int, saved_s: float, size_bytes: int) -> None:
        """The entry is new, or has been used.

        Args:
          saved_s: seconds of generation that it has saved in all, or can be hoped to save once.
        """
        self._clock += 1
        worth = float(self._clock) if self._rule == "lru" else self._age + saved_s / max(1, size_bytes)
        self._current[entry] = (worth, self._clock)
        heapq.heappush(self._heap, (worth, self._clock, entry))
        if len(self._heap) > 64 + 4 * len(self._current):
            self._heap = [(worth, clock, e) for e, (worth, clock) in self._current.items()]
            heapq.heapify(self._heap)

    def remove(self, entry: int) -> None:
        self._current.pop(entry, None)

    def victim(self) -> int | None:
        """The entry to go first; still there."""
        while self._heap:
            worth, clock, entry = self._heap[0]
            if self._current.get(entry) == (worth, clock):
                if self._rule == "cost":
                    self._age = max(self._age, worth)
                return entry
            heapq.heappop(self._heap)
        return None
