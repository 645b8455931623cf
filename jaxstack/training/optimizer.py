"""Optimizers and learning-rate schedules, built from one config on top of optax."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
      name: the rule.
      learning_rate: its peak.
      schedule: its course after the warm-up: level, straight down, half a cosine down, or level and then straight down
        (WSD).
      warmup_steps: steps of linear warm-up; the first step has learning_rate / warmup_steps.
      warmup_ratio: the same as a part of all steps; used when warmup_steps is 0.
      end_lr_ratio: the last step's learning rate as a part of the peak.
      decay_ratio: the part of all steps in which WSD goes down.
      b1, b2, eps: of the moments (adamw, lion, and muon's adam part).
      momentum: of sgd and muon.
      weight_decay: decoupled, on matrices only: never on norms, biases or embeddings. None means 0 for adapters and
        0.01 for full training.
      clip_norm: gradients over trainable parameters are scaled down to this global norm; None for never.
      max_skipped_in_row: so many steps in a row with a gradient that is not finite end the run.
    """

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    end_lr_ratio: float = 0.0
    decay_ratio: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float | None = None
    clip_norm: float | None = 1.0
    max_skipped_in_row: int = 10

    def __post_init__(self) -> None:
        for name, allowed in (("name", _RULES), ("schedule", ("constant", "linear", "cosine", "wsd"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"optimizer.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate}: expected a positive number")
        for name in ("warmup_ratio", "end_lr_ratio", "decay_ratio", "b1", "b2", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: expected a number from 0 to 1")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps={self.warmup_steps}: expected 0 or more")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay={self.weight_decay}: expected 0 or more, or none")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={self.clip_norm}: expected a positive number, or none")
        if self.max_skipped_in_row < 1:
            raise UserError(f"optimizer.max_skipped_in_row={self.max_skipped_in_row}: expected at least 1")


_RULES = ("adamw", "adafactor", "lion", "muon", "sgd")


class Optimizer(NamedTuple):
    """What a training step needs.

    Attributes:
      transform: gradients (already clipped) to updates, learning rate included.
      schedule: number of updates done -> learning rate of the next.
      clip_norm: largest global gradient norm, or None.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float | None


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by update number, from 0.

    Raises:
      UserError: the warm-up (and WSD's way down) is longer than the run.
    """
    warmup = config.warmup_steps or round(config.warmup_ratio * total_steps)
    decay = max(1, round(config.decay_ratio * total_steps)) if config.schedule == "wsd" else total_steps - warmup
    if warmup + (decay if config.schedule == "wsd" else 0) > total_steps:
        also = f" and {decay} decay steps" if config.schedule == "wsd" else ""
        raise UserError(f"optimizer: {warmup} warm-up steps{also} do not fit into {total_steps} steps")
    peak, end = config.learning_rate, config.learning_rate * config.end_lr_ratio
    # The last update is number total_steps - 1; it has the end value.
    down = max(1, decay - 1)
    if config.schedule == "constant":
        after: list[optax.Schedule] = [optax.constant_schedule(peak)]
        bounds: list[int] = []
    elif config.schedule == "linear":
        after, bounds = [optax.linear_schedule(peak, end, down)], []
    elif config.schedule == "cosine":
        after, bounds = [optax.cosine_decay_schedule(peak, down, config.end_lr_ratio)], []
    else:
        after = [optax.constant_schedule(peak), optax.linear_schedule(peak, end, down)]
        bounds = [total_steps - decay]
    if warmup:
        # Starts above 0: a step with learning rate 0 would be thrown away.
        rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
        return optax.join_schedules([rise, *after], [warmup, *bounds])
    return optax.join_schedules(after, bounds) if bounds else after[0]


def build_optimizer(
    config: OptimizerConfig, names: Iterable[str], *, total_steps: int, adapters: bool = False
) -> Optimizer:
    """The optimizer for trainable parameters called `names` ("layers.mlp.up_proj.kernel", ...).

    Args:
      total_steps: of the run, for the schedule.
      adapters: whether the parameters are LoRA factors; decides the default weight decay.

    Raises:
      UserError: the schedule does not fit into `total_steps`.
    """
    schedule = learning_rate_schedule(config, total_steps)
    matrices = {name: name.rsplit(".", 1)[-1] in ("kernel", "a", "b") for name in names}
    decay = config.weight_decay if config.weight_decay is not None else (0.0 if adapters else 0.01)
    rule: optax.GradientTransformation
    if config.name == "adamw":
        rule = optax.adamw(
            schedule, config.b1, config.b2, config.eps, weight_decay=decay, mask=matrices, mu_dtype=jnp.float32
        )
    elif config.name == "lion":
        rule = optax.lion(schedule, config.b1, config.b2, weight_decay=decay, mask=matrices, mu_dtype=jnp.float32)
    elif config.name == "adafactor":
        rule = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            weight_decay_rate=decay or None,
            weight_decay_mask=matrices,
        )
    elif config.name == "muon":
        rule = _muon(config, schedule, decay, matrices)
    else:
        rule = optax.chain(
            optax.add_decayed_weights(decay, matrices) if decay else optax.identity(),
            optax.sgd(schedule, momentum=config.momentum or None),
        )
    return Optimizer(rule, schedule, config.clip_norm)


def _muon(
    config: OptimizerConfig, schedule: optax.Schedule, decay: float, matrices: dict[str, bool]
) -> optax.GradientTransformation:
    """Muon on hidden matrices, AdamW on the rest. Leading layer (and adapter) axes are batches of matrices."""
    from optax import contrib

    hidden = {name: matrix and not name.startswith("lm_head") for name, matrix in matrices.items()}

    def dimensions(params: Any) -> Any:
        return {
            name: contrib.MuonDimensionNumbers(reduction_axis=value.ndim - 2, output_axis=value.ndim - 1)
            if hidden[name]
            else None
            for name, value in params.items()
        }

    return contrib.muon(
        schedule,
        beta=config.momentum,
        weight_decay=decay,
        weight_decay_mask=matrices,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=dimensions,
        # Scaled so that one learning rate serves both rules (Liu et al. 2025).
        consistent_rms=0.2,
    )
