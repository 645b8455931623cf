"""The live half: real replicas in three virtual zones, killed at random while they answer, and their controller with
them. Every answer is compared with the one that an undisturbed replica gave to the same question.

    found = run_local(Path("work/local"), seconds=60, kills=6, streams=40)

What is started is what a user would start: `python -m launch.fleet up service.yaml`.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from flax import nnx

from jaxstack.fleet.controller import LocalProvisioner
from jaxstack.fleet.controller.page import snapshot
from jaxstack.fleet.controller.running import bring_down
from jaxstack.fleet.controller.service_spec import VirtualZone
from jaxstack.models.checkpoint import save_decoder
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.progress import Progress
from launch.server_process import free_port

_REPLICAS = 3
_ZONES = tuple(VirtualZone(f"local-{letter}", capacity=2) for letter in "abc")
_START_S = 600.0
# Whole characters of two to four bytes; each byte is a token.
_CHARACTERS = "(é|ü|漢|字|🙂|𝄞){40}"

SERVICE = """
name: live
service:
  readiness_probe: {{path: /health, endpoint_probe_interval_seconds: 1}}
  replica_policy: {{min_replicas: {replicas}, spot_placer: dynamic_fallback}}
jaxstack:
  zones: {zones}
  backoff: {{base_seconds: 2, max_seconds: 8}}
  migration_limit: 20
  hold_seconds: 300
  drain_seconds: 5
envs:
  JAX_PLATFORMS: cpu
  JAX_COMPILATION_CACHE_DIR: {programs}
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS: 0
run: >
  exec $PYTHON -m launch.serve --model={model} --port=$PORT --served_model_name=tiny --trust_client_id
  --max_sequences=4 --max_batch_tokens=16 --page_size=8
"""


@dataclasses.dataclass(frozen=True)
class Question:
    """A body, and whether it is asked as a chat."""

    name: str
    body: dict[str, Any]

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


@dataclasses.dataclass
class Heard:
    """What a client has had of one answer. `gap_s` is the longest time that nothing came in it."""

    question: str
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    ids: set[str] = dataclasses.field(default_factory=set)
    finish: list[str] = dataclasses.field(default_factory=list)
    usage: tuple[int, int] | None = None
    resumed: int = 0
    gap_s: float = 0.0
    error: str | None = None

    def same_as(self, other: "Heard") -> bool:
        said = [(heard.tokens, heard.text, heard.finish, heard.usage) for heard in (self, other)]
        return self.error is None and len(self.ids) == 1 and said[0] == said[1]


def questions(tokens: int) -> list[Question]:
    """Ways of asking whose answers are determined: greedy and seeded, with stop strings, in characters of many bytes,
    as a chat, and at once instead of as a stream.
    """
    prompt = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    stream = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    seeded = {"temperature": 1.0, "seed": 11}
    letters = {"allowed_token_ids": list(range(97, 123))}
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4 * tokens, "guided_regex": _CHARACTERS}
    return [
        Question("greedy", {**prompt, **stream, "temperature": 0.0}),
        Question("seeded", {**prompt, **stream, **seeded}),
        Question("penalties", {**prompt, **stream, **seeded, **letters, "presence_penalty": 0.5, "top_p": 0.9}),
        Question("stop", {**prompt, **stream, **letters, **seeded, "stop": ["STOP"]}),
        Question("chat", {**chat, **stream, **seeded}),
        Question("whole", {**prompt, **seeded, "return_token_ids": True}),
    ]


def run_local(
    workdir: str | Path,
    *,
    seconds: float = 60.0,
    kills: int = 6,
    streams: int = 40,
    progress: Progress | Callable[[str], None] | None = None,
    controller_kills: int = 1,
    clients: int = 6,
    tokens: int = 160,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs a fleet under load for so long, and kills replicas and controller in it. Blocks.

    Args:
      workdir: gets the model, the fleet's files and logs.
      seconds: of load; it goes on until `streams` answers have come and every kill has been done.
      kills: SIGKILLs to replicas.
      progress: told what is being done, a line at a time; a bar counts the seconds of load.
      controller_kills: SIGKILLs to the controller, which is started again a second later.
      clients: requests under way at a time.
      tokens: of an answer, about.

    Returns: `local_failed_requests`, `local_lost_or_repeated_tokens`, `local_streams_identical` (a share), and how many
      requests, kills and resumptions there were.

    Raises:
      UserError: the fleet does not come up.
    """
    workdir = Path(workdir).resolve()
    fleet = workdir / "fleet"
    workdir.mkdir(parents=True, exist_ok=True)
    said = Progress(None, "fleet", unit="s", enabled=False) if progress is None else progress
    tell = said.say if isinstance(said, Progress) else said
    advance: Callable[[int], object] = said.advance if isinstance(said, Progress) else int
    _save_model(workdir / "model")
    zones = json.dumps([{"name": z.name, "capacity": z.capacity} for z in _ZONES])
    service = SERVICE.format(replicas=_REPLICAS, zones=zones, model=workdir / "model", programs=workdir / "programs")
    (workdir / "service.yaml").write_text(service)
    began = time.monotonic()
    with _fleet(workdir, fleet, tell) as run:
        load = _Load(run, clients, questions(tokens), tell, advance, random.Random(seed))
        asyncio.run(load.run(seconds, streams, kills, controller_kills))
        status = httpx.get(f"{run.url}/router/status", trust_env=False, timeout=30).json()
    orphans = sum(o.alive for o in asyncio.run(LocalProvisioner(fleet, []).observe()))
    gaps = [heard.gap_s for heard in load.heard if heard.resumed and heard.error is None]
    return {
        **load.summary(),
        "local_seconds": round(seconds, 1),
        "local_kills": load.kills,
        "local_controller_kills": load.controller_kills,
        "local_resumed": int(status["resumed"]),
        "local_resumed_tokens": int(status["resumed_tokens"]),
        "local_held": int(status["held"]),
        "local_resume_gap_p50_s": round(float(np.percentile(gaps, 50)), 3) if gaps else None,
        "local_resume_gap_p99_s": round(float(np.percentile(gaps, 99)), 3) if gaps else None,
        "local_orphans": orphans,
        "local_wall_s": round(time.monotonic() - began, 1),
    }


@dataclasses.dataclass
class _Run:
    """A running fleet; its controller may be another one later."""

    workdir: Path
    folder: Path
    port: int
    controller: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> int:
        with contextlib.suppress(UserError):
            return int(snapshot(self.folder)["ready"])
        return 0


def _start(workdir: Path, folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launch.fleet", "up", str(workdir / "service.yaml"), f"--workdir={folder}"]
    with (workdir / "controller.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"--port={port}", "--page_port=-1"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def _fleet(workdir: Path, folder: Path, tell: Callable[[str], None]) -> Iterator[_Run]:
    port = free_port()
    run = _Run(workdir, folder, port, _start(workdir, folder, port))
    try:
        tell(f"starting {_REPLICAS} replicas")
        until = time.monotonic() + _START_S
        while run.ready() < _REPLICAS:
            if run.controller.poll() is not None or time.monotonic() > until:
                lines = (workdir / "controller.log").read_text(errors="replace").splitlines()
                raise UserError(f"the fleet did not come up: {(lines or ['it said nothing'])[-1]}")
            time.sleep(0.2)
        yield run
        tell("bringing the fleet down")
    finally:
        if run.controller.poll() is None:
            run.controller.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.controller.wait(60)
        if run.controller.poll() is None:
            run.controller.kill()
            run.controller.wait()
        with contextlib.suppress(UserError):
            asyncio.run(bring_down(folder))


class _Load:
    """Clients that ask one question after the other, and who kills meanwhile."""

    def __init__(
        self,
        run: _Run,
        clients: int,
        asked: list[Question],
        tell: Callable[[str], None],
        advance: Callable[[int], object],
        choose: random.Random,
    ):
        self._run, self._clients, self._questions, self._random = run, clients, asked, choose
        self._tell, self._advance = tell, advance
        self._place = LocalProvisioner(run.folder, _ZONES)
        self._expected: dict[str, Heard] = {}
        self.heard: list[Heard] = []
        self.kills = self.controller_kills = 0
        self._killed: set[str] = set()
        self._done = False

    async def run(self, seconds: float, streams: int, kills: int, controller_kills: int) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(trust_env=False, timeout=600, limits=limits, base_url=self._run.url) as http:
            while (await http.get("/health")).status_code != 200:
                await asyncio.sleep(0.1)
            self._tell("undisturbed answers")
            for i, question in enumerate(self._questions):
                heard = await _ask(http, question)
                if question.name == "stop":  # one that the answer comes to, far into it
                    text = heard.text
                    place = len(text) * 2 // 3
                    question = Question("stop", {**question.body, "stop": [text[place : place + 5]]})
                    self._questions[i], heard = question, await _ask(http, question)
                if heard.error is not None:
                    raise UserError(f"an undisturbed request failed: {heard.error}")
                self._expected[question.name] = heard
            self._tell(f"{seconds:g} s of load, {kills} replicas killed, {controller_kills} controllers")
            asking = [asyncio.create_task(self._client(http, i)) for i in range(self._clients)]
            breaking = [
                asyncio.create_task(self._kill_replicas(http, seconds, kills)),
                asyncio.create_task(self._kill_controllers(seconds, controller_kills)),
            ]
            try:
                for _ in range(int(seconds)):
                    await asyncio.sleep(1.0)
                    self._advance(1)
                await asyncio.sleep(seconds % 1.0)
                await asyncio.gather(*breaking)
                while len(self.heard) < streams:
                    await asyncio.sleep(0.1)
                self._done = True
                await asyncio.gather(*asking)
            finally:
                for task in (*asking, *breaking):
                    task.cancel()
                await asyncio.gather(*asking, *breaking, return_exceptions=True)

    def summary(self) -> dict[str, Any]:
        failed = [heard for heard in self.heard if heard.error is not None]
        for heard in failed[:3]:
            self._tell(f"failed: {heard.question}: {heard.error}")
        wrong = 0
        for heard in self.heard:
            expected = self._expected[heard.question].tokens
            if heard.error is None:
                differing = sum(mine != theirs for mine, theirs in zip(heard.tokens, expected))
                wrong += differing + abs(len(heard.tokens) - len(expected))
        identical = sum(heard.same_as(self._expected[heard.question]) for heard in self.heard)
        return {
            "local_requests": len(self.heard),
            "local_failed_requests": len(failed),
            "local_lost_or_repeated_tokens": wrong,
            "local_streams_identical": identical / max(1, len(self.heard)),
            "local_streams_resumed": sum(heard.resumed > 0 for heard in self.heard),
        }

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        turn = number
        while not self._done:
            self.heard.append(await _ask(http, self._questions[turn % len(self._questions)]))
            turn += 1

    async def _kill_replicas(self, http: httpx.AsyncClient, seconds: float, kills: int) -> None:
        began = time.monotonic()
        for number in range(kills):
            when_s = seconds * (0.05 + 0.8 * (number + self._random.random()) / kills)
            await asyncio.sleep(max(0.0, began + when_s - time.monotonic()))
            while not await self._kill_one(http):
                await asyncio.sleep(0.1)

    async def _kill_one(self, http: httpx.AsyncClient) -> bool:
        """SIGKILL to a replica, rather one that is answering."""
        status = (await http.get("/router/status")).json()
        active = {r["url"]: int(r["active"]) for r in status["replicas"].values()}
        alive = [
            o
            for o in await self._place.observe()
            if o.alive and o.handle.url in active and o.replica_id not in self._killed
        ]
        if not alive:
            return False
        weights = [1 + 4 * active[o.handle.url] for o in alive]
        (chosen,) = self._random.choices(alive, weights)
        if not self._place.kill(chosen.replica_id):
            return False
        self.kills += 1
        self._killed.add(chosen.replica_id)
        self._tell(f"killed {chosen.replica_id} in {chosen.zone}, which was answering {active[chosen.handle.url]}")
        return True

    async def _kill_controllers(self, seconds: float, kills: int) -> None:
        for _ in range(kills):
            await asyncio.sleep(seconds * 0.9 / (kills + 1))
            os.kill(self._run.controller.pid, signal.SIGKILL)
            self._run.controller.wait()
            self.controller_kills += 1
            self._tell("killed the controller")
            await asyncio.sleep(1.0)
            self._run.controller = _start(self._run.workdir, self._run.folder, self._run.port)


async def _ask(http: httpx.AsyncClient, question: Question) -> Heard:
    heard = Heard(question.name)
    try:
        if not question.body.get("stream"):
            answer = await http.post(question.path, json=question.body)
            content = answer.json()
            if answer.status_code != 200:
                heard.error = json.dumps(content)[:300]
                return heard
            _hear(heard, content)
            return heard
        done, last = False, None
        async with http.stream("POST", question.path, json=question.body) as answer:
            async for line in answer.aiter_lines():
                now = time.monotonic()
                if line.startswith("data: "):
                    heard.gap_s, last = max(heard.gap_s, now - (now if last is None else last)), now
                heard.resumed += line.startswith(": resumed")
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    _hear(heard, json.loads(line.removeprefix("data: ")))
        if not done and heard.error is None:
            heard.error = f"status {answer.status_code}, no end after {len(heard.tokens)} tokens"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        heard.error = repr(error)
    return heard


def _hear(heard: Heard, content: dict[str, Any]) -> None:
    if "error" in content:
        heard.error = json.dumps(content["error"])[:300]
        return
    heard.ids.add(content["id"])
    for choice in content["choices"]:
        said = choice.get("delta") or choice.get("message") or {}
        heard.text += choice.get("text") or said.get("content") or ""
        heard.tokens += choice.get("token_ids") or []
        if choice["finish_reason"]:
            heard.finish.append(choice["finish_reason"])
    if content.get("usage"):
        heard.usage = content["usage"]["prompt_tokens"], content["usage"]["completion_tokens"]


def _save_model(folder: Path) -> None:
    """A tiny decoder over bytes with random weights, in float32."""
    if (folder / "config.json").exists():
        return
    config = DecoderConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=byte_tokenizer().vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        qkv_bias=True,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    save_decoder(Decoder(config, rngs=nnx.Rngs(0)), folder)
    byte_tokenizer().save(folder)
