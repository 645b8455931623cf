"""`python -m launch.batch`, killed while it writes: after the next run every answer is there exactly once."""

import json
import signal
import time
from pathlib import Path

import pytest
from byte_model import byte_model, save
from programs import run, start

MODEL = byte_model(1024)
REQUESTS, TOKENS = 12, 60


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    folder = tmp_path / "tiny-model"
    save(folder, MODEL)
    lines = []
    for i in range(REQUESTS):
        body = {"prompt": f"{i}: ", "max_tokens": TOKENS, "seed": i, "ignore_eos": True, "return_token_ids": True}
        lines.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        f"--input={tmp_path / 'in.jsonl'}",
        f"--output={tmp_path / 'out.jsonl'}",
        f"--model={folder}",
        "--max_sequences=1",
        "--max_batch_tokens=16",
    ]


def test_killed_and_started_again(flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    finished = REQUESTS
    while finished == REQUESTS:  # once more where a busy machine let it end first
        out.unlink(missing_ok=True)
        first = start("launch.batch", *flags)
        while (not out.exists() or out.read_bytes().count(b"\n") < 3) and first.poll() is None:
            time.sleep(0.002)
        first.send_signal(signal.SIGKILL)
        said = first.communicate()
        before = out.read_bytes() if out.exists() else b""
        finished = before.count(b"\n")
        assert finished >= 3, said
    # What a kill in the middle of a write leaves.
    out.write_bytes(before + b'{"id": "batch_req_0", "custom_id": "r3')
    second = run("launch.batch", *flags)
    assert second.returncode == 0, second.stderr
    summary = json.loads(second.stdout.splitlines()[-1])
    assert summary["requests"] == REQUESTS and summary["answered_before"] == finished
    assert summary["succeeded"] == REQUESTS - finished and summary["failed"] == 0
    assert "batch" in second.stderr  # the bar
    answers = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(answer["custom_id"] for answer in answers) == sorted(f"r{i}" for i in range(REQUESTS))
    for answer in answers:
        assert answer["response"]["status_code"] == 200
        assert len(answer["response"]["body"]["choices"][0]["token_ids"]) == TOKENS


def test_wrong_usage_is_one_line(flags: list[str], tmp_path: Path) -> None:
    for arguments, code, message in (
        ([flags[0]], 2, "--output is missing"),
        ([flags[0], f"--output={tmp_path / 'in.jsonl'}"], 2, "found the input file"),
    ):
        done = run("launch.batch", *arguments)
        assert done.returncode == code and done.stdout == ""
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
