"""Drafts from a sequence's own past: what followed the last time its latest tokens came up (prompt lookup, n-grams).

Every draft token becomes one more row of the next step, at the position after the row before. Each row is sampled with
the random number of its own position, and a row counts only if its input is the token that was really drawn there. So
the answer is exactly the one without drafts; a draft only decides how many rows of a step were of use.
"""

from collections.abc import Sequence

# Longest first: a longer match is a better guess.
_LENGTHS = (3, 2)


class Drafter:
    """Drafts for one sequence, as many as have proved worth it: half as many after a miss, one more after a hit.

    Args:
      limit: of tokens in a draft.
    """

    def __init__(self, limit: int):
        self._limit = self._count = limit
        self._indexed = 0
        # The last tokens of a run -> the position after its latest appearance but the one at the very end.
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow `tokens`, which grow from call to call; none if nothing is alike."""
        for position in range(self._indexed, len(tokens)):
            for length in _LENGTHS:
                if position >= length:
                    self._after[tuple(tokens[position - length : position])] = position
        self._indexed = len(tokens)
        count = min(self._count, limit)
        for length in _LENGTHS:
            source = self._after.get(tuple(tokens[-length:]))
            if source is not None:
                draft: list[int] = []
                for position in range(source, source + count):  # may run into what it writes: a loop goes on
                    draft.append(tokens[position] if position < len(tokens) else draft[position - len(tokens)])
                return draft
        return []

    def learn(self, proposed: int, accepted: int) -> None:
        """How the last draft fared."""
        if accepted < proposed:
            self._count = max(1, self._count // 2)
        else:
            self._count = min(self._limit, self._count + 1)
