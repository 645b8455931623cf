"""Launchers started as a user starts them, without importing jax and the rest anew each time, which takes seconds.

One process imports the libraries and then forks at a word: the copy gets its own arguments, folder, environment and
streams, leads a session of its own, runs the launcher's file as `python -m` does, and ends as any process does. What a
launcher itself defines (its flags) is imported in the copy. One launcher of each kind (training, serving, routing,
solving, planning) is started `anew` by its longest test.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from jaxstack.runtime.memory import with_huge_pages

ROOT = Path(__file__).parents[2]

_PARENT = """
import contextlib, ctypes, gc, importlib, json, os, runpy, signal, socket, sys, warnings

LIBRARIES = (
    "optax, orbax.checkpoint, matplotlib.figure, matplotlib.backends.backend_agg, openai, tqdm, httpx, absl.app,"
    "jaxstack.engine, jaxstack.engine.offload, jaxstack.serving, jaxstack.training, jaxstack.reasoning.benchmarks,"
    "jaxstack.reasoning.longcot.study, jaxstack.models.checkpoint, launch.job"
)
for name in LIBRARIES.split(","):
    importlib.import_module(name.strip())
from jax._src import xla_bridge

assert not xla_bridge.backends_are_initialized()  # its threads would be missing in the copies
gc.collect()
gc.freeze()


def fork():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with jax imported: no device is in use yet
        pid = os.fork()
    if pid == 0:
        with contextlib.suppress(AttributeError):  # Linux: nothing outlives its parent, and the first parent the tests
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    return pid


def reap(*_):
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def next_program(wishes):
    '''Returns in the copy that is to run it.'''
    signal.signal(signal.SIGCHLD, reap)
    while True:
        message, streams, _, _ = socket.recv_fds(wishes, 1 << 20, 4)
        if not message:
            sys.exit()
        if fork() == 0:  # waits for the program, and tells how it ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            wishes.close()
            pid = fork()
            if pid == 0:
                break
            os.write(streams[3], b"%d\\n" % pid)
            for stream in streams[:3]:
                os.close(stream)
            for stream in range(3):
                os.close(stream)
            os.write(streams[3], b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
        for stream in streams:
            os.close(stream)
    os.setsid()
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    wish = json.loads(message)
    os.environ.clear()
    os.environ.update(wish["environment"])
    os.chdir(wish["folder"])
    sys.argv[1:] = wish["arguments"]
    sys.orig_argv[1:] = ["-m", wish["module"], *wish["arguments"]]
    return wish["module"]


runpy.run_module(next_program(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__", alter_sys=True)
"""


class Program:
    """What a test needs of `subprocess.Popen`; all streams are pipes of text."""

    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str], stderr: IO[str], ending: IO[bytes]):
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None
        self._waiting = threading.Thread(target=self._wait, args=[ending], daemon=True)
        self._waiting.start()

    def _wait(self, ending: IO[bytes]) -> None:
        with ending:
            self.returncode = int(ending.readline())

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._waiting.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"program {self.pid}", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """What is left of both outputs, when the program has ended."""
        end = None if timeout is None else time.monotonic() + timeout
        texts: dict[str, str] = {}
        readers = [
            threading.Thread(target=lambda name=name: texts.update({name: getattr(self, name).read()}), daemon=True)
            for name in ("stdout", "stderr")
        ]
        for reader in readers:
            reader.start()
        with contextlib.suppress(BrokenPipeError), self.stdin:
            self.stdin.write(input or "")
        for reader in readers:
            reader.join(None if end is None else max(0.0, end - time.monotonic()))
        self.wait(None if end is None else max(0.1, end - time.monotonic()))
        for stream in (self.stdout, self.stderr):
            stream.close()
        return texts["stdout"], texts["stderr"]


def _environment() -> dict[str, str]:
    """With huge pages, for which the launchers of training would start anew."""
    return with_huge_pages({**os.environ, "JAX_PLATFORMS": "cpu"})


@functools.cache
def _wishes() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = _environment()
    command = [sys.executable, "-c", _PARENT, str(theirs.fileno())]
    parent = subprocess.Popen(
        command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
    )
    theirs.close()

    @atexit.register
    def end() -> None:
        ours.close()
        parent.wait(60)

    return ours


def start(module: str, *arguments: object, anew: bool = False) -> "Program | subprocess.Popen[str]":
    """`python -m MODULE ARGUMENTS`, in the repository; `anew`: by an interpreter of its own."""
    command, environment = [*map(str, arguments)], {**os.environ, "JAX_PLATFORMS": "cpu"}
    if anew:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, "-m", module, *command],
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,
            **pipes,
        )
    wish = {"module": module, "arguments": command, "folder": str(ROOT), "environment": _environment()}
    read, write = zip(*(os.pipe() for _ in range(4)))
    theirs = [read[0], *write[1:]]
    socket.send_fds(_wishes(), [json.dumps(wish).encode()], theirs)
    for descriptor in theirs:
        os.close(descriptor)
    ending = os.fdopen(read[3], "rb")
    return Program(int(ending.readline()), os.fdopen(write[0], "w"), *map(os.fdopen, read[1:3]), ending)


def kill(program: "Program | subprocess.Popen[str]") -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.kill()  # one that has only just begun leads no group yet
    program.communicate()


def run(module: str, *arguments: object, anew: bool = False, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`start`, and waits for its end."""
    program = start(module, *arguments, anew=anew)
    out, err = program.communicate(timeout=timeout)
    assert program.returncode is not None
    return subprocess.CompletedProcess([module, *map(str, arguments)], program.returncode, out, err)
