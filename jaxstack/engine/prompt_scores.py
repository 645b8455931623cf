"""Logprobs of a prompt's own tokens: gathered chunk by chunk, kept with the prefix cache, given out with the answer.

The forward pass at position p scores the token at p + 1. A page of the prefix cache keeps the scores of the tokens *in*
it, since these depend on nothing behind it; so a prompt that begins with cached pages gets their scores for nothing and
computes on from the last cached position, which scores the first token behind them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxstack.engine.request import TokenLogprob
from jaxstack.engine.scheduler import StepPlan


class PageScores(NamedTuple):
    """Of the tokens of one page: their logprobs, and the likeliest alternatives with theirs."""

    logprob: Float32[np.ndarray, " page_size"]
    ids: Int32[np.ndarray, "page_size alternatives"]
    values: Float32[np.ndarray, "page_size alternatives"]


class PromptScores:
    """Of one prompt of `tokens`, known for the first `known` of them. The first token has no score."""

    def __init__(self, tokens: tuple[int, ...], alternatives: int):
        self._tokens, self._alternatives = tokens, alternatives
        self._parts: list[PageScores] = []
        self.known = 1

    @property
    def complete(self) -> bool:
        return self.known >= len(self._tokens)

    def add(self, start: int, scores: PageScores) -> None:
        """Scores of the tokens from `start` on. Those known already, and those past the prompt, are left out."""
        assert start <= self.known, "a gap in the scores of a prompt"
        cut = slice(self.known - start, max(self.known, len(self._tokens)) - start)
        part = PageScores(*(array[cut] for array in scores))
        self._parts.append(part)
        self.known += len(part.logprob)

    def pages(self, page_size: int) -> list[PageScores]:
        """The scores page by page; the last page that is not full is left out."""
        if not self._parts:
            return []
        # The first token's place is filled with something finite that nobody reads.
        joined = [np.concatenate(arrays) for arrays in zip(*self._parts)]
        whole = [np.concatenate([array[:1], array]) for array in joined]
        return [
            PageScores(*(array[i : i + page_size] for array in whole))
            for i in range(0, self.known - page_size + 1, page_size)
        ]

    def entries(self) -> tuple[TokenLogprob | None, ...]:
        """One entry a token; None for the first."""
        found: list[TokenLogprob | None] = [None]
        for part in self._parts:
            for logprob, ids, values in zip(part.logprob.tolist(), part.ids.tolist(), part.values.tolist()):
                top = tuple(zip(ids[: self._alternatives], values[: self._alternatives]))
                found.append(TokenLogprob(self._tokens[len(found)], logprob, top))
        return tuple(found)


def pack_targets(plan: StepPlan, rows: int) -> Int32[np.ndarray, " rows"] | None:
    """For each token row of a step the token to score there, -1 for none; None if that is all of them."""
    targets: np.ndarray | None = None
    at = 0
    for row in plan.rows:
        if row.scores:
            if targets is None:
                targets = np.full(rows, -1, np.int32)
            prompt = row.sequence.request.prompt
            wanted = prompt[row.start + 1 : row.start + row.count + 1]
            targets[at : at + len(wanted)] = wanted
        at += row.count
    return targets
