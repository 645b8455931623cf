"""How fast the engine answers many requests, beside Hugging Face transformers or llama.cpp on the same machine.

    python -m launch.bench_serve                          # a quarter of Qwen2.5-0.5B, at most ten minutes on two cores
    python -m launch.bench_serve --layers=24 --vocab_size=151936      # all of it
    python -m launch.bench_serve --shared_prefix=0.75     # 512-token prompts of which 384 tokens are the same
    python -m launch.bench_serve --dtype=bfloat16         # both sides in bfloat16
    python -m launch.bench_serve --peer=llama_cpp         # many requests at once, and one alone

Both sides open the same folder of random weights and answer the same requests, all handed in at once: prompts of 32 to
256 tokens, 16 to 96 tokens each, greedy, the end token ignored. The peer runs in its own environment (`make peers`,
`make peer-llama-cpp`), in a process of its own, in every mode it has: of transformers `generate` in left-padded batches
of 8, 16 and 32 sorted by length, and continuous batching (`generate_batch`) with several settings; of llama.cpp one
shared batch of all sequences. What is best in a first trial is measured in the rounds that count, where all sides take
turns, the order turned around each time. Model loading, compilation, warm-up and the starting of threads are outside
the clock. Ours is measured through HTTP with the openai client (client and server in our process, their CPU time is
counted as ours) and by `Engine.generate`.

speedup_vs_X is the median over the rounds of X's seconds over ours through HTTP; X is the peer's best mode for the
peer's own name. matmul_share is our CPU seconds over those of the bare matrix products of the same steps (see
serve_benchmark/matmul_limit.py); 1 is the roof. `engine_ms_per_step` is what planning, packing and handing out tokens
cost, `http_cpu_ms_per_step` the CPU time of client and server over that of `Engine.generate`. `conclusive` is false
where other programs used more than 0.3 cores; then the ratios of wall times say nothing.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import flax
import jax
from absl import flags, logging

from jaxstack.engine import EngineConfig
from jaxstack.runtime.errors import UserError
from launch import job
from launch.peers import find_interpreter
from launch.serve_benchmark import matmul_limit, report
from launch.serve_benchmark.agreement import NEAR_TIE, Agreement, MarginAt, PlainForward, compare
from launch.serve_benchmark.contest import Contest, PeerMode, Progress, Run, fastest
from launch.serve_benchmark.machine import FOREIGN_LIMIT, describe, foreign_now, load1
from launch.serve_benchmark.opponents import OPPONENTS, Opponent
from launch.serve_benchmark.ours import Ours, model_folder
from launch.serve_benchmark.shapes import model_config, scale_of
from launch.serve_benchmark.workload import Workload

_PEER = flags.DEFINE_enum("peer", "transformers", sorted(OPPONENTS), "whom to compare with")
_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "interpreter of the peer's environment")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations, on both sides")
_LAYERS = flags.DEFINE_integer("layers", 6, "layers of the model; Qwen2.5-0.5B has 24", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 37_984, "size of the vocabulary; Qwen2.5-0.5B has 151936", lower_bound=2
)
_REQUESTS = flags.DEFINE_integer("requests", 32, "requests at once", lower_bound=1)
_SHARED_PREFIX = flags.DEFINE_float(
    "shared_prefix", 0.0, "share of every prompt, of 512 tokens then, that all have in common"
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds that count", lower_bound=1)
_ALONE = flags.DEFINE_boolean(
    "alone", None, "also measure one request alone; by default with --peer=llama_cpp and more than one request"
)
_MAX_BATCH_TOKENS = flags.DEFINE_integer("max_batch_tokens", 512, "our engine's tokens per step", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of weights, lengths and token ids", lower_bound=0)
_WORKDIR = flags.DEFINE_string(
    "workdir", "work/bench_serve", "where the model, summary.json, bench_serve.png and logs go"
)

_SHARED_PROMPT = (512, 512)


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
    found = Agreement(near_tie=NEAR_TIE[_DTYPE.value])
    for r in rounds:
        requests, mine = workload.draw(r["http"].variant), r["http"].measured.tokens
        for kind in kinds:
            found += compare(requests.prompts, requests.max_tokens, mine, r[kind].measured.tokens, margin_at)
        alone = workload.draw(r["in_process"].variant), r["in_process"].measured.tokens
        found += Agreement(counts_equal=[len(answer) for answer in alone[1]] == alone[0].max_tokens)
    return found


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """A workload's rounds, the products' times around each, the peer's best mode of each kind, and every trial."""

    workload: Workload
    rounds: list[report.Round]
    limits: list[matmul_limit.MatmulTimes]
    best: dict[str, PeerMode]
    tried: list[tuple[PeerMode, Run]]


def contend(
    contest: Contest,
    opponent: Opponent,
    workload: Workload,
    products: matmul_limit.Products,
    progress: Progress,
    *,
    quiet: bool,
) -> _Outcome:
    """Trials, then rounds, of one workload."""
    for i, name in enumerate(contest.ours):
        contest.run_ours(name, i)
    tried = trials(contest, opponent.modes(workload), quiet=quiet, progress=progress)
    best = fastest(tried, quiet=quiet)
    if not best:
        raise UserError(f"{opponent.name}: found no mode that works, see {_WORKDIR.value}/{opponent.name}-passive.log")
    contest.keep({mode.wait_policy for mode in best.values()})
    times: list[matmul_limit.MatmulTimes] = []

    def time_products() -> None:
        times.append(products.measure())
        progress.done("matrix products alone")

    rounds = contest.rounds(_ROUNDS.value, list(best.values()), first_variant=len(contest.ours), between=time_products)
    limits = [matmul_limit.mean(around) for around in pairwise(times)]
    return _Outcome(workload, rounds, limits, best, tried)


def run() -> dict[str, Any]:
    began = time.perf_counter()
    logging.set_verbosity(logging.WARNING)  # no line for every HTTP request
    opponent = OPPONENTS[_PEER.value]
    interpreter = find_interpreter(_PEER_PYTHON.value or opponent.interpreter, opponent.make_target)
    workdir = Path(_WORKDIR.value)
    config = model_config(_LAYERS.value, _VOCAB_SIZE.value)
    many = Workload(
        requests=_REQUESTS.value,
        prompt_tokens=_SHARED_PROMPT if _SHARED_PREFIX.value else Workload.prompt_tokens,
        vocab_size=config.vocab_size,
        shared_prefix=_SHARED_PREFIX.value,
        seed=_SEED.value,
    )
    workloads = [many]
    with_alone = opponent.name == "llama_cpp" if _ALONE.value is None else _ALONE.value
    if with_alone and many.requests > 1:
        workloads.append(dataclasses.replace(many, requests=1))
    load_before, foreign_before = load1(), foreign_now(2.0)
    quiet = foreign_before <= FOREIGN_LIMIT
    kinds = [len({mode.kind for mode in opponent.modes(w)}) for w in workloads]
    runs = sum(2 + len(opponent.modes(w)) + n + (3 + n) * _ROUNDS.value + 1 for w, n in zip(workloads, kinds))
    progress = Progress(1 + runs)
    progress.done(f"{scale_of(config)}; other programs use {foreign_before:.1f} cores", 0)

    folder = model_folder(workdir, config, many.seed)
    engine_config = EngineConfig(
        max_sequences=many.requests,
        max_batch_tokens=_MAX_BATCH_TOKENS.value,
        max_model_len=many.window,
        dtype="bfloat16" if _DTYPE.value == "bfloat16" else "float32",
    )
    peer: dict[str, Any] = {}
    outcomes: list[_Outcome] = []
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(contextlib.closing(Ours(folder, many, engine_config)))
        progress.done(f"our engine is warm after {ours.warm_up_s:.0f} s")
        products = matmul_limit.Products(config, _MAX_BATCH_TOKENS.value, dtype=_DTYPE.value)
        open_peer = partial(opponent.open, interpreter, folder, workdir, peer, _DTYPE.value)
        for workload in workloads:
            contest = Contest({"http": ours.over_http, "in_process": ours.in_process}, open_peer, workload, progress)
            with contextlib.closing(contest):
                outcomes.append(contend(contest, opponent, workload, products, progress, quiet=quiet))
        stats = ours.engine.stats()

    plain = PlainForward(folder, many.window)
    first = outcomes[0]
    agreement = agreement_of(many, first.rounds, list(first.best), plain)
    summary = {
        "benchmark": "bench_serve",
        "peer": opponent.name,
        **report.figures(opponent.name, first.rounds, first.best, first.limits, agreement, foreign_before),
        **(
            {"speedup_shared_prefix": report.speedup_over_best(first.rounds, "http", first.best)}
            if many.shared_prefix
            else {}
        ),
        **{f"alone_{name}": value for o in outcomes[1:] for name, value in _alone(o, plain).items()},
        **report.overhead(first.rounds, stats),
        "recompilations": stats.recompilations,
        "padding_ratio": round(stats.step_padding / (stats.step_padding + stats.step_rows), 4),
        "dtype": _DTYPE.value,
        **describe(),
        "load1_before": round(load_before, 2),
        "load1": round(load1(), 2),
        "scale": scale_of(config),
        "workload": dataclasses.asdict(many)
        | {"prompts": many.draw(0).prompt_tokens, "outputs": many.draw(0).output_tokens},
        "rounds": len(first.rounds),
        "trials": [
            {
                "requests": o.workload.requests,
                "mode": mode.label,
                "wall_s": round(r.wall_s, 2),
                "cpu_s": round(r.measured.cpu_s, 2),
            }
            for o in outcomes
            for mode, r in o.tried
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


def _alone(outcome: _Outcome, plain: PlainForward) -> dict[str, Any]:
    """The figures of the request that had the machine to itself."""
    agreement = agreement_of(outcome.workload, outcome.rounds, list(outcome.best), plain)
    return {
        **report.speedups(_PEER.value, outcome.rounds, outcome.best),
        **report.our_figures(outcome.rounds, outcome.limits),
        "tokens_agree": agreement.tokens_agree,
        "contestants": report.contestants(outcome.rounds, outcome.best),
    }


if __name__ == "__main__":
    job.main(run)
