"""Answers that are cut anywhere and go on with another replica: the client gets what it would have got."""

import copy
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from cutting_proxy import CuttingProxy

from jaxstack.engine import Engine
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.serving.router import BackgroundRouter, LeastLoad, RouterConfig
from jaxstack.serving.router.migration import StreamJournal
from jaxstack.serving.router.upstream import UpstreamError
from tests.serving.stopping import stopping

# Whole characters of two, three and four bytes, each byte a token of the model.
CHARACTERS = "(é|ü|漢|字|🙂|𝄞|a){14}"
ASK: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 16, "ignore_eos": True}
GREEDY, SEEDED = {"temperature": 0}, {"temperature": 1.0, "seed": 7}


class Setup:
    """A router before one replica whose answers are cut, and one whose are not unless it is said."""

    def __init__(self, server: BackgroundServer, cutting: CuttingProxy, other: CuttingProxy, router: BackgroundRouter):
        self.server, self.cutting, self.other, self.router = server, cutting, other, router

    def cut(self, *after: int | None, other: tuple[int | None, ...] = ()) -> None:
        self.cutting.cuts[:], self.other.cuts[:] = after, other


@pytest.fixture(scope="module")
def setup(engine: Engine) -> Iterator[Setup]:
    config = ServerConfig(port=0, model_name="tiny")
    with (
        BackgroundServer(engine, config) as server,
        CuttingProxy(server.url) as cutting,
        CuttingProxy(server.url) as other,
    ):
        replicas = RouterConfig((cutting.url, other.url), ServerConfig(port=0), resume_timeout_s=300.0)
        with BackgroundRouter(replicas, Preferring(cutting.name)) as router:
            yield Setup(server, cutting, other, router)


class Preferring(LeastLoad):
    """Takes one replica wherever it may."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def choose(self, request, replicas):
        return next((r for r in replicas if r.name == self._name), replicas[0])


def post(http: httpx.Client, url: str, body: dict[str, Any]) -> Any:
    """The whole answer, or the events of a stream."""
    path = "chat/completions" if "messages" in body else "completions"
    answer = http.post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert events[-1] == "[DONE]", answer.text
    return [json.loads(event) for event in events[:-1]]


def gist(answer: Any) -> Any:
    """What must not depend on who answered: a stream's pieces are put together, and it has one id."""
    if isinstance(answer, dict):
        answer = {**answer, "id": None, "created": None}
        answer["usage"] = {k: answer["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return answer
    assert len({(event["id"], event["created"]) for event in answer}) == 1
    choices: dict[int, dict[str, Any]] = {}
    for event in answer:
        for choice in event["choices"]:
            kept = choices.setdefault(choice["index"], dict(copy.deepcopy(EMPTY)))
            delta = choice.get("delta", {})
            kept["text"] += choice.get("text") or delta.get("content") or ""
            kept["roles"] += "role" in delta
            for call in delta.get("tool_calls") or []:
                kept["calls"].append([call.get("id") is not None, call["index"], call["function"].get("name")])
                kept["arguments"] += call["function"]["arguments"]
            kept["ids"] += choice.get("token_ids") or []
            kept["logprobs"].append(choice["logprobs"])
            kept["end"] += [(choice["finish_reason"], choice["stop_reason"])] if choice["finish_reason"] else []
    for kept in choices.values():
        kept["logprobs"] = [put_together(kept["logprobs"])]
        kept["calls"] = [call for call in kept["calls"] if call[0]]  # where each begins
    usage = [event["usage"] for event in answer if event.get("usage")]
    return choices, [(u["prompt_tokens"], u["completion_tokens"]) for u in usage]


def put_together(lists: list[Any]) -> Any:
    together: dict[str, list[Any]] = {}
    for found in lists:
        for name, values in (found or {}).items():
            together.setdefault(name, []).extend(values or [])
    # A prefix computed at once may differ from one computed token by token in the last bit.
    return json.loads(json.dumps(together), parse_float=lambda text: round(float(text), 3))


EMPTY: dict[str, Any] = {
    "text": "", "roles": 0, "ids": [], "logprobs": [], "end": [], "calls": [], "arguments": ""
}  # fmt: skip
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {**ASK, **GREEDY, **STREAM, "return_token_ids": True},
    "seeded": {**ASK, **SEEDED, **STREAM, "return_token_ids": True, "logprobs": 2},
    "penalties and min_tokens": {
        **ASK, **SEEDED, **STREAM, "ignore_eos": False, "min_tokens": 14, "repetition_penalty": 1.3,
        "presence_penalty": 0.5, "logit_bias": {"104": 3.0}, "return_token_ids": True,
    },
    "several choices": {**ASK, **SEEDED, **STREAM, "n": 2, "max_tokens": 9, "return_token_ids": True},
    "several prompts": {**ASK, **SEEDED, **STREAM, "prompt": ["one", "another"], "max_tokens": 8, "echo": True},
    "characters": {
        "prompt": "x", "max_tokens": 64, **SEEDED, **STREAM, "guided_regex": CHARACTERS, "return_token_ids": True,
    },
    "chat": {
        "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24, **SEEDED, **STREAM, "logprobs": True,
        "top_logprobs": 1, "guided_regex": CHARACTERS,
    },
    "tools": {
        "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 80, **SEEDED, **STREAM,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {
            "type": "object", "properties": {"x": {"type": "string", "pattern": "^[éü🙂]{3}$"}}, "required": ["x"],
            "additionalProperties": False}}}],
        "tool_choice": "required",
    },
    "whole": {**ASK, **SEEDED, "n": 2, "max_tokens": 9, "return_token_ids": True},
    "whole chat": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16, **SEEDED, "ignore_eos": True},
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_cut_anywhere_changes_nothing(setup: Setup, http: httpx.Client, name: str) -> None:
    body = dict(REQUESTS[name])
    setup.cut()
    undisturbed = post(http, setup.server.url, body)
    expected = gist(undisturbed)
    if name == "characters":  # a stop string that begins inside what has been sent, and has characters of many bytes
        text = expected[0][0]["text"]
        assert len(text.encode()) > 20
        body["stop"] = [text[7:10], "never"]
        expected = gist(post(http, setup.server.url, body))
        assert expected[0][0]["end"] == [("stop", text[7:10])] and text[7:10] not in expected[0][0]["text"]
    before = setup.router.service.dispatcher.counts.resumed
    assert gist(post(http, setup.router.url, body)) == expected
    answer = setup.cutting.answers[-1]
    assert answer.count(b": tokens ") > 2 and answer.count(b": journal ") == 1
    # At its head, in the middle of it, behind the first tokens, somewhere in the middle, before the last, at the end.
    marks = [m.start() for m in re.finditer(b": tokens ", bytes(answer))]
    places = {8, answer.index(b"\r\n\r\n") + 30, *(marks[i] + d for i in (0, -2, -1) for d in (-9, 40))}
    places |= {len(answer) - d for d in (1, 12, 40)} | {len(answer) * i // 4 for i in range(1, 4)}
    for place in sorted(places):
        setup.cut(place)
        assert gist(post(http, setup.router.url, body)) == expected, place
    assert setup.router.service.dispatcher.counts.resumed - before > len(places) // 4
    assert setup.router.service.dispatcher.counts.lost_answers == 0


def test_two_cuts_and_more_than_are_allowed(setup: Setup, http: httpx.Client) -> None:
    body = REQUESTS["seeded"]
    setup.cut()
    expected = gist(post(http, setup.server.url, body))
    setup.cut()
    post(http, setup.router.url, body)
    size = len(setup.cutting.answers[-1])
    setup.cut(size // 4, None, other=(size // 3,))
    assert gist(post(http, setup.router.url, body)) == expected
    setup.cut(size // 4, size // 4, size // 4, other=(size // 4, size // 4))
    answer = http.post(f"{setup.router.url}/v1/completions", json=body)
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    error = json.loads(events[-1])["error"]
    assert error["code"] == "replica_lost" and "3 resumptions" in error["message"] and len(events) > 2
    setup.cut()
    setup.router.service.dispatcher.counts.lost_answers = 0


def test_a_request_without_a_seed_goes_on_with_its_own_draws(setup: Setup, http: httpx.Client) -> None:
    """Nobody knows what it would have been, but the router told both replicas the seed it drew."""
    body = {**ASK, **STREAM, "temperature": 1.0, "return_token_ids": True}
    setup.cut(900)
    text, usage = gist(post(http, setup.router.url, body))
    assert len(text[0]["ids"]) == 16 and usage[0][1] == 16
    assert setup.other.paths[-1] == "/internal/resume"
    sent = [m.group(1) for m in re.finditer(rb": tokens \[\[0,\[([\d,]+)\]", bytes(setup.cutting.answers[-1]))]
    begun = [int(token) for ids in sent for token in ids.split(b",")]
    assert 0 < len(begun) < 16 and text[0]["ids"][: len(begun)] == begun
    again = {**body, "seed": None}
    two = [gist(post(http, setup.router.url, again))[0][0]["ids"] for _ in range(2)]
    assert two[0] != two[1]


def test_the_openai_client_sees_one_stream(setup: Setup) -> None:
    plain = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=setup.router.base_url, api_key="none", max_retries=0, http_client=plain) as client:
        talk: dict[str, Any] = {"model": "tiny", "prompt": "A tale", "max_tokens": 20, "temperature": 0}
        setup.cut()
        whole = client.completions.create(**talk)
        setup.cut(1200)
        pieces = list(client.completions.create(**talk, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == whole.choices[0].text
    assert len({piece.id for piece in pieces}) == 1 and pieces[0].id.startswith("cmpl-")
    assert pieces[-1].usage is not None and whole.usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert setup.other.paths[-1] == "/internal/resume"


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_shuts_down_hands_its_answers_over(engine: Engine, http: httpx.Client, stream: bool) -> None:
    body = {**REQUESTS["several choices"], "n": 1, "max_tokens": 250}
    if not stream:
        body = {name: value for name, value in body.items() if not name.startswith("stream")}
    ending = BackgroundServer(engine, ServerConfig(port=0, model_name="tiny", drain_timeout_s=0.05))
    with BackgroundServer(engine, ServerConfig(port=0, model_name="tiny")) as other:
        expected = gist(post(http, other.url, body))
        ending.__enter__()
        urls = (ending.url, other.url)
        with BackgroundRouter(RouterConfig(urls, ServerConfig(port=0)), Preferring(ending.url[7:])) as router:
            got: list[Any] = []
            asking = threading.Thread(target=lambda: got.append(post(http, router.url, body)))
            with stopping(engine, after=60) as stopped:
                asking.start()
                stopped.at.wait()
                ending.__exit__(None, None, None)
            asking.join(300)
            assert gist(got[0]) == expected
            counts = router.service.dispatcher.counts
            assert counts.resumed + counts.resent == 1 and counts.lost_answers == 0


def test_best_of_and_scored_prompts_begin_anew(setup: Setup, http: httpx.Client) -> None:
    for more in ({"best_of": 2, **SEEDED}, {"prompt_logprobs": 1, **GREEDY}):
        setup.cut()
        expected = gist(post(http, setup.server.url, {**ASK, **more}))
        setup.cut(200)
        found = gist(post(http, setup.router.url, {**ASK, **more}))
        assert found["choices"][0]["text"] == expected["choices"][0]["text"] and found["usage"] == expected["usage"]
        assert setup.other.paths[-1] == "/v1/completions"


def test_an_answer_waits_for_a_replica_to_come(engine: Engine, http: httpx.Client) -> None:
    """Managed: the only replica is taken away in the middle of an answer; another comes a second later."""
    body = {**REQUESTS["seeded"], "max_tokens": 200}
    config = RouterConfig((), ServerConfig(port=0), managed=True, hold_timeout_s=300.0, resume_timeout_s=300.0)
    server = ServerConfig(port=0, model_name="tiny")
    with BackgroundRouter(config, LeastLoad()) as router, BackgroundServer(engine, server) as one:
        expected = gist(post(http, one.url, body))
        with BackgroundServer(engine, server) as two:
            got: list[Any] = []
            asking = threading.Thread(target=lambda: got.append(post(http, router.url, body)))
            asking.start()  # held: there is no replica yet
            while router.service.dispatcher.counts.held == 0:
                time.sleep(0.01)
            set_replicas = f"{router.url}/router/replicas"
            with stopping(engine, after=50) as stopped:
                assert http.post(set_replicas, json={"replicas": [one.url]}).status_code == 200
                stopped.at.wait()
                http.post(set_replicas, json={"replicas": [], "lost": [one.url]})
            time.sleep(0.3)
            assert not got and router.service.replicas == []
            http.post(set_replicas, json={"replicas": [two.url]})
            asking.join(300)
        assert gist(got[0]) == expected
        assert router.service.dispatcher.counts.resumed == 1
        wrong = http.post(set_replicas, json={"replicas": ["nowhere"]})
        assert wrong.status_code == 400 and "expected http://HOST:PORT" in wrong.json()["error"]["message"]


def test_bad_resumptions_get_one_clear_error(setup: Setup, http: httpx.Client) -> None:
    good = {"id": "cmpl-1", "created": 1, "prompts": [[65, 66]], "choices": [[[67], False, []]], "elapsed_s": 0.1}
    request = {**ASK, **GREEDY}
    cases: dict[str, Any] = {
        "path": {"path": "/v1/embeddings", "request": request, "resumed": good},
        "request": {"path": "/v1/completions", "request": 3, "resumed": good},
        "resumed": {"path": "/v1/completions", "request": request, "resumed": {**good, "choices": [[[67], 1, []]]}},
        "1 choices": {"path": "/v1/completions", "request": {**request, "n": 2}, "resumed": good},
        "token id 99999": {
            "path": "/v1/completions", "request": request, "resumed": {**good, "choices": [[[99999], False, []]]}
        },
        "fewer than max_tokens": {
            "path": "/v1/completions", "request": request, "resumed": {**good, "choices": [[[67] * 16, False, []]]}
        },
        "prompt: found token id": {
            "path": "/v1/completions", "request": request, "resumed": {**good, "prompts": [[99999]]}
        },
    }  # fmt: skip
    for expected, body in cases.items():
        answer = http.post(f"{setup.server.url}/internal/resume", json=body, headers={"x-journal": "5"})
        assert answer.status_code == 400 and expected in answer.json()["error"]["message"], (expected, answer.text)
    answer = http.post(f"{setup.server.url}/internal/resume", json={}, headers={"x-journal": "five"})
    assert answer.status_code == 400 and "x-journal" in answer.json()["error"]["message"]


def test_only_what_is_committed_is_passed_on() -> None:
    journal = StreamJournal()
    said = (
        b': journal {"id":"cmpl-1","created":2,"prompts":[[1,2]],"choices":1}\n\ndata: a\n\ndata: b\n\n'
        b": tokens [[0,[5,6],false,[]]]\n\ndata: c\n\n: tokens [[0,[7],false,[]]]\n\n"
        b": waiting\n\ndata: d\n\n: usage {}\n\n"
    )
    for size in (1, 2, 7, 1000):
        journal = StreamJournal()
        passed = b"".join(journal.take(said[i : i + size]) for i in range(0, len(said), size))
        assert passed == b"data: a\n\ndata: b\n\ndata: c\n\n: waiting\n\n"
        assert journal.resumable and journal.tokens == 3 and not journal.complete
        path, body = journal.resumption("/v1/completions", b'{"prompt":"x"}')
        told = json.loads(body)
        assert path == "/internal/resume" and told["request"] == {"prompt": "x"}
        assert told["resumed"]["choices"] == [[[5, 6, 7], False, []]] and told["resumed"]["prompts"] == [[1, 2]]
        assert journal.take(b"data: [DONE]\n\n: complete\n\n").endswith(b": usage {}\n\ndata: [DONE]\n\n")
        assert journal.complete
    foreign = StreamJournal()
    assert b"".join(foreign.take(bytes([b])) for b in b": waiting\n\ndata: x") == b": waiting\n\ndata: x"
    assert not foreign.kept and not foreign.resumable
    with pytest.raises(UpstreamError, match="journal"):
        StreamJournal().take(b": journal {}\n\n: tokens what\n\n")
