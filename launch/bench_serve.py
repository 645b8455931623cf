"""How fast the engine answers many requests, beside Hugging Face transformers on the same machine.

    python -m launch.bench_serve                                    # a quarter of Qwen2.5-0.5B, at most ten minutes on
    two cores python -m launch.bench_serve --layers=24 --vocab_size=151936    # all of it
    python -m launch.bench_serve --shared_prefix=0.75               # 512-token prompts of which 384 tokens are the same

Both sides open the same folder of random float32 weights and answer the same requests, all handed in at once: prompts
of 32 to 256
tokens, 16 to 96 tokens each, greedy, the end token ignored. The peer runs in its own environment (`make peers`), in a
process of its
own, in every mode it has: `generate` in left-padded batches of 8, 16 and 32 sorted by length, and continuous batching
(`generate_batch`) with several settings. What is best in a first trial is measured in the rounds that count, where all
sides take
turns, the order turned around each time. Model loading, compilation, warm-up and the starting of threads are outside
the clock. Ours is measured through HTTP with the openai client (client and server in our process, their CPU time is
counted as ours) and by `Engine.generate`.

speedup_vs_X is the median over the rounds of X's seconds over ours through HTTP; X is the peer's best mode for
`transformers`. matmul_share is our CPU seconds over those of the bare matrix products of the same steps (see
serve_benchmark/matmul_limit.py); 1 is the roof. `conclusive` is false where other programs used more than 0.3 cores;
then the ratios of wall times say nothing.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
from absl import flags, logging

from jaxstack.engine import EngineConfig
from jaxstack.runtime.errors import UserError
from launch import job
from launch.peers import PeerProcess, find_interpreter
from launch.peers.process import DEFAULT_INTERPRETER
from launch.serve_benchmark import matmul_limit, report
from launch.serve_benchmark.agreement import Agreement, MarginAt, PlainForward, compare
from launch.serve_benchmark.contest import Contest, PeerMode, Progress, Run, fastest
from launch.serve_benchmark.machine import FOREIGN_LIMIT, describe, foreign_now, load1
from launch.serve_benchmark.ours import Ours, model_config, model_folder, scale_of
from launch.serve_benchmark.workload import Workload

_PEER = flags.DEFINE_enum("peer", "transformers", ["transformers"], "whom to compare with")
_PEER_PYTHON = flags.DEFINE_string("peer_python", DEFAULT_INTERPRETER, "interpreter of the peers' environment")
_LAYERS = flags.DEFINE_integer("layers", 6, "layers of the model; Qwen2.5-0.5B has 24", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 37_984, "size of the vocabulary; Qwen2.5-0.5B has 151936", lower_bound=2
)
_REQUESTS = flags.DEFINE_integer("requests", 32, "requests at once", lower_bound=1)
_SHARED_PREFIX = flags.DEFINE_float(
    "shared_prefix", 0.0, "share of every prompt, of 512 tokens then, that all have in common"
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds that count", lower_bound=1)
_MAX_BATCH_TOKENS = flags.DEFINE_integer("max_batch_tokens", 512, "our engine's tokens per step", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of weights, lengths and token ids", lower_bound=0)
_WORKDIR = flags.DEFINE_string(
    "workdir", "work/bench_serve", "where the model, summary.json, bench_serve.png and logs go"
)

_PROGRAM = Path(__file__).parent / "peers" / "transformers_serve.py"
_SHARED_PROMPT = (512, 512)
_THREADS = 2
_PEER_PAGE = 32


def peer_modes(workload: Workload) -> list[PeerMode]:
    """What is tried of transformers: the sizes and orders of static batches, and the settings of continuous batching.

    Sizes that it would guess for a GPU are given. Of what cannot win the shared-prefix workload (static batches compute
    every prompt whole) only the likeliest is tried there. `grouped` is an option of its `sdpa` attention. Left out:
    `eager` attention (1.5 times as long as the best) and batches of 16 sorted by prompt length (1.1 times as long as by
    output length).
    """
    whole, sharing = workload.requests, bool(workload.shared_prefix)
    static = [(batch, order, True) for batch, order in ((8, "output"), (16, "output")) if batch < whole]
    static = ([] if sharing else static) + [(whole, "given", True), (whole, "given", False)]
    modes = [
        PeerMode(
            "generate",
            f"batches of {batch}"
            + (f", longest {order} first" if batch < whole else "")
            + (", grouped" if grouped else ""),
            {"batch": batch, "order": order, "grouped": grouped},
        )
        for batch, order, grouped in static
    ]
    base = {
        "order": "output",
        "page_size": _PEER_PAGE,
        "num_blocks": whole * -(-workload.window // _PEER_PAGE + 1),
        "max_requests_per_batch": whole,
        "allow_block_sharing": sharing,
    }
    paged: list[tuple[str, dict[str, Any]]] = [
        ("sdpa grouped, 512 tokens a step", {"attention": "sdpa", "grouped": True, "max_batch_tokens": 512}),
        ("sdpa grouped, 1024 tokens a step", {"attention": "sdpa", "grouped": True, "max_batch_tokens": 1024}),
        ("sdpa, 512 tokens a step", {"attention": "sdpa", "max_batch_tokens": 512}),
    ]
    if whole > 16:
        half = {"attention": "sdpa", "grouped": True, "max_batch_tokens": 512, "max_requests_per_batch": whole // 2}
        paged.append((f"sdpa grouped, 512 tokens a step, {whole // 2} requests at once", half))
    return modes + [PeerMode("generate_batch", title, {**base, **settings}) for title, settings in paged]


def open_peer(interpreter: Path, folder: Path, workdir: Path, about: dict[str, Any], policy: str) -> PeerProcess:
    """Starts the peer with OMP_WAIT_POLICY=`policy`, loads the model, finds the best number of threads."""
    peer = PeerProcess(
        [interpreter, _PROGRAM],
        log_file=workdir / f"peer-{policy.lower()}.log",
        environment={"OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(_THREADS), "TOKENIZERS_PARALLELISM": "false"},
        name="transformers",
    )
    try:
        loaded = peer.ask("load", folder=str(folder.resolve()), threads=_THREADS)
        threads = peer.ask("choose_threads", candidates=[_THREADS, 1])
    except BaseException:
        peer.close()
        raise
    about["versions"] = loaded["versions"]
    about.setdefault("threads", {})[policy] = threads["threads"]
    return peer


def trials(
    contest: Contest, modes: Sequence[PeerMode], *, quiet: bool, progress: Progress
) -> list[tuple[PeerMode, Run]]:
    """Every mode once with waiting threads asleep; on a quiet machine the best of each kind with spinning ones, too."""
    tried = contest.trials(modes, variant=0)
    winners = list(fastest(tried, quiet=quiet).values())
    if quiet:
        return tried + contest.trials([dataclasses.replace(mode, wait_policy="ACTIVE") for mode in winners], variant=0)
    progress.done("OMP_WAIT_POLICY=ACTIVE not tried: it needs a machine without other work", len(winners))
    return tried


def agreement_of(
    workload: Workload, rounds: Sequence[report.Round], kinds: Sequence[str], margin_at: MarginAt
) -> Agreement:
    """Our answers over HTTP against those of every peer mode, in all rounds."""
    found = Agreement()
    for r in rounds:
        requests, mine = workload.draw(r["http"].variant), r["http"].measured.tokens
        for kind in kinds:
            found += compare(requests.prompts, requests.max_tokens, mine, r[kind].measured.tokens, margin_at)
        alone = workload.draw(r["in_process"].variant), r["in_process"].measured.tokens
        found += Agreement(counts_equal=[len(answer) for answer in alone[1]] == alone[0].max_tokens)
    return found


def run() -> dict[str, Any]:
    began = time.perf_counter()
    logging.set_verbosity(logging.WARNING)  # no line for every HTTP request
    interpreter = find_interpreter(_PEER_PYTHON.value)
    workdir = Path(_WORKDIR.value)
    config = model_config(_LAYERS.value, _VOCAB_SIZE.value)
    workload = Workload(
        requests=_REQUESTS.value,
        prompt_tokens=_SHARED_PROMPT if _SHARED_PREFIX.value else Workload.prompt_tokens,
        vocab_size=config.vocab_size,
        shared_prefix=_SHARED_PREFIX.value,
        seed=_SEED.value,
    )
    load_before, foreign_before = load1(), foreign_now(2.0)
    modes = peer_modes(workload)
    progress = Progress(1 + 2 + len(modes) + 2 + 4 * _ROUNDS.value + 1)
    progress.done(f"{scale_of(config)}; other programs use {foreign_before:.1f} cores", 0)

    folder = model_folder(workdir, config, workload.seed)
    engine_config = EngineConfig(
        max_sequences=workload.requests,
        max_batch_tokens=_MAX_BATCH_TOKENS.value,
        max_model_len=workload.window,
        dtype="float32",
    )
    peer: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(contextlib.closing(Ours(folder, workload, engine_config)))
        progress.done(f"our engine is warm after {ours.warm_up_s:.0f} s")
        contest = Contest(
            {"http": ours.over_http, "in_process": ours.in_process},
            partial(open_peer, interpreter, folder, workdir, peer),
            workload,
            progress,
        )
        stack.enter_context(contextlib.closing(contest))
        for i, name in enumerate(contest.ours):
            contest.run_ours(name, i)
        quiet = foreign_before <= FOREIGN_LIMIT
        tried = trials(contest, modes, quiet=quiet, progress=progress)
        best = fastest(tried, quiet=quiet)
        if not best:
            raise UserError(f"transformers: found no mode that works, see {workdir}/peer-passive.log")
        contest.keep({mode.wait_policy for mode in best.values()})
        rounds = contest.rounds(_ROUNDS.value, list(best.values()), first_variant=len(contest.ours))
        # Before anything else is compiled in this process: the counter is the process's own.
        stats = ours.engine.stats()
    limit = matmul_limit.measure(config, _MAX_BATCH_TOKENS.value)
    progress.done("matrix products alone measured")

    agreement = agreement_of(workload, rounds, list(best), PlainForward(folder, workload.window))
    summary = {
        "benchmark": "bench_serve",
        "peer": _PEER.value,
        **report.figures(rounds, list(contest.ours), best, limit, agreement, foreign_before),
        **({"speedup_shared_prefix": report.speedup_over_best(rounds, "http", best)} if workload.shared_prefix else {}),
        "recompilations": stats.recompilations,
        "padding_ratio": round(stats.step_padding / (stats.step_padding + stats.step_rows), 4),
        "dtype": "float32",
        **describe(),
        "load1_before": round(load_before, 2),
        "load1": round(load1(), 2),
        "scale": scale_of(config),
        "workload": dataclasses.asdict(workload)
        | {"prompts": workload.draw(0).prompt_tokens, "outputs": workload.draw(0).output_tokens},
        "rounds": len(rounds),
        "trials": [
            {"mode": mode.label, "wall_s": round(r.wall_s, 2), "cpu_s": round(r.measured.cpu_s, 2)} for mode, r in tried
        ],
        "peer_threads": peer["threads"],
        "versions": peer["versions"] | {"jax": jax.__version__, "flax": flax.__version__},
        "warm_up_s": round(ours.warm_up_s, 1),
        "workdir": str(workdir),
        "wall_s": round(time.perf_counter() - began, 1),
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.plot(summary["contestants"], report.title(summary), workdir / "bench_serve.png")
    print(report.text(summary), file=sys.stderr)
    return summary


if __name__ == "__main__":
    job.main(run)
