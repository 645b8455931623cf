"""`python -m launch.route` before three replicas, as a user runs them; one is killed under load.

Every request is answered, also those whose answers the dead replica had begun; and what clients have been charged is
what the answers cost.
"""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import programs
import pytest
from byte_model import byte_model, save

QUANTUM = 10**9


def url_of(child: Any) -> str:
    line = child.stdout.readline()
    assert " at http://127.0.0.1:" in line, child.communicate()
    return line.split()[-1].removesuffix("/v1")


@dataclasses.dataclass
class Running:
    """A router, and the process numbers of its replicas by name."""

    router: Any
    url: str
    replicas: dict[str, int]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("model")
    save(folder / "tiny", byte_model(512))
    flags = [f"--model={folder / 'tiny'}", "--port=0", "--max_sequences=4", "--max_batch_tokens=16", "--page_size=8"]
    urls: list[str] = []
    children: list[Any] = []
    try:
        for _ in range(3):  # the second and third find compiled what the first has compiled
            children.append(programs.start("launch.serve", *flags))
            urls.append(url_of(children[-1]))
        more = [f"--replicas={','.join(urls)}", "--port=0", f"--quantum={QUANTUM}", "--health_interval_s=0.2"]
        router = programs.start("launch.route", *more, anew=True)
        replicas = {url.removeprefix("http://"): replica.pid for url, replica in zip(urls, children)}
        children.append(router)
        yield Running(router, url_of(router), replicas)
    finally:
        for child in children:
            child.kill()
            child.communicate()


@dataclasses.dataclass
class Answer:
    """`usage` of one that came whole; `error` of one that did not; the `replica` that it came from in the end."""

    client: str
    replica: str
    usage: dict[str, Any] | None = None
    error: str | None = None
    status: int = 200
    events: int = 0
    resumed: bool = False


async def ask(
    http: httpx.AsyncClient, url: str, number: int, tokens: int, begun: Callable[[str], None] = lambda replica: None
) -> Answer:
    """`begun` hears which replica sends as soon as a stream's second token is there."""
    client, stream = f"client {number % 5}", number % 2 == 0
    body: dict[str, Any] = {
        "prompt": f"{client} has a prompt of some length that begins alike; question {number % 7}".ljust(150, "."),
        "max_tokens": tokens,
        "ignore_eos": True,
        "user": client,
    }
    if not stream:
        answer = await http.post(f"{url}/v1/completions", json=body)
        found = Answer(client, answer.headers.get("x-replica", ""), status=answer.status_code)
        found.usage, error = answer.json().get("usage"), answer.json().get("error")
        found.error = error and error["code"]
        return found
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
        text = ""
        async for piece in answer.aiter_text():
            text += piece
            if text.count("data: ") >= 2:
                begun(answer.headers["x-replica"])
    found = Answer(client, answer.headers.get("x-replica", ""), status=answer.status_code)
    if answer.status_code != 200:
        found.error = json.loads(text)["error"]["code"]
        return found
    assert text.endswith("\n\n")
    for event in text.split("\n\n"):
        if event.startswith(": resumed at "):
            found.replica, found.resumed = event.removeprefix(": resumed at "), True
    events = [event.removeprefix("data: ") for event in text.split("\n\n")[:-1] if event.startswith("data: ")]
    if events[-1] == "[DONE]":
        found.usage = json.loads(events[-2])["usage"]
    else:
        found.error = json.loads(events[-1])["error"]["code"]
    assert all("error" not in json.loads(event) for event in events[:-1])
    found.events = len(events)
    return found


def test_one_of_three_replicas_is_killed_under_load(running: Running) -> None:
    victim = next(iter(running.replicas))
    left = {victim: running.replicas[victim]}

    def kill(replica: str) -> None:
        """In the middle of a stream, which goes on for a while, and of others."""
        if pid := left.pop(replica, None):
            os.kill(pid, signal.SIGKILL)

    async def load() -> list[Answer]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(trust_env=False, timeout=120, limits=limits) as http:
            first = await asyncio.gather(*(ask(http, running.url, i, 8) for i in range(15)))
            second = await asyncio.gather(*(ask(http, running.url, i, 160, begun=kill) for i in range(36)))
            assert not left
            third = await asyncio.gather(*(ask(http, running.url, i, 8) for i in range(15)))
            return [*first, *second, *third]

    answers = asyncio.run(load())
    assert len(answers) == 66
    assert all(answer.usage and answer.error is None and answer.status == 200 for answer in answers)
    resumed = [answer for answer in answers if answer.resumed]
    assert resumed and all(answer.events > 1 and answer.replica != victim for answer in resumed)
    assert all(answer.usage["completion_tokens"] == 160 for answer in answers[15:51] if answer.usage)
    assert all(answer.replica != victim for answer in answers[-15:]) and not any(a.error for a in answers[-15:])
    with httpx.Client(trust_env=False, timeout=30) as http:
        deadline = time.monotonic() + 20
        while True:
            status = http.get(f"{running.url}/router/status").json()
            if not status["active"] and status["replicas"][victim]["state"] == "down":
                break
            assert time.monotonic() < deadline, status
            time.sleep(0.05)
    assert status["outcomes"][f"{victim} lost"] >= 1
    # Streams went on; of the others those that had begun did so, too.
    assert status["resent"] + status["resumed"] == status["outcomes"][f"{victim} lost"]
    assert status["resumed"] >= len(resumed) and status["lost_answers"] == 0
    # To the token: answers are paid for where they came from, what was lost is not.
    spent: dict[tuple[str, str], int] = {}
    for answer in answers:
        assert answer.usage is not None
        extend = answer.usage["prompt_tokens"] - answer.usage["prompt_tokens_details"]["cached_tokens"]
        key = answer.client, answer.replica
        spent[key] = spent.get(key, 0) + extend + 2 * answer.usage["completion_tokens"]
    for client, row in status["policy"]["deficits"].items():
        assert row == {name: QUANTUM - spent.get((client, name), 0) for name in running.replicas}
    assert len(status["policy"]["deficits"]) == 5
    # The rest goes home at a word, with what it counted.
    running.router.send_signal(signal.SIGTERM)
    out, errors = running.router.communicate(timeout=60)
    assert running.router.returncode == 0 and "Traceback" not in errors, errors
    summary = json.loads(out.splitlines()[-1])
    assert summary["requests"]["answered"] == len(answers) and summary["policy"] == "d2lpm"


def test_mistakes_get_one_line_and_a_code() -> None:
    cases = {
        (): (1, "replicas: found none, expected at least one URL"),
        ("--replicas=http://a:1", "--threshold=0.4"): (2, "--threshold: d2lpm has none"),
        ("--policy=best",): (2, "--policy=best"),
    }
    for flags, (exit_code, message) in cases.items():
        done = programs.run("launch.route", *flags)
        assert done.returncode == exit_code and "Traceback" not in done.stderr
        (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert message in said


def test_it_needs_no_jax() -> None:
    program = "import sys; from launch import route; print(sorted({'jax', 'openai'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=programs.ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
