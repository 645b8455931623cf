"""`python -m launch.route` over replicas of different kinds: requests go by the plan's tables; mistakes."""

import contextlib
import json
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import programs
import pytest

TABLE = {
    "version": 1,
    "input_edges_tokens": [50, 10_000],
    "output_edges_tokens": [100],
    "max_rate_rps": {"small": [[4.0], [0.0]], "large": [[16.0], [8.0]]},
    "concurrency": {"small": [[8.0], [0.0]], "large": [[32.0], [16.0]]},
    "shares": {"small": [[0.5], [0.0]], "large": [[0.5], [1.0]]},
    "output_weights": [[0.5], [0.5]],
}


class Handler(BaseHTTPRequestHandler):
    """A replica that answers at once."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say({"data": [{"id": "tiny"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        self.say({"object": "text_completion", "choices": [{"index": 0, "text": "x"}], "usage": usage})

    def say(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def replica():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_long_prompts_go_where_the_plan_can_serve_them(tmp_path):
    (tmp_path / "routing.json").write_text(json.dumps(TABLE))
    with replica() as small, replica() as large:
        router = programs.start(
            "launch.route",
            f"--replicas={small},{large}", "--replica_kinds=small,large", "--policy=occupancy", "--port=0",
            f"--routing_table={tmp_path / 'routing.json'}",
        )  # fmt: skip
        try:
            assert router.stdout is not None
            line = router.stdout.readline()
            assert " at http://127.0.0.1:" in line, router.communicate()
            url = line.split()[-1]
            with httpx.Client(trust_env=False, timeout=600) as http:
                seen = {}
                for prompt in ("short", "a long prompt " * 100):
                    answer = http.post(f"{url}/completions", json={"prompt": prompt, "max_tokens": 5})
                    assert answer.status_code == 200, answer.text
                    seen[len(prompt)] = answer.headers["x-replica"]
                occupied = True
                while occupied:  # what a request took is given back a moment after its answer
                    status = http.get(f"{url.removesuffix('/v1')}/router/status").json()
                    occupied = any(status["policy"]["occupancy"].values())
            # An idle large one takes less of itself for either; the small one could not have served the long one.
            assert set(seen.values()) == {large.removeprefix("http://")}
            names = {small.removeprefix("http://"), large.removeprefix("http://")}
            assert status["policy"] == {
                "name": "MixedFleet",
                "rule": "occupancy",
                "occupancy": dict.fromkeys(sorted(names), 0.0),
            }
            router.send_signal(signal.SIGTERM)
            out, errors = router.communicate(timeout=600)
            assert router.returncode == 0 and "Traceback" not in errors, errors
            assert json.loads(out.splitlines()[-1])["requests"] == {"answered": 2}
        finally:
            if router.poll() is None:
                programs.kill(router)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--routing_table is missing: --policy=spill reads routing.json"),
        (
            ("--routing_table={}", "--replica_kinds=small,large"),
            2,
            "found 2 kinds for 1 replicas, expected one for each",
        ),
        (("--routing_table={}", "--replica_kinds=huge"), 1, "127.0.0.1:1: found kind 'huge', expected one of small"),
    ],
)
def test_mistakes_get_one_line_and_a_code(arguments, code, message, tmp_path):
    (tmp_path / "routing.json").write_text(json.dumps(TABLE))
    filled = [argument.format(tmp_path / "routing.json") for argument in arguments]
    child = programs.start("launch.route", "--policy=spill", "--replicas=http://127.0.0.1:1", *filled)
    _, errors = child.communicate(timeout=600)
    (said,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert child.returncode == code and message in said and "Traceback" not in errors
