"""Who takes the turns: the caller, or a thread of their own; and how other threads talk to whoever it is.

What other threads want done goes into an inbox, which is emptied where no step is being planned or launched. Whoever
waits for something that steps bring about either takes them himself or sleeps until the thread has.
"""

import asyncio
import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext

from jaxstack.engine.errors import EngineDead
from jaxstack.engine.listeners import Touched, wake_all

log = logging.getLogger(__name__)

# Failed turns in a row after which the thread gives up.
_FATAL_FAILURES = 3


class Driver:
    """Takes turns, one at a time.

    Args:
      turn: one turn; False when there was nothing to do.
      busy: whether a request is open, once the inbox is empty.
      recover: after a turn that raised, makes the next one possible.
      give_up: ends every open request, as an error; no turn comes after.
      watch: entered around every turn and what is done between turns.

    Attributes:
      lock: held where turns are taken. All four callbacks but `busy` are called with it.
      stopping: no turn comes after the one under way.
      death: what has ended the thread; None otherwise.
      touched: the event loops to be woken after a turn, with those of their feeds that have got something.
    """

    def __init__(
        self,
        *,
        turn: Callable[[], bool],
        busy: Callable[[], bool],
        recover: Callable[[], None],
        give_up: Callable[[], None],
        watch: AbstractContextManager[object] | None = None,
    ):
        self._turn, self._busy, self._recover, self._give_up = turn, busy, recover, give_up
        self._watch = watch or nullcontext()
        self.lock = threading.RLock()
        self.stopping = False
        self.death: BaseException | None = None
        self.touched: Touched = {}
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._posted = threading.Condition()
        self._turned = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failures = 0

    @property
    def alive(self) -> bool:
        """Whether requests are answered still."""
        return self.death is None and not self.stopping

    @property
    def posted(self) -> int:
        """Actions that nobody has taken out of the inbox yet."""
        return len(self._inbox)

    def check_alive(self) -> None:
        """Raises EngineDead."""
        if not self.alive:
            raise EngineDead("the engine has stopped") from self.death

    def post(self, action: Callable[[], None], *, while_alive: bool = False) -> None:
        """Has `action` done before the next turn.

        Args:
          while_alive: raise EngineDead where no turn would come after it.
        """
        with self._posted:
            if while_alive:
                self.check_alive()
            self._inbox.append(action)
            self._posted.notify_all()

    def take_in(self) -> None:
        """Does what has been posted. Needs `lock`."""
        while self._inbox:
            self._inbox.popleft()()

    def step(self) -> bool:
        """Does what has been posted and takes one turn. False when there was nothing to do in it."""
        with self.lock, self._watch:
            self.take_in()
            worked = self._turn()
            self.flush()
            return worked

    def flush(self) -> None:
        """Wakes whoever waits for a turn, and each event loop once, however many of its requests got a token."""
        with self._turned:
            self._turned.notify_all()
        touched = dict(self.touched)
        self.touched.clear()
        for loop, feeds in touched.items():
            _wake(loop, feeds)

    # Waiting.

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Lets turns pass, or takes them, until a condition that they bring about holds. Raises EngineDead."""
        while not holds():
            if self._thread is None:
                self.step()
            else:
                with self._turned:  # the timeout is for a thread that dies between two looks
                    self._turned.wait_for(lambda: holds() or self.death is not None, timeout=1.0)
                self._check_living()

    def wait_for(self, event: threading.Event) -> None:
        """As `wait_until`, for an event: its waiter sleeps through the turns that do not set it. Raises EngineDead."""
        while not event.is_set():
            if self._thread is None:
                self.step()
            elif not event.wait(timeout=1.0):
                self._check_living()

    def between_turns(self, action: Callable[[], None]) -> None:
        """Runs `action` where no other thread plans or launches, and passes on what it raises."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                action()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        self.post(run)
        if self._thread in (None, threading.current_thread()):
            with self.lock:
                self.take_in()
        self.wait_until(done.done)
        done.result()

    # The thread.

    def start(self) -> None:
        """Gives the turns a thread of their own, unless they have one or had to stop."""
        if self._thread is None and not self.stopping:
            self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
            self._thread.start()

    def stop(self, drain_timeout_s: float) -> None:
        """Takes no more turns, once no request is open or after `drain_timeout_s`; the thread ends."""
        with self._turned:
            drained = lambda: self.death is not None or not (self._busy() or self._inbox)  # noqa: E731
            self._turned.wait_for(drained, timeout=min(drain_timeout_s, threading.TIMEOUT_MAX))
        with self._posted:
            self.stopping = True
            self._posted.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _check_living(self) -> None:
        if self.death is not None:
            raise EngineDead("the engine has stopped") from self.death

    def _run(self) -> None:
        try:
            while not self.stopping:
                try:
                    worked = self.step()
                    self._failures = 0 if worked else self._failures
                except Exception:
                    self._failures += 1
                    log.exception("step failed (%d in a row)", self._failures)
                    with self.lock:
                        self._recover()
                        self.flush()
                    if self._failures >= _FATAL_FAILURES:
                        raise
                    continue
                if not worked:
                    with self._posted:
                        if not self._inbox and not self.stopping:
                            self._posted.wait(timeout=1.0)
        except BaseException as error:
            with self._posted:
                self.death = error
            log.critical("the engine has died: %s", error)
            with self.lock:
                self.take_in()
                self._give_up()
                self.flush()


def _wake(loop: asyncio.AbstractEventLoop, feeds: list) -> None:
    try:
        loop.call_soon_threadsafe(wake_all, feeds)
    except RuntimeError:  # the loop is closed; its requests were aborted or will be, by their iterators
        log.debug("an event loop closed with %d open requests", len(feeds))
