"""What the demo prints and computes, without a server."""

import io
import json
import math

import pytest

from jaxstack.reasoning.countdown import held_out
from launch import conversation


class Terminal(io.StringIO):
    def isatty(self):
        return True


def answer(problem, *, thinking=True, correct=True, first=0.25, last=1.25, tokens=11):
    reason = "correct" if correct else "no answer"
    return conversation.Answer(problem, thinking, "answer 1", correct, reason, first, last, tokens)


PROBLEM, *OTHERS = held_out(8)
TRACE = (
    "try 2 + 9 = 11 & 11 : 22 0 big goal 29 no \n\n Hmm , try 2 * 9 = 18 & 11 : 29 yes \n\n "
    "</think> answer ( 2 * 9 ) + 11"
)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_trace_is_printed_one_step_a_line_however_it_is_cut(size):
    out = io.StringIO()
    printer = conversation.TracePrinter(out)
    printer.begin(PROBLEM)
    for start in range(0, len(TRACE), size):
        printer.piece(TRACE[start : start + size])
    printer.end(answer(PROBLEM))
    assert out.getvalue().splitlines() == [
        "",
        f"{' '.join(map(str, PROBLEM.numbers))} -> {PROBLEM.target}",
        "    try 2 + 9 = 11 & 11 : 22 0 big goal 29 no",
        "    Hmm , try 2 * 9 = 18 & 11 : 29 yes",
        "    </think> answer ( 2 * 9 ) + 11",
        "    [correct, 11 tokens in 1.25 s]",
    ]


def test_colour_is_for_terminals_only():
    for out, coloured in ((io.StringIO(), False), (Terminal(), True)):
        printer = conversation.TracePrinter(out)
        printer.begin(PROBLEM)
        printer.piece("try")
        printer.end(answer(PROBLEM, correct=False))
        assert ("\x1b[" in out.getvalue()) == coloured
        assert "wrong: no answer" in out.getvalue()


def test_summary():
    thinking = [answer(PROBLEM), answer(OTHERS[0], correct=False, first=0.75, last=2.75, tokens=21)]
    direct = [answer(PROBLEM, thinking=False, tokens=9), answer(OTHERS[0], thinking=False, correct=False, tokens=7)]
    before = {"vllm:prefix_cache_queries_total": 100.0, "jaxstack:compilations_total": 0.0}
    after = {
        "vllm:prefix_cache_queries_total": 300.0,
        "vllm:prefix_cache_hits_total": 50.0,
        "jaxstack:compilations_total": 1.0,
    }
    summary = conversation.summarise(thinking, direct, seconds=4.0, before=before, after=after)
    assert summary["accuracy"] == summary["accuracy_no_thinking"] == 0.5
    assert summary["problems"] == 2
    assert summary["recompilations"] == 1
    assert summary["tokens_per_s"] == 8.0
    assert summary["ttft_p50_s"] == 0.5
    assert summary["tpot_p50_s"] == pytest.approx(0.1)
    assert summary["prefix_hit_rate"] == 0.25
    assert summary["mean_tokens"] == 16.0
    assert json.loads(json.dumps(summary)) == summary
    text = conversation.report(summary | {"workdir": "work/demo"})
    assert "0.500 of 2 held-out problems" in text
    assert "500.0 / 700.0 / 745.0 ms" in text


def test_an_answer_without_tokens_breaks_no_figure():
    silent = answer(PROBLEM, correct=False, first=math.nan, last=math.nan, tokens=0)
    summary = conversation.summarise([silent], [silent], seconds=1.0, before={}, after={})
    assert summary["ttft_p50_s"] is None
    assert summary["tpot_p50_s"] is None
    assert summary["prefix_hit_rate"] == 0.0
    assert "NaN" not in json.dumps(summary)
    assert "- / - / - ms" in conversation.report(summary | {"workdir": "w"})


def test_plot(tmp_path):
    thinking = [answer(problem) for problem in (PROBLEM, *OTHERS)]
    direct = [answer(problem, thinking=False, correct=False) for problem in (PROBLEM, *OTHERS)]
    conversation.plot(thinking, direct, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    conversation.plot(thinking[:1], direct[:1], tmp_path / "one.png")
