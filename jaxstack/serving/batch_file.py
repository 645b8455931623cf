"""OpenAI's batch files: requests in as JSON lines, answers out as JSON lines, every one exactly once.

An answer is appended and forced to disk as one line when it is complete, so a run that was killed loses what was under
way and nothing else; the next run reads the answers that are there, cuts off a last line that is torn, and does the
rest. Answers come in the order in which they are finished; `custom_id` says whose they are.
"""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from jaxstack.engine import Engine, EngineDead
from jaxstack.runtime.errors import UserError
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.endpoints import WHOLE_ANSWERS, Endpoints
from jaxstack.serving.errors import ApiError, as_api_error, shorten
from jaxstack.serving.exchange import encode_json
from jaxstack.serving.protocol import read_json

log = logging.getLogger(__name__)

# What stands for a line's identity: its custom_id, or its number if it has none.
_Key = str | int


def answer_file(
    engine: Engine, source: Path, target: Path, config: ServerConfig, *, concurrency: int, progress: bool = True
) -> dict[str, Any]:
    """Answers every line of `source` that `target` does not answer yet. Blocks.

    Args:
      engine: started.
      source: lines `{"custom_id", "method": "POST", "url", "body"}`.
      target: created, or continued: lines `{"id", "custom_id", "response": {"status_code", "request_id", "body"},
        "error"}`. A request that is refused has its error object as the body; a line that is no request has `error`.
      config: names and limits, as a server's.
      concurrency: requests under way at once.
      progress: a bar with the remaining time on stderr.

    Returns: a summary: counts of requests, of those answered before, succeeded and failed now, and tokens.

    Raises:
      UserError: a file cannot be used: no such file, a `custom_id` twice, answers to other requests in `target`, or
        somebody else writes there.
      EngineDead: the engine has died; what was finished is in `target`.
    """
    keys = _read_keys(source)
    with _open_target(target) as out:
        done = _read_done(target, out, keys)
        run = _Run(engine, source, out, config, done, total=len(keys), progress=progress)
        asyncio.run(run.answer_all(concurrency))
    return {"requests": len(keys), "answered_before": len(done), **run.counts}


class _Run:
    def __init__(
        self,
        engine: Engine,
        source: Path,
        out: BinaryIO,
        config: ServerConfig,
        done: set[_Key],
        *,
        total: int,
        progress: bool,
    ):
        self._endpoints = Endpoints(engine, config)
        self._source, self._out, self._done = source, out, done
        self._bar = tqdm(total=total, initial=len(done), desc="batch", unit="request", disable=not progress)
        self.counts = {"succeeded": 0, "failed": 0, "prompt_tokens": 0, "completion_tokens": 0}

    async def answer_all(self, concurrency: int) -> None:
        running: set[asyncio.Task[None]] = set()
        try:
            with self._bar:
                for number, line in _lines(self._source):
                    if _key(number, line) in self._done:
                        continue
                    if len(running) >= concurrency:
                        running = await self._some_finished(running)
                    running.add(asyncio.create_task(self._answer(number, line)))
                while running:
                    running = await self._some_finished(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._endpoints.close()

    async def _some_finished(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return running

    async def _answer(self, number: int, line: bytes) -> None:
        entry: dict[str, Any] = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": None,
            "response": None,
            "error": None,
        }
        try:
            request = _read_request(line)
            entry["custom_id"] = request["custom_id"]
        except ApiError as error:
            with contextlib.suppress(ApiError):
                entry["custom_id"] = _custom_id(read_json(line))
            entry["error"] = {"code": "invalid_line", "message": error.message, "line": number}
        else:
            status, body = await self._respond(request["url"], request["body"])
            entry["response"] = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        self._write(entry)

    async def _respond(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        while True:
            try:
                if body.get("stream"):
                    raise ApiError(400, "stream: not in a batch", param="stream")
                return 200, await self._endpoints.answer(url, encode_json(body))
            except EngineDead:
                raise
            except Exception as error:
                known = as_api_error(error)
                if known is None:
                    log.exception("a request to %s failed", url)
                    known = ApiError(500, f"internal error ({type(error).__name__})", code="internal_error")
                if known.status != 429:
                    return known.status, known.body
                await asyncio.sleep(0.1)  # the engine's queue is full of our own requests

    def _write(self, entry: dict[str, Any]) -> None:
        self._out.write(encode_json(entry) + b"\n")
        self._out.flush()
        os.fsync(self._out.fileno())
        response = entry["response"]
        ok = response is not None and response["status_code"] == 200
        self.counts["succeeded" if ok else "failed"] += 1
        if ok:
            for name in ("prompt_tokens", "completion_tokens"):
                self.counts[name] += response["body"]["usage"].get(name, 0)
        self._bar.update()


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"input: cannot read {str(source)!r} ({error.strerror})") from None


def _custom_id(content: dict[str, Any]) -> str | None:
    found = content.get("custom_id")
    return found if isinstance(found, str) and found else None


def _key(number: int, line: bytes) -> _Key:
    try:
        return _custom_id(read_json(line)) or number
    except ApiError:
        return number


def _read_keys(source: Path) -> set[_Key]:
    seen: dict[_Key, int] = {}
    for number, line in _lines(source):
        key = _key(number, line)
        if key in seen:
            raise UserError(
                f"input: {source}: found custom_id {shorten(key)} in lines {seen[key]} and {number}, expected each once"
            )
        seen[key] = number
    return set(seen)


def _read_request(line: bytes) -> dict[str, Any]:
    request = read_json(line)
    if _custom_id(request) is None:
        raise ApiError(400, f"custom_id: found {shorten(request.get('custom_id'))}, expected a string, not empty")
    if request.get("method") != "POST":
        raise ApiError(400, f"method: found {shorten(request.get('method'))}, expected 'POST'")
    if request.get("url") not in WHOLE_ANSWERS:
        raise ApiError(400, f"url: found {shorten(request.get('url'))}, expected one of {', '.join(WHOLE_ANSWERS)}")
    if not isinstance(request.get("body"), dict):
        raise ApiError(400, f"body: found {shorten(request.get('body'))}, expected an object")
    return request


@contextlib.contextmanager
def _open_target(target: Path) -> Iterator[BinaryIO]:
    try:
        with target.open("ab+") as out:
            try:
                fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"output: another run is writing {str(target)!r}") from None
            yield out
    except OSError as error:
        raise UserError(f"output: cannot write {str(target)!r} ({error.strerror})") from None


def _read_done(target: Path, out: BinaryIO, keys: set[_Key]) -> set[_Key]:
    """Who has been answered; a torn last line is cut off."""
    done: set[_Key] = set()
    whole = 0
    out.seek(0)
    for number, line in enumerate(out, 1):
        if not line.endswith(b"\n"):
            break
        try:
            entry = json.loads(line)
            error = entry["error"]
            key = entry["custom_id"] or error["line"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"output: {target}: line {number} is no answer of a batch; expected another file") from None
        if key not in keys:
            message = f"output: {target}: line {number} answers {shorten(key)}, which the input does not ask"
            raise UserError(message)
        if key in done:
            raise UserError(f"output: {target}: line {number} answers {shorten(key)} a second time")
        done.add(key)
        whole += len(line)
    out.truncate(whole)
    out.seek(0, os.SEEK_END)
    return done
