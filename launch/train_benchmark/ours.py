"""Our side: the trainer's own step, loss and optimizer on given batches."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxstack.models import lora
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.decoder import Decoder
from jaxstack.models.linear import LoraParam
from jaxstack.training import OptimizerConfig
from jaxstack.training.losses import cross_entropy
from jaxstack.training.optimizer import build_optimizer
from jaxstack.training.packing import HostBatch
from jaxstack.training.step import decoder_loss, init_state, make_train_step, split_model
from launch.train_benchmark.workload import targets_of


class Ours:
    """One run: weights, adapter and optimizer as new, and a compiled step for batches of one shape.

    Args:
      folder: the base model.
      config, seed: of the adapter.
      batches: the steps' batches, used in turn.
      longest: tokens of the longest example.
      unroll: as `SftConfig.unroll_layers`.
    """

    def __init__(
        self,
        folder: Path,
        config: lora.LoraConfig,
        seed: int,
        batches: list[HostBatch],
        longest: int,
        *,
        learning_rate: float,
        clip_norm: float,
        total_steps: int,
        unroll: bool = False,
    ):
        start = time.perf_counter()
        model = adapted(folder, config, seed)
        self._batches = [{k: jnp.asarray(v) for k, v in batch.items()} for batch in batches]
        split, params, frozen = split_model(model, LoraParam)
        optimizer = build_optimizer(
            OptimizerConfig(learning_rate=learning_rate, schedule="constant", clip_norm=clip_norm),
            params,
            total_steps=total_steps,
            adapters=True,
        )
        self._state, self._frozen = init_state(params, optimizer), frozen
        row = self._batches[0]["token_ids"].shape[1]
        most = max(map(targets_of, batches))
        loss = decoder_loss(
            cross_entropy,
            unroll=unroll,
            compute_dtype=jnp.float32,
            longest=min(row, -(-longest // 16) * 16),
            most_targets=-(-most // 64) * 64,
        )
        step = make_train_step(split, loss, optimizer)
        loaded = time.perf_counter()
        self._step = step.lower(self._state, frozen, self._batches[0]).compile()
        self.load_s, self.compile_s = loaded - start, time.perf_counter() - loaded

    def run(self, first: int, last: int) -> tuple[list[float], float]:
        """Losses of steps [first, last), before each update, and the seconds of all."""
        start = time.perf_counter()
        sums = []
        for number in range(first, last):
            batch = self._batches[number % len(self._batches)]
            self._state, metrics = self._step(self._state, self._frozen, batch)
            sums.append((metrics["loss_num"], metrics["loss_den"]))
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - start
        return [float(num) / float(den) for num, den in sums], seconds


def peak_bytes(*arguments: Any, **options: Any) -> int:
    """The largest resident size of a process that does nothing but build an `Ours` and take two steps."""
    Ours(*arguments, **options).run(0, 2)
    # Not getrusage: a new process inherits the figure of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def adapted(folder: Path, config: lora.LoraConfig, seed: int) -> Decoder:
    """The base model with a fresh adapter."""
    model = load_decoder(folder, progress=False)
    lora.attach(model, config, seed=seed)
    return model
