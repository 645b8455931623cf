"""Clients that go away, never read, or come by the hundred: pages come back, and others notice nothing."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from jaxstack.engine import Engine
from jaxstack.serving import BackgroundServer, ServerConfig

LONG = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what must come; the limit only keeps a failure from hanging."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def at_rest(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.pages_private == 0


def request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def connect(server: BackgroundServer) -> socket.socket:
    return socket.create_connection(server.server._listener.getsockname()[:2], timeout=600)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z", "w", "v", "u"]])
def test_leaving_frees_the_pages(engine: Engine, server: BackgroundServer, stream: bool, prompt: Any) -> None:
    eventually(lambda: at_rest(engine))
    aborted = engine.stats().finished.get("abort", 0)
    connection = connect(server)
    connection.sendall(request({**LONG, "prompt": prompt, "stream": stream}))
    if stream:
        assert b"200" in connection.recv(1000)
    eventually(lambda: engine.stats().running > 0)
    connection.close()
    eventually(lambda: at_rest(engine))
    stats = engine.stats()
    assert stats.pages_free + stats.pages_tree == stats.pages_total
    assert stats.finished["abort"] > aborted
    eventually(lambda: server.server.service.active == 0)


def test_many_clients_that_vanish(engine: Engine, server: BackgroundServer, http: httpx.Client) -> None:
    threads = threading.active_count()
    draw = random.Random(0)
    talk = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "ignore_eos": True, "n": 2}
    whole = request(talk, "/v1/chat/completions")
    for _ in range(150):
        connection = connect(server)
        connection.sendall(whole[: draw.randrange(len(whole) + 40)])
        if draw.random() < 0.3:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )  # reset instead of a farewell
        connection.close()
    good = http.post(f"{server.base_url}/completions", json={"prompt": "x", "max_tokens": 3})
    assert good.status_code == 200
    eventually(lambda: at_rest(engine) and server.server.service.active == 0)
    eventually(lambda: len(server.server.server_state.connections) <= 4)  # those of the tests' own clients
    assert threading.active_count() <= threads + server.config.tokenizer_threads
    assert engine.stats().pages_free + engine.stats().pages_tree == engine.stats().pages_total


def test_a_client_that_does_not_read_holds_up_nobody_and_is_cut_off(engine: Engine, http: httpx.Client) -> None:
    with BackgroundServer(engine, ServerConfig(port=0, stall_timeout_s=0.5)) as server:
        # Log probabilities make an answer of a megabyte, more than any socket buffer on the way.
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.server._listener.getsockname()[:2])
        connection.sendall(request({**LONG, "n": 4, "stream": True, "logprobs": 20}))
        eventually(lambda: server.server.service.active == 1)
        good = http.post(f"{server.base_url}/completions", json={"prompt": "y", "max_tokens": 3})
        assert good.status_code == 200
        eventually(lambda: server.server.service.active == 0)
        eventually(lambda: at_rest(engine))
        connection.close()
