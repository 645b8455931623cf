"""A program in another environment, kept running beside us: JSON lines over pipes, frozen while it is not its turn."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from jaxstack.runtime.errors import UserError

DEFAULT_INTERPRETER = ".venv-peers/bin/python"
_EXIT_S = 3.0


def find_interpreter(path: str | Path = DEFAULT_INTERPRETER, target: str = "peers") -> Path:
    """A peer's Python; `make TARGET` makes its environment.

    Raises:
      UserError: it is not there; the message says how to get it.
    """
    found = Path(path)
    if not (found.is_file() and os.access(found, os.X_OK)):
        raise UserError(
            f"peer_python: found no interpreter at {str(path)!r}, expected the peer's environment; "
            f"`make {target}` makes it"
        )
    return found


class PeerProcess:
    """A child that answers each JSON line on its stdin with one on its stdout.

    It runs in a session of its own, so that a Ctrl-C at the terminal reaches us alone, and is killed by `close`,
    however busy.

    Args:
      command: program and arguments.
      log_file: receives what the child prints beside its answers.
      environment: variables set for the child, on top of ours.
      name: for error messages.
      target: what makes its environment, for the message that something is missing there.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log_file: Path,
        environment: Mapping[str, str] | None = None,
        name: str = "",
        target: str = "peers",
    ):
        self.name, self._target = name or Path(command[-1]).name, target
        self.log_file = log_file
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("w") as log:
            self._child = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.process = psutil.Process(self._child.pid)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"{self.name}-answers", daemon=True)
        self._reader.start()

    def ask(self, do: str, *, timeout_s: float = 600.0, **arguments: Any) -> dict[str, Any]:
        """Sends `{"do": do, **arguments}` and waits for the answer. The child runs only meanwhile, once `freeze` was
        called.

        Lines that are no JSON object are noise of the child's libraries and skipped.

        Raises:
          UserError: the child ended, answered with an error, or took longer than `timeout_s` (it is killed then).
        """
        try:
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._child.stdin.flush()
        except OSError:
            raise self._ended() from None
        while True:
            try:
                line = self._lines.get(timeout=timeout_s)
            except queue.Empty:
                self.close()
                raise UserError(f"{self.name}: no answer to {do!r} after {timeout_s:.0f} s") from None
            if line is None:
                raise self._ended()
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    break
        if "error" in answer:
            raise UserError(f"{self.name}: {do}: {answer['error']} (log: {self.log_file})")
        return answer

    def freeze(self) -> None:
        """Stops the child's clock (SIGSTOP): no thread of it can spin while another side is measured."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends the child: by closing its stdin, and by SIGKILL if that does not do."""
        if self._child.poll() is None:
            self.thaw()
            with contextlib.suppress(OSError):
                assert self._child.stdin is not None
                self._child.stdin.close()
            try:
                self._child.wait(_EXIT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._reader.join()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> "PeerProcess":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:  # do not wait for an answer that nobody will read
            self._child.kill()
        self.close()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(number)

    def _ended(self) -> UserError:
        code = self._child.wait()
        lines = [line for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1][-300:] if lines else "it printed nothing"
        hint = f"; `make {self._target}` installs what it needs" if "ModuleNotFoundError" in last else ""
        return UserError(f"{self.name}: ended with exit code {code}: {last}{hint} (log: {self.log_file})")
