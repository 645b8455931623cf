"""Batch files: an answer for every line, exactly once, whatever is in the lines and in the output already."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxstack.engine import Engine, SamplingParams
from jaxstack.runtime.errors import UserError
from jaxstack.serving import ServerConfig
from jaxstack.serving.batch_file import answer_file

CONFIG = ServerConfig(model_name="tiny")
Answer = Callable[[], dict[str, Any]]


def line(name: str, prompt: str = "x", url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    content = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": content}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


class Batch:
    def __init__(self, engine: Engine, folder: Path):
        self.engine, self.source, self.target = engine, folder / "in.jsonl", folder / "out.jsonl"

    def write(self, *lines: Any) -> None:
        self.source.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))

    def answer(self) -> dict[str, Any]:
        return answer_file(self.engine, self.source, self.target, CONFIG, concurrency=8, progress=False)

    @property
    def answers(self) -> list[dict[str, Any]]:
        return read(self.target)


@pytest.fixture
def batch(engine: Engine, tmp_path: Path) -> Batch:
    return Batch(engine, tmp_path)


def test_every_line_is_answered(batch: Batch) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "ignore_eos": True}
    wide = [line(f"c{i}", prompt=f"prompt {i}") for i in range(20)]
    batch.write(*wide, "", {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": chat})
    summary = batch.answer()
    assert summary["requests"] == summary["succeeded"] == 21 and summary["failed"] == summary["answered_before"] == 0
    assert summary["completion_tokens"] == 20 * 4 + 3
    found = {entry["custom_id"]: entry for entry in batch.answers}
    assert len(found) == 21 and all(entry["error"] is None for entry in found.values())
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for i, own in enumerate(batch.engine.generate([f"prompt {i}" for i in range(20)], params)):
        response = found[f"c{i}"]["response"]
        assert response["status_code"] == 200 and response["body"]["object"] == "text_completion"
        assert response["body"]["choices"][0]["text"] == own.completions[0].text
    assert found["chat"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert len({entry["id"] for entry in found.values()}) == 21


def test_bad_lines_are_answered_too(batch: Batch) -> None:
    batch.write(
        "no json",
        {"method": "POST"},
        {**line("get"), "method": "GET"},
        {**line("where"), "url": "/v1/nothing"},
        {**line("empty"), "body": None},
        line("hot", temperature=-1),
        line("long", prompt="x" * 5000),
        line("stream", stream=True),
        line("model", model="other"),
        line("good"),
    )
    assert batch.answer() | {"prompt_tokens": 0} == {
        "requests": 10,
        "answered_before": 0,
        "succeeded": 1,
        "failed": 9,
        "prompt_tokens": 0,
        "completion_tokens": 4,
    }
    found = {entry["custom_id"] or entry["error"]["line"]: entry for entry in batch.answers}
    for key, message in {
        1: "not valid JSON",
        2: "custom_id: found None",
        "get": "method: found 'GET', expected 'POST'",
        "where": "url: found '/v1/nothing', expected one of /v1/completions",
        "empty": "body: found None",
    }.items():
        assert found[key]["response"] is None and message in found[key]["error"]["message"]
    for name, status, message in (
        ("hot", 400, "temperature: found -1"),
        ("long", 400, "found 5000 tokens"),
        ("stream", 400, "not in a batch"),
        ("model", 404, "does not exist here"),
    ):
        response = found[name]["response"]
        assert found[name]["error"] is None and response["status_code"] == status
        assert message in response["body"]["error"]["message"]
    # All of this counts as answered.
    assert batch.answer()["answered_before"] == 10 and len(batch.answers) == 10


def test_going_on_after_a_torn_line(batch: Batch) -> None:
    lines = [line(f"r{i}", prompt=f"prompt {i}") for i in range(6)]
    batch.write(*lines[:3])
    batch.answer()
    before = batch.target.read_bytes()
    batch.write(*lines, "still no json")
    for torn in (b"", b'{"id": "batch_req_1", "custom_id": "r4", "resp', before.splitlines()[1], b"\xff\xfe{"):
        batch.target.write_bytes(before + torn)
        summary = batch.answer()
        assert summary["answered_before"] == 3 and summary["succeeded"] == 3 and summary["failed"] == 1
        assert batch.target.read_bytes().startswith(before)
        names = [entry["custom_id"] for entry in batch.answers]
        assert len(names) == 7 and set(names) == {f"r{i}" for i in range(6)} | {None}


def test_what_cannot_be_run_is_refused_before_anything_is_answered(batch: Batch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input: cannot read .*No such file"):
        batch.answer()
    batch.write(line("a"), line("b"), line("a"))
    with pytest.raises(UserError, match="custom_id 'a' in lines 1 and 3"):
        batch.answer()
    assert not batch.target.exists()
    batch.write(line("a"))
    for content, message in (
        ("something else\n", "line 1 is no answer of a batch"),
        ("[]\n", "line 1 is no answer"),
        ('{"custom_id": "z", "error": null}\n', "line 1 answers 'z', which the input does not ask"),
        ('{"custom_id": "a", "error": null}\n' * 2, "line 2 answers 'a' a second time"),
    ):
        batch.target.write_text(content)
        with pytest.raises(UserError, match=message):
            batch.answer()
        assert batch.target.read_text() == content
    batch.target = tmp_path
    with pytest.raises(UserError, match="output: cannot write"):
        batch.answer()


def test_two_runs_do_not_write_one_file(batch: Batch) -> None:
    import fcntl

    batch.write(line("a"))
    with batch.target.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            batch.answer()
    assert batch.answer()["succeeded"] == 1
