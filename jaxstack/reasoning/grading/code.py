"""Grades programs by running them on tests, each in a process of its own.

THIS IS NOT A SANDBOX. A program runs as the user who grades it and can read what that user can read. It gets limits of
CPU time, memory, file size and new processes (which the kernel does not enforce against root), a temporary folder to
start in, an empty environment, no network where the kernel grants that, and its process group is killed afterwards.
That stops accidents, endless loops and fork bombs, not an adversary: grade what you do not trust in a container or a
virtual machine.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from jaxstack.reasoning.grading.answer import after_thought
from jaxstack.reasoning.grading.verdict import Verdict, shorten

_WORKER = Path(__file__).with_name("code_worker.py")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")


@dataclasses.dataclass(frozen=True)
class CodeTest:
    """One test: of a program by stdin and stdout, or of a function by JSON arguments and result.

    Attributes:
      input: stdin, or the function's arguments.
      output: what stdout must hold, or the result.
      function: its name, in the module or in a class `Solution`; None for a program.
    """

    input: Any
    output: Any
    function: str | None = None


@dataclasses.dataclass(frozen=True)
class CodeLimits:
    """Limits of one test: CPU and wall-clock time, memory, bytes written into any one file (stdout, too), and processes
    and threads that it may have at once beside the user's others.
    """

    cpu_s: int = 6
    wall_s: float = 12.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 4 << 20
    processes: int = 32


def extract_code(text: str, *, thinking: bool = False) -> str | None:
    """The last closed Python code block after the thought (the last closed block if none is marked as Python).

    None if there is none: a block that is cut off is no answer.
    """
    rest = after_thought(text, thinking=thinking)
    if rest is None:
        return None
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(rest):
        if opening is None:
            opening = fence
        elif not fence.group(1):
            blocks.append((opening.group(1).lower(), rest[opening.end() : fence.start()]))
            opening = None
    chosen = [body for language, body in blocks if language in _PYTHON] or [body for _, body in blocks]
    return chosen[-1].strip("\n") + "\n" if chosen and chosen[-1].strip() else None


def grade_code(
    text: str, tests: Sequence[CodeTest], *, limits: CodeLimits | None = None, thinking: bool = False
) -> Verdict:
    """Grades the program in a completion: correct if every test passes. The first that fails is the reason."""
    code = extract_code(text, thinking=thinking)
    if code is None:
        ended = after_thought(text, thinking=thinking) is not None
        return Verdict("no_answer", "no whole code block after the thought" if ended else "the thought never ended")
    if not tests:
        return Verdict("error", "the problem has no tests", code)
    for number, test in enumerate(tests, 1):
        verdict = run_test(code, test, limits)
        if not verdict.correct:
            return Verdict(verdict.outcome, f"test {number} of {len(tests)}: {verdict.reason}", code)
    return Verdict("correct", "", code)


def run_test(code: str, test: CodeTest, limits: CodeLimits | None = None) -> Verdict:
    """Runs `code` on one test. See the module's warning."""
    limits = limits or CodeLimits()
    with tempfile.TemporaryDirectory(prefix="graded-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "solution.py").write_text(code, encoding="utf-8", errors="replace")
        (folder / "stdin").write_text("" if test.function else str(test.input), encoding="utf-8")
        if test.function:
            (folder / "arguments.json").write_text(json.dumps(test.input), encoding="utf-8")
        status = _run(folder, test.function, limits)
        if status is None:
            return Verdict("timeout", f"more than {limits.wall_s:g} s")
        if status == -signal.SIGXCPU:
            return Verdict("timeout", f"more than {limits.cpu_s} s of CPU time")
        printed = folder / "stdout"
        if _size(printed) >= limits.file_bytes:
            return Verdict("wrong", f"more than {limits.file_bytes} bytes of output")
        if status != 0:
            return Verdict("wrong", _complaint(folder / "stderr", status))
        if test.function is None:
            return _compare_output(printed.read_text(encoding="utf-8", errors="replace"), str(test.output))
        return _compare_result(folder / "result.json", test.output, limits)


def _run(folder: Path, function: str | None, limits: CodeLimits) -> int | None:
    """The exit status (minus the signal that ended it); None if it ran too long."""
    settings = {
        "function": function,
        "resources": {
            "RLIMIT_CPU": limits.cpu_s,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_CORE": 0,
            "RLIMIT_NOFILE": 64,
        },
        "processes": limits.processes,
    }
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
    with (
        open(folder / "stdin", "rb") as given,
        open(folder / "stdout", "wb") as out,
        open(folder / "stderr", "wb") as err,
    ):
        process = subprocess.Popen(
            # -I: neither this folder's files nor the user's settings take the place of the library's modules.
            [sys.executable, "-I", str(_WORKER), json.dumps(settings)],
            cwd=folder,
            env=environment,
            stdin=given,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        ended = _wait(process.pid, limits.wall_s)
        # The leader is not reaped yet, so that its group's number cannot belong to another.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status if ended else None


def _wait(pid: int, limit_s: float) -> bool:
    """Waits until the process has ended, without reaping it; False after `limit_s`."""
    deadline, pause = time.monotonic() + limit_s, 0.001
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(0.02, 1.5 * pause)
    return True


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() and not file.is_symlink() else 0


def _complaint(stderr: Path, status: int) -> str:
    """The last line a program said, or how it ended."""
    with open(stderr, "rb") as file:
        file.seek(max(0, _size(stderr) - 4096))
        lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
    if status < 0:
        return f"ended by signal {-status}"
    return shorten(lines[-1], 200) if lines else f"exit status {status}"


def _compare_output(printed: str, expected: str) -> Verdict:
    """Line by line, blanks at the ends of lines and of the whole ignored; numbers may be written differently."""
    found, wanted = (text.strip().splitlines() for text in (printed, expected))
    if len(found) != len(wanted):
        return Verdict("wrong", f"printed {len(found)} lines, expected {len(wanted)}")
    for number, (line, right) in enumerate(zip(found, wanted), 1):
        tokens, right_tokens = line.split(), right.split()
        if tokens != right_tokens and not _equal_numbers(tokens, right_tokens):
            return Verdict("wrong", f"line {number}: printed {shorten(line)!r}, expected {shorten(right)!r}")
    return Verdict("correct")


def _equal_numbers(found: list[str], expected: list[str]) -> bool:
    try:
        return len(found) == len(expected) and all(Decimal(a) == Decimal(b) for a, b in zip(found, expected))
    except InvalidOperation:
        return False


def _compare_result(file: Path, expected: Any, limits: CodeLimits) -> Verdict:
    # The program could have put anything at this place.
    if not file.is_file() or file.is_symlink():
        return Verdict("wrong", "it returned nothing that JSON can say")
    if _size(file) >= limits.file_bytes:
        return Verdict("wrong", f"more than {limits.file_bytes} bytes of result")
    try:
        found = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return Verdict("wrong", "it returned nothing that JSON can say")
    # Through JSON and back: a tuple equals a list, as in the exercises.
    if found == json.loads(json.dumps(expected)):
        return Verdict("correct")
    return Verdict("wrong", f"returned {shorten(json.dumps(found))}, expected {shorten(json.dumps(expected))}")
