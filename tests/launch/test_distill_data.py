"""`python -m launch.distill_data` against a teacher and a rewriter behind HTTP: what it keeps, and why not the rest."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from programs import run


class Endpoint(BaseHTTPRequestHandler):
    """OpenAI's chat completions, with answers of a rule: adds, and copies into sections when told to."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._reply({"object": "list", "data": [{"id": "adder", "object": "model", "created": 0, "owned_by": "test"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"]
        self.asked.append(said)
        if "<|begin_of_thought|>" in said:
            original = said.partition("Write nothing else.\n\n")[2]
            thought, answer = original.rsplit(" So ", 1)
            text = f"<|begin_of_thought|> {thought} <|end_of_thought|>"
            text += f" <|begin_of_solution|> So {answer} <|end_of_solution|>"
        else:
            a, b = (int(word) for word in said.split("\n")[0].rstrip("?").split(" ") if word.isdigit())
            total = a + b if a != 3 else 0  # it cannot add to 3
            text = f"Let me add {a} and {b} slowly. Wait, carefully. So \\boxed{{{total}}}"
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        self._reply(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "adder", "choices": [choice], "usage": None}
        )

    def _reply(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Endpoint.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_over_http(tmp_path: Path, url: str) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = [{"id": i, "problem": f"What is {i} plus 40?", "answer": str(40 + i)} for i in range(1, 5)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = tmp_path / "aime.jsonl"
    known.write_text(json.dumps({"id": 7, "problem": "what is 4 plus 40", "answer": "44"}) + "\n")
    flags = [f"--problems={problems}", f"--evaluation=AIME24:{known}", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--url={url}", f"--rewriter_url={url}", "--max_tokens=50", "--noextended"]
    done = run("launch.distill_data", *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == {"problems": 4, "kept": 2, "failed": 0, "rejected": {"decontaminate": 1, "grade": 1}}
    data = [json.loads(line) for line in (tmp_path / "run" / "data.jsonl").read_text().splitlines()]
    assert [row["id"] for row in data] == ["1", "2"]
    assert data[0]["conversations"][1]["value"].startswith("<|begin_of_thought|>\n\nLet me add 1 and 40 slowly.")
    rejected = [json.loads(line) for line in (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()]
    assert {row["id"]: row["reason"] for row in rejected} == {
        "4": "shares 'what is 4 plus 40' with AIME24/7",
        "3": "wrong: 0 is not 43",
    }
    assert len(Endpoint.asked) == 6 and "generate: 100%" in done.stderr
