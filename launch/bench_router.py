"""What the router costs: `python -m launch.bench_router`.

    added latency   the same short request asked of a replica directly and through the router, in turns, one at a time
                    over open connections: the difference of the medians, and of the 99th percentiles. Of streams the
                    time to the first event is taken. Replica, router and client are three processes; on a machine with
                    few cores they wait for one another, which is counted in; the router's own processor time for a
                    request stands beside it.
    decisions       choices of a replica by D2LPM on one core, with their accounts (choose, dispatch, finish), of
                    prompts with 100 keys of which most are shared; and the same beginning with the bytes of a body.
    matching        looking up how much of every queued prompt (256 keys) each of 4 replicas holds, once.

The last line is one JSON object. Without --replica a server of the embedded model is started.
"""

import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from absl import flags

from jaxstack.runtime.errors import UserError
from jaxstack.serving.prefix_keys import keys_of_body
from jaxstack.serving.router import D2Lpm, PrefixTree, RoutedRequest
from launch import job
from launch.server_process import server_process

_REPLICA = flags.DEFINE_string("replica", None, "URL of a running server; default: one is started")
_REQUESTS = flags.DEFINE_integer("requests", 300, "requests of each kind, each way", lower_bound=20)
_DECISIONS = flags.DEFINE_integer("decisions", 5000, "choices timed", lower_bound=100)
_QUEUED: Any = flags.DEFINE_multi_integer("queued", [400, 4000], "prompts matched together", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the prompts")
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_router", "where the server's log goes")

_REPLICAS = ("a", "b", "c", "d")


class _Replica:
    def __init__(self, name: str):
        self.name, self.active = name, 0


def run() -> dict[str, Any]:
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {}
    _say("decisions")
    summary |= _decisions(_DECISIONS.value)
    for queued in _QUEUED.value:
        summary[f"match_ms_at_{queued}_queued"] = _matching(queued)
    with contextlib.ExitStack() as stack:
        url = _REPLICA.value
        if url is None:
            from jaxstack.models.embedded import embedded_model  # with it comes jax

            url = stack.enter_context(server_process(embedded_model("countdown"), workdir / "server.log"))
        router, process = stack.enter_context(_router(url, workdir / "router.log"))
        _say("latency")
        for stream in (False, True):
            summary |= _latency(url, router, process, _REQUESTS.value, stream)
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def _best(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of processor time, the least of some."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def _decisions(count: int) -> dict[str, Any]:
    draw = random.Random(_SEED.value)
    documents = ["".join(draw.choices("abcdefgh ", k=5600)) for _ in range(64)]
    bodies = []
    for i in range(count):
        text = draw.choice(documents) + "".join(draw.choices("abcdefgh ", k=800))
        bodies.append(json.dumps({"model": "m", "prompt": text, "user": f"client {i % 16}"}).encode())

    def read(body: bytes) -> RoutedRequest:
        content = json.loads(body)
        return RoutedRequest.of_keys(content["user"], keys_of_body(content), 64, 4.0)

    def route(requests: Iterator[RoutedRequest]) -> None:
        policy, replicas = D2Lpm(), [_Replica(name) for name in _REPLICAS]
        under_way: list[tuple[RoutedRequest, _Replica]] = []
        for request in requests:
            replica = policy.choose(request, replicas)
            policy.on_dispatch(request, replica)
            replica.active += 1
            under_way.append((request, replica))
            if len(under_way) > 64:
                request, replica = under_way.pop(0)
                replica.active -= 1
                policy.on_finish(request, replica, 1000, 32, 1600)

    requests = [read(body) for body in bodies]
    return {
        "decisions_per_s": round(count / _best(lambda: route(iter(requests)))),
        "decisions_from_bodies_per_s": round(count / _best(lambda: route(map(read, bodies)))),
        "keys_per_prompt": len(requests[0].keys),
    }


def _matching(queued: int) -> float:
    """Milliseconds for all of them."""
    draw = random.Random(_SEED.value)
    documents = [draw.choices(range(50_000), k=192 * 16) for _ in range(64)]
    tree = PrefixTree(max_marks=2**40)
    requests = []
    for _ in range(queued):
        tokens = draw.choice(documents) + draw.choices(range(50_000), k=64 * 16)
        requests.append(RoutedRequest.of_tokens("", tokens, 1))
        if draw.random() < 0.5:
            tree.insert(requests[-1].keys, draw.choice(_REPLICAS), 0.0)

    def match() -> None:
        for request in requests:
            tree.match(request.keys, _REPLICAS, 1.0)

    return round(1000 * _best(match), 3)


def _latency(direct: str, routed: str, process: psutil.Process, count: int, stream: bool) -> dict[str, float]:
    name = "stream" if stream else "whole"
    body = {"prompt": "<bos> numbers 11 2 10 target 19", "max_tokens": 1, "temperature": 0, "stream": stream}
    times: dict[str, list[float]] = {direct: [], routed: []}
    before = 0.0
    with httpx.Client(trust_env=False, timeout=60) as client:
        for turn in range(count + 20):
            if turn == 20:  # the first are not counted: connections are opened, code is met for the first time
                before = sum(process.cpu_times()[:2])
            for url in (direct, routed) if turn % 2 else (routed, direct):
                start = time.perf_counter()
                with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                    if answer.status_code != 200:
                        raise UserError(f"{url}: answered {answer.status_code}: {answer.read().decode()[:200]}")
                    pieces = answer.iter_raw()
                    next(pieces)
                    taken = time.perf_counter() - start
                    for _ in pieces:
                        pass
                if turn >= 20:
                    times[url].append(taken)
    busy = sum(process.cpu_times()[:2]) - before
    p50, p99 = ({url: 1000 * float(np.percentile(t, q)) for url, t in times.items()} for q in (50, 99))
    return {
        f"direct_{name}_p50_ms": round(p50[direct], 3),
        f"added_{name}_p50_ms": round(p50[routed] - p50[direct], 3),
        f"added_{name}_p99_ms": round(p99[routed] - p99[direct], 3),
        f"router_{name}_cpu_ms": round(1000 * busy / count, 3),
    }


@contextlib.contextmanager
def _router(replica: str, log_file: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`launch.route` before one replica; yields its URL and its process."""
    command = [sys.executable, "-m", "launch.route", f"--replicas={replica}", "--port=0"]
    with log_file.open("w") as log:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line.startswith("routing"):
            raise UserError(f"the router did not start (log: {log_file})")
        yield line.split()[-1].removesuffix("/v1"), psutil.Process(child.pid)
    finally:
        child.terminate()
        child.communicate()


if __name__ == "__main__":
    job.main(run)
