"""LoRA fine-tuning against transformers + PEFT: `python -m launch.bench_train`. About 8 minutes.

Both sides start from the same weights and the same adapter, train all linear layers on the same examples in the same
steps (float32, AdamW, clipping, cross entropy over target tokens), and take turns, round by round; who waits is frozen.
A turn's first step is not counted: some machines take memory away from who does not run, which training never meets.
A step is what the trainer's packer puts into a few rows. The peer's ways of batching the same examples are tried first
and the quickest is counted: flattened (transformers' own packing: one row without padding, documents told apart by
their positions), packed into rows with a mask of blocks, padded in groups of like length; then that one with OpenMP
threads that sleep instead of spinning, and, if asked for, with torch.compile (it took two minutes and was slower).
Ours compiles layer by layer (`SftConfig.unroll_layers`), which its first step pays for.

    speedup_vs_peft       trained tokens a second, ours packed against the peer's best
    speedup_vs_peft_with_huge_pages
                          the same, the peer started with the C library's setting that our launchers make by themselves
                          (`jaxstack.runtime.memory`): what is left when somebody tunes the peer's environment
    speedup_pure_step     the same padded batches on both sides: what a step costs, packing aside
    losses_max_difference of all steps, which must agree
    first_step_s          from loaded weights to the first step's end, compilation included
    peak_mib              largest resident size of a process that loads and takes two steps

The model has all widths of Qwen2.5-0.5B, but fewer layers and tokens (`--layers`, `--vocab_size`), random weights.
"""

if __name__ == "__main__":  # as launch.sft does
    from jaxstack.runtime.memory import restart_with_huge_pages

    restart_with_huge_pages()

import concurrent.futures
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from jaxstack.models import lora
from jaxstack.models.peft_format import save_peft
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.memory import with_huge_pages
from launch import job
from launch.peers import PeerProcess, find_interpreter
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe, foreign_now
from launch.serve_benchmark.ours import model_folder
from launch.serve_benchmark.shapes import model_config, scale_of
from launch.train_benchmark.ours import Ours, adapted, peak_bytes
from launch.train_benchmark.workload import Steps, Workload, targets_of

_PEER = flags.DEFINE_enum("peer", "peft", ["peft"], "whom to compare with")
_PEER_PYTHON = flags.DEFINE_string("peer_python", ".venv-peers/bin/python", "the peer's Python (`make peers`)")
_LAYERS = flags.DEFINE_integer("layers", 6, "layers of the model; Qwen2.5-0.5B has 24", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab_size", 37_984, "vocabulary; Qwen2.5-0.5B has 151936", lower_bound=64)
_ROWS = flags.DEFINE_integer("rows", 3, "packed rows of a step", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens of a packed row, and of the longest example", lower_bound=16)
_RANK = flags.DEFINE_integer("rank", 16, "of the adapter", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 1, "counted steps of a side in a round", lower_bound=1)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "rounds of ours against the peer: the more, the less a machine's moods weigh", lower_bound=1
)
_UNROLL = flags.DEFINE_bool(
    "unroll_layers", True, "our side compiles every layer by itself: longer start, quicker steps"
)
_COMPILE = flags.DEFINE_bool("torch_compile", False, "try torch.compile, too; takes minutes")
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_train", "where the model and summary.json go")

_LEARNING_RATE, _CLIP, _SEED, _THREADS = 1e-3, 1.0, 0, 2
_TOLERANCE = 1e-3
_OPTIONS: dict[str, Any] = {"learning_rate": _LEARNING_RATE, "clip_norm": _CLIP, "total_steps": 10_000}
_PADDED = 6  # examples of a step of the padded comparison
_MAIN = ("ours", "peft")
_ALL_EVERY = 4  # rounds: the other sides' figures stand beside the main one, which needs most rounds

_POLICIES = ("ACTIVE", "PASSIVE")


def run() -> dict[str, Any]:
    interpreter = find_interpreter(_PEER_PYTHON.value)
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    config = model_config(_LAYERS.value, _VOCAB.value)
    count = 1 + _ROUNDS.value * (1 + _STEPS.value)
    workload = Workload(steps=count, rows=_ROWS.value, seq_len=_SEQ_LEN.value, vocab_size=config.vocab_size)
    adapter = lora.LoraConfig(r=_RANK.value, alpha=2.0 * _RANK.value)
    folder = model_folder(workdir, config, _SEED)
    save_peft(adapted(folder, adapter, _SEED), workdir / "adapter", adapter, base_model=str(folder))

    before = foreign_now(2.0)
    with contextlib.ExitStack() as stack, LoadMeter() as meter:
        summary = _Contest(workload.draw(), folder, workdir, adapter, interpreter, stack).run()
    summary |= {
        "conclusive": before <= FOREIGN_LIMIT,
        "foreign_cores_before": round(before, 3),
        "rounds": _ROUNDS.value,
        "steps_of_a_round": _STEPS.value,
        "rows_of_a_step": workload.rows,
        "scale": scale_of(config),
        "dtype": "float32",
        "rank": adapter.r,
        "unroll_layers": _UNROLL.value,
        "jax": jax.__version__,
        **describe(),
        "wall_s": round(meter.wall_s, 1),
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if summary["losses_max_difference"] > _TOLERANCE:
        raise UserError(
            f"losses differ by {summary['losses_max_difference']:.1e}, expected at most {_TOLERANCE}: the sides do not "
            f"train the same thing; see {workdir / 'summary.json'}"
        )
    return summary


class _Contest:
    """Both sides and what is measured of them."""

    def __init__(
        self,
        steps: Steps,
        folder: Path,
        workdir: Path,
        adapter: lora.LoraConfig,
        interpreter: Path,
        stack: contextlib.ExitStack,
    ):
        self._steps, self._folder, self._adapter = steps, folder, adapter
        self._interpreter, self._workdir, self._stack = interpreter, workdir, stack
        self._all = steps.plain()
        packed = {"kind": "packed", "rows": _ROWS.value, "row_length": _SEQ_LEN.value}
        self._modes: dict[str, dict[str, Any]] = {"flattened": {"kind": "flattened"}, "packed": packed}
        self._modes |= {f"padded, {n} groups by length": {"kind": "padded", "groups": n} for n in (2, 4)}

    def _open(self, policy: str, *, huge_pages: bool = False) -> PeerProcess:
        peer = PeerProcess(
            [self._interpreter, Path(__file__).parent / "peers" / "peft_train.py"],
            log_file=self._workdir / "peft.log",
            environment={
                **(with_huge_pages({}) if huge_pages else {"GLIBC_TUNABLES": ""}),
                "OMP_WAIT_POLICY": policy,
                "OMP_NUM_THREADS": str(_THREADS),
                "HF_HUB_OFFLINE": "1",
            },
            name="peft",
        )
        try:
            self.versions = peer.ask(
                "load",
                folder=str(self._folder.resolve()),
                adapter=str((self._workdir / "adapter").resolve()),
                threads=_THREADS,
                learning_rate=_LEARNING_RATE,
                clip_norm=_CLIP,
            )["versions"]
        except BaseException:
            peer.close()
            raise
        return peer

    def run(self) -> dict[str, Any]:
        count, rounds = _STEPS.value, _ROUNDS.value
        total = len(self._modes) + _COMPILE.value + 1 + 2 + rounds * 2 + -(-rounds // _ALL_EVERY) * 3 + 2
        self._bar = tqdm(total=total, unit="run", file=sys.stderr)
        trials, best = self._try()
        name, policy, compiled = best
        mode = self._modes[name]

        ours, first_ours, my_losses = self._ours(self._steps.packed(), self._steps.longest)
        padded = self._steps.padded(_PADDED)
        ours_padded, *_ = self._ours(padded, padded[0]["token_ids"].shape[1])
        self._note(f"ours: {ours.compile_s:.1f} s to compile, {first_ours:.1f} s to the first step's end")
        # Processes of their own, so that none has another's optimizer.
        peer, peer_huge, peer_padded = (
            self._stack.enter_context(self._open(policy, huge_pages=huge)) for huge in (False, True, False)
        )
        their_losses, first_peer = self._fresh(peer, self._all, mode, compiled)
        self._fresh(peer_huge, self._all, mode, compiled)
        alike = {"kind": "padded", "groups": 1, "length": padded[0]["token_ids"].shape[1]}
        self._fresh(peer_padded, self._steps.plain(_PADDED), alike, False)
        self._note(f"peft: {first_peer:.1f} s to the first step's end")

        # What runs steps [first, last), the batches, and steps a round.
        sides: dict[str, tuple[Callable[[int, int], tuple[list[float], float]], list, int]] = {
            "ours": (ours.run, self._steps.packed(), count),
            "peft": (partial(self._run, peer, mode), self._steps.packed(), count),
            "peft, huge pages": (partial(self._run, peer_huge, mode), self._steps.packed(), count),
            "ours padded": (ours_padded.run, padded, 1),
            "peft padded": (partial(self._run, peer_padded, alike), padded, 1),
        }
        peers = (peer, peer_huge, peer_padded)
        losses: dict[str, list[float]] = {side: [] for side in sides} | {"ours": my_losses, "peft": their_losses}
        rates: dict[str, dict[int, float]] = {side: {} for side in sides}  # by round
        foreign = []
        for number in range(rounds):
            playing = [side for side in sides if side in _MAIN or number % _ALL_EVERY == 0]
            for side in playing if number % 2 == 0 else reversed(playing):
                run, batches, steps = sides[side]
                first = 1 + number * (1 + steps)
                losses[side] += run(first, first + 1)[0]
                first += 1
                with LoadMeter(lambda: [p.process for p in peers]) as meter:
                    found, seconds = run(first, first + steps)
                losses[side] += found
                foreign.append(meter.foreign_cores)
                rates[side][number] = sum(map(targets_of, batches[first : first + steps])) / seconds
                self._note(f"{side}: {rates[side][number]:.0f} trained tokens/s")
        for each in peers:
            each.close()
        peaks = {"ours": self._our_peak(), "peft": self._peer_peak(policy, mode, compiled)}
        self._note("peak memory measured")
        self._bar.close()

        def ratio(a: str, b: str) -> float:
            return round(statistics.median(rates[a][r] / rates[b][r] for r in rates[a].keys() & rates[b].keys()), 3)

        return {
            "benchmark": "bench_train",
            "peer": "peft",
            "speedup_vs_peft": ratio("ours", "peft"),
            "speedup_vs_peft_with_huge_pages": ratio("ours", "peft, huge pages"),
            "speedup_pure_step": ratio("ours padded", "peft padded"),
            "trained_tokens_per_s": {
                side: round(statistics.median(values.values()), 1) for side, values in rates.items()
            },
            "losses_max_difference": float(f"{max(abs(a - b) for a, b in zip(my_losses, their_losses)):.2e}"),
            "losses": {"ours": [round(x, 5) for x in my_losses], "peft": [round(x, 5) for x in their_losses]},
            "first_step_s": {"ours": round(first_ours, 2), "peft": round(first_peer, 2)},
            "peak_mib": {side: round(size / 2**20) for side, size in peaks.items()},
            "best_peer_mode": _title(*best),
            "trial_seconds_a_step": {_title(*key): s and round(s, 3) for key, s in trials.items()},
            "fill_rate": round(self._steps.fill_rate, 4),
            "examples_a_step": round(statistics.mean(map(len, self._steps.examples)), 1),
            "foreign_cores": round(max(foreign), 3),
            "versions": self.versions,
        }

    def _try(self) -> tuple[dict[tuple[str, str, bool], float | None], tuple[str, str, bool]]:
        """Seconds a step of the peer's ways (mode, threads, compiled), None where one fails; and the quickest."""
        trials: dict[tuple[str, str, bool], float | None] = {}

        def quickest() -> tuple[str, str, bool]:
            return min((key for key, seconds in trials.items() if seconds), key=lambda key: trials[key] or 1e9)

        first, second = _POLICIES
        with self._open(first) as peer:
            for name in self._modes:
                trials[name, first, False] = self._trial(peer, name, first, False)
            if _COMPILE.value:
                name = quickest()[0]
                trials[name, first, True] = self._trial(peer, name, first, True)
        name, _, compiled = quickest()
        with self._open(second) as peer:
            trials[name, second, compiled] = self._trial(peer, name, second, compiled)
        return trials, quickest()

    def _trial(self, peer: PeerProcess, name: str, policy: str, compiled: bool) -> float | None:
        """Seconds of the second step; None where the mode fails."""
        title = _title(name, policy, compiled)
        try:
            self._fresh(peer, self._all[:2], self._modes[name], compiled)
            seconds = self._run(peer, self._modes[name], 1, 2)[1]
        except UserError as error:
            self._note(f"peft, {title}: {error}")
            return None
        self._note(f"peft, {title}: {seconds:.2f} s a step")
        return seconds

    def _ours(self, batches: list, longest: int) -> tuple[Ours, float, list[float]]:
        """Our side after its first step, the seconds from loaded weights to there, and that step's loss."""
        ours = Ours(self._folder, self._adapter, _SEED, batches, longest, **_OPTIONS, unroll=_UNROLL.value)
        losses, seconds = ours.run(0, 1)
        return ours, ours.compile_s + seconds, losses

    def _fresh(self, peer: PeerProcess, steps: list, mode: dict, compiled: bool) -> tuple[list[float], float]:
        """Begins anew: loss of the first step, and its seconds."""
        peer.thaw()
        peer.ask("begin", steps=steps, compiled=compiled)
        return self._run(peer, mode, 0, 1)

    def _run(self, peer: PeerProcess, mode: dict, first: int, last: int) -> tuple[list[float], float]:
        """Losses of steps [first, last), and the seconds of all."""
        peer.thaw()
        start = time.perf_counter()
        answer = peer.ask("run", first=first, last=last, mode=mode)
        seconds = time.perf_counter() - start
        peer.freeze()
        return answer["losses"], seconds

    def _our_peak(self) -> int:
        """Of a process of its own."""
        arguments = self._folder, self._adapter, _SEED, self._steps.packed(), self._steps.longest
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_bytes, *arguments, **_OPTIONS, unroll=_UNROLL.value).result()

    def _peer_peak(self, policy: str, mode: dict, compiled: bool) -> int:
        with self._open(policy) as peer:
            peer.ask("begin", steps=self._all, compiled=compiled)
            peer.ask("run", first=0, last=2, mode=mode)
            return int(peer.ask("peak")["bytes"])

    def _note(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        self._bar.update()


def _title(name: str, policy: str, compiled: bool) -> str:
    threads = "spinning" if policy == "ACTIVE" else "sleeping"
    return f"{name}{', torch.compile' if compiled else ''}, {threads} threads"


if __name__ == "__main__":
    job.main(run)
