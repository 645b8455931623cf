"""Direct preference optimisation (Rafailov et al. 2023) in the one training step.

    h = beta * ((logp(chosen) - logp(rejected)) - (logp_ref(chosen) - logp_ref(rejected)))
    loss = -(1 - label_smoothing) log sigmoid(h) - label_smoothing log sigmoid(-h)

where log-probabilities are summed over an answer's trained tokens: a mean over pairs. The sigmoid needs both answers
whole, so this is a `ModelLoss` of its own and not a sum over tokens; cut by rows it adds up like every other loss.

The batch's contract: both answers of a pair stand in one row, each behind its own copy of the prompt, as the documents
(segments) 2 p + 1, chosen, and 2 p + 2, rejected, of the row's pair p = 0, 1, ...; `loss_mask` is 1 on the tokens of
answers. Attention and positions are those of any packed batch. `pair_batches` makes such rows.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.models import Decoder
from jaxstack.models.decoder import Remat
from jaxstack.models.lora import sites
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import Example
from jaxstack.training.document_rows import document_batches
from jaxstack.training.log_probs import at_target, decoder_log_probs, without_adapters
from jaxstack.training.losses import Batch, LossParts, shift_targets
from jaxstack.training.packing import HostBatch
from jaxstack.training.step import ModelLoss

_SHORTEST_PAIR = 4  # tokens: each answer has one, behind at least one more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo:
    """The loss and where its reference comes from.

    Attributes:
      beta: how far the policy may go from the reference: smaller is further.
      label_smoothing: the assumed part of pairs whose preference is the wrong way round (Mitchell 2023); below 0.5.
      reference: "batch": log-probabilities computed before, in the batch as `logp_ref` float32 [rows, T] at each token
        (`make_log_prob_step`); "no_adapter": the frozen model under LoRA, by a second forward pass with adapter 0.

    Raises:
      UserError: one line naming the field, what was found and what was expected.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference: Literal["batch", "no_adapter"] = "batch"

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"Dpo.beta={self.beta!r}: expected a positive number")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"Dpo.label_smoothing={self.label_smoothing!r}: expected 0 or more, below 0.5")
        if self.reference not in ("batch", "no_adapter"):
            raise UserError(f"Dpo.reference={self.reference!r}: expected batch or no_adapter")

    def parts(self, logp: Float[Array, "rows T"], logp_ref: Float[Array, "rows T"], batch: Batch) -> LossParts:
        """The loss from log-probabilities of the batch's tokens, each at its token.

        Logs `accuracy`, the part of pairs with h > 0; `margin`, the mean of h; `chosen_reward` and `rejected_reward`,
        the means of beta * (logp - logp_ref) of the answers.
        """
        rows, length = batch["token_ids"].shape
        pairs = max(1, length // _SHORTEST_PAIR)
        weights = at_target(shift_targets(batch)["weights"])
        segments = batch["segment_ids"]
        # Places in [rows, pairs, 2]; padding, and pairs that no row could hold, go past the end and are dropped.
        place = jnp.arange(rows, dtype=jnp.int32)[:, None] * (2 * pairs) + segments - 1
        place = jnp.where((segments > 0) & (segments <= 2 * pairs), place, 2 * pairs * rows)

        def by_answer(x: Array) -> Array:
            return jax.ops.segment_sum(x.reshape(-1), place.reshape(-1), 2 * pairs * rows).reshape(rows, pairs, 2)

        present = jnp.all(by_answer(weights) > 0, axis=-1)
        rewards = self.beta * by_answer(jnp.where(weights != 0, weights * (logp - logp_ref), 0.0))
        chosen, rejected = rewards[..., 0], rewards[..., 1]
        h = chosen - rejected
        smooth = self.label_smoothing
        losses = -(1 - smooth) * jax.nn.log_sigmoid(h) - smooth * jax.nn.log_sigmoid(-h)

        def total(x: Array) -> Array:
            return jnp.sum(jnp.where(present, x, 0.0))

        count = jnp.sum(present.astype(jnp.float32))
        aux = {"accuracy": (h > 0) * 1.0, "margin": h, "chosen_reward": chosen, "rejected_reward": rejected}
        aux_parts = {name: (total(jax.lax.stop_gradient(x)), count) for name, x in aux.items()}
        return LossParts(total(losses), count, aux_parts)


def dpo_loss(
    dpo: Dpo,
    *,
    remat: Remat = "none",
    compute_dtype: Any = None,
    chunk_tokens: int | None = None,
    longest: int | None = None,
) -> ModelLoss:
    """The `ModelLoss` of a decoder on rows of pairs; goes where `decoder_loss` goes, with the same options.

    Raises:
      UserError: while tracing: the batch has no `logp_ref`, or the model no adapters to leave out.
    """
    log_probs = decoder_log_probs(remat=remat, compute_dtype=compute_dtype, chunk_tokens=chunk_tokens, longest=longest)

    def loss(model: Decoder, batch: Batch) -> LossParts:
        if dpo.reference == "batch":
            if "logp_ref" not in batch:
                raise UserError(f"Dpo: the batch has no logp_ref; found {sorted(batch)}")
            reference = batch["logp_ref"]
        else:
            if all(site.linear.lora is None for site in sites(model)):
                raise UserError("Dpo.reference='no_adapter': the model has no adapters; expected LoRA, or 'batch'")
            reference = jax.lax.stop_gradient(log_probs(model, without_adapters(batch)))
        return dpo.parts(log_probs(model, batch), reference, batch)

    return loss


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, each with the prompt before it: `loss_mask` says which tokens are the answer's."""

    chosen: Example
    rejected: Example


def pair_batches(preferences: Sequence[Preference], *, row_count: int, row_length: int) -> list[HostBatch]:
    """Packs pairs into batches of one shape that keep the contract above, without `logp_ref`.

    Raises:
      UserError: a pair is longer than a row, or an answer has no trained token.
    """
    units = []
    for number, preference in enumerate(preferences):
        unit = []
        for name in ("chosen", "rejected"):
            example: Example = getattr(preference, name)
            mask = example.loss_mask.astype(np.float32)
            mask[:1] = 0.0  # nothing precedes it
            if not mask.any():
                raise UserError(f"pair {number}: {name} has no trained token; expected at least one behind the first")
            unit.append({"token_ids": example.token_ids.astype(np.int32), "loss_mask": mask})
        units.append(unit)
    return document_batches(units, row_count=row_count, row_length=row_length, what="pair")
