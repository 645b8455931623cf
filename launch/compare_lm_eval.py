"""Runs lm-eval against this stack's server, and compares what it found with the same figures computed in process.

    python -m launch.compare_lm_eval

The server (`launch.serve`, with the embedded model) answers lm-eval's `local-completions` on two tasks of held-out
Countdown problems: log likelihoods of given answers, and generated answers. lm-eval runs as a subprocess in its own
environment (`make peers`) with its own tokenizer, and needs no network.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models.embedded import embedded_model
from jaxstack.reasoning.countdown import grade, held_out
from jaxstack.reasoning.evaluation import MAX_TOKENS
from jaxstack.runtime.errors import UserError
from launch import job, lm_eval_tasks
from launch.lm_eval_tasks import CHOOSING, GENERATING
from launch.peers import find_interpreter
from launch.server_process import server_process

_PEER = flags.DEFINE_string("peer_python", ".venv-peers/bin/python", "Python with lm_eval (`make peers`).")
_PROBLEMS = flags.DEFINE_integer("problems", 48, "held-out problems of each task", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 5, "shuffle of the held-out problems")
_WORKDIR = flags.DEFINE_string("workdir", "work/compare_lm_eval", "where tasks, logs and summary.json go")

TOLERANCE = 1e-4
_TIMEOUT_S = 600.0
# The same bits whatever else is in the batch, so that both sides can be held against each other exactly.
_SETTINGS = EngineConfig(page_size=4, max_sequences=16, max_batch_tokens=256, batch_invariant=True)
_FLAGS = ("--page_size=4", "--max_sequences=16", "--max_batch_tokens=256", "--batch_invariant")


def run() -> dict[str, Any]:
    python, began = find_interpreter(_PEER.value), time.perf_counter()
    workdir, folder = Path(_WORKDIR.value), embedded_model()
    problems = held_out(_PROBLEMS.value, seed=_SEED.value)
    choosing, generating = lm_eval_tasks.choosing_documents(problems), lm_eval_tasks.generating_documents(problems)
    lm_eval_tasks.write_tasks(workdir / "tasks", choosing, generating)
    shutil.rmtree(workdir / "found", ignore_errors=True)
    with server_process(folder, workdir / "server.log", flags=_FLAGS) as url:
        _lm_eval(python, url, folder, workdir)
    results = lm_eval_tasks.read_results(workdir / "found")
    engine = Engine.from_folder(folder, _SETTINGS)
    try:
        chosen = _compare_choosing(engine, choosing, lm_eval_tasks.read_samples(workdir / "found", CHOOSING))
        made = _compare_generating(engine, generating, lm_eval_tasks.read_samples(workdir / "found", GENERATING))
    finally:
        engine.close()
    right = sum(grade(problem, text).correct for problem, text in zip(problems, made.pop("texts")))
    chosen["accuracy_lm_eval"] = results[CHOOSING]["acc,none"]
    made["exact_match_lm_eval"] = results[GENERATING]["exact_match,answer"]
    made["graded_correct"] = right / len(problems)
    agree = (
        chosen["max_abs_diff"] <= TOLERANCE
        and chosen["accuracy"] == chosen["accuracy_lm_eval"]
        and chosen["greedy_agree"] == chosen["log_likelihoods"]
        and made["exact_match"] == made["exact_match_lm_eval"]
        and made["same_text"] == len(problems)
    )
    summary = {
        "agree": agree,
        "tolerance": TOLERANCE,
        "problems": len(problems),
        "choosing": chosen,
        "generating": made,
        "wall_s": round(time.perf_counter() - began, 1),
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _lm_eval(python: Path, url: str, folder: Path, workdir: Path) -> None:
    model = f"model={folder.name},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={folder}"
    command = [
        *(str(python), "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", f"{model},num_concurrent=4,max_retries=1", "--batch_size", "4"),
        *("--tasks", f"{CHOOSING},{GENERATING}", "--include_path", str(workdir / "tasks")),
        *("--output_path", str(workdir / "found"), "--log_samples"),
    ]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    places = {"HF_HOME": str(workdir.resolve() / "cache"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    log = workdir / "lm_eval.log"
    print(f"lm-eval asks the server (log: {log})", file=sys.stderr, flush=True)
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **offline, **places},
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"lm-eval: not done after {_TIMEOUT_S:.0f} s (log: {log})") from None
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1][-300:] if lines else "it printed nothing"
        raise UserError(f"lm-eval: ended with exit code {done.returncode}: {last} (log: {log})")


def _compare_choosing(engine: Engine, documents: list[dict[str, Any]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Every choice's log likelihood, and whether greedy decoding would say it."""
    assert engine.tokenizer is not None
    prompts, starts = [], []
    for document in documents:
        start = len(engine.tokenizer.encode(document["prompt"]))
        for choice in document["choices"]:
            prompts.append(engine.tokenizer.encode(f"{document['prompt']} {choice}"))
            starts.append(start)
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1))
    ours = []
    for output, start in zip(outputs, starts):
        assert output.prompt_logprobs is not None
        entries = [entry for entry in output.prompt_logprobs[start:] if entry is not None]
        likeliest = all(entry.logprob == max(value for _, value in entry.top) for entry in entries)
        ours.append((sum(entry.logprob for entry in entries), likeliest))
    theirs = [
        (float(logprob), str(greedy) == "True")
        for sample in samples
        for ((logprob, greedy),) in sample["resps"]
    ]  # fmt: skip
    size = lm_eval_tasks.CHOICES
    if len(theirs) != len(ours):
        raise UserError(f"lm-eval: found {len(theirs)} log likelihoods, expected {len(ours)}")
    best = [max(range(size), key=lambda i: ours[start + i][0]) for start in range(0, len(ours), size)]
    return {
        "log_likelihoods": len(ours),
        "max_abs_diff": max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs)),
        "greedy_agree": sum(a == b for (_, a), (_, b) in zip(ours, theirs)),
        "greedy": sum(likeliest for _, likeliest in ours),
        "accuracy": sum(i == document["label"] for i, document in zip(best, documents)) / len(documents),
    }


def _compare_generating(
    engine: Engine, documents: list[dict[str, Any]], samples: list[dict[str, Any]]
) -> dict[str, Any]:
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop=("<eos>",))
    ours = [o.completions[0].text for o in engine.generate([document["prompt"] for document in documents], sampling)]
    theirs = [sample["resps"][0][0] for sample in samples]
    if len(theirs) != len(ours):
        raise UserError(f"lm-eval: found {len(theirs)} answers, expected {len(ours)}")
    found = [re.findall(lm_eval_tasks.ANSWER, text) for text in ours]
    matches = sum(bool(f) and f[0] == document["answer"] for f, document in zip(found, documents))
    return {
        "answers": len(ours),
        "same_text": sum(a == b for a, b in zip(ours, theirs)),
        "exact_match": matches / len(ours),
        "texts": theirs,
    }


if __name__ == "__main__":
    job.main(run)
