"""Every bad request gets one clear error object, and the next good one works."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxstack.engine import Engine
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.serving.errors import ApiError
from jaxstack.serving.protocol import ChatRequest, CompletionRequest
from tests.serving.stopping import stopping

JSON = {"content-type": "application/json"}
GOOD = {"prompt": "x", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f"}}
SAY = [{"role": "user", "content": "x"}]


class Http:
    """The shared client, with a body as it is or as JSON."""

    def __init__(self, http: httpx.Client, server: BackgroundServer):
        self.plain, self.server = http, server

    def post(self, path: str, content: Any, headers: dict[str, str] | None = None) -> httpx.Response:
        body = json.dumps(content) if isinstance(content, (dict, list)) else content
        return self.plain.post(f"{self.server.url}{path}", content=body, headers=JSON if headers is None else headers)


@pytest.fixture
def to(http: httpx.Client, server: BackgroundServer) -> Http:
    return Http(http, server)


@pytest.fixture(scope="module")
def hasty(engine: Engine) -> Iterator[BackgroundServer]:
    """A server that does not wait long for what is to come."""
    config = ServerConfig(port=0, model_name="tiny", body_timeout_s=0.3, header_timeout_s=0.3)
    with BackgroundServer(engine, config) as server:
        yield server


def check_refused(to: Http, answer: httpx.Response, status: int, message: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert message in error["message"] and "\n" not in error["message"] and "Traceback" not in answer.text
    good = to.post("/v1/completions", GOOD)
    assert good.status_code == 200 and good.json()["usage"]["completion_tokens"] >= 1
    return error


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b"\xff\xfe", None, "not valid JSON"),
        (b"[1]", None, "found a JSON list, expected an object"),
        (b"[" * 50_000, None, "body:"),
        (b'{"prompt": "x", "temperature": NaN}', None, "NaN is not a JSON number"),
        (b'{"prompt": "x", "temperature": -Infinity}', None, "-Infinity is not a JSON number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature", "expected a finite number"),
        (b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", None, "not valid JSON"),
        ({}, "prompt", "expected a string, a list of strings"),
        ({"prompt": ""}, "prompt", "found no tokens"),
        ({"prompt": []}, "prompt", "none empty"),
        ({"prompt": [[]]}, "prompt", "none empty"),
        ({"prompt": ["a", 1]}, "prompt", "expected a string"),
        ({"prompt": [1, True]}, "prompt", "expected a string"),
        ({"prompt": {"a": 1}}, "prompt", "expected a string"),
        ({"prompt": [1, 264]}, "prompt", "token id 264, expected ids from 0 to 263"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        (b'{"prompt": "\\ud800"}', None, "surrogate"),
        ({"prompt": "x", "model": "other"}, "model", "'other' does not exist here"),
        ({"prompt": "x", "model": 5}, "model", "found 5"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "expected an integer >= 1"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens", "found '5'"),
        ({"prompt": "x", "max_tokens": 2.5}, "max_tokens", "found 2.5"),
        ({"prompt": "x", "max_tokens": 4000}, "prompt", "found 1 tokens and 4000 to generate, expected at most 2048"),
        ({"prompt": "x" * 3000}, "prompt", "found 3000 tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature", "found -1"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "found 'hot'"),
        ({"prompt": "x", "top_p": 0}, "top_p", "(0, 1]"),
        ({"prompt": "x", "top_p": 1.5}, "top_p", "found 1.5"),
        ({"prompt": "x", "top_k": -5}, "top_k", "found -5"),
        ({"prompt": "x", "n": 0}, "n", "expected an integer from 1"),
        ({"prompt": "x", "n": 1000}, "n", "found 1000"),
        ({"prompt": ["x"] * 200, "n": 2}, "n", "200 prompts times n = 2"),
        ({"prompt": "x", "stop": ["a"] * 5}, "stop", "found 5 strings, expected at most 4"),
        ({"prompt": "x", "stop": ""}, "stop", "none empty"),
        ({"prompt": "x", "stop": [1]}, "stop", "none empty"),
        ({"prompt": "x", "stop_token_ids": "a"}, "stop_token_ids", "found 'a'"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"prompt": "x", "logprobs": True}, "logprobs", "found True"),
        ({"prompt": "x", "logprobs": 21, "echo": True}, "logprobs", "from 0 to 20"),
        ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20"),
        ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not together with stream"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ({"prompt": "x", "best_of": 0}, "best_of", "from n = 1 to 128"),
        ({"prompt": "x", "best_of": 2, "n": 3}, "best_of", "from n = 3"),
        ({"prompt": "x", "best_of": 3, "stream": True}, "best_of", "not together with stream"),
        ({"prompt": ["x"] * 3, "best_of": 100}, "best_of", "3 prompts times best_of = 100"),
        ({"prompt": "x", "priority": "high"}, "priority", "found 'high'"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens", "max_tokens = 16"),
        ({"prompt": "x", "min_p": 1.5}, "min_p", "found 1.5"),
        ({"prompt": "x", "frequency_penalty": 3}, "frequency_penalty", "from -2 to 2"),
        ({"prompt": "x", "presence_penalty": -3}, "presence_penalty", "from -2 to 2"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", "above 0"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"prompt": "x", "logit_bias": {"5": "a"}}, "logit_bias.5", "found 'a'"),
        ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
        ({"prompt": "x", "guided_json": 5}, "guided_json", "found 5"),
        ({"prompt": "x", "guided_choice": []}, "guided_choice", "a list of strings"),
        ({"prompt": "x", "guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "together with guided_regex"),
        ({"prompt": "x", "structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "one of json"),
        ({"prompt": "x", "structured_outputs": {"structural_tag": {}}}, "structured_outputs", "one of json"),
        ({"prompt": "x", "stream": "yes"}, "stream", "found 'yes'"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options", "together with stream"),
        ({"prompt": "x", "stream": True, "stream_options": 3}, "stream_options", "found 3"),
        ({"prompt": "x", "timeout_s": 0}, "timeout_s", "found 0"),
    ],
)
def test_bad_completions(to: Http, body: Any, param: str | None, message: str) -> None:
    answer = to.post("/v1/completions", body)
    error = check_refused(to, answer, 404 if param == "model" and "other" in str(body) else 400, message)
    assert error["param"] == param and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "a list of messages"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "found 'hi'"),
        ({"messages": ["hi"]}, "messages[0]", "an object with role and content"),
        ({"messages": [*SAY, {"role": "robot", "content": "x"}]}, "messages[1].role", "found 'robot', expected one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "found None"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "found 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "this model reads text only",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0]", "a text part"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls", "function.name"),
        ({"messages": SAY, "tools": {}}, "tools", "a list of tools"),
        ({"messages": SAY, "tools": [{"type": "function"}]}, "tools[0]", '"function": {...}'),
        ({"messages": SAY, "tools": [TOOL, TOOL]}, "tools", "'f' twice"),
        ({"messages": SAY, "tools": [TOOL] * 129}, "tools", "found 129"),
        (
            {"messages": SAY, "tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "letters",
        ),
        (
            {"messages": SAY, "tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
            "found []",
        ),
        ({"messages": SAY, "tool_choice": "required"}, "tool_choice", "no tools were given"),
        ({"messages": SAY, "tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice", "found 'sometimes'"),
        (
            {"messages": SAY, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "found 'g', expected one of the tools: f",
        ),
        ({"messages": SAY, "response_format": {"type": "xml"}}, "response_format", "json_object or json_schema"),
        (
            {"messages": SAY, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "a JSON schema",
        ),
        ({"messages": SAY, "reasoning_effort": "low"}, "reasoning_effort", "chat_template_kwargs"),
        ({"messages": SAY, "top_logprobs": 3}, "top_logprobs", "together with logprobs"),
        ({"messages": SAY, "logprobs": True, "top_logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"messages": SAY, "logprobs": 3}, "logprobs", "found 3"),
        ({"messages": SAY, "max_completion_tokens": -1}, "max_tokens", "found -1"),
        ({"messages": SAY, "chat_template_kwargs": []}, "chat_template_kwargs", "found []"),
        ({"messages": SAY, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ({"messages": SAY, "chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        (
            {"messages": SAY, "continue_final_message": True, "add_generation_prompt": True},
            "messages",
            "exclude each other",
        ),
    ],
)
def test_bad_chats(to: Http, body: Any, param: str, message: str) -> None:
    error = check_refused(to, to.post("/v1/chat/completions", body), 400, message)
    assert error["param"] == param


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 2**31},
        {"top_k": 10**30},
        {"top_p": 1e-300},
        {"temperature": 1e-4, "top_p": 1e-12},
        {"temperature": 10_000},
        {"seed": -(10**30)},
        {"stop_token_ids": [-1, 2**40]},
        {"stop": "y" * 50_000},
        {"max_tokens": 10**30},
        {"timeout_s": 1e300},
    ],
)
def test_extreme_values_disturb_nobody(to: Http, extreme: dict[str, Any]) -> None:
    answer = to.post("/v1/completions", {**GOOD, **extreme})
    assert answer.status_code in (200, 400), answer.text
    assert to.post("/v1/completions", GOOD).status_code == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "role", "content", "tools"})
)
LIKELY = st.fixed_dictionaries(
    {"prompt": st.just("x"), "messages": st.lists(st.just(SAY[0]) | st.dictionaries(FIELDS, VALUES), min_size=1)}
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(LIKELY, st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_body_gets_past_the_checks_or_breaks_them(likely: dict[str, Any], fields: dict[str, Any]) -> None:
    body = json.dumps({**likely, **fields}).encode()
    for reader in (CompletionRequest, ChatRequest):
        try:
            request = reader.read(body)
            request.sampling(ServerConfig())
        except (ApiError, UserError) as refusal:
            assert "\n" not in str(refusal).replace("\\n", "")
        else:
            if isinstance(request, CompletionRequest):
                assert request.prompts()
            else:
                assert all(isinstance(m["content"], str) and m["role"] != "developer" for m in request.messages)
                request.template_variables()


def test_what_asks_for_nothing_is_allowed(to: Http) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "suffix": None,
        "min_p": 0,
        "best_of": 1,
        "user": "me",
        "something_new": [1],
    }
    assert to.post("/v1/completions", {**GOOD, **neutral}).status_code == 200
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "stop": None, "max_tokens": 2}
    assert to.post("/v1/chat/completions", {"messages": SAY, **neutral}).status_code == 200


def test_paths_methods_and_types(to: Http) -> None:
    check_refused(to, to.post("/v1/nothing", GOOD), 404, "no such path")
    got = to.plain.get(f"{to.server.base_url}/completions")
    check_refused(to, got, 405, "not allowed here")
    assert got.headers["allow"] == "POST"
    for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        check_refused(to, to.post("/v1/completions", GOOD, kind), 415, "expected application/json")
    charset = {"content-type": "application/json; charset=utf-8"}
    assert to.post("/v1/completions", GOOD, charset).status_code == 200


def test_tokenize_and_detokenize(to: Http) -> None:
    answer = to.post("/tokenize", {"prompt": "aé", "return_token_strs": True}).json()
    assert answer == {"count": 3, "max_model_len": 2048, "tokens": [97, 195, 169], "token_strs": ["a", "Ã", "©"]}
    assert to.post("/detokenize", {"tokens": [97, 195, 169]}).json() == {"prompt": "aé"}
    chat = to.post("/tokenize", {"messages": SAY}).json()
    assert to.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"].endswith("<|im_start|>assistant\n")
    check_refused(to, to.post("/tokenize", {}), 400, "either prompt or messages")
    check_refused(to, to.post("/detokenize", {}), 400, "tokens: missing")
    check_refused(to, to.post("/detokenize", {"tokens": [99999]}), 400, "tokens: found 99999")
    check_refused(to, to.post("/detokenize", {"tokens": ["a"]}), 400, "tokens.0: found 'a'")


def test_large_bodies_are_refused_before_they_are_read(to: Http) -> None:
    big = json.dumps({"prompt": "x" * 200_000})
    check_refused(to, to.post("/v1/completions", big), 413, "expected at most 100000")

    def chunks() -> Any:
        for _ in range(50):
            yield b" " * 10_000

    check_refused(to, to.post("/v1/completions", chunks()), 413, "more than 100000 bytes")


def raw(server: BackgroundServer, data: bytes) -> bytes:
    """What the server answers to `data`, until it closes the connection."""
    with socket.create_connection(server.server._listener.getsockname()[:2], timeout=600) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),  # the beginning of TLS
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000, 400),
        (b"POST /v1/completions HTTP/1.1\r\nHo", 408),
        (HEAD + b"Content-Length: 50\r\n\r\n{", 408),
        (HEAD + b"Content-Length: 99999999999\r\n\r\n{", 413),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_broken_http(to: Http, hasty: BackgroundServer, data: bytes, status: int) -> None:
    head, _, body = raw(hasty if status == 408 else to.server, data).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == str(status).encode(), head
    assert json.loads(body)["error"]["message"]
    assert to.post("/v1/completions", GOOD).status_code == 200


def test_idle_connections_are_closed(hasty: BackgroundServer) -> None:
    assert b" 408 " in raw(hasty, b"")


def test_keys(engine: Engine, http: httpx.Client) -> None:
    with BackgroundServer(engine, ServerConfig(port=0, api_key="s3cret", model_name="m")) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            answer = http.get(f"{server.base_url}/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.post(f"{server.base_url}/completions", json=GOOD).status_code == 401
        for path in ("/health", "/metrics"):
            assert http.get(f"{server.url}{path}").status_code == 200
        good = http.get(f"{server.base_url}/models", headers={"authorization": "Bearer s3cret"})
        assert good.status_code == 200 and good.json()["data"][0]["id"] == "m"


def test_limits_on_streams_and_connections(engine: Engine, http: httpx.Client) -> None:
    config = ServerConfig(port=0, max_streams=1, max_connections=3, allowed_origins=("https://page.example",))
    with BackgroundServer(engine, config) as server:
        long = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with (
            stopping(engine, after=10),
            http.stream("POST", f"{server.base_url}/completions", json=long) as stream,
        ):
            lines = stream.iter_lines()  # httpx closes the response with its iterator
            next(lines)
            busy = http.post(f"{server.base_url}/completions", json=GOOD)
            assert busy.status_code == 429 and busy.headers["retry-after"] == "1"
            assert busy.json()["error"]["type"] == "rate_limit_error"
            idle = [socket.create_connection(server.server._listener.getsockname()[:2]) for _ in range(2)]
            full = raw(server, b"")
            assert b" 503 " in full and b"too_many_connections" in full
            for connection in idle:
                connection.close()
        preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
        allowed = http.options(f"{server.base_url}/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"


def test_cors_is_off_by_default(to: Http) -> None:
    preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
    answer = to.plain.options(f"{to.server.base_url}/completions", headers=preflight)
    assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("field", "value"),
    [("port", 70000), ("host", ""), ("api_key", ""), ("max_streams", 0), ("drain_timeout_s", -1), ("keep_alive_s", 0)],
)
def test_wrong_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: found"):
        ServerConfig(**{field: value})
