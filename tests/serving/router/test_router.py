"""The router over real sockets: before a real engine, and before replicas that fail on purpose."""

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from raw_replica import STREAM_HEAD, RawReplica, Script, chunk, whole

from jaxstack.engine import Engine
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.serving.prefix_keys import keys_of_body
from jaxstack.serving.router import BackgroundRouter, D2Lpm, LeastLoad, RouterConfig, RoutingPolicy
from tests.serving.test_clients_that_leave import eventually, request

USAGE = {"prompt_tokens": 30, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 10}}
ANSWER = json.dumps({"choices": [{"text": "ab"}], "usage": USAGE}).encode()
ASK = {"prompt": "x" * 128, "user": "anna"}


def routing(*urls: str, policy: RoutingPolicy | None = None, http: dict[str, Any] | None = None, **more: Any):
    settings = RouterConfig(
        urls,
        ServerConfig(**{"port": 0, **(http or {})}),
        **{"health_interval_s": 0.1, "health_timeout_s": 60.0, **more},
    )
    return BackgroundRouter(settings, policy or LeastLoad())


def ask(http: httpx.Client, router: BackgroundRouter, **body: Any) -> httpx.Response:
    return http.post(f"{router.base_url}/completions", json={**ASK, **body})


def code(answer: httpx.Response) -> str:
    return answer.json()["error"]["code"]


def replica_of(router: BackgroundRouter, number: int = 0) -> Any:
    return router.service.replicas[number]


async def answers(writer: asyncio.StreamWriter) -> None:
    writer.write(whole(ANSWER))


async def streams(writer: asyncio.StreamWriter) -> None:
    usage = b": usage " + json.dumps(USAGE).encode() + b"\n\n"
    events = b'data: {"a": 1}\n\n', b'data: {"b"', b": 2}\n\n", usage + b"data: [DONE]\n\n"
    writer.write(STREAM_HEAD + b"".join(map(chunk, events)) + b"0\r\n\r\n")


def refuses(status: int, body: bytes = b'{"error": {"message": "full", "code": "rate_limit_exceeded"}}') -> Script:
    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(whole(body, status).replace(b"\r\n\r\n", b"\r\nretry-after: 7\r\n\r\n", 1))

    return script


async def dies(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


# ------------------------------------------------------------------------------------------------- with a real engine


@pytest.fixture(scope="module")
def policy() -> D2Lpm:
    return D2Lpm(quantum=100_000)


@pytest.fixture(scope="module")
def routed(engine: Engine, policy: D2Lpm) -> Iterator[BackgroundRouter]:
    with (
        BackgroundServer(engine, ServerConfig(port=0, model_name="tiny")) as server,
        routing(server.url, policy=policy, http={"max_body_bytes": 100_000}) as router,
    ):
        eventually(lambda: replica_of(router).reports)
        yield router


def test_the_openai_client_notices_nothing(routed: BackgroundRouter, policy: D2Lpm) -> None:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=routed.base_url, api_key="none", max_retries=0, http_client=http) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").id == "tiny"
        talk: dict[str, Any] = {"model": "tiny", "prompt": "abc" * 50, "max_tokens": 6, "temperature": 0}
        once = client.completions.create(**talk, user="openai")
        pieces = list(client.completions.create(**talk, stream=True, user="openai"))
        assert "".join(piece.choices[0].text for piece in pieces) == once.choices[0].text
        messages: Any = [{"role": "user", "content": "hello " * 30}]
        chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
        assert chat.usage is not None and chat.usage.completion_tokens <= 4
        assert len(client.embeddings.create(model="tiny", input="x" * 100).data[0].embedding) == 16
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(**{**talk, "temperature": -1})
    # The second time the prompt was cached, but for its last page: what was charged is what the replica counted, though
    # the stream's client asked for no usage.
    assert once.usage is not None and once.usage.prompt_tokens_details is not None
    first = once.usage.prompt_tokens - (once.usage.prompt_tokens_details.cached_tokens or 0)
    second = once.usage.prompt_tokens - (once.usage.prompt_tokens - 1) // 8 * 8
    spent = first + second + 2 * 2 * once.usage.completion_tokens
    eventually(lambda: policy.deficits.deficit("openai", replica_of(routed).name) == 100_000 - spent)


def test_evictions_reach_the_router(
    routed: BackgroundRouter, policy: D2Lpm, engine: Engine, http: httpx.Client
) -> None:
    prompt = "a prompt that nobody else has " * 20
    assert ask(http, routed, prompt=prompt, max_tokens=1).status_code == 200
    keys, replica = keys_of_body({"prompt": prompt}).keys, replica_of(routed)

    def depth() -> int:
        return policy.tree.match(keys, [replica.name], policy._clock())[replica.name]

    assert depth() == len(keys) > 5
    reports = engine.scheduler.pool.on_evicted.__self__  # type: ignore[union-attr]
    eventually(lambda: sum(map(len, reports._keys.values())) >= len(keys))
    engine._driver.between_turns(engine.scheduler.tree.clear)
    eventually(lambda: depth() == 0)
    assert replica.epoch is not None


@pytest.mark.parametrize(
    ("content", "kind", "status", "expected"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[1]", "application/json", 400, "found a JSON list, expected an object"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}', "application/json", 413, "expected at most 100000"),
        (b"{}", "text/plain", 415, "expected application/json"),
        (b'{"prompt": "x", "max_tokens": "many"}', "application/json", 400, "max_tokens"),
        (b'{"prompt": "x", "model": "none"}', "application/json", 404, "does not exist here"),
    ],
)
def test_bad_requests_get_one_clear_error(
    routed: BackgroundRouter, http: httpx.Client, content: bytes, kind: str, status: int, expected: str
) -> None:
    answer = http.post(f"{routed.base_url}/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == status and expected in answer.json()["error"]["message"]
    eventually(lambda: routed.service.active == 0 == replica_of(routed).active)


def test_names_of_requests_and_pages_about_it(routed: BackgroundRouter, http: httpx.Client) -> None:
    url, name = f"{routed.base_url}/completions", replica_of(routed).name
    body = {"prompt": "x", "max_tokens": 1}
    answer = http.post(url, json=body, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1" and answer.headers["x-replica"] == name
    assert len(http.post(url, json=body, headers={"x-request-id": "no good"}).headers["x-request-id"]) == 32
    assert http.get(f"{routed.url}/health").status_code == 200
    status = http.get(routed.url).json()
    assert status["policy"]["name"] == "D2Lpm" and status["replicas"][name]["state"] == "ready"
    assert status["policy"]["deficits"]["127.0.0.1"][name] <= 100_000
    figures = http.get(f"{routed.url}/metrics").text
    assert f'jaxstack:router_replica_usable{{replica="{name}"}} 1.0' in figures
    assert "jaxstack:router_policy_errors_total 0.0" in figures
    assert http.get(f"{routed.url}/nothing").status_code == 404
    assert http.post(f"{routed.url}/tokenize", json={"prompt": "abc"}).json()["count"] == 3


# ------------------------------------------------------------------------------------------------ replicas that fail


def test_who_has_no_room_is_passed_over(http: httpx.Client) -> None:
    with (
        RawReplica(refuses(429)) as full,
        RawReplica(answers) as free,
        RawReplica(refuses(503)) as ending,
        routing(full.url, ending.url, free.url) as router,
    ):
        for _ in range(3):
            answer = ask(http, router)
            assert answer.status_code == 200 and answer.content == ANSWER
            assert answer.headers["x-replica"] == free.name
        free.script = refuses(429)
        answer = ask(http, router)
        assert answer.status_code in (429, 503) and answer.headers["retry-after"] == "7"
        assert code(answer) == "rate_limit_exceeded"


def test_an_error_of_the_engine_is_not_tried_elsewhere_and_costs_nothing(http: httpx.Client) -> None:
    policy = D2Lpm(quantum=100)
    with (
        RawReplica(refuses(500)) as one,
        RawReplica(refuses(500)) as other,
        routing(one.url, other.url, policy=policy) as router,
    ):
        assert ask(http, router).status_code == 500
        assert len(one.heads) + len(other.heads) == 1
        eventually(lambda: set(policy.deficits.row("anna").values()) == {100})


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_dies_before_the_answer(http: httpx.Client, stream: bool) -> None:
    policy = D2Lpm(quantum=1000)
    good = streams if stream else answers
    with RawReplica(dies) as one, RawReplica(dies) as other, routing(one.url, other.url, policy=policy) as router:
        lost = ask(http, router, stream=stream)
        assert lost.status_code == 502 and code(lost) == "replica_lost"
        other.script = good
        answer = ask(http, router, stream=stream)
        assert answer.status_code == 200 and answer.headers["x-replica"] == other.name
        one.die()
        for _ in range(2):
            assert ask(http, router, stream=stream).headers["x-replica"] == other.name
        eventually(lambda: replica_of(router).state == "down")
        spent = 3 * (20 + 2 * 2)
        eventually(lambda: policy.deficits.row("anna") == {one.name: 1000, other.name: 1000 - spent})
        other.die()
        answer = ask(http, router, stream=stream)
        assert answer.status_code in (502, 503) and code(answer) in ("replica_lost", "no_replica")
        eventually(lambda: http.get(f"{router.url}/health").status_code == 503)
        assert "is down" in ask(http, router).json()["error"]["message"]


def test_a_stream_is_passed_on_at_once_and_ends_with_an_error_when_its_replica_dies(http: httpx.Client) -> None:
    policy, go_on = D2Lpm(quantum=1000), asyncio.Event()

    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(b'data: {"a": 1}\n\ndata: {"b'))
        await writer.drain()
        await go_on.wait()
        writer.transport.abort()

    with RawReplica(half) as one, routing(one.url, policy=policy) as router:
        with http.stream("POST", f"{router.base_url}/completions", json={**ASK, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == 'data: {"a": 1}'  # while the replica still holds the rest back
            assert policy.deficits.deficit("anna", one.name) < 1000
            one._loop.call_soon_threadsafe(go_on.set)
            rest = [line for line in lines if line]
        (event,) = rest  # neither the half event nor a [DONE]
        error = json.loads(event.removeprefix("data: "))["error"]
        assert error["code"] == "replica_lost" and "after 1 events" in error["message"]
        eventually(lambda: policy.deficits.deficit("anna", one.name) == 1000)
        assert replica_of(router).active == 0 and not policy._charged


def test_comments_are_no_answer_yet(http: httpx.Client) -> None:
    async def only_waits(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunk(b": waiting\n\n"))
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.abort()

    with (
        RawReplica(only_waits) as one,
        RawReplica(streams) as other,
        routing(one.url, other.url, retries=1) as router,
    ):
        text = ask(http, router, stream=True).text
        assert text == ': waiting\n\ndata: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
        other.script = refuses(429)
        one.script = only_waits
        events = ask(http, router, stream=True).text.split("\n\n")
        assert "rate_limit_exceeded" in events[-2] or "full" in events[-2]


def test_a_replica_that_hangs_is_found_lost(http: httpx.Client) -> None:
    async def hangs(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    with RawReplica(hangs) as one, RawReplica(answers) as other:
        settings = {"health_timeout_s": 0.5, "failures_allowed": 2}
        with routing(one.url, other.url, **settings) as router:
            got: list[httpx.Response] = []
            asking = threading.Thread(target=lambda: got.append(ask(http, router)))
            asking.start()
            eventually(lambda: len(one.heads) == 1)

            # The whole process: nobody answers for its health either.
            again = threading.Event()
            one._loop.call_soon_threadsafe(again.wait)
            asking.join(300)
            again.set()
            assert got[0].status_code == 200 and got[0].headers["x-replica"] == other.name
            eventually(lambda: replica_of(router).state == "ready")


# ------------------------------------------------------------------------------------------------------- slow and gone


def test_a_slow_reader_holds_its_replica_back_and_is_cut_off(http: httpx.Client) -> None:
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(STREAM_HEAD)
        event = chunk(b"data: " + b"x" * 60_000 + b"\n\n")
        while True:
            writer.write(event)
            await writer.drain()
            sent += len(event)

    with RawReplica(endless) as one, routing(one.url, http={"stall_timeout_s": 1.0}) as router:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(router.url.rpartition(":")[2])))
        connection.sendall(request({**ASK, "stream": True}))
        eventually(lambda: one.gone.is_set() and router.service.active == 0 == replica_of(router).active)
        assert 0 < sent < 32 * 2**20  # all that there was room for, until the reader was cut off
        connection.close()
        one.script = answers
        assert ask(http, router).status_code == 200


def test_a_client_that_leaves_takes_its_request_with_it(http: httpx.Client) -> None:
    policy = D2Lpm(quantum=1000)

    async def slow(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        while True:
            writer.write(chunk(b"data: {}\n\n"))
            await writer.drain()
            await asyncio.sleep(0.01)

    with RawReplica(slow) as one, routing(one.url, policy=policy) as router:
        with http.stream("POST", f"{router.base_url}/completions", json={**ASK, "stream": True}) as answer:
            next(answer.iter_lines())
        eventually(lambda: one.gone.is_set() and router.service.active == 0 == replica_of(router).active)
        assert policy.deficits.deficit("anna", one.name) < 1000 - 32  # what it had is charged


# ---------------------------------------------------------------------------------------------------- limits and ends


def test_limits_and_keys(http: httpx.Client) -> None:
    begun, go_on = threading.Event(), asyncio.Event()

    async def waits(writer: asyncio.StreamWriter) -> None:
        begun.set()
        await go_on.wait()
        writer.write(whole(ANSWER))

    keys = {"api_key": "ours", "max_streams": 1}
    with RawReplica(waits) as one, routing(one.url, http=keys, replica_api_key="theirs") as router:
        url, ours = f"{router.base_url}/completions", {"authorization": "Bearer ours"}
        assert http.post(url, json=ASK).status_code == 401
        asking = threading.Thread(target=lambda: http.post(url, json=ASK, headers=ours))
        asking.start()
        begun.wait()
        busy = http.post(url, json=ASK, headers=ours)
        assert busy.status_code == 429 and code(busy) == "rate_limit_exceeded" and busy.headers["retry-after"] == "1"
        one._loop.call_soon_threadsafe(go_on.set)
        asking.join(300)
        (head,) = one.heads
        assert "authorization: bearer theirs\r\n" in head and "x-client-id: anna\r\n" in head
        assert "x-request-id: " in head and "x-want-usage" not in head


def test_a_client_header_counts_where_it_is_trusted(http: httpx.Client) -> None:
    for trusted, client in ((True, "bob"), (False, "anna")):
        with RawReplica(answers) as one, routing(one.url, http={"trust_client_id": trusted}) as router:
            http.post(f"{router.base_url}/completions", json=ASK, headers={"x-client-id": "bob"})
            assert f"x-client-id: {client}\r\n" in one.heads[0]
            sly = {**ASK, "user": "é\r\nx-evil: 1"}
            assert http.post(f"{router.base_url}/completions", json=sly).status_code == 200
            assert "x-client-id: %c3%a9%0d%0ax-evil: 1\r\n" in one.heads[1]


def test_draining_a_replica_and_the_router(http: httpx.Client) -> None:
    begun, go_on = threading.Event(), asyncio.Event()

    async def waits(writer: asyncio.StreamWriter) -> None:
        begun.set()
        await go_on.wait()
        writer.write(whole(ANSWER))

    got: list[httpx.Response] = []
    with RawReplica(waits) as one, RawReplica(answers) as other:
        router = routing(one.url, other.url)
        router.__enter__()
        drain = f"{router.url}/router/drain"
        wrong = http.post(drain, json={"replica": "nobody"})
        assert wrong.status_code == 400 and one.name in wrong.json()["error"]["message"]
        asking = threading.Thread(target=lambda: got.append(ask(http, router)))
        asking.start()
        begun.wait()
        assert http.post(drain, json={"replica": one.name}).json()["state"] == "draining"
        assert {ask(http, router).headers["x-replica"] for _ in range(4)} == {other.name}
        http.post(drain, json={"replica": other.name})
        assert code(ask(http, router)) == "no_replica"
        http.post(drain, json={"replica": other.name, "draining": False})
        assert ask(http, router).status_code == 200
        router.server.stop()
        refused = http.get(f"{router.url}/health")
        while refused.status_code == 200:
            refused = http.get(f"{router.url}/health")
        assert code(refused) == "shutting_down" == code(ask(http, router))
        one._loop.call_soon_threadsafe(go_on.set)
        asking.join(300)
        router._thread.join(300)
        assert got[0].status_code == 200 and not router._thread.is_alive()
        router.__exit__(None, None, None)


def test_shutting_down_ends_what_does_not_end_by_itself(http: httpx.Client) -> None:
    begun = threading.Event()

    async def never(writer: asyncio.StreamWriter) -> None:
        begun.set()
        await asyncio.sleep(60)

    got: list[httpx.Response] = []
    with RawReplica(never) as one:
        router = routing(one.url, http={"drain_timeout_s": 0.1})
        router.__enter__()
        asking = threading.Thread(target=lambda: got.append(ask(http, router)))
        asking.start()
        begun.wait()
        router.__exit__(None, None, None)
        asking.join(300)
        assert got[0].status_code == 503 and code(got[0]) == "shutting_down"


def test_a_policy_that_fails_costs_no_request(http: httpx.Client) -> None:
    class Broken(LeastLoad):
        def choose(self, request: Any, replicas: Any) -> Any:
            raise RuntimeError("oh")

    with RawReplica(answers) as one, routing(one.url, policy=Broken()) as router:
        assert ask(http, router).status_code == 200
        assert "jaxstack:router_policy_errors_total 1.0" in http.get(f"{router.url}/metrics").text


# ----------------------------------------------------------------------------------------------------- several routers


def free_port() -> int:
    """One that nobody is given who asks for any: it is still free a moment later."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def test_routers_share_what_clients_have_had(http: httpx.Client) -> None:
    """One client's requests come in at two routers: what she may ask of a replica is not twice as much."""
    ports = [free_port(), free_port()]
    policies = [D2Lpm(quantum=60), D2Lpm(quantum=60)]
    with RawReplica(answers) as one, RawReplica(answers) as other:
        first, second = (
            routing(
                *(one.url, other.url),
                policy=policy,
                http={"port": port},
                peers=(f"http://127.0.0.1:{peer}",),
                peer_interval_s=0.02,
            )
            for policy, port, peer in zip(policies, ports, reversed(ports))
        )
        with first, second:
            eventually(lambda: all(len(policy.deficits._others) == 1 for policy in policies))
            # A request costs 24: of 30 tokens 20 are to be computed, and two come out.
            for router, replica, at_one, at_other in (
                (first, one, 36, 60),
                (second, other, 36, 36),  # where more is left; this router has sent nothing yet
                (first, one, 12, 36),
                (first, one, -12, 36),
                (second, other, -12, 12),
                (first, other, -12, -12),
                (second, other, 48, 24),  # by its own account 12 were left there; by all accounts it is a new round
            ):
                assert ask(http, router).headers["x-replica"] == replica.name
                left = {one.name: at_one, other.name: at_other}
                eventually(lambda left=left: all(p.deficits.row("anna") == left for p in policies))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicas": ()}, "replicas: found none"),
        ({"replicas": ("localhost:1",)}, "replicas: found 'localhost:1', expected http://HOST:PORT"),
        ({"replicas": ("http://a:1/v2",)}, "replicas: found"),
        ({"replicas": ("http://a:x",)}, "replicas: found"),
        ({"replicas": ("http://a:1", "http://a:1/v1")}, "twice"),
        ({"replicas": ("http://a:1",), "health_interval_s": 0}, "health_interval_s: found 0"),
        ({"replicas": ("http://a:1",), "retries": -1}, "retries: found -1"),
        ({"replicas": ("http://a:1",), "peers": ("nowhere",)}, "peers: found 'nowhere'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RouterConfig(**settings)
