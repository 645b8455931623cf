"""Log-probabilities of a batch's own tokens, by the forward pass that trains.

Ratios of policies are sensitive: a sampler's numbers differ from the trainer's by its kernels and its dtypes, and the
exponential of that difference would pass for a change of policy. So the denominators come from here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxstack.models import Decoder
from jaxstack.models.decoder import Remat
from jaxstack.training.losses import Batch, shift_targets, token_log_probs
from jaxstack.training.packed_attention import packed_attention
from jaxstack.training.step import SplitModel

LogProbs = Callable[[Decoder, Batch], Float[Array, "rows T"]]


def decoder_log_probs(
    *,
    remat: Remat = "none",
    compute_dtype: Any = None,
    chunk_tokens: int | None = None,
    longest: int | None = None,
) -> LogProbs:
    """A function of a decoder and a packed batch: log p(token | what precedes it in its document), float32, at the
    token itself; 0 at the first token of a document and at padding.

    Args:
      remat, compute_dtype, chunk_tokens, longest: as in `decoder_loss`; give both the same.
    """

    def log_probs(model: Decoder, batch: Batch) -> Float[Array, "rows T"]:
        flat = {k: v.reshape(-1) for k, v in batch.items()}
        hidden, _ = model.hidden(
            flat["token_ids"],
            flat["positions"],
            packed_attention(batch["positions"], longest=longest),
            adapter_ids=flat.get("adapter_ids"),
            remat=remat,
            compute_dtype=compute_dtype,
        )
        everything = {**batch, "loss_mask": jnp.ones(batch["token_ids"].shape, jnp.float32)}
        targets = shift_targets(everything)
        ids = targets["token_ids"].reshape(-1)
        if chunk_tokens:
            found = _by_chunks(model, hidden, ids, flat.get("adapter_ids"), chunk_tokens)
        else:
            found = token_log_probs(model.logits(hidden, flat.get("adapter_ids")), ids)
        found = jnp.where(targets["weights"] != 0, found.reshape(batch["token_ids"].shape), 0.0)
        return at_target(found)

    return log_probs


def at_target(x: Float[Array, "rows T"]) -> Float[Array, "rows T"]:
    """What stands where a target is predicted, moved to the target itself: the opposite of `shift_targets`."""
    return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)


def _by_chunks(model: Decoder, hidden: Array, ids: Array, adapters: Array | None, chunk_tokens: int) -> Array:
    pad = -len(ids) % chunk_tokens

    def cut(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, chunk_tokens, *x.shape[1:])

    one = jax.checkpoint(lambda piece: token_log_probs(model.logits(piece[0], piece[2]), piece[1]))
    return jax.lax.map(one, (cut(hidden), cut(ids), cut(adapters))).reshape(-1)[: len(ids)]


def make_log_prob_step(model: SplitModel, log_probs: LogProbs) -> jax.stages.Wrapped:
    """The jitted `(params, frozen, batch) -> [rows, T]`: fills `logp_old` before a wave's first update."""
    return jax.jit(lambda params, frozen, batch: log_probs(model.merge(params, frozen), batch))


def without_adapters(batch: Batch) -> Batch:
    """The batch with adapter 0, "no adapter", for every token: under LoRA the frozen model, so the reference policy."""
    return {**batch, "adapter_ids": jnp.zeros_like(batch["token_ids"])}
