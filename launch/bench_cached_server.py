"""What an answer from the cache takes through the whole way, the openai client and a real server, beside a generation.

    python -m launch.bench_cached_server                  the small reasoning model that comes with jaxstack

Each problem is asked for the first time, again, and in other words; how each was answered is read from the headers.
The cache has one threshold here, so that it always answers. The last line is one JSON object:

    miss_p50_ms           asked for the first time: a generation
    exact_p50_ms          asked again
    hit_p50_ms            asked in other words: embedding, search, decision
    hit_over_miss         miss_p50_ms / hit_p50_ms
    different_answers     repeats whose text was not that of the first answer; 0 unless something is wrong
"""

import statistics
import time
from pathlib import Path
from typing import Any

import openai
import psutil
from absl import flags

from jaxstack.models.embedded import embedded_model
from jaxstack.reasoning.countdown import held_out
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch import job
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe
from launch.server_process import server_process

_PROBLEMS = flags.DEFINE_integer("problems", 40, "asked three times each", lower_bound=2)
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_cached_server", "where summary.json and server.log go")

_SERVER_FLAGS = ("--max_sequences=4", "--max_batch_tokens=64", "--semantic_cache", "--cache_policy=static")
_THRESHOLD = 0.8
_KINDS = {"miss": "{}", "exact": "{}", "hit": "{} please"}


def run() -> dict[str, Any]:
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    problems = [problem.content for problem in held_out(_PROBLEMS.value, seed=5)]
    took: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    other: dict[str, int] = {}
    first: dict[str, str] = {}
    different = 0
    flags_ = (*_SERVER_FLAGS, f"--cache_threshold={_THRESHOLD}")
    with server_process(embedded_model(), workdir / "server.log", flags=flags_) as url:
        http = openai.DefaultHttpxClient(trust_env=False)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
            Progress(len(_KINDS) * len(problems), "asking", unit="request") as progress,
            LoadMeter(lambda: psutil.Process().children(recursive=True)) as machine,
        ):
            for wanted, form in _KINDS.items():
                for problem in problems:
                    messages: Any = [{"role": "user", "content": form.format(problem)}]
                    began = time.perf_counter()
                    raw = client.chat.completions.with_raw_response.create(
                        model="countdown", messages=messages, temperature=0, max_tokens=300
                    )
                    answer = raw.parse()
                    spent, kind = time.perf_counter() - began, raw.headers["x-cache"]
                    text = str(answer.choices[0].message)
                    if kind == wanted:
                        took[kind].append(1e3 * spent)
                    else:
                        other[f"{wanted}: {kind}"] = other.get(f"{wanted}: {kind}", 0) + 1
                    if wanted == "miss":
                        first[problem] = text
                    elif kind == "exact":
                        different += text != first[problem]
                    progress.advance()
    if not all(took.values()):
        raise UserError(f"answers: found {other}, expected some of each of {', '.join(_KINDS)}")
    summary: dict[str, Any] = {f"{kind}_p50_ms": round(statistics.median(ms), 3) for kind, ms in took.items()}
    summary |= {f"{kind}_max_ms": round(max(ms), 3) for kind, ms in took.items()}
    summary |= {f"{kind}_requests": len(ms) for kind, ms in took.items()}
    summary["hit_over_miss"] = round(summary["miss_p50_ms"] / summary["hit_p50_ms"], 2)
    summary |= {"different_answers": different, "answered_otherwise": other}
    summary |= {"foreign_cores": round(machine.foreign_cores, 3), "conclusive": machine.foreign_cores <= FOREIGN_LIMIT}
    summary |= describe()
    write_summary(workdir, summary)
    return summary


if __name__ == "__main__":
    job.main(run)
