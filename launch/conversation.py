"""A conversation about held-out Countdown problems with a running server, through the `openai` client.

What `launch.demo` does between starting the server and stopping it: ask, show, measure, plot. No flags here.
"""

import asyncio
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import openai
from tqdm import tqdm

from jaxstack.reasoning.countdown import Problem, grade, solve

_MAX_TOKENS = 150
_PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completed request. Times are seconds after it was sent; `tokens` counts generated tokens."""

    problem: Problem
    thinking: bool
    text: str
    correct: bool
    reason: str
    first_token_s: float
    last_token_s: float
    tokens: int

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        return (self.last_token_s - self.first_token_s) / (self.tokens - 1) if self.tokens > 1 else None


async def ask(
    client: openai.AsyncOpenAI,
    model: str,
    problem: Problem,
    *,
    thinking: bool,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Streams one chat completion, greedy, and grades it; `on_text` sees each piece as it arrives."""
    sent = time.perf_counter()
    pieces: list[str] = []
    first = last = float("nan")
    tokens = 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": problem.content}],
        temperature=0.0,
        max_tokens=_MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        # The text as it was generated: the thinking is shown and graded with the rest.
        extra_body={"chat_template_kwargs": {"enable_thinking": thinking}, "separate_reasoning": False},
    )
    async for chunk in stream:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            last = time.perf_counter() - sent
            first = first if pieces else last
            pieces.append(text)
            if on_text is not None:
                on_text(text)
    text = "".join(pieces)
    result = grade(problem, text)
    return Answer(problem, thinking, text, result.correct, result.reason, first, last, tokens)


async def ask_all(
    client: openai.AsyncOpenAI, model: str, problems: Sequence[Problem], *, thinking: bool, concurrency: int
) -> tuple[list[Answer], float]:
    """All problems at once, at most `concurrency` under way; the answers in order, and the seconds it took."""
    places = asyncio.Semaphore(concurrency)
    correct = 0
    name = "thinking" if thinking else "no thinking"
    with tqdm(total=len(problems), desc=name, unit="problem", disable=None) as bar:

        async def one(problem: Problem) -> Answer:
            nonlocal correct
            async with places:
                answer = await ask(client, model, problem, thinking=thinking)
            correct += answer.correct
            bar.set_postfix_str(f"{correct} correct", refresh=False)
            bar.update()
            return answer

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(problem)) for problem in problems]
        took = time.perf_counter() - began
    if bar.disable:
        print(f"{name}: {correct} of {len(problems)} correct in {took:.1f} s", file=sys.stderr, flush=True)
    return [task.result() for task in tasks], took


class TracePrinter:
    """Writes a streamed trace, one step a line, indented; in colour on a terminal."""

    def __init__(self, out: TextIO):
        self._out = out
        self._colour = out.isatty()
        self._at_line_start = True
        self._space = ""

    def begin(self, problem: Problem) -> None:
        self._out.write(self._paint("1", f"\n{' '.join(map(str, problem.numbers))} -> {problem.target}\n"))
        self._at_line_start, self._space = True, ""

    def piece(self, text: str) -> None:
        for character in text:
            if character == "\n":
                # The blank line between steps becomes one line end.
                self._out.write("" if self._at_line_start else "\n")
                self._at_line_start, self._space = True, ""
            elif character == " ":
                self._space = "" if self._at_line_start else " "
            else:
                indent = "    " if self._at_line_start else self._space
                self._out.write(indent + self._paint("2", character))
                self._at_line_start, self._space = False, ""
        self._out.flush()

    def end(self, answer: Answer) -> None:
        mark = self._paint("32", "correct") if answer.correct else self._paint("31", f"wrong: {answer.reason}")
        self._out.write("" if self._at_line_start else "\n")
        self._out.write(f"    [{mark}, {answer.tokens} tokens in {answer.last_token_s:.2f} s]\n")
        self._out.flush()

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def percentiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """`{name_p50_s, name_p90_s, name_p99_s}` of a sample in seconds; None where there is none."""
    known = [value for value in values if np.isfinite(value)]
    return {f"{name}_p{p}_s": round(float(np.percentile(known, p)), 5) if known else None for p in _PERCENTILES}


def summarise(
    thinking: Sequence[Answer],
    direct: Sequence[Answer],
    *,
    seconds: float,
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    """The demo's figures.

    Args:
      thinking: answers with thinking, all sent at once; latency and throughput are theirs.
      direct: the same problems without thinking.
      seconds: how long the first took, from the first request to the last token.
      before: the server's counters when it was warm. Its count of compilations is of those after warm-up as it is.
      after: the server's counters at the end.
    """
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    queried = grown.get("vllm:prefix_cache_queries_total", 0.0)
    tokens = sum(answer.tokens for answer in thinking)
    return {
        "accuracy": round(float(np.mean([a.correct for a in thinking])), 4),
        "problems": len(thinking),
        "accuracy_no_thinking": round(float(np.mean([a.correct for a in direct])), 4),
        "recompilations": int(after.get("jaxstack:compilations_total", 0)),
        "tokens_per_s": round(tokens / seconds, 1),
        **percentiles("ttft", [a.first_token_s for a in thinking]),
        **percentiles("tpot", [a.per_token_s for a in thinking if a.per_token_s is not None]),
        "prefix_hit_rate": round(grown.get("vllm:prefix_cache_hits_total", 0.0) / queried, 4) if queried else 0.0,
        "mean_tokens": round(tokens / len(thinking), 1),
        "mean_tokens_no_thinking": round(sum(a.tokens for a in direct) / len(direct), 1),
        "seconds": round(seconds, 3),
    }


def plot(thinking: Sequence[Answer], direct: Sequence[Answer], file: Path) -> None:
    """Accuracy by depth of the first hit, thinking and not, and the latency of the concurrent run, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    depths = sorted({_depth(answer) for answer in thinking})
    for offset, (label, answers) in enumerate((("thinking", thinking), ("no thinking", direct))):
        shares = [np.mean([a.correct for a in answers if _depth(a) == depth]) for depth in depths]
        left.bar(np.array(depths) + 0.4 * offset - 0.2, shares, 0.4, label=label)
    counts = [sum(_depth(a) == depth for a in thinking) for depth in depths]
    left.set_xticks(depths, [f"{depth}\nn={count}" for depth, count in zip(depths, counts)])
    left.set(xlabel="candidates to reject before the first hit", ylabel="accuracy", ylim=(0, 1.2))
    left.set_title(f"{len(thinking)} held-out problems, greedy")
    left.legend(loc="upper right", ncols=2)
    for label, values in (
        ("time to first token", [a.first_token_s for a in thinking]),
        ("time per output token", [a.per_token_s for a in thinking if a.per_token_s]),
        ("whole answer", [a.last_token_s for a in thinking]),
    ):
        ordered = np.sort([value for value in values if np.isfinite(value)])
        right.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), label=label)
    right.set(xscale="log", xlabel="seconds", ylabel="share of requests", title="latency, all requests at once")
    right.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _depth(answer: Answer) -> int:
    solution = solve(answer.problem)
    return solution.depth if solution else -1


def _client(url: str) -> openai.AsyncOpenAI:
    # No proxy from the environment between us and this machine.
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, http_client=http)


async def converse(
    url: str, problems: Sequence[Problem], shown: Sequence[Problem], concurrency: int
) -> tuple[list[Answer], list[Answer], float]:
    """The conversation with a warm server: a few problems to watch, then all, thinking and not."""
    printer = TracePrinter(sys.stderr)
    async with _client(url) as client:
        model = (await client.models.list()).data[0].id
        for problem in shown:
            printer.begin(problem)
            printer.end(await ask(client, model, problem, thinking=True, on_text=printer.piece))
        if shown:
            sys.stderr.write("\n")
        thinking, seconds = await ask_all(client, model, problems, thinking=True, concurrency=concurrency)
    # A client of its own: the first one's idle connections are about to be closed by the server.
    async with _client(url) as client:
        direct, _ = await ask_all(client, model, problems, thinking=False, concurrency=concurrency)
    return thinking, direct, seconds


def report(summary: dict[str, Any]) -> str:
    """The summary for people."""

    def latency(name: str) -> str:
        values = [summary[f"{name}_p{p}_s"] for p in _PERCENTILES]
        return " / ".join("-" if value is None else f"{1000 * value:.1f}" for value in values) + " ms"

    rows = [
        ("accuracy, thinking", f"{summary['accuracy']:.3f} of {summary['problems']} held-out problems"),
        ("accuracy, no thinking", f"{summary['accuracy_no_thinking']:.3f}"),
        ("generated", f"{summary['tokens_per_s']:.0f} tokens/s"),
        ("TTFT p50 / p90 / p99", latency("ttft")),
        ("TPOT p50 / p90 / p99", latency("tpot")),
        ("prefix cache hit rate", f"{summary['prefix_hit_rate']:.3f}"),
        ("compilations after warm-up", str(summary["recompilations"])),
        ("files", summary["workdir"]),
    ]
    return "\n" + "\n".join(f"{name:28}{value}" for name, value in rows)
