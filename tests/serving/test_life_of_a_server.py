"""From warm-up to shutdown, and what happens when the engine is slow, fails or dies.

A real engine of test size is too quick and too healthy for this. A scripted one stands in for it, with the same
interface.
"""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from jaxstack.engine import Delta, EngineDead, EngineStats, QueueFull, SamplingParams
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer, ServerConfig

Script = Callable[[], AsyncIterator[Delta]]


class ScriptedEngine:
    """Says what a test tells it to: `script` yields the pieces of every request."""

    def __init__(self, script: Script | None = None):
        self.script = script or self.letters
        self.tokenizer, self.max_model_len = byte_tokenizer(), 100
        self.model_config = SimpleNamespace(vocab_size=264)
        self.may_start = threading.Event()
        self.may_start.set()
        self.dead = False
        self.closed = 0
        self.adapters: tuple[str, ...] = ()
        self.more = asyncio.Event()

    async def letters(self) -> AsyncIterator[Delta]:
        for letter in "abc":
            yield piece(letter)
        yield piece("", end="stop")

    def start(self) -> None:
        self.may_start.wait()

    def close(self) -> None:
        pass

    def on_finish(self, callback: Any) -> None:
        pass

    def check_prompt(self, prompt: list[int], sampling: SamplingParams) -> list[int]:
        return prompt

    def abort(self, request_id: str) -> None:
        pass  # it is stuck: the server ends what came so far by itself

    async def stream(
        self, prompt: list[int], sampling: SamplingParams, request_id: str, **settings: Any
    ) -> AsyncIterator[Delta]:
        try:
            async for delta in self.script():
                yield delta
        finally:
            self.closed += 1

    def stats(self) -> EngineStats:
        values: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(EngineStats)}
        values |= {"finished": {}, "iteration_tokens": {}, "alive": not self.dead, "warm_progress": 0.25}
        return EngineStats(**values)


def piece(text: str, end: Any = None) -> Delta:
    return Delta(0, text, (1,) if text else (), (), end, None, 1, 0)


def serving(engine: Any, **config: Any) -> BackgroundServer:
    return BackgroundServer(engine, ServerConfig(port=0, model_name="m", **config))


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=600) as http:
        yield http


def ask(http: httpx.Client, server: BackgroundServer, **body: Any) -> httpx.Response:
    return http.post(f"{server.base_url}/completions", json={"prompt": "x", **body})


def code(answer: httpx.Response) -> str:
    return answer.json()["error"]["code"]


def test_warming_up(http: httpx.Client) -> None:
    engine = ScriptedEngine()
    engine.may_start.clear()
    server = serving(engine)
    entering = threading.Thread(target=server.__enter__)
    entering.start()
    answer = None
    while answer is None:
        try:
            answer = http.get(f"{server.url}/health")
        except httpx.TransportError:
            time.sleep(0.01)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert code(answer) == "warming_up" and answer.json()["error"]["progress"] == 0.25
    assert ask(http, server).status_code == 503 and http.get(f"{server.base_url}/models").status_code == 200
    engine.may_start.set()
    entering.join()
    assert http.get(f"{server.url}/health").status_code == 200 and ask(http, server).status_code == 200
    server.__exit__(None, None, None)


def test_an_engine_that_does_not_start() -> None:
    engine = ScriptedEngine()

    def start() -> None:
        raise UserError("num_pages: found 1")

    engine.start = start  # type: ignore[method-assign]
    with pytest.raises(UserError, match="num_pages"):
        serving(engine, dead_grace_s=0.0).__enter__()


def test_a_dead_engine(http: httpx.Client) -> None:
    engine = ScriptedEngine()
    with serving(engine, dead_grace_s=600.0) as server:
        engine.dead = True
        for answer in (http.get(f"{server.url}/health"), ask(http, server)):
            assert answer.status_code == 503 and code(answer) == "engine_dead"
    engine.dead = False
    with serving(engine, dead_grace_s=0.1) as server:
        engine.dead = True
        server._thread.join(300)
        assert not server._thread.is_alive() and server.server.failure is not None


def raising(error: Exception) -> Script:
    async def script() -> AsyncIterator[Delta]:
        raise error
        yield  # makes it a generator

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (QueueFull("3 requests wait"), 429, "rate_limit_exceeded"),
        (EngineDead("gone"), 503, "engine_dead"),
        (UserError("prompt: found a bad one"), 400, None),
        (KeyError("secret detail"), 500, "internal_error"),
    ],
)
def test_errors_before_the_first_token_have_their_status(
    http: httpx.Client, stream: bool, error: Exception, status: int, expected: str | None
) -> None:
    engine = ScriptedEngine(raising(error))
    with serving(engine) as server:
        answer = ask(http, server, stream=stream)
        assert answer.status_code == status and code(answer) == expected
        assert "secret" not in answer.text
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        engine.script = engine.letters
        assert ask(http, server).json()["choices"][0]["text"] == "abc"


def test_a_failure_of_the_engine_is_500_and_ends_a_stream_without_done(http: httpx.Client) -> None:
    async def script() -> AsyncIterator[Delta]:
        yield piece("a")
        await asyncio.sleep(0.05)
        yield piece("", end="error")

    engine = ScriptedEngine(script)
    with serving(engine) as server:
        whole = ask(http, server)
        assert whole.status_code == 500 and code(whole) == "engine_error"
        lines = ask(http, server, stream=True).text.split("\n\n")
        assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == "a"
        assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert lines[2:] == [""]
        assert engine.closed == 2


def test_a_deadline_before_the_first_token(http: httpx.Client) -> None:
    async def script() -> AsyncIterator[Delta]:
        await asyncio.sleep(60)
        yield piece("a", end="stop")

    engine = ScriptedEngine(script)
    with serving(engine, request_timeout_s=0.2) as server:
        for stream in (False, True):
            answer = ask(http, server, stream=stream, timeout_s=5)
            assert answer.status_code == 408 and code(answer) == "timeout"
        assert engine.closed == 2


def test_a_silent_stream_sends_comments_and_the_headers_of_a_stream(http: httpx.Client) -> None:
    go_on = threading.Event()  # what is to be said comes when the comment has been read

    async def script() -> AsyncIterator[Delta]:
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        yield piece("a", end="stop")

    def events(answer: httpx.Response) -> Iterator[str]:
        for line in answer.iter_lines():
            if line == ": waiting":
                go_on.set()
            if line:
                yield line

    with serving(ScriptedEngine(script), comment_interval_s=0.05) as server:
        with http.stream("POST", f"{server.base_url}/completions", json={"prompt": "x", "stream": True}) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
            said = list(events(answer))
        assert said[0] == ": waiting" and said[-1] == "data: [DONE]"
        assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
        go_on.clear()
        talk = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with http.stream("POST", f"{server.base_url}/chat/completions", json=talk) as answer:
            first, second = list(events(answer))[:2]
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert second == ": waiting"


def test_pieces_that_nobody_took_are_merged(http: httpx.Client) -> None:
    async def script() -> AsyncIterator[Delta]:
        for _ in range(1000):
            yield piece("é")
        yield piece("", end="length")

    with serving(ScriptedEngine(script)) as server:
        events = ask(http, server, stream=True).text.split("\n\n")[:-2]
        texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
        assert "".join(texts) == "é" * 1000 and len(texts) < 10


@pytest.mark.parametrize("patient", [True, False])
def test_shutdown_lets_answers_finish_or_ends_them(http: httpx.Client, patient: bool) -> None:
    begun, go_on = threading.Event(), threading.Event()

    async def script() -> AsyncIterator[Delta]:
        yield piece("a")
        begun.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        yield piece("b", end="stop")

    engine = ScriptedEngine(script)
    answers: list[httpx.Response] = []
    server = serving(engine, drain_timeout_s=600 if patient else 0.2)
    server.__enter__()
    asking = threading.Thread(target=lambda: answers.append(ask(http, server)))
    asking.start()
    begun.wait()
    server.server.stop()
    if patient:
        refused = None
        while refused is None or refused.status_code == 200:
            refused = http.get(f"{server.url}/health")
        assert refused.status_code == 503 and code(refused) == "shutting_down"
        assert ask(http, server).status_code == 503
        go_on.set()
    asking.join(300)
    server._thread.join(300)
    assert not server._thread.is_alive()
    (choice,) = answers[0].json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (("ab", "stop") if patient else ("a", "abort"))
    server.server.force_exit = True
    server.__exit__(None, None, None)


def test_a_port_in_use_is_said_in_one_line() -> None:
    with serving(ScriptedEngine()) as server:
        port = server._listener.getsockname()[1]
        with pytest.raises(UserError, match=f"port: cannot listen on 127.0.0.1:{port}"):
            BackgroundServer(ScriptedEngine(), ServerConfig(port=port))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="host: found 'no such host"):
        BackgroundServer(ScriptedEngine(), ServerConfig(host="no such host"))  # type: ignore[arg-type]
