"""The demo: a reasoning model that this stack trained solves problems it has never seen, on this stack's own server.

Starts `launch.serve` on a free port, sends held-out Countdown problems through the `openai` client, first a few one by
one to watch the reasoning stream, then all at once, with and without thinking, greedy. Prints accuracy, throughput and
latency, and stops the server.

    python -m launch.demo --problems=128
"""

import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import openai
from absl import flags

from jaxstack.models.embedded import embedded_model
from jaxstack.reasoning.countdown import held_out
from jaxstack.runtime.errors import UserError
from launch import job
from launch.conversation import converse, plot, report, summarise
from launch.server_process import metrics, server_process

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder of a Countdown model; default: the embedded one")
_PROBLEMS = flags.DEFINE_integer("problems", 128, "how many held-out problems", lower_bound=1)
_SHOWN = flags.DEFINE_integer("shown", 3, "how many more problems to show as they stream", lower_bound=0)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 128, "requests under way at a time", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 5, "shuffle of the held-out problems")
_WORKDIR = flags.DEFINE_string("workdir", "work/demo", "where summary.json, demo.png, answers.jsonl and server.log go")

# A prompt has eight words. In pages of four, prompts with the same beginning share their computation.
_SERVER_FLAGS = ("--page_size=4", "--max_sequences=64", "--max_batch_tokens=256")


def run() -> dict[str, Any]:
    began = time.perf_counter()
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    folder = Path(_MODEL.value) if _MODEL.value else embedded_model()
    pool = held_out(_PROBLEMS.value + _SHOWN.value, seed=_SEED.value)
    problems, shown = pool[: _PROBLEMS.value], pool[_PROBLEMS.value :]
    with server_process(folder, workdir / "server.log", flags=_SERVER_FLAGS) as url:
        before = metrics(url)
        try:
            thinking, direct, seconds = asyncio.run(converse(url, problems, shown, _CONCURRENCY.value))
        except (openai.OpenAIError, ExceptionGroup) as error:
            first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            if not isinstance(first, openai.OpenAIError):
                raise
            raise UserError(f"a request failed: {first} (server log: {workdir / 'server.log'})") from error
        after = metrics(url)
    summary = summarise(thinking, direct, seconds=seconds, before=before, after=after)
    summary |= {
        "model": str(folder),
        "workdir": str(workdir),
        "wall_s": round(time.perf_counter() - began, 1),
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (workdir / "answers.jsonl").open("w") as file:
        for answer in (*thinking, *direct):
            file.write(json.dumps(dataclasses.asdict(answer)) + "\n")
    plot(thinking, direct, workdir / "demo.png")
    print(report(summary), file=sys.stderr)
    return summary


if __name__ == "__main__":
    job.main(run)
