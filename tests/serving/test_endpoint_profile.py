"""Measuring an endpoint: the search for a rate against a known one; a real server, its journal, and refusals."""

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.fleet.profile.bracketing import ProbeResult, highest_rate
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.live import Endpoint, EndpointProfileConfig, Journal, measure_profile
from jaxstack.fleet.profile.throughput import LatencyObjective
from jaxstack.runtime.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def search(true: float, start: float, lowest: float = 0.01, highest: float = 1000.0, tolerance: float = 0.05):
    tried = []

    async def probe(rate: float) -> ProbeResult:
        tried.append(rate)
        return ProbeResult(rate, rate <= true, concurrency=2 * rate)

    found = highest_rate(probe, start_rps=start, lowest_rps=lowest, highest_rps=highest, tolerance=tolerance)
    return asyncio.run(found), tried


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.floats(-3, 4), st.floats(-3, 4), st.sampled_from([0.02, 0.05, 0.3]),
)  # fmt: skip
def test_the_highest_rate_is_found_wherever_one_begins(true, start, tolerance):
    true, start = 10.0**true, 10.0**start
    found, tried = search(true, start, tolerance=tolerance)
    if true < 0.01:
        assert found.rate_rps == 0.0
    elif true >= 1000:
        assert found.rate_rps == 1000.0 and found.limited
    else:
        assert found.rate_rps <= true <= found.rate_rps * (1 + tolerance) * (1 + 1e-9)
        assert found.concurrency == 2 * found.rate_rps
    # Doublings from the start, and then halvings of what is between two.
    assert len(tried) <= 3 + abs(math.log2(min(max(true, 0.01), 1000) / min(max(start, 0.01), 1000))) + math.log2(
        math.log(2) / math.log(1 + tolerance)
    )
    assert len(set(tried)) == len(tried) and all(0.01 <= rate <= 1000 for rate in tried)


def test_what_is_refused_altogether_is_not_tried_again():
    async def probe(rate: float) -> ProbeResult:
        return ProbeResult(rate, False, "too long", possible=False)

    found = asyncio.run(highest_rate(probe, start_rps=8, lowest_rps=0.1, highest_rps=10))
    assert found.rate_rps == 0 and len(found.tried) == 1
    with pytest.raises(UserError, match="rates: found from 5 to 1"):
        search(1.0, 1.0, lowest=5.0, highest=1.0)


def config_for(server, **more) -> EndpointProfileConfig:
    settings = {
        "base_url": server.base_url, "name": "tiny", "grid": LengthGrid((8, 4000), (4,)), "vocab_size": 200,
        "objective": LatencyObjective(30.0, 60.0, 0.9), "probe_s": 0.3, "least_requests": 6, "highest_rps": 20.0,
        "tolerance": 1.0,
    }  # fmt: skip
    return EndpointProfileConfig(**{**settings, **more})


def test_a_server_is_measured_and_its_journal_kept(server, tmp_path):
    said: list[str] = []
    config = config_for(server)
    profile = asyncio.run(measure_profile(config, tmp_path / "journal.jsonl", say=said.append))
    # With an objective that anything keeps, the highest rate that is tried; the long prompt is beyond its window.
    assert profile.max_rate_rps["tiny"].tolist() == [[20.0], [0.0]]
    assert profile.concurrency is not None and profile.concurrency["tiny"][0, 0] >= 1
    assert len(said) == 2 and "20/s" in said[0] and "cannot serve: 400" in said[1]
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert "settings" in rows[0] and [row["bucket"] for row in rows[1:]] == [[0, 0], [1, 0]]
    (last,) = rows[1]["probes"][-1:]
    assert last["passed"] and last["requests"] >= 1 and last["attainment"] >= 0.9 and last["tpot_p99_s"] < 30
    # A line that a kill tore is measured again, and nothing else is.
    text = (tmp_path / "journal.jsonl").read_text().splitlines()
    (tmp_path / "journal.jsonl").write_text("\n".join(text[:2]) + "\n" + text[2][:20])
    said.clear()
    again = asyncio.run(measure_profile(config, tmp_path / "journal.jsonl", say=said.append))
    assert len(said) == 1 and again.max_rate_rps["tiny"].tolist() == profile.max_rate_rps["tiny"].tolist()
    with pytest.raises(UserError, match="found a profile with other settings"):
        Journal(tmp_path / "journal.jsonl", {"probe_s": 1.0})


def test_a_journal_whose_settings_were_torn_begins_anew_or_is_refused(tmp_path):
    file = tmp_path / "journal.jsonl"
    file.write_text('{"settings": {"pro')
    Journal(file, {"probe_s": 1.0}).add((0, 0), {"rate": 1.0})
    assert Journal(file, {"probe_s": 1.0}).buckets[0, 0]["rate"] == 1.0
    with pytest.raises(UserError, match="other settings"):
        Journal(file, {"probe_s": 2.0})
    file.write_text('3\n{"settings": {"pro\n' + file.read_text().splitlines()[-1] + "\n")
    with pytest.raises(UserError, match="no line with settings"):
        Journal(file, {"probe_s": 1.0})


def test_an_objective_that_nobody_keeps_is_no_rate(server, tmp_path):
    config = config_for(server, objective=LatencyObjective(1e-9), grid=LengthGrid((8, 16), (4,)))
    profile = asyncio.run(measure_profile(config, tmp_path / "journal.jsonl"))
    assert profile.max_rate_rps["tiny"].tolist() == [[0.0], [0.0]]
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert "alone it takes" in rows[1]["why"] and rows[2]["why"] == "a shorter prompt cannot be served either"


def test_requests_are_counted_by_the_server_and_crowds_are_given_up(server):
    async def ask():
        async with Endpoint(config_for(server)) as endpoint:
            answer = await endpoint.ask(12, 6)
            assert answer.tokens == 6 and not answer.error
            assert answer.sent_s < answer.first_s <= answer.end_s and answer.tpot_s >= 0
            crowd = await endpoint.probe(8, 64, 4000.0, 1e-3)
            assert not crowd.passed and "pile up" in crowd.why
            return (await endpoint.ask(5000, 4)).error

    assert asyncio.run(ask()).startswith("400: ")


def test_an_endpoint_that_is_lost_in_a_probe_is_no_rate(tmp_path):
    """What was measured until then is not taken for the size's rate, nor written down."""
    answers = 0
    place: asyncio.Server | None = None

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answers
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = head.partition(b"content-length: ")[2].split(b"\r\n")[0]
        await reader.readexactly(int(length or 0))
        body, kind = b'{"data": [{"id": "m"}]}', b"application/json"
        if head.startswith(b"post"):
            answers += 1
            if answers > 6:
                assert place is not None
                place.close()  # two alone, some of the first probe, and then never again
                writer.close()
                return
            usage = b'{"choices": [], "usage": {"completion_tokens": 2}}'
            body, kind = b'data: {"choices": [{}]}\n\ndata: ' + usage + b"\n\ndata: [DONE]\n\n", b"text/event-stream"
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: " + kind + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async def measure() -> None:
        nonlocal place
        place = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{place.sockets[0].getsockname()[1]}/v1"
        objective = LatencyObjective(30.0, 60.0, 0.9)
        config = EndpointProfileConfig(
            url, "dying", LengthGrid((8,), (2,)), objective, probe_s=0.2, least_requests=4, highest_rps=40.0
        )
        await measure_profile(config, tmp_path / "journal.jsonl")

    with pytest.raises(UserError, match="was lost while measuring"):
        asyncio.run(measure())
    rows = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert answers > 6 and not any("bucket" in row for row in rows)


def test_nobody_there_is_said_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.profile_endpoint", "--base_url=http://127.0.0.1:9/v1", f"--workdir={tmp_path}"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "http://127.0.0.1:9/v1: cannot be reached (ConnectError)" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_url": "localhost"}, "base_url: found 'localhost'"),
        ({"probe_s": 0.0}, "probe_s: found 0.0"),
        ({"least_requests": 0}, "least_requests, vocab_size: found 0"),
    ],
)
def test_mistakes_get_one_line(change, message):
    settings = {
        "base_url": "http://x/v1",
        "name": "a",
        "grid": LengthGrid((1,), (1,)),
        "objective": LatencyObjective(1),
    }
    with pytest.raises(UserError, match=message):
        EndpointProfileConfig(**{**settings, **change})
