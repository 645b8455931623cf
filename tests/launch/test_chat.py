"""The terminal chat, with an engine in this process and over HTTP: what it prints, remembers, and does at Ctrl-C."""

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_model import byte_model, save
from programs import start

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.training.initialize import fresh_decoder

MODEL = byte_model(4096, initializer_range=0.3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = EngineConfig(max_sequences=1, max_batch_tokens=16, num_pages=300)
    engine = Engine(fresh_decoder(MODEL), byte_tokenizer(), settings)
    engine.start(progress=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=["in process", "over http"])
def source(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Any]:
    from launch.chat import Endpoint, InProcess

    if request.param == "in process":
        with contextlib.closing(InProcess(engine, ServerConfig())) as source:
            yield source
        return
    with (
        BackgroundServer(engine, ServerConfig(port=0)) as server,
        contextlib.closing(Endpoint(server.base_url, None, None)) as source,
    ):
        yield source


class Screen(io.StringIO):
    """Does something when enough has been printed."""

    def __init__(self, limit: int, action: Any):
        super().__init__()
        self._limit, self._action = limit, action

    def write(self, text: str) -> int:
        done = super().write(text)
        if self._action is not None and len(self.getvalue()) >= self._limit:
            action, self._action = self._action, None
            action()
        return done


def chat(source: Any, lines: list[str], out: io.StringIO | None = None) -> tuple[Any, str, str]:
    from launch.chat import Chat

    out, notes = out or io.StringIO(), io.StringIO()
    talk = Chat(source, iter(lines), out, notes, shows_thinking=False)
    talk.run()
    return talk, out.getvalue(), notes.getvalue()


SET = ["/set temperature=0", "/set max_tokens=12", "/set ignore_eos=true"]


def test_what_is_said_is_remembered(source: Any, engine: Engine) -> None:
    lines = [*SET, "/system be brief", "hello", '"""', "a", " b", '"""', "one \\", "two", "/quit", "not read"]
    talk, out, _ = chat(source, lines)
    asked = [m["content"] for m in talk.talk if m["role"] == "user"]
    assert asked == ["hello", "a\n b", "one \ntwo"]
    said = [m["content"] for m in talk.talk if m["role"] == "assistant"]
    assert out == "".join(text + "\n" for text in said)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for i in range(3):
        before = [{"role": "system", "content": "be brief"}, *talk.talk[: 2 * i + 1]]
        prompt = engine.tokenizer.encode(engine.tokenizer.render_chat(before), add_special_tokens=False)
        assert engine.generate([prompt], params)[0].completions[0].text == said[i]


def test_commands(source: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = [*SET, "/set max_tokens=", "/set", "/set max_tokens=3", "hé", f"/save {file}", "/reset", "again"]
    talk, _, notes = chat(source, [*lines, "/system", "/nothing", "/set 5", f"/save {tmp_path}", "/save", "/help"])
    assert [m["role"] for m in json.loads(file.read_text())] == ["user", "assistant"]
    assert talk.talk[0] == {"role": "user", "content": "again"} and len(talk.talk) == 2
    for note in (
        "\nignore_eos=true, temperature=0\n",
        "saved 2 messages",
        "unknown command /nothing",
        "/set: found '5'",
        "/save: cannot write",
        "/save: found no name",
        "forget the conversation",
    ):
        assert note in notes


def test_a_refused_message_is_taken_back(source: Any) -> None:
    talk, out, notes = chat(source, [*SET, "/set temperature=-1", "hello", "/set temperature=0", "hello"])
    assert "error: " in notes and "temperature: found -1" in notes and "\n" not in notes.partition("error: ")[2][:20]
    assert [m["content"] for m in talk.talk if m["role"] == "user"] == ["hello"] and out.strip()


def test_ctrl_c_stops_the_answer_and_not_the_chat(source: Any, engine: Engine, request: pytest.FixtureRequest) -> None:
    # A parallel run's workers ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    begin = time.perf_counter()
    screen = Screen(50, lambda: os.kill(os.getpid(), signal.SIGINT))
    lines = ["/set temperature=0", "/set ignore_eos=true", "hello", "/set max_tokens=3", "and?"]
    talk, _, notes = chat(source, lines, screen)
    assert "(stopped)" in notes and len(talk.talk) == 4
    assert 40 < len(talk.talk[1]["content"]) < 3000 and talk.talk[3]["content"]
    while engine.stats().running:
        assert time.perf_counter() - begin < 600
        time.sleep(0.01)


def test_as_a_program_with_lines_from_a_pipe(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-model"
    save(folder, MODEL)
    done = start("launch.chat", f"--model={folder}", "--max_batch_tokens=16")
    out, errors = done.communicate("/set max_tokens=5\n/set temperature=0\nhello\n", timeout=600)
    assert done.returncode == 0, errors
    assert out.strip() and "\x1b" not in out and "Traceback" not in errors


def test_thinking_is_dimmed_and_not_remembered() -> None:
    from launch.chat import Chat

    class Thinker:
        async def deltas(self, body: dict[str, Any]) -> Any:
            yield {"role": "assistant", "content": ""}
            yield {"reasoning_content": "hm"}
            yield {"reasoning_content": "m"}
            yield {"content": "yes"}
            yield {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a"'}}]}
            yield {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}

    out = io.StringIO()
    talk = Chat(Thinker(), iter(["x"]), out, io.StringIO(), shows_thinking=True)
    talk.run()
    assert out.getvalue() == '\x1b[2mhmm\x1b[0m\n\nyes\nf {"a": 1}\n'
    assert talk.talk[1]["content"] == 'yes\nf {"a": 1}'
    assert threading.current_thread() is threading.main_thread()
