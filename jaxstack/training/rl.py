"""Policy-gradient losses for the one training step: REINFORCE, PPO's clip, GRPO, DAPO, Dr. GRPO and leave-one-out.

Each is a frozen dataclass with two halves. On the host, `advantages` turns the rewards of a wave of responses into one
number a response, and `token_weights` says how much every token of a response counts. On the device, `loss` is a
`LossFn` over per-token arrays:

    num = sum_t loss_weights[t] * term[t]          den = sum_t loss_shares[t]

How a method averages (over tokens, over sequences, by a constant) lies in these two arrays alone. They are data, so the
step never changes with the method, and sums over microbatches, chunks or devices add up to those of the whole batch.

A batch has, besides what every packed batch has (`jaxstack.training.losses`), float32 [rows, T] at the token they are
about: `advantages`, `loss_weights`, `loss_shares`; `logp_old`, the log-probability under the policy before this wave's
updates, from the trainer's own forward pass (`jaxstack.training.log_probs`), NaN for "this step's policy is that one";
`logp_sampler`, the same as the sampler reported it, NaN where it did not; and `logp_ref` where beta > 0.
`jaxstack.training.rollouts` builds it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxstack.runtime.errors import UserError
from jaxstack.training.losses import LossParts, Targets, token_log_probs

Mean = Literal["token", "sequence", "constant"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """What all of them share.

    Attributes:
      eps_low, eps_high: the ratio of new to old policy earns nothing beyond 1 - eps_low and 1 + eps_high.
      beta: weight of the penalty k3 = exp(logp_ref - logp) - (logp_ref - logp) - 1 (Schulman 2020), an unbiased
        estimate of KL(policy || reference) that is never negative.
      truncated: what becomes of a response that ran into its token limit. "mask": no token of it is trained, its reward
        still counts among its group's; "penalise": `truncated_penalty` is taken off its reward; "train": as any other.
      truncated_penalty: see there.
      importance_cap: multiply each token's term by min(exp(logp_old - logp_sampler), cap), for samplers whose numbers
        differ from the trainer's (truncated importance sampling, usually 2.0); None for not at all.
      log_entropy: report the policy's entropy; one more pass over the logits.

    Raises:
      UserError: one line naming the field, what was found and what was expected.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    beta: float = 0.0
    truncated: Literal["mask", "penalise", "train"] = "mask"
    truncated_penalty: float = 1.0
    importance_cap: float | None = None
    log_entropy: bool = True

    mean: ClassVar[Mean] = "token"
    clipped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field, low, high in (("eps_low", 0, 1), ("eps_high", 0, math.inf), ("beta", 0, math.inf)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < math.inf:
                raise UserError(f"{name}.{field}={value!r}: expected a number of at least {low}")
            if value > high:
                raise UserError(f"{name}.{field}={value!r}: expected at most {high}")
        if self.truncated not in ("mask", "penalise", "train"):
            raise UserError(f"{name}.truncated={self.truncated!r}: expected mask, penalise or train")
        if not math.isfinite(self.truncated_penalty):
            raise UserError(f"{name}.truncated_penalty={self.truncated_penalty!r}: expected a number")
        if self.importance_cap is not None and not 0 < self.importance_cap < math.inf:
            raise UserError(f"{name}.importance_cap={self.importance_cap!r}: expected a positive number, or none")

    # ------------------------------------------------------------------------------------------------------ on the host

    def advantages(
        self,
        rewards: Float[np.ndarray, "n"] | Sequence[float],
        group_ids: Int[np.ndarray, "n"] | Sequence[int],
        truncated: Bool[np.ndarray, "n"] | Sequence[bool] | None = None,
    ) -> Float[np.ndarray, "n"]:
        """One advantage a response, float32, computed in float64.

        Args:
          rewards: of whole responses.
          group_ids: responses to the same prompt share a number; any integers, in any order.
          truncated: which responses ran into their limit; None for none.

        Raises:
          UserError: lengths differ, or a reward is not finite.
        """
        shaped, groups = _checked(rewards, group_ids)
        if self.truncated == "penalise" and truncated is not None:
            shaped = shaped - self.truncated_penalty * _flags(truncated, len(shaped))
        return self._advantages(shaped, groups).astype(np.float32)

    def _advantages(self, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def token_weights(
        self,
        lengths: Int[np.ndarray, "n"] | Sequence[int],
        truncated: Bool[np.ndarray, "n"] | Sequence[bool] | None = None,
    ) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """`loss_weights` and `loss_shares` of each response's trained tokens, float32.

        A token mean has 1 and 1, a sequence mean 1 / length and 1 / length (which sum to the number of sequences). A
        masked response has 0 and 0: it is in neither sum.

        Args:
          lengths: trained tokens of each response, at least 1.
          truncated: as in `advantages`.

        Raises:
          UserError: a response without a trained token.
        """
        counts = np.asarray(lengths, np.float64)
        if (counts < 1).any():
            raise UserError(f"response {int(np.argmin(counts))} has no trained token; expected at least one")
        kept = np.ones(len(counts))
        if self.truncated == "mask" and truncated is not None:
            kept = 1.0 - _flags(truncated, len(counts))
        weights, shares = self._token_weights(counts, kept)
        return weights.astype(np.float32), shares.astype(np.float32)

    def _token_weights(self, lengths: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        each = kept / lengths if self.mean == "sequence" else kept
        return each, each

    # ---------------------------------------------------------------------------------------------------- on the device

    def loss(self, logits: Float[Array, "... T V"], targets: Targets) -> LossParts:
        """A `LossFn`: see the module's head for the arrays, `Targets` for their place.

        Logs, as means over trained tokens: `clip_fraction`, the part whose gradient the clip takes away; `approx_kl`,
        k3 between the old policy and this one; `sampler_gap` and `sampler_gap_abs`, logp_sampler - logp_old and its
        absolute value; `importance_weight` with a cap; `kl_ref` with a beta; `entropy`.

        Raises:
          UserError: the batch lacks an array.
        """
        needed = ["advantages", "loss_weights", "loss_shares", "logp_old", "logp_sampler"]
        needed += ["logp_ref"] if self.beta else []
        missing = [name for name in needed if name not in targets]
        if missing:
            raise UserError(f"{type(self).__name__}: the batch has no {', '.join(missing)}; found {sorted(targets)}")
        weights = targets["weights"] * targets["loss_weights"]
        used = weights != 0
        logp = token_log_probs(logits, targets["token_ids"])
        advantage, sampler, old = targets["advantages"], targets["logp_sampler"], targets["logp_old"]
        old = jnp.where(jnp.isnan(old), jax.lax.stop_gradient(logp), old)
        sampler = jnp.where(jnp.isnan(sampler), old, sampler)

        def difference(a: Array, b: Array) -> Array:
            # What stands at other tokens is nobody's business, and exp() of it might overflow into a NaN gradient.
            return jnp.where(used, a - b, 0.0)

        log_ratio = difference(logp, old)
        ratio = jnp.exp(log_ratio)
        if self.clipped:
            bounded = jnp.clip(ratio, 1 - self.eps_low, 1 + self.eps_high)
            term = -jnp.minimum(ratio * advantage, bounded * advantage)
        else:
            term = -advantage * logp
        aux = {}
        gap = difference(sampler, old)
        if self.importance_cap is not None:
            importance = jnp.exp(jnp.minimum(-gap, math.log(self.importance_cap)))
            term = term * importance
            aux["importance_weight"] = importance
        if self.beta:
            k3 = _k3(difference(targets["logp_ref"], logp))
            term = term + self.beta * k3
            aux["kl_ref"] = k3
        num = jnp.sum(jnp.where(used, weights * term, 0.0))
        den = jnp.sum(targets["weights"] * targets["loss_shares"])

        beyond = jnp.where(advantage > 0, ratio > 1 + self.eps_high, (ratio < 1 - self.eps_low) & (advantage < 0))
        aux |= {"approx_kl": _k3(log_ratio), "sampler_gap": gap, "sampler_gap_abs": jnp.abs(gap)}
        if self.clipped:
            aux["clip_fraction"] = beyond.astype(jnp.float32)
        if self.log_entropy:
            aux["entropy"] = _entropy(jax.lax.stop_gradient(logits))
        tokens = jnp.sum(used.astype(jnp.float32))
        means = {name: (jnp.sum(jnp.where(used, jax.lax.stop_gradient(x), 0.0)), tokens) for name, x in aux.items()}
        return LossParts(num, den, means)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce(PolicyLoss):
    """-A logp (Williams 1992), mean over tokens. The advantage is the reward as given: subtract a baseline before."""

    clipped: ClassVar[bool] = False

    def _advantages(self, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        return rewards


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoClip(PolicyLoss):
    """-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) (Schulman et al. 2017), mean over tokens.

    A = (R - mean) / (std + std_eps) within the group, std with n - 1 below the line. A group whose rewards are all
    equal, a lone response included, has A = 0. With a critic, write its per-token advantages into the batch instead.
    """

    std_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.std_eps < math.inf:
            raise UserError(f"{type(self).__name__}.std_eps={self.std_eps!r}: expected a number of at least 0")

    def _advantages(self, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        centred, counts = _centred(rewards, groups)
        variance = np.bincount(groups, centred**2)[groups] / np.maximum(counts - 1, 1)
        # Rounding leaves a variance that is not quite 0 where rewards are equal: ask them instead.
        return np.where(_informative(rewards, groups), centred / (np.sqrt(variance) + self.std_eps + 1e-300), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(PpoClip):
    """PPO's clip with group advantages, mean over the tokens of each sequence, then over sequences (Shao et al. 2024).

    A sequence that is masked as truncated is not among those averaged over.
    """

    mean: ClassVar[Mean] = "sequence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dapo(PpoClip):
    """GRPO with a higher upper clip and a mean over all tokens of the batch (Yu et al. 2025).

    Groups with equal rewards carry no gradient: the sampling loop asks `informative` which to keep and fills up the
    rest. Its soft penalty on long responses is `soft_overlong_penalty`.
    """

    eps_high: float = 0.28


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrGrpo(PolicyLoss):
    """GRPO without its two biases (Liu et al. 2025): A = R - mean, and the sum over tokens divided by
    n_sequences * max_response_tokens, whatever the lengths. Masked sequences stay in that constant.

    Attributes:
      max_response_tokens: the sampler's limit.
    """

    max_response_tokens: int

    mean: ClassVar[Mean] = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.max_response_tokens, bool) or not self.max_response_tokens >= 1:
            found = self.max_response_tokens
            raise UserError(f"DrGrpo.max_response_tokens={found!r}: expected an integer of at least 1")

    def _advantages(self, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        return np.where(_informative(rewards, groups), _centred(rewards, groups)[0], 0.0)

    def _token_weights(self, lengths: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return kept, self.max_response_tokens / lengths


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(PolicyLoss):
    """A_i = R_i - mean of the others in its group (RLOO: Kool et al. 2019, Ahmadian et al. 2024; LOOP: Chen et al.
    2025), PPO's clip, mean over tokens. A lone response has A = 0: there is nothing to compare it with.
    """

    def _advantages(self, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        centred, counts = _centred(rewards, groups)
        # R_i - (S - R_i) / (n - 1) = (R_i - S / n) * n / (n - 1)
        return np.where(_informative(rewards, groups), centred * counts / np.maximum(counts - 1, 1), 0.0)


def informative(
    rewards: Float[np.ndarray, "n"] | Sequence[float], group_ids: Int[np.ndarray, "n"] | Sequence[int]
) -> Bool[np.ndarray, "n"]:
    """Which responses are in a group whose rewards are not all equal: the others have advantage 0 (DAPO's dynamic
    sampling drops them).

    Raises:
      UserError: lengths differ, or a reward is not finite.
    """
    return _informative(*_checked(rewards, group_ids))


def soft_overlong_penalty(
    lengths: Int[np.ndarray, "n"] | Sequence[int], *, max_tokens: int, buffer_tokens: int
) -> Float[np.ndarray, "n"]:
    """What to add to rewards for length: 0 up to `max_tokens - buffer_tokens`, falling linearly to -1 at `max_tokens`,
    -1 beyond (Yu et al. 2025, equation 13).

    Raises:
      UserError: the buffer is not within 1..max_tokens.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise UserError(f"buffer_tokens={buffer_tokens}: expected 1..max_tokens={max_tokens}")
    over = np.asarray(lengths, np.float64) - (max_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)


def _k3(log_ratio: Array) -> Array:
    """exp(x) - x - 1; expm1 keeps the digits that matter near 0."""
    return jnp.expm1(log_ratio) - log_ratio


def _entropy(logits: Float[Array, "... V"]) -> Float[Array, "..."]:
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.sum(jnp.exp(logits - total) * (total - logits), axis=-1)


def _checked(rewards, group_ids) -> tuple[np.ndarray, np.ndarray]:
    """Rewards in float64, and groups numbered from 0."""
    values, groups = np.asarray(rewards, np.float64), np.asarray(group_ids)
    if values.ndim != 1 or groups.shape != values.shape:
        raise UserError(f"rewards have shape {values.shape}, group_ids {groups.shape}; expected one of each a response")
    if not np.isfinite(values).all():
        bad = int(np.argmin(np.isfinite(values)))
        raise UserError(f"the reward of response {bad} is {values[bad]}; expected a finite number")
    return values, np.unique(groups, return_inverse=True)[1].reshape(-1)


def _flags(truncated, count: int) -> np.ndarray:
    flags = np.asarray(truncated, bool)
    if flags.shape != (count,):
        raise UserError(f"truncated has shape {flags.shape}, expected ({count},): one flag a response")
    return flags


def _centred(rewards: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rewards less their group's mean, and the size of each one's group."""
    counts = np.bincount(groups)[groups]
    return rewards - np.bincount(groups, rewards)[groups] / counts, counts


def _informative(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    size = int(groups.max()) + 1 if len(groups) else 0
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, groups, rewards)
    np.maximum.at(high, groups, rewards)
    return (high > low)[groups]
