"""Compile accounting: how many XLA programs were built, and how long that took.

Static shapes are a promise (everything is compiled at start-up, nothing afterwards), and a promise needs a meter. JAX
announces each backend compilation through `jax.monitoring`; one listener of this process adds them up, and a
`CompileCounter` remembers where the sum stood when it was created.
"""

import threading
from pathlib import Path

import jax
from jax import monitoring

# Announced once for each program handed to the backend, also when the persistent cache then supplies the executable: a
# program found in the cache was still traced and lowered, so it still is a broken promise after warm-up.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class _Total:
    """The process-wide sum; JAX has no public way to take a listener back, so there is one, not one per counter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listening = False
        self.count = 0
        self.seconds = 0.0
        self._thread = threading.local()

    @property
    def of_this_thread(self) -> int:
        return getattr(self._thread, "count", 0)

    def listen(self) -> None:
        with self._lock:
            if not self._listening:
                monitoring.register_event_duration_secs_listener(self._on_event)
                self._listening = True

    def _on_event(self, event: str, duration_secs: float, **_: object) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1
                self.seconds += duration_secs
            self._thread.count = self.of_this_thread + 1  # JAX tells the thread that compiles


_total = _Total()


class CompileCounter:
    """Counts backend compilations of this process, on any thread, since the counter was created or last reset.

    >>> counter = CompileCounter()
    >>> step(state, batch)
    >>> counter.count     # 1 the first time
    """

    def __init__(self) -> None:
        _total.listen()
        self.reset()

    def reset(self) -> None:
        """Starts counting from now."""
        self._count, self._seconds = _total.count, _total.seconds

    @property
    def count(self) -> int:
        """Programs compiled since creation or `reset()`."""
        return _total.count - self._count

    @property
    def seconds(self) -> float:
        """Seconds spent in the backend compiler since creation or `reset()`."""
        return _total.seconds - self._seconds


class CompileWatch:
    """Counts the compilations inside its `with` blocks, by the thread that is in the block; what others compile
    meanwhile is not counted. One thread at a time.
    """

    def __init__(self) -> None:
        _total.listen()
        self.count = 0
        self._before = 0

    def __enter__(self) -> "CompileWatch":
        self._before = _total.of_this_thread
        return self

    def __exit__(self, *_: object) -> None:
        self.count += _total.of_this_thread - self._before


def use_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs of this process in `folder`: the next process with the same programs starts in a second.

    Programs of every size and compile time are kept. Call before the first compilation: JAX opens its cache once.
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
