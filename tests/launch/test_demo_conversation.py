"""The demo's conversation with a real server and the real client, and the figures that come out of it."""

import asyncio
import contextlib

import pytest

from jaxstack.engine import Engine, EngineConfig
from jaxstack.models.embedded import embedded_model
from jaxstack.reasoning.countdown import held_out
from jaxstack.serving import BackgroundServer
from launch import conversation
from launch.server_process import metrics


@pytest.fixture(scope="module")
def url():
    config = EngineConfig(max_sequences=4, max_batch_tokens=64, page_size=4, num_pages=512)
    engine = Engine.from_folder(embedded_model(), config)
    with contextlib.closing(engine), BackgroundServer(engine) as server:
        yield server.url


def test_conversation(url, capsys):
    problems = held_out(17)
    before = metrics(url)
    thinking, direct, seconds = asyncio.run(conversation.converse(url, problems[:16], problems[16:], concurrency=8))
    summary = conversation.summarise(thinking, direct, seconds=seconds, before=before, after=metrics(url))
    assert [answer.problem for answer in thinking] == list(problems[:16])
    assert summary["accuracy"] >= 0.6
    assert summary["accuracy"] > summary["accuracy_no_thinking"]
    assert summary["recompilations"] == 0
    # Eight of nine words of a prompt without thinking are those of the same prompt with.
    assert 0.4 < summary["prefix_hit_rate"] < 1.0
    assert all(answer.text.startswith("try ") and answer.tokens > 20 for answer in thinking)
    assert all(answer.text.startswith("answer ") and answer.tokens < 20 for answer in direct)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{' '.join(map(str, problems[16].numbers))} -> {problems[16].target}\n    try " in shown.err
    assert "tokens in" in shown.err
