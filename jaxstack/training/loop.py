"""The training loop: data, step, log, evaluate, checkpoint, stop; for any step and any stream of batches.

The device is never waited for: a step is dispatched while the one before it runs, and its figures are fetched two steps
later. Only a checkpoint or an evaluation waits, and then everything up to that step is written down first, so that a
job killed at any moment finds in its folder a state, and the log that belongs to it.
"""

import collections
import dataclasses
import logging
import math
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jaxstack.runtime.checkpoint import Checkpointer, SaveFailed
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import MetricWriter, WindowedMeans
from jaxstack.runtime.progress import Progress
from jaxstack.runtime.signals import StopFlag
from jaxstack.training.losses import Batch
from jaxstack.training.step import Metrics, Params, TrainState

_log = logging.getLogger(__name__)

TIMING_FIELDS = ("tokens_per_s", "mfu", "step_time_s", "data_wait_s", "memory_bytes")
"""Fields of a metrics row that differ between two runs of the same job; all others are reproducible."""

SCORE = "score_"
"""How the names of a generation's scores begin in a row of metrics."""

# Steps that may be dispatched and not yet looked at. Two keep the device busy; more would only delay a stop.
_IN_FLIGHT = 2


class BatchStream(Protocol):
    """Where batches come from."""

    waited_s: float

    def next(self, stop: Callable[[], bool]) -> Batch | None:
        """The next batch; None if `stop()` became true while waiting."""

    def state(self) -> Any:
        """The place behind the last batch handed out; has `as_json()`."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When things happen, in steps; None for never.

    Attributes:
      total_steps: the run ends after so many.
      log_every: steps of one row of metrics.
      save_every, eval_every: besides the end of the run.
      max_skipped_in_row: so many skipped steps in a row end the run.
    """

    total_steps: int
    log_every: int = 10
    save_every: int | None = None
    eval_every: int | None = None
    max_skipped_in_row: int = 10


@dataclasses.dataclass
class Counts:
    """Totals of a run, kept in checkpoints."""

    tokens_trained: int = 0
    tokens_seen: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    steps_without_targets: int = 0
    eval_pending: bool = False
    last_loss: float | None = None
    last_eval_loss: float | None = None
    last_scores: dict[str, float] | None = None


class Trainer:
    """Runs steps from a state to `total_steps`, or until `stop`.

    Args:
      step: `(state, frozen, batch) -> (state, metrics)`, as `make_train_step` returns it; `state` is donated.
      state: the first, or restored, state.
      frozen: parameters that do not change.
      stream: batches, standing at the place that belongs to `state`.
      epoch_of: a stream's state as a number of epochs, for the log.
      config: when things happen.
      checkpointer: where states go; None to keep none.
      writer: where rows go.
      stop: polled at every boundary.
      evaluate: `(params, stop) -> {"eval_loss": ..., ...}` (any names; this one is the run's measure where it is
        among them), or None if stopped midway.
      metadata: stored with every checkpoint under "job".
      resumed: the "loop" part of the metadata of the checkpoint that `state` came from.
      slots_per_step: token slots of a batch, for the fill rate.
      peak_tokens_per_s: tokens that the devices could train in a second at their peak, for the model FLOPs utilization
        (Chowdhery et al. 2022, appendix B); None where that is not known.
      progress: show a bar.
    """

    def __init__(
        self,
        step: Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]],
        state: TrainState,
        frozen: Params,
        stream: BatchStream,
        *,
        epoch_of: Callable[[Any], float],
        config: LoopConfig,
        checkpointer: Checkpointer | None,
        writer: MetricWriter,
        stop: StopFlag,
        evaluate: Callable[[Params, StopFlag], dict[str, float] | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
        resumed: Mapping[str, Any] | None = None,
        slots_per_step: int,
        peak_tokens_per_s: float | None = None,
        progress: bool = True,
    ):
        self._step, self.state, self._frozen, self._stream = step, state, frozen, stream
        self._epoch_of, self._config, self._evaluate = epoch_of, config, evaluate
        self._checkpointer, self._writer, self._stop = checkpointer, writer, stop
        self._metadata, self._slots, self._show = dict(metadata or {}), slots_per_step, progress
        self._peak_tokens_per_s = peak_tokens_per_s
        # A CPU that pretends to be several devices has one set of threads for all of them: two steps at once could each
        # wait for the other's.
        devices = state.step.devices()
        self._one_at_a_time = len(devices) > 1 and next(iter(devices)).platform == "cpu"
        self.step_number = int(state.step)
        self.first_step = self.step_number
        resumed = resumed or {}
        self.counts = Counts(**resumed.get("counts", {}))
        self._window = WindowedMeans(resumed.get("window"))
        self._pending: collections.deque[tuple[int, Metrics, float]] = collections.deque()
        self._saved_step = self.step_number if resumed else 0
        self.save_failed = False
        self.recompilations = 0
        self.train_s = 0.0
        self.trained_here = 0
        """Target tokens of this process's steps, the first one excluded: it may still wait for the compiler."""

    def run(self) -> None:
        """Trains. Afterwards `state`, `step_number`, `counts` and `recompilations` say what came of it.

        Raises:
          UserError: too many skipped steps in a row, or the device ran out of memory.
        """
        config = self._config
        compiles = CompileCounter()
        bar = Progress(config.total_steps, "train", initial=self.step_number, enabled=self._show)
        started: float | None = None
        self._log_time, self._log_waited = time.perf_counter(), self._stream.waited_s
        self._log_step = self.step_number
        self._bar = bar
        try:
            if self.counts.eval_pending:
                self._run_evaluation()
            while self.step_number < config.total_steps and not self._stop:
                batch = self._stream.next(self._stop.is_set)
                if batch is None:
                    break
                self.state, metrics = self._step(self.state, self._frozen, batch)
                if self._one_at_a_time:
                    jax.block_until_ready(self.state)
                self.step_number += 1
                self._pending.append((self.step_number, metrics, self._epoch_of(self._stream.state())))
                if started is None:
                    self._drain()
                    started, before = time.perf_counter(), self.counts.tokens_trained
                    compiles.reset()
                while len(self._pending) > _IN_FLIGHT:
                    self._collect()
                bar.advance()
                if _due(config.eval_every, self.step_number, config.total_steps) and self._evaluate is not None:
                    self.counts.eval_pending = True
                    self._run_evaluation()
                if _due(config.save_every, self.step_number, config.total_steps):
                    self.save()
                if self.counts.skipped_in_row >= config.max_skipped_in_row:
                    break
            self._drain()
            self.recompilations = compiles.count if started is not None else 0
            if started is not None:
                self.train_s = time.perf_counter() - started
                self.trained_here = self.counts.tokens_trained - before
            if self.step_number > self._saved_step:
                self.save()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"out of memory in a step of {self._slots} token slots ({' '.join(str(error).split())[:200]}); "
                "in this order: fewer batch_rows and more accum_steps, remat=full, chunk_tokens=1024"
            ) from error
        finally:
            bar.close()
        if self.counts.skipped_in_row >= config.max_skipped_in_row:
            raise UserError(
                f"{self.counts.skipped_in_row} steps in a row up to step {self.step_number} had a gradient that is not "
                "finite; the last good parameters are in the checkpoint; try a lower learning_rate, or look at the data"
            )

    # -------------------------------------------------------------------------------------------------- bookkeeping

    def _drain(self) -> None:
        """Waits for all dispatched steps and writes down what they gave."""
        while self._pending:
            self._collect()

    def _collect(self) -> None:
        """Fetches the figures of the oldest dispatched step; a full window becomes a row."""
        step, metrics, epoch = self._pending.popleft()
        values = jax.device_get(metrics)
        counts, window = self.counts, self._window
        skipped = int(values["skipped"])
        counts.skipped_steps += skipped
        counts.skipped_in_row = counts.skipped_in_row + 1 if skipped else 0
        if skipped and counts.skipped_steps == 1:
            _log.warning(
                "step %d: the gradient is not finite (norm %s); the step is skipped and the parameters stay as they "
                "are, now and whenever it happens again: skipped_steps counts it",
                step,
                values["grad_norm"],
            )
        elif not skipped and not float(values["loss_den"]):
            counts.steps_without_targets += 1
            if counts.steps_without_targets == 1:
                _log.warning("step %d: no token of its batch is a target, so it teaches nothing", step)
        counts.tokens_trained += round(float(values["loss_den"]))
        counts.tokens_seen += int(values["tokens"])
        window.add("loss", values["loss_num"], values["loss_den"])
        for name, (num, den) in values["aux"].items():
            window.add(name, num, den)
        if not skipped:
            window.add("grad_norm", values["grad_norm"], 1)
            window.add("update_norm_ratio", values["update_norm"] / max(float(values["param_norm"]), 1e-30), 1)
        window.add("fill_rate", values["tokens"], self._slots)
        window.add("trained", values["loss_den"], 1)
        if step % self._config.log_every == 0 or step == self._config.total_steps:
            self._write_row(step, epoch, float(values["learning_rate"]))

    def _write_row(self, step: int, epoch: float, learning_rate: float) -> None:
        counts = self.counts
        trained, seen = (self._window.state()[name][0] for name in ("trained", "fill_rate"))
        means = self._window.means()
        del means["trained"]
        self._window.reset()
        now = time.perf_counter()
        steps, seconds = max(1, step - self._log_step), max(now - self._log_time, 1e-9)
        counts.last_loss = means["loss"]
        row = {
            "epoch": round(epoch, 6),
            **means,
            "tokens_trained": counts.tokens_trained,
            "tokens_seen": counts.tokens_seen,
            "learning_rate": learning_rate,
            "skipped_steps": counts.skipped_steps,
            "tokens_per_s": trained / seconds,
            "step_time_s": seconds / steps,
            "data_wait_s": self._stream.waited_s - self._log_waited,
            "memory_bytes": peak_memory_bytes(),
        }
        if self._peak_tokens_per_s is not None:
            row["mfu"] = seen / seconds / self._peak_tokens_per_s
        self._writer.write(step, row)
        self._bar.figures(loss=means["loss"], tokens_per_s=round(trained / seconds))
        self._log_time, self._log_step, self._log_waited = now, step, self._stream.waited_s

    def _run_evaluation(self) -> None:
        """Evaluates at this step; a stop request leaves it pending for the resumed run."""
        assert self._evaluate is not None
        self._drain()
        began = time.perf_counter()
        values = self._evaluate(self.state.params, self._stop)
        self._log_time += time.perf_counter() - began
        if values is None:
            return
        self.counts.eval_pending = False
        if "eval_loss" in values:
            self.counts.last_eval_loss = values["eval_loss"]
            if not math.isfinite(values["eval_loss"]):
                _log.warning("step %d: the loss on the held-out data is %s", self.step_number, values["eval_loss"])
        self.counts.last_scores = {name: value for name, value in values.items() if name.startswith(SCORE)} or None
        self._writer.write(self.step_number, values, group="eval")

    def save(self) -> None:
        """Checkpoints the present state; a failing disk is a warning, and `save_failed` until a later save succeeds."""
        if self._checkpointer is None:
            return
        self._drain()
        metadata = {
            "job": self._metadata,
            "data": self._stream.state().as_json(),
            "loop": {"counts": dataclasses.asdict(self.counts), "window": self._window.state()},
        }
        metric = self.counts.last_eval_loss if self.counts.last_eval_loss is not None else self.counts.last_loss
        try:
            self._checkpointer.save(self.step_number, state_arrays(self.state), metadata, metric=metric)
            if self.step_number >= self._config.total_steps or self._stop:
                self._checkpointer.wait()
        except SaveFailed as error:
            self.save_failed = True
            _log.warning("%s; training goes on without it", error)
            return
        self._saved_step, self.save_failed = self.step_number, False


def state_arrays(state: TrainState) -> dict[str, Any]:
    """A state as the tree of arrays that a checkpoint holds: optimizer leaves by their path, so that it reads without
    optax.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {
        "step": state.step,
        "updates": state.updates,
        "params": dict(state.params),
        "opt_state": {jax.tree_util.keystr(path): leaf for path, leaf in leaves},
    }


def state_from_arrays(arrays: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `state_arrays`, with the structure of `like`."""
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, _: arrays["opt_state"][jax.tree_util.keystr(path)], like.opt_state
    )
    return TrainState(arrays["step"], arrays["updates"], dict(arrays["params"]), opt_state)


def peak_memory_bytes() -> int:
    """The most memory in use so far: of the fullest accelerator, or where there is none of this process."""
    stats = [device.memory_stats() for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _due(every: int | None, step: int, total: int) -> bool:
    """Whether something with this period happens after this step; the last step counts."""
    return step == total or (every is not None and step % every == 0)


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
