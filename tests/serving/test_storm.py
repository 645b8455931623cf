"""A thousand clients that mean no good, at once; more work than there are pages; more requests than may wait."""

import asyncio
import contextlib
import random
import struct
import threading

import httpx
import psutil
import pytest

from jaxstack.engine import Engine, EngineConfig
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.serving import BackgroundServer, ServerConfig
from jaxstack.training.initialize import fresh_decoder
from tests.serving.conftest import MODEL
from tests.serving.stopping import stopping
from tests.serving.test_clients_that_leave import at_rest, eventually, request

SOCKET_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset instead of a farewell
TALK = {"prompt": "and on and on", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def small():
    """An engine with hardly any pages and a short queue, and its server."""
    settings = EngineConfig(
        max_sequences=4, max_batch_tokens=64, page_size=8, num_pages=16, max_model_len=128, max_waiting=8
    )
    engine = Engine(fresh_decoder(MODEL), byte_tokenizer(), settings)
    with BackgroundServer(engine, ServerConfig(port=0, model_name="small")) as server:
        yield engine, server
    engine.close()


async def misbehave(address: tuple[str, int], number: int, gate: asyncio.Semaphore) -> None:
    """One bad client; what it does is drawn from its number."""
    draw = random.Random(number)
    whole = request({**TALK, "stream": draw.random() < 0.5, "n": draw.choice([1, 2])})
    async with gate:
        try:
            reader, writer = await asyncio.open_connection(*address)
        except OSError:
            return
        try:
            kind = draw.randrange(6)
            if kind == 0:  # garbage
                writer.write(draw.randbytes(draw.randrange(1, 2000)))
            elif kind == 1:  # a head that stops
                writer.write(whole[: draw.randrange(1, whole.index(b"\r\n\r\n"))])
            elif kind == 2:  # a body that stops
                writer.write(whole[: draw.randrange(whole.index(b"\r\n\r\n") + 4, len(whole))])
            elif kind == 3:  # a request, and nobody who would wait for the answer
                writer.write(whole)
            elif kind == 4:  # takes a little of its answer, then leaves
                writer.write(whole)
                await writer.drain()
                await asyncio.wait_for(reader.read(200), 2.0)
            # kind 5 connects and says nothing
            await writer.drain()
            await asyncio.sleep(draw.random() * 0.2)
        except (OSError, TimeoutError):
            pass
        finally:
            if draw.random() < 0.3:
                with contextlib.suppress(OSError):  # the server may have closed it
                    # The reset: SO_LINGER with no time.
                    writer.get_extra_info("socket").setsockopt(1, 13, SOCKET_RESET)
            writer.close()


def test_a_thousand_clients(engine: Engine, server: BackgroundServer, http: httpx.Client) -> None:
    """Afterwards every page is free or the prefix cache's, no thread, connection or descriptor is left over, and a good
    client, there all the time, has been answered.
    """
    process, threads = psutil.Process(), threading.active_count()
    http.get(f"{server.url}/health")
    descriptors = process.num_fds()
    address = server.server._listener.getsockname()[:2]
    good: list[int] = []

    async def storm() -> None:
        gate = asyncio.Semaphore(250)  # a descriptor on each side

        async def well_behaved() -> None:
            async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
                for _ in range(5):
                    answer = await client.post(f"{server.base_url}/completions", json={"prompt": "x", "max_tokens": 3})
                    good.append(answer.status_code)
                    await asyncio.sleep(0.05)

        await asyncio.gather(well_behaved(), *(misbehave(address, number, gate) for number in range(1000)))

    asyncio.run(storm())
    assert good == [200] * 5
    eventually(lambda: at_rest(engine) and server.server.service.active == 0)
    eventually(lambda: len(server.server.server_state.connections) <= 4)  # those of the tests' own clients
    eventually(lambda: process.num_fds() <= descriptors + 4)
    eventually(lambda: threading.active_count() <= threads + server.config.tokenizer_threads)
    stats = engine.stats()
    assert stats.pages_free + stats.pages_tree == stats.pages_total
    assert stats.recompilations == 0
    assert http.post(f"{server.base_url}/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200


def test_more_work_than_pages_is_all_done(small) -> None:
    """Four sequences of up to 15 pages compete for 16 pages: preempted over and over, all of them finish."""
    engine, server = small

    async def all_at_once() -> list[dict]:
        async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
            bodies = [{"prompt": f"{i}" * 5, "max_tokens": 100, "ignore_eos": True, "temperature": 0} for i in range(8)]
            posts = [client.post(f"{server.base_url}/completions", json=body) for body in bodies]
            return [answer.json() for answer in await asyncio.gather(*posts)]

    answers = asyncio.run(all_at_once())
    assert [a["usage"]["completion_tokens"] for a in answers] == [100] * 8
    assert engine.stats().preemptions > 0
    eventually(lambda: at_rest(engine))
    stats = engine.stats()
    assert stats.pages_free + stats.pages_tree == stats.pages_total
    engine.scheduler.check_accounting()


def test_a_full_queue_says_so_and_comes_back(small) -> None:
    """Four run and eight may wait: of forty at once some are told to come back later, and the rest are answered."""
    engine, server = small

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(trust_env=False, timeout=600) as client:
            body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}
            url = f"{server.base_url}/completions"
            asking = [asyncio.create_task(client.post(url, json=body)) for _ in range(40)]
            while sum(task.done() for task in asking) < 28:  # those for whom there is no room
                await asyncio.sleep(0.01)
            stopped.go_on.set()
            return await asyncio.gather(*asking)

    with stopping(engine, after=1) as stopped:
        answers = asyncio.run(all_at_once())
    refused = [a for a in answers if a.status_code != 200]
    assert refused and len(answers) - len(refused) >= 8
    for answer in refused:
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
    eventually(lambda: at_rest(engine))
