"""Longest prefix match: SGLang's order (arXiv 2312.07104, section 3), the most work saved and nobody's fairness."""

from collections.abc import Iterable, Sequence
from typing import Any

from jaxstack.engine.scheduling.fcfs import FirstComeFirstServed
from jaxstack.engine.scheduling.policy import SchedulerView


class LongestPrefixMatch(FirstComeFirstServed):
    """The request with the most cached tokens first, by arrival among equals; one that does not fit holds up the rest.

    Of requests that share a prefix which is not cached, one goes first and the others follow it into the cache a step
    later: `try_admit` puts them off. There is no limit on the queue's length, since matching it is cheap.
    """

    name = "lpm"

    def order(self, waiting: Sequence[Any], view: SchedulerView) -> Iterable[Any]:
        return by_cached_prefix(waiting, view)


def by_cached_prefix(waiting: Sequence[Any], view: SchedulerView) -> list[Any]:
    """The most cached tokens first, then by arrival: a total order, whatever order they come in."""
    lengths = view.prefix_lengths(waiting)
    ranked = sorted((-length, request.order, i) for i, (length, request) in enumerate(zip(lengths, waiting)))
    return [waiting[i] for _, _, i in ranked]
