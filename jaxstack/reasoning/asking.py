"""Asking a language model for many answers that take long: side by side, tried again, each on disk when it is there.

Work is done in threads, rows come back as they are finished, and go into a `RowFile`, which a later run reads to do
what is left.
"""

import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxstack.engine import Completion, EngineDead, SamplingParams
from jaxstack.runtime.errors import UserError
from jaxstack.serving import LanguageModel

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Unanswered(Exception):
    """Every try failed; the message is the last one's."""


def ask(
    model: LanguageModel,
    messages: Sequence[Mapping[str, Any]],
    sampling: SamplingParams,
    *,
    chat_kwargs: Mapping[str, Any] | None = None,
    retries: int = 3,
    pause_s: float = 1.0,
) -> Completion:
    """One answer, after up to `retries` further tries with pauses that double. What a failure says is never an answer.

    Raises:
      Unanswered: every try failed.
      EngineDead: the engine in this process has died; nothing will be answered any more.
    """
    for attempt in range(retries + 1):
        try:
            return model.generate([list(messages)], [sampling], chat_kwargs=chat_kwargs)[0].completions[0]
        except EngineDead:
            raise
        except Exception as error:
            if attempt == retries:
                raise Unanswered(f"{type(error).__name__}: {error}"[:500]) from error
            time.sleep(pause_s * 2**attempt)
    raise AssertionError


def side_by_side(work: Callable[[_Item], _Result], items: Sequence[_Item], threads: int) -> Iterator[_Result]:
    """`work` of every item, as it is finished; what it raises ends all.

    The threads are daemons: whoever interrupts this does not wait for answers under way.
    """
    waiting: queue.SimpleQueue[_Item] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[_Result | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()
    for item in items:
        waiting.put(item)

    def run() -> None:
        while not stop.is_set():
            try:
                item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((work(item), None))
            except BaseException as error:
                finished.put((None, error))
                return

    for i in range(min(threads, len(items))):
        threading.Thread(target=run, name=f"answer-{i}", daemon=True).start()
    try:
        for _ in items:
            result, error = finished.get()
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    finally:
        stop.set()


def digest(*parts: Any) -> bytes:
    """The sha256 of JSON-ready values: names a request by all it depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


class RowFile:
    """A JSONL file of rows with a "key", appended one by one. A killed run loses what was under way and nothing else.

    `rows` are those that were there and those appended since; a row with an "error" is not among them, so that it is
    had again. A torn last line is cut off.

    Raises:
      UserError: the file cannot be written, or has other rows.
    """

    def __init__(self, path: str | Path, *, wanted: set[str]):
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            self._file = self.path.open("ab+")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._read(wanted)
        except BaseException:
            self._file.close()
            raise

    def _read(self, wanted: set[str]) -> None:
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if row["key"] in wanted and "error" not in row:
                    self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{number}: no row of such a run; expected another folder") from None
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def append(self, row: dict[str, Any]) -> None:
        """In the page cache when this returns: SIGKILL does not lose it."""
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()
        if "error" not in row:
            self.rows[row["key"]] = row

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
