"""What the router does when going on with an answer is not as easy as it should be: replicas that hang and refuse."""

import asyncio
import json
import threading

import httpx
import pytest
from raw_replica import STREAM_HEAD, RawReplica, chunk, whole

from jaxstack.serving import ServerConfig
from jaxstack.serving.router import BackgroundRouter, LeastLoad, RouterConfig

HEAD = b': journal {"id":"cmpl-1","created":2,"prompts":[[1,2]],"choices":1}\n\n'
FIRST = b'data: {"n": 1}\n\n: tokens [[0,[5],false,[]]]\n\n'
SECOND = b'data: {"n": 2}\n\n: tokens [[0,[6],true,[]]]\n\n'
END = b"data: [DONE]\n\n: complete\n\n"
ASK = {"prompt": "x", "stream": True}


async def begins_and_hangs(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(HEAD + FIRST + b'data: {"not": "committed"}\n\n'))
    await writer.drain()
    await asyncio.sleep(60)


async def begins_and_dies(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(HEAD + FIRST))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def goes_on(writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + chunk(HEAD + SECOND) + chunk(END) + b"0\r\n\r\n")


async def does_not_know_how(writer: asyncio.StreamWriter) -> None:
    writer.write(whole(b'{"error": {"message": "no such path"}}', 404))


async def dies(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


@pytest.fixture(scope="module")
def http():
    with httpx.Client(trust_env=False, timeout=600) as http:
        yield http


class InOrder(LeastLoad):
    def choose(self, request, replicas):
        return replicas[0]


def routing(*replicas: RawReplica, **more: float) -> BackgroundRouter:
    settings = {"health_interval_s": 0.1, "health_timeout_s": 60.0, "resume_timeout_s": 300.0, **more}
    config = RouterConfig(tuple(r.url for r in replicas), ServerConfig(port=0), **settings)  # type: ignore[arg-type]
    return BackgroundRouter(config, InOrder())


def said(http: httpx.Client, router: BackgroundRouter) -> list[str]:
    return http.post(f"{router.base_url}/completions", json=ASK).text.split("\n\n")[:-1]


def test_who_falls_silent_is_given_up(http: httpx.Client) -> None:
    with RawReplica(begins_and_hangs) as one, RawReplica(goes_on) as other:
        with routing(one, other, silence_timeout_s=1.5) as router:
            events = said(http, router)
        assert events == ['data: {"n": 1}', f": resumed at {other.name}", 'data: {"n": 2}', "data: [DONE]"]
        assert other.heads[0].startswith("post /internal/resume")


def test_who_cannot_go_on_is_passed_over(http: httpx.Client) -> None:
    with RawReplica(begins_and_dies) as one, RawReplica(does_not_know_how) as old, RawReplica(goes_on) as other:
        with routing(one, old, other) as router:
            events = said(http, router)
            counts = router.service.dispatcher.counts
            assert counts.resumed == 2 and counts.outcomes[old.name, "refused"] == 1
        assert events[0] == 'data: {"n": 1}' and events[-2:] == ['data: {"n": 2}', "data: [DONE]"]
        assert old.heads[0].startswith("post /internal/resume")


def test_where_nobody_can_the_stream_ends_with_an_error(http: httpx.Client) -> None:
    async def begins_once(writer: asyncio.StreamWriter) -> None:
        await (begins_and_dies if len(one.heads) == 1 else does_not_know_how)(writer)

    with (
        RawReplica(begins_once) as one,
        RawReplica(does_not_know_how) as old,
        routing(one, old, resume_timeout_s=0.6) as router,
    ):
        events = said(http, router)
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "replica_lost" and "after 1 tokens" in error["message"]
        assert router.service.dispatcher.counts.lost_answers == 1 and len(old.heads) >= 1


def test_it_is_not_gone_on_with_for_ever(http: httpx.Client) -> None:
    with RawReplica(begins_and_dies) as one, RawReplica(begins_and_dies) as two:
        with routing(one, two, migration_limit=2) as router:
            events = said(http, router)
        assert events.count('data: {"n": 1}') == 3  # each replica says that it has gone one further
        assert "2 resumptions" in events[-1] and len(one.heads) + len(two.heads) == 3
        with routing(one, two, migration_limit=0) as router:  # as it was: nothing is done again after the first event
            events = said(http, router)
        assert "x-journal" not in one.heads[-1]
        assert "in the middle of this answer, after" in events[-1]


def test_a_refusal_of_a_whole_answer_keeps_its_status(http: httpx.Client) -> None:
    async def fails(writer: asyncio.StreamWriter) -> None:
        told = b': tokens []\n\n: status 500\n\ndata: {"error": {"message": "failed", "code": "engine_error"}}\n\n'
        writer.write(STREAM_HEAD + chunk(HEAD + told + b": complete\n\n") + b"0\r\n\r\n")

    with RawReplica(fails) as one, routing(one) as router:
        answer = http.post(f"{router.base_url}/completions", json={"prompt": "x"})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_error"
        assert answer.headers["content-type"] == "application/json" and len(one.heads) == 1


def test_replicas_come_and_go(http: httpx.Client) -> None:
    go_on = asyncio.Event()

    async def waits(writer: asyncio.StreamWriter) -> None:
        await go_on.wait()
        await goes_on(writer)

    config = RouterConfig((), ServerConfig(port=0), managed=True, health_interval_s=0.1, hold_timeout_s=300.0)
    with RawReplica(waits) as one, RawReplica(goes_on) as other, BackgroundRouter(config, InOrder()) as router:
        put, got = f"{router.url}/router/replicas", []
        asking = threading.Thread(target=lambda: got.append(said(http, router)))
        asking.start()
        with httpx.Client(trust_env=False, timeout=600) as control:
            while control.get(f"{router.url}/router/status").json()["waiting"] == 0:
                pass
            control.post(put, json={"replicas": [one.url]})
            while not one.heads:
                pass
            # It drains: nothing new goes there, and it is forgotten when its answer is over.
            told = control.post(put, json={"replicas": [other.url]}).json()["replicas"]
            assert told[one.name]["state"] == "draining" and told[one.name]["active"] == 1
            assert said(control, router)[-1] == "data: [DONE]" and len(other.heads) == 1
            one._loop.call_soon_threadsafe(go_on.set)
            asking.join(300)
            assert got[0][-1] == "data: [DONE]"
            while one.name in control.get(f"{router.url}/router/status").json()["replicas"]:
                pass
            control.post(put, json={"replicas": [], "lost": [other.url]})
            assert control.get(f"{router.url}/health").status_code == 503
            for body in ({"replicas": 3}, {"replicas": ["ftp://x"]}, {"lost": [1]}):
                assert control.post(put, json=body).status_code == 400
