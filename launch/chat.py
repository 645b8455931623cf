"""A chat in the terminal, with a model in this process or behind any OpenAI-compatible endpoint.

    python -m launch.chat                                   the small reasoning model that comes with jaxstack
    python -m launch.chat --model=FOLDER                    a Hugging Face folder
    python -m launch.chat --url=http://127.0.0.1:8000/v1    a server
    echo 'Hello!' | python -m launch.chat --model=FOLDER    every line is a message; answers alone on stdout

Ctrl-C stops an answer, Ctrl-D ends the chat. A line that ends in a backslash goes on in the next one; so does anything
between lines of three double quotes. Commands:

    /reset                 forget the conversation
    /system TEXT           begin the conversation with this instruction; without TEXT, with none
    /set temperature=0.5   any field of a request, its value as JSON; without a value, back to the default
    /set                   show what is set
    /save FILE             write the conversation as JSON
    /help, /quit
"""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from absl import flags

from jaxstack.engine import Engine
from jaxstack.runtime.errors import UserError
from jaxstack.serving import EndpointModel, ServerConfig
from jaxstack.serving.endpoints import Endpoints
from jaxstack.serving.errors import ApiError
from jaxstack.serving.exchange import encode_json
from jaxstack.serving.language_model import plain_errors
from launch import engine_flags, job

_URL = flags.DEFINE_string("url", None, "endpoint to talk to, with the /v1, instead of a model in this process")
_API_KEY = flags.DEFINE_string("api_key", None, "key for the endpoint")
_URL_MODEL = flags.DEFINE_string("url_model", None, "the model's name there; by default the first it lists")
_SYSTEM = flags.DEFINE_string("system", None, "instruction that the conversation begins with")
flags.adopt_module_key_flags(engine_flags)

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_QUOTES = '"""'


class Source(Protocol):
    """Where answers come from."""

    def deltas(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The `delta` objects of one streamed answer. Raises UserError or ApiError."""
        ...


class InProcess:
    """A started engine, asked as the server asks it."""

    def __init__(self, engine: Engine, config: ServerConfig):
        self._endpoints = Endpoints(engine, config)

    def close(self) -> None:
        self._endpoints.close()

    async def deltas(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        reply = await self._endpoints.prepare("/v1/chat/completions", encode_json({**body, "stream": True}))
        async with contextlib.aclosing(self._endpoints.chunks(reply)) as groups:
            async for chunks in groups:
                for chunk in chunks or ():
                    for choice in chunk["choices"]:
                        yield choice["delta"]


class Endpoint:
    """A server."""

    def __init__(self, url: str, model: str | None, api_key: str | None):
        self._url = url
        # The client of `EndpointModel` knows about local addresses, and what the first model is called.
        self._model = EndpointModel(url, model=model, api_key=api_key, max_retries=1)

    def close(self) -> None:
        self._model.close()

    async def deltas(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        name = await asyncio.to_thread(lambda: self._model.model)
        with plain_errors(self._url):
            async with self._model.async_client() as client:
                messages = body.pop("messages")
                stream = await client.chat.completions.create(
                    model=name, messages=messages, stream=True, extra_body=body
                )
                try:
                    async for chunk in stream:
                        for choice in chunk.choices:
                            yield choice.delta.model_dump(exclude_none=True)
                finally:
                    await stream.close()


class Chat:
    """One conversation.

    Args:
      source: what answers.
      lines: the user's lines, without their ends.
      out: where answers go.
      notes: where everything else goes, for instance what a command says.
      shows_thinking: whether thinking is printed, dimmed.
    """

    def __init__(
        self,
        source: Source,
        lines: Iterator[str],
        out: TextIO,
        notes: TextIO,
        *,
        shows_thinking: bool,
        system: str = "",
    ):
        self._source, self._lines, self._out, self._notes = source, lines, out, notes
        self._shows_thinking = shows_thinking
        self.system = system
        self.talk: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {}
        self._commands: dict[str, Callable[[str], None]] = {
            "/reset": lambda _: self.talk.clear(),
            "/system": self._set_system,
            "/set": self._set,
            "/save": self._save,
            "/help": lambda _: self._note((__doc__ or "").partition("Commands:\n\n")[2].rstrip()),
        }

    def run(self) -> None:
        """Until the lines end, or `/quit`."""
        with asyncio.Runner() as runner:
            for text in self._messages():
                word, _, rest = text.strip().partition(" ")
                if word in ("/quit", "/exit"):
                    return
                if word.startswith("/"):
                    self._obey(word, rest.strip())
                else:
                    self._say(runner, text)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As they are sent."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.talk]

    # ------------------------------------------------------------------------------------------------------- messages

    def _messages(self) -> Iterator[str]:
        """Lines put together where one message is several."""
        for line in self._lines:
            if line.strip() == _QUOTES:
                parts = []
                for line in self._lines:
                    if line.strip() == _QUOTES:
                        break
                    parts.append(line)
                text = "\n".join(parts)
            else:
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + next(self._lines, "")
                text = line
            if text.strip():
                yield text

    def _say(self, runner: asyncio.Runner, text: str) -> None:
        self.talk.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            runner.run(self._answer(pieces))
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except (UserError, ApiError) as error:
            self._note(f"error: {' '.join(str(error).split())}")
            if not pieces:
                self.talk.pop()
                return
        self.talk.append({"role": "assistant", "content": "".join(pieces)})

    async def _answer(self, pieces: list[str]) -> None:
        """Prints an answer as it comes; what the model should remember of it goes to `pieces`."""
        body = {"messages": self.messages, **self.settings}
        began, count, dimmed = time.perf_counter(), 0, False

        def dim(on: bool) -> None:
            nonlocal dimmed
            if on != dimmed:
                self._out.write(_DIM if on else f"{_PLAIN}\n\n")
                dimmed = on

        try:
            async with contextlib.aclosing(self._source.deltas(body)) as deltas:
                async for delta in deltas:
                    thought = delta.get("reasoning_content") or delta.get("reasoning")
                    count += 1
                    if thought and self._shows_thinking:
                        dim(True)
                        self._out.write(thought)
                    said = delta.get("content") or ""
                    for call in delta.get("tool_calls") or ():
                        function = call["function"]
                        said += f"\n{function['name']} " if function.get("name") else ""
                        said += function.get("arguments") or ""
                    if said:
                        dim(False)
                        pieces.append(said)
                        self._out.write(said)
                    self._out.flush()
        finally:
            if dimmed:
                self._out.write(_PLAIN)
            self._out.write("\n")
            self._out.flush()
        if self._shows_thinking:
            self._note(f"{_DIM}({time.perf_counter() - began:.1f} s){_PLAIN}")

    # ------------------------------------------------------------------------------------------------------- commands

    def _obey(self, word: str, rest: str) -> None:
        command = self._commands.get(word)
        if command is None:
            self._note(f"unknown command {word}; /help lists them")
            return
        try:
            command(rest)
        except UserError as error:
            self._note(f"error: {error}")

    def _set_system(self, text: str) -> None:
        self.system = text

    def _set(self, text: str) -> None:
        for assignment in [text] if text else []:
            name, equals, value = (part.strip() for part in assignment.partition("="))
            if not equals or not name.isidentifier() or name in ("messages", "stream"):
                raise UserError(f"/set: found {text!r}, expected FIELD=VALUE")
            if not value:
                self.settings.pop(name, None)
                continue
            try:
                self.settings[name] = json.loads(value)
            except ValueError:
                self.settings[name] = value
        shown = ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(self.settings.items()))
        self._note(shown or "nothing is set")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: found no name, expected FILE")
        try:
            Path(name).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"/save: cannot write {name!r} ({error.strerror})") from None
        self._note(f"saved {len(self.messages)} messages to {name}")

    def _note(self, text: str) -> None:
        print(text, file=self._notes, flush=True)


def typed_lines(prompt: str = "> ") -> Iterator[str]:
    """Lines typed at a terminal; Ctrl-C begins the line again."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and keys to edit with
    while True:
        try:
            yield input(prompt)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends the chat)")
        except EOFError:
            print()
            return


def run() -> None:
    if _URL.value and engine_flags.MODEL.value:
        raise job.BadUsage("--url and --model exclude each other")
    typed = sys.stdin.isatty()
    lines = typed_lines() if typed else (line.rstrip("\r\n") for line in sys.stdin)
    notes = sys.stdout if typed else sys.stderr

    def talk(source: Source) -> None:
        shows = sys.stdout.isatty()
        Chat(source, lines, sys.stdout, notes, shows_thinking=shows, system=_SYSTEM.value or "").run()

    if _URL.value:
        with contextlib.closing(Endpoint(_URL.value, _URL_MODEL.value, _API_KEY.value)) as endpoint:
            talk(endpoint)
        return
    folder = engine_flags.model_folder()
    config = ServerConfig(tool_parser=engine_flags.TOOLS.value, reasoning_parser=engine_flags.REASONING.value)
    # One answer at a time: a small engine is compiled sooner. Flags that were given count.
    small = {} if flags.FLAGS["max_sequences"].present else {"max_sequences": 1}
    engine = engine_flags.load_engine(folder, engine_flags.engine_config(**small))
    try:
        engine.start()
        with contextlib.closing(InProcess(engine, config)) as source:
            talk(source)
    finally:
        engine.close()


if __name__ == "__main__":
    job.main(run)
