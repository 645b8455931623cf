"""Sampled responses into the batches of a policy-gradient loss."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int32

from jaxstack.runtime.errors import UserError
from jaxstack.training.document_rows import document_batches
from jaxstack.training.packing import HostBatch
from jaxstack.training.rl import PolicyLoss


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A prompt and what was sampled after it, over one turn or many.

    Attributes:
      token_ids: int32 [n], prompt, responses, and whatever came between them.
      loss_mask: bool [n], true where the policy chose the token. The first token never is one.
      reward: of the whole.
      group: rollouts of the same prompt share it.
      truncated: it ended at a limit, not by itself.
      logp_sampler: float32 [n], the log-probability of each chosen token as the sampler had it, anything elsewhere;
        None where it is not known.
    """

    token_ids: Int32[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]
    reward: float
    group: int
    truncated: bool = False
    logp_sampler: Float[np.ndarray, "n"] | None = None


def rollout_batches(
    loss: PolicyLoss, rollouts: Sequence[Rollout], *, row_count: int, row_length: int
) -> list[HostBatch]:
    """Packs a wave of rollouts into batches of one shape, with the arrays that `loss` takes.

    `logp_old` is NaN, which means the policy of the step itself: right for the first update after sampling. For more
    than one, fill it with the trainer's own numbers before the first (see `make_log_prob_step`). Add `logp_ref` if the
    loss has a beta.

    Args:
      loss: gives advantages, over the whole wave, and token weights.
      row_count, row_length: the shape of a batch.

    Raises:
      UserError: a rollout is longer than a row, has arrays of different lengths or no trained token; the loss wants
        sampler log-probabilities and there are none.
    """
    masks = []
    for number, rollout in enumerate(rollouts):
        arrays = {"token_ids": rollout.token_ids, "loss_mask": rollout.loss_mask, "logp_sampler": rollout.logp_sampler}
        for name, array in arrays.items():
            if array is not None and array.shape != (len(rollout.token_ids),):
                raise UserError(
                    f"rollout {number}: {name} has shape {array.shape}, expected ({len(rollout.token_ids)},)"
                )
        if rollout.logp_sampler is None and loss.importance_cap is not None:
            raise UserError(f"rollout {number} has no logp_sampler; importance_cap={loss.importance_cap} needs it")
        mask = rollout.loss_mask.astype(np.float32)
        mask[:1] = 0.0  # nothing precedes it
        if not mask.any():
            raise UserError(f"rollout {number} has no trained token; expected at least one behind the first")
        masks.append(mask)
    truncated = [rollout.truncated for rollout in rollouts]
    advantages = loss.advantages([r.reward for r in rollouts], [r.group for r in rollouts], truncated)
    weights, shares = loss.token_weights([int(mask.sum()) for mask in masks], truncated)
    units = []
    for i, (rollout, mask) in enumerate(zip(rollouts, masks, strict=True)):
        unknown = np.full(len(mask), np.nan, np.float32)
        sampled = unknown if rollout.logp_sampler is None else rollout.logp_sampler.astype(np.float32)
        document = {
            "token_ids": rollout.token_ids.astype(np.int32),
            "loss_mask": mask,
            "advantages": advantages[i] * mask,
            "loss_weights": weights[i] * mask,
            "loss_shares": shares[i] * mask,
            "logp_old": unknown,
            "logp_sampler": sampled,
        }
        units.append([document])
    return document_batches(units, row_count=row_count, row_length=row_length, what="rollout")
