"""`python -m launch.serve` as a child process: started on a free port, waited for, and always stopped.

What a launcher uses that needs a real server beside it (`launch.demo`): exactly what a user would start by hand.
"""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from jaxstack.runtime.errors import UserError

_STOP_S = 15.0


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server_process(
    model: str | Path, log_file: Path, *, flags: Sequence[str] = (), start_timeout_s: float = 600.0
) -> Iterator[str]:
    """A running server of the Hugging Face folder `model`; yields its base URL (`http://127.0.0.1:PORT`).

    The server is warm when this yields: every step is compiled. It is stopped when the block ends, however it ends.

    Args:
      model: Hugging Face folder.
      log_file: receives what the server prints.
      flags: further flags of `launch.serve`.
      start_timeout_s: how long it may take to load and compile.

    Raises:
      UserError: the server ended before it was ready, or was not ready in time; with the last line it printed.
    """
    port = free_port()
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "launch.serve", f"--model={model}", "--host=127.0.0.1", f"--port={port}", *flags]
    url = f"http://127.0.0.1:{port}"
    with _terminated_like_interrupted():
        with log_file.open("w") as log:
            # In a session of its own: a Ctrl-C at the terminal reaches us alone, and we stop it.
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            _wait_until_ready(child, url, log_file, start_timeout_s)
            yield url
        finally:
            _stop(child)


def metrics(url: str) -> dict[str, float]:
    """The samples of `/metrics` without labels, summed over theirs: name -> value."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def _wait_until_ready(child: subprocess.Popen, url: str, log_file: Path, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    logging.getLogger("httpx").setLevel(logging.WARNING)  # or each question whether it is ready would be a line
    if not sys.stderr.isatty():
        print("starting the server: compiling its steps", file=sys.stderr, flush=True)
    form = "{desc}: {percentage:3.0f}% {elapsed}"
    with tqdm(total=1.0, desc="starting the server", bar_format=form, disable=None) as bar:
        while child.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.get(f"{url}/health", timeout=5, trust_env=False)
                if answer.status_code == 200:
                    bar.update(1.0 - bar.n)
                    return
                # 503 with how far the engine's warm-up is.
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    bar.update(max(0.0, float(answer.json()["error"].get("progress", 0.0)) - bar.n))
            time.sleep(0.2)
            bar.refresh()
    lines = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][-300:] if lines else "nothing was printed"
    what = f"not ready after {timeout_s:.0f} s" if child.poll() is None else f"ended with exit code {child.poll()}"
    raise UserError(f"the server {what}: {last} (whole log: {log_file})")


def _stop(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the block, so that the child is stopped then too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: its owner decides about signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
