"""Stopping cleanly: one flag that SIGTERM, SIGINT or the caller raises and that every loop polls at its boundaries."""

import os
import signal
import socket
import threading
from types import TracebackType
from typing import Any

from jaxstack.runtime.errors import UserError


class StopFlag:
    """Set by the first SIGTERM or SIGINT while entered; the second one ends the process at once with 128 + its number.

    Python runs signal handlers between bytecodes only, and a compilation is one long call, so a handler alone could
    neither note the first signal in time nor obey the second. The interpreter's C-level handler does write each
    signal's number into a wake-up descriptor immediately; a small thread reads it there.

    Signals can be received in the main thread only. Elsewhere this is just a flag, raised by `set()` or by the `event`
    given.

    Args:
      event: also counts as raised whenever this event is set (for callers that stop a run from another thread).
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, event: threading.Event | None = None):
        self._event = event
        self._set = threading.Event()
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def set(self, reason: str = "requested") -> None:
        """Raises the flag."""
        if self.reason is None:
            self.reason = reason
        self._set.set()

    def is_set(self) -> bool:
        """Whether to stop at this boundary. Cheap: meant to be polled."""
        if self._event is not None and self._event.is_set():
            self.set("requested")
        return self._set.is_set()

    def __bool__(self) -> bool:
        return self.is_set()

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in self._SIGNALS:
            # The handler itself has nothing to do: replacing the default action is what makes the wake-up byte happen.
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, args=(self._reader,), name="stop-flag", daemon=True)
        self._thread.start()
        return self

    def _watch(self, reader: socket.socket) -> None:
        received = 0
        while data := reader.recv(16):
            for number in data:
                if number not in self._SIGNALS:
                    continue
                received += 1
                if received > 1:
                    os._exit(128 + number)
                self.set(signal.Signals(number).name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None or self._reader is None or self._thread is None:
            return
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._writer.close()
        self._thread.join()
        self._reader.close()
        self._writer = self._reader = self._thread = None


class WorkdirLock:
    """Holds `workdir/.lock` by flock while entered: two jobs in one folder would overwrite each other.

    The kernel lets go of the lock with the process, so a killed job leaves nothing to clean up.

    Raises:
      UserError: another process holds it (its pid is named), or the folder cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        self._path = os.path.join(os.fspath(workdir), ".lock")
        self._fd: int | None = None

    def __enter__(self) -> "WorkdirLock":
        import fcntl

        folder = os.path.dirname(self._path)
        try:
            os.makedirs(folder, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"workdir {folder!r} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            self._fd = None
            raise UserError(f"workdir {folder!r} is in use by another job (pid {holder}); choose another") from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
