"""LoRA fine-tuning against transformers + PEFT: `python -m launch.bench_train`. About 8 minutes.

Both sides start from the same weights and the same adapter, train all linear layers on the same examples in the same
steps (float32, AdamW, clipping, cross entropy over target tokens), and take turns, round by round; who waits is frozen.
The peer's ways of batching are tried first and the quickest is counted: padded, sorted by length into groups, packed
with a block mask (which keeps documents apart, as ours does), each with and without torch.compile, and with OpenMP
threads that sleep or spin.

    speedup_vs_peft       trained tokens a second, ours packed against the peer's best
    speedup_pure_step     the same padded batches on both sides: what a step costs, packing aside
    losses_max_difference of the first steps, which must agree
    first_step_s          from loaded weights to the first step's end, compilation included

The model has all widths of Qwen2.5-0.5B, but fewer layers and tokens (`--layers`, `--vocab_size`), random weights.
"""

import concurrent.futures
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags
from tqdm import tqdm

from jaxstack.models import lora
from jaxstack.models.peft_format import save_peft
from jaxstack.runtime.errors import UserError
from launch import job
from launch.peers import PeerProcess, find_interpreter
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter, describe, foreign_now
from launch.serve_benchmark.ours import model_folder
from launch.serve_benchmark.shapes import model_config, scale_of
from launch.train_benchmark.ours import Ours, adapted, batch_of, peak_bytes, rows_of
from launch.train_benchmark.workload import Workload, targets_of

_PEER = flags.DEFINE_enum("peer", "peft", ["peft"], "whom to compare with")
_PEER_PYTHON = flags.DEFINE_string("peer_python", ".venv-peers/bin/python", "the peer's Python (`make peers`)")
_LAYERS = flags.DEFINE_integer("layers", 6, "layers of the model; Qwen2.5-0.5B has 24", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab_size", 37_984, "vocabulary; Qwen2.5-0.5B has 151936", lower_bound=64)
_EXAMPLES = flags.DEFINE_integer("examples", 16, "examples of a step", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens of a packed row, and of the longest example", lower_bound=16)
_RANK = flags.DEFINE_integer("rank", 16, "of the adapter", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 4, "steps of a side in a round", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds", lower_bound=1)
_COMPARED = flags.DEFINE_integer("compared", 12, "steps whose losses are compared", lower_bound=1)
_COMPILE = flags.DEFINE_bool("torch_compile", True, "try torch.compile, too; takes a minute or two")
_WORKDIR = flags.DEFINE_string("workdir", "work/bench_train", "where the model and summary.json go")

_LEARNING_RATE, _CLIP, _SEED, _THREADS = 1e-3, 1.0, 0, 2
_TOLERANCE = 1e-3


def run() -> dict[str, Any]:
    interpreter = find_interpreter(_PEER_PYTHON.value)
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    config = model_config(_LAYERS.value, _VOCAB.value)
    workload = Workload(examples=_EXAMPLES.value, seq_len=_SEQ_LEN.value, vocab_size=config.vocab_size)
    steps = workload.draw()
    adapter = lora.LoraConfig(r=_RANK.value, alpha=2.0 * _RANK.value)
    folder = model_folder(workdir, config, _SEED)
    save_peft(adapted(folder, adapter, _SEED), workdir / "adapter", adapter, base_model=str(folder))

    before = foreign_now(2.0)
    with contextlib.ExitStack() as stack, LoadMeter() as meter:
        contest = _Contest(workload, steps, folder, workdir, adapter, interpreter, stack)
        summary = contest.run()
    summary |= {
        "conclusive": before <= FOREIGN_LIMIT,
        "foreign_cores_before": round(before, 3),
        "rounds": _ROUNDS.value,
        "steps_of_a_round": _STEPS.value,
        "examples_of_a_step": workload.examples,
        "scale": scale_of(config),
        "dtype": "float32",
        "rank": adapter.r,
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
        workload: Workload,
        steps: list,
        folder: Path,
        workdir: Path,
        adapter: lora.LoraConfig,
        interpreter: Path,
        stack: contextlib.ExitStack,
    ):
        self._steps, self._folder, self._adapter = steps, folder, adapter
        self._longest = max(len(ids) for step in steps for ids, _ in step)
        self._rows, self._row = rows_of(steps, workload.seq_len), workload.seq_len
        self._interpreter, self._workdir = interpreter, workdir
        self._peers: dict[str, PeerProcess] = {}
        for policy in ("PASSIVE", "ACTIVE"):
            self._peers[policy] = stack.enter_context(self._open(policy))
            self._peers[policy].freeze()

    def _open(self, policy: str) -> PeerProcess:
        peer = PeerProcess(
            [self._interpreter, Path(__file__).parent / "peers" / "peft_train.py"],
            log_file=self._workdir / f"peft-{policy.lower()}.log",
            environment={"OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(_THREADS), "HF_HUB_OFFLINE": "1"},
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
        packed = {"kind": "packed", "rows": self._rows, "row_length": self._row}
        padded = {"kind": "padded", "groups": 1}
        same = {**padded, "length": self._longest}
        modes = {"padded": padded, "by length, 2 groups": {**padded, "groups": 2}, "packed": packed}
        modes["by length, 4 groups"] = {**padded, "groups": 4}
        total = 2 * len(modes) + (2 if _COMPILE.value else 0) + 3 + _ROUNDS.value * 4
        self._bar = tqdm(total=total, unit="run", file=sys.stderr)

        trials = {
            (name, policy, False): self._trial(policy, mode) for policy in self._peers for name, mode in modes.items()
        }
        if _COMPILE.value:  # one shape, so that it compiles once; by the policy that is quicker without
            policy = min(self._peers, key=lambda p: trials["packed", p, False] or 1e9)
            trials["packed", policy, True] = self._trial(policy, packed, compiled=True)
            trials["padded alike", policy, True] = self._trial(policy, same, compiled=True)
        best = min((key for key, seconds in trials.items() if seconds), key=lambda key: trials[key] or 1e9)
        name, policy, compiled = best
        mode = {**modes, "padded alike": same}[name]

        ours = self._ours(packed=True)
        first_ours = ours.compile_s + ours.run(0, 1)[1]
        alike = self._ours(packed=False)
        self._note(f"ours compiled in {ours.compile_s:.1f} s")

        # The first steps of both, for the losses: fresh weights on either side.
        ours_again = self._ours(packed=True)
        mine = ours_again.run(0, _COMPARED.value)[0]
        del ours_again
        theirs, first_peer = self._fresh(policy, mode, compiled, _COMPARED.value)
        difference = max(abs(a - b) for a, b in zip(mine, theirs))
        self._note(f"losses differ by {difference:.1e} at most over {_COMPARED.value} steps")

        count = _STEPS.value
        tokens = lambda first: sum(targets_of(self._steps[i % len(self._steps)]) for i in range(first, first + count))  # noqa: E731
        rates: dict[str, list[float]] = {"ours": [], "peft": [], "ours padded": [], "peft padded": []}
        foreign = []
        for number in range(_ROUNDS.value):
            first = 1 + number * count
            turns = [
                ("ours", lambda first=first: ours.run(first, first + count)[1]),
                ("peft", lambda first=first: self._peer_seconds(policy, mode, first, count)),
                ("ours padded", lambda first=first: alike.run(first, first + count)[1]),
                ("peft padded", lambda first=first: self._peer_seconds(policy, same, first, count)),
            ]
            for side, turn in turns if number % 2 == 0 else turns[::-1]:
                with LoadMeter(lambda: [p.process for p in self._peers.values()]) as meter:
                    seconds = turn()
                foreign.append(meter.foreign_cores)
                rates[side].append(tokens(first) / seconds)
                self._note(f"{side}: {rates[side][-1]:.0f} trained tokens/s")
        peaks = {"ours": self._our_peak(), "peft": self._peer_peak(policy, mode, compiled)}
        self._note("peak memory measured")
        self._bar.close()
        ratio = lambda a, b: round(statistics.median(x / y for x, y in zip(rates[a], rates[b])), 3)  # noqa: E731
        return {
            "benchmark": "bench_train",
            "peer": "peft",
            "speedup_vs_peft": ratio("ours", "peft"),
            "speedup_pure_step": ratio("ours padded", "peft padded"),
            "trained_tokens_per_s": {side: round(statistics.median(values), 1) for side, values in rates.items()},
            "losses_max_difference": float(f"{difference:.2e}"),
            "losses": {"ours": [round(x, 5) for x in mine], "peft": [round(x, 5) for x in theirs]},
            "first_step_s": {"ours": round(first_ours, 2), "peft": round(first_peer, 2)},
            "peak_mib": {side: round(size / 2**20) for side, size in peaks.items()},
            "best_peer_mode": _title(*best),
            "trial_seconds_a_step": {_title(*key): s and round(s, 3) for key, s in trials.items()},
            "fill_rate": round(
                statistics.mean(sum(len(ids) for ids, _ in step) for step in self._steps) / (self._rows * self._row), 3
            ),
            "foreign_cores": round(max(foreign), 3),
            "versions": self.versions,
        }

    def _ours(self, *, packed: bool) -> Ours:
        arguments, options = self._for_ours(packed=packed)
        return Ours(*arguments, **options)

    def _for_ours(self, *, packed: bool) -> tuple[tuple, dict[str, Any]]:
        rows, row = (self._rows, self._row) if packed else (len(self._steps[0]), self._longest)
        batches = [batch_of(step, rows, row, packed=packed) for step in self._steps]
        arguments = self._folder, self._adapter, _SEED, batches, self._longest
        return arguments, {"learning_rate": _LEARNING_RATE, "clip_norm": _CLIP, "total_steps": 10_000}

    def _trial(self, policy: str, mode: dict, compiled: bool = False) -> float | None:
        """Seconds a step; None where the mode fails."""
        try:
            self._fresh(policy, mode, compiled, 1)
            seconds = self._peer_seconds(policy, mode, 1, 3) / 3
        except UserError as error:
            self._note(f"peft: {mode['kind']}{', torch.compile' if compiled else ''}: {error}")
            return None
        words = ", torch.compile" if compiled else ""
        self._note(f"peft, {mode['kind']}, {mode.get('groups', '')} {policy.lower()}{words}: {seconds:.2f} s a step")
        return seconds

    def _fresh(self, policy: str, mode: dict, compiled: bool, steps: int) -> tuple[list[float], float]:
        """Begins anew: losses of the first steps, and seconds of the very first."""
        peer = self._peers[policy]
        peer.thaw()
        peer.ask("begin", steps=self._steps, compiled=compiled)
        answer = peer.ask("run", first=0, last=steps, mode=mode)
        peer.freeze()
        return answer["losses"], answer["seconds"][0]

    def _peer_seconds(self, policy: str, mode: dict, first: int, count: int) -> float:
        peer = self._peers[policy]
        peer.thaw()
        start = time.perf_counter()
        peer.ask("run", first=first, last=first + count, mode=mode)
        seconds = time.perf_counter() - start
        peer.freeze()
        return seconds

    def _our_peak(self) -> int:
        """Of a process of its own."""
        arguments, options = self._for_ours(packed=True)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_bytes, *arguments, **options).result()

    def _peer_peak(self, policy: str, mode: dict, compiled: bool) -> int:
        with self._open(policy) as peer:
            peer.ask("begin", steps=self._steps, compiled=compiled)
            peer.ask("run", first=0, last=2, mode=mode)
            return int(peer.ask("peak")["bytes"])

    def _note(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)
        self._bar.update()


def _title(name: str, policy: str, compiled: bool) -> str:
    return f"{name}{', torch.compile' if compiled else ''}, {policy.lower()} threads"


if __name__ == "__main__":
    job.main(run)
