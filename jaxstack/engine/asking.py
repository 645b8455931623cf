"""Many requests at once, for callers that wait for all of them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxstack.engine.driver import Driver
from jaxstack.engine.listeners import Collector
from jaxstack.engine.request import Listener


class Ask(NamedTuple):
    """One request: the prompt's token ids, how many choices it gets, and what queues it for a listener and returns its
    id.
    """

    tokens: list[int]
    choices: int
    submit: Callable[[Listener], str]


def ask_all(
    asks: Iterable[Ask],
    driver: Driver,
    *,
    room: Callable[[], bool],
    abort: Callable[[str], None],
    on_done: Callable[[], object] = lambda: None,
) -> list[Collector]:
    """Queues requests as there is room and waits until every one has ended. When anything raises, the others are
    aborted and it is passed on.

    Args:
      room: whether another request may be queued.
      on_done: called whenever one has ended.

    Returns: what collected each answer, in the order asked.
    """
    collectors: dict[str, Collector] = {}
    try:
        for ask in asks:
            driver.wait_until(room)
            collector = Collector(ask.tokens, ask.choices, on_done)
            collectors[ask.submit(collector)] = collector
        for collector in collectors.values():
            driver.wait_for(collector.done)
    except BaseException:
        for request_id, collector in collectors.items():
            if not collector.done.is_set():
                abort(request_id)
        raise
    return list(collectors.values())
