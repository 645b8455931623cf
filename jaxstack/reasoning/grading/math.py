r"""Grades mathematical answers: the last balanced \boxed{} after the thought, compared by math-verify.

math-verify reads LaTeX into sympy, which may compute without end (10^{10^{10}}), exhaust the memory or overflow the
stack. So comparisons run in worker processes of their own, one at a time each, under a wall-clock limit enforced by
killing the worker and starting another; the verdict is then `timeout`, not `wrong`.
"""

import contextlib
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxstack.reasoning.grading.answer import after_thought, last_boxed, last_number, split_list, unboxed
from jaxstack.reasoning.grading.verdict import Verdict, shorten
from jaxstack.runtime.errors import UserError

_WORKER = Path(__file__).with_name("math_worker.py")
# A longer answer is refused unread.
LONGEST_ANSWER = 2_000
_START_LIMIT_S = 120.0
_MEMORY_BYTES = 2 << 30
_LONGEST_RESULT = 1 << 16
_INTEGER = re.compile(r"-?0*\d{1,18}")


def grade_integer(text: str, gold: int, *, low: int = 0, high: int = 999, thinking: bool = False) -> Verdict:
    r"""Grades an answer that must be an integer in `low..high`, as in AIME: exact, without a worker.

    The box holds the integer alone; leading zeros, blanks, dollars and a `\text{}` around it are allowed.
    """
    answer = extract(text, thinking=thinking)
    if answer is None:
        return no_answer(text, thinking)
    bare = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}|\\[,;!: ]|\s|\$", r"\1", answer)
    if not _INTEGER.fullmatch(bare):
        return Verdict("wrong", f"found {shorten(answer)!r}, expected an integer", answer)
    if not low <= int(bare) <= high:
        return Verdict("wrong", f"found {int(bare)}, expected {low} to {high}", answer)
    return (
        Verdict("correct", "", answer) if int(bare) == gold else Verdict("wrong", f"{int(bare)} is not {gold}", answer)
    )


def extract(text: str, *, thinking: bool = False) -> str | None:
    r"""The content of the last balanced `\boxed{}` after the thought; None if there is none (see `after_thought`)."""
    rest = after_thought(text, thinking=thinking)
    return None if rest is None else last_boxed(rest) or None


def no_answer(text: str, thinking: bool) -> Verdict:
    ended = after_thought(text, thinking=thinking) is not None
    return Verdict("no_answer", "no \\boxed{} after the thought" if ended else "the thought never ended")


def normalised(answer: str) -> str:
    r"""`answer` without what does not change its value: blanks, dollars, `\left`, spacing; `\dfrac` becomes `\frac`."""
    answer = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;!: ]|\s|\$|\.$", "", answer.strip())
    return re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)


class MathGrader:
    """A pool of workers that compare answers; safe to use from several threads. To be closed.

    Args:
      workers: comparisons at once. A worker is started when first needed, in about two seconds.
      limit_s: wall-clock time of one comparison.
    """

    def __init__(self, *, workers: int = 2, limit_s: float = 5.0):
        if workers < 1:
            raise UserError(f"math grader: found {workers} workers, expected at least 1")
        if not limit_s > 0:
            raise UserError(f"math grader: found a limit of {limit_s} s, expected more than 0")
        self.limit_s = limit_s
        self._closed = False
        # Last in, first out: workers that run are used before others are started.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker(limit_s) for _ in range(workers)]
        for worker in self._workers:
            self._free.put(worker)

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        for worker in self._workers:
            worker.kill()

    def grade(
        self, text: str, gold: str, *, tolerance: float | None = None, several: bool = False, thinking: bool = False
    ) -> Verdict:
        r"""Grades a completion strictly: nothing but the last balanced `\boxed{}` after the thought is looked at.

        Args:
          text: the completion.
          gold: the true answer, LaTeX or plain, boxed or not.
          tolerance: the largest absolute difference between numbers that counts as equal.
          several: the answer is a list, whose order does not matter.
          thinking: see `after_thought`.

        Raises:
          UserError: math-verify is not installed.
        """
        answer = extract(text, thinking=thinking)
        if answer is None:
            return no_answer(text, thinking)
        return self.compare(answer, gold, tolerance=tolerance, several=several)

    def grade_last_number(
        self, text: str, gold: str, *, tolerance: float | None = None, thinking: bool = False
    ) -> Verdict:
        """As `grade`, but where there is no box the last number after the thought is the answer.

        It credits luck, and is meant to be reported beside the strict figure, never instead of it.
        """
        strict = extract(text, thinking=thinking)
        rest = after_thought(text, thinking=thinking)
        answer = strict if strict is not None or rest is None else last_number(rest)
        return no_answer(text, thinking) if answer is None else self.compare(answer, gold, tolerance=tolerance)

    def compare(self, answer: str, gold: str, *, tolerance: float | None = None, several: bool = False) -> Verdict:
        """Grades an extracted answer; arguments as in `grade`."""
        answer, gold = unboxed(answer), unboxed(gold)
        if len(answer) > LONGEST_ANSWER:
            return Verdict("wrong", f"an answer of {len(answer)} characters, at most {LONGEST_ANSWER} are read", answer)
        if normalised(answer) == normalised(gold) != "":
            return Verdict("correct", "", answer)
        golds, answers = (split_list(gold), split_list(answer)) if several else ([gold], [answer])
        if len(golds) != len(answers):
            return Verdict("wrong", f"found {len(answers)} answers, expected {len(golds)}", answer)
        worker = self._free.get()
        try:
            result = worker.ask({"golds": golds, "answers": answers, "tolerance": tolerance}, self.limit_s)
        except _Died as error:
            return Verdict("error", "the grader was closed" if self._closed else f"the worker died ({error})", answer)
        finally:
            self._free.put(worker)
        if result is None:
            return Verdict("timeout", f"the comparison took more than {self.limit_s:g} s", answer)
        if "error" in result:
            return Verdict("error", result["error"], answer)
        if result["equal"]:
            return Verdict("correct", "", answer)
        return Verdict("wrong", f"{shorten(answer)} is not {shorten(gold)}", answer)


class _Died(Exception):
    """The worker ended by itself."""


class _Worker:
    """One process, started when it is first asked and again after it was killed. Used by one thread at a time."""

    def __init__(self, limit_s: float):
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any] | None:
        """The result; None if it took longer than `limit_s`, and the process is gone."""
        process = self._process or self._start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process, limit_s)
        except (OSError, ValueError, _Died) as error:
            code = self.kill(died=True)
            raise _Died(f"exit status {code}") from error
        if line is None:
            self.kill()
            return None
        return json.loads(line)

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps the worker's folder off the import path: it holds a math.py, and so would shadow the library's.
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(3 * self._limit_s + 10), str(_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            line = _read_line(process, _START_LIMIT_S)
        except (OSError, ValueError, _Died) as error:
            code = self.kill(died=True)
            raise _Died(f"while it started, exit status {code}") from error
        if line is None:
            self.kill()
            raise UserError(f"math grader: its worker did not start within {_START_LIMIT_S:g} s")
        told = json.loads(line)
        if "missing" in told:
            self.kill()
            raise UserError(f"math grader: {told['missing']}; expected math-verify to be installed")
        return process

    def kill(self, *, died: bool = False) -> int | None:
        """Ends the process, if there is one; returns its exit status, its own if it had `died`."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2 if died else 0)
        code = process.poll()
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()
        return process.returncode if code is None else code


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes | None:
    """The next line of its output; None after `limit_s`."""
    assert process.stdout is not None
    file, line = process.stdout.fileno(), b""
    poll = select.poll()
    poll.register(file, select.POLLIN | select.POLLHUP)
    deadline = time.monotonic() + limit_s
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        piece = os.read(file, _LONGEST_RESULT)
        if not piece or len(line) > _LONGEST_RESULT:
            raise _Died
        line += piece
    return line
