"""An engine that stops in the middle of its work: what a test does then happens there, however busy the machine is."""

import contextlib
import threading
from collections.abc import Iterator

from jaxstack.engine import Engine


class Stopped:
    """An engine that has been told to stop. `at` is set where it stands still; it goes on when `go_on` is set."""

    def __init__(self) -> None:
        self.at, self.go_on = threading.Event(), threading.Event()


@contextlib.contextmanager
def stopping(engine: Engine, after: int) -> Iterator[Stopped]:
    """The engine's thread stands still after so many turns with something to do, until the end at the latest."""
    driver, stopped, left = engine._driver, Stopped(), after
    turn = driver._turn

    def counted() -> bool:
        nonlocal left
        worked = turn()
        left -= worked
        if left <= 0:
            stopped.at.set()
            stopped.go_on.wait()
        return worked

    driver._turn = counted
    try:
        yield stopped
    finally:
        stopped.go_on.set()
        driver._turn = turn
