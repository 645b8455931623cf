"""Rotary position embeddings (Su et al. 2021), half-split, and the scalings that stretch them to longer contexts."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxstack.runtime.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles.

    Attributes:
      theta: the base; pair `d` of a head turns by `position * theta ** (-2 d / head_dim)` radians.
      rope_type: "default", "linear" (every frequency divided by `factor`), "llama3" (long wavelengths divided, short
        kept), "yarn" (Peng et al. 2023) or "longrope" (Ding et al. 2024).
      factor: how many times longer than the pretraining context; ignored by "default".
      original_max_position_embeddings: the pretraining context in tokens; "llama3", "yarn" and "longrope" need it.
      low_freq_factor, high_freq_factor: "llama3": wavelengths above original/low are divided, below original/high kept.
      beta_fast, beta_slow, truncate: "yarn": rotations within the original context where the ramp ends and begins, and
        whether its ends are rounded to whole dimensions.
      attention_factor: "yarn", "longrope": multiplies cos and sin; None for 0.1 ln(factor) + 1 and
        sqrt(1 + ln(factor) / ln(original)).
      short_factor, long_factor: "longrope": what each pair's frequency is divided by, in contexts up to the pretraining
        one and beyond it.
      partial_rotary_factor: only so much of a head, its first features, is rotated.

    Raises:
      UserError: an unknown rope_type or a value out of range.
    """

    theta: float = 10_000.0
    rope_type: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES:
            raise UserError(f"rope.rope_type: found {self.rope_type!r}, expected one of {', '.join(ROPE_TYPES)}")
        if not self.theta > 1:
            raise UserError(f"rope.theta: found {self.theta}, expected a number > 1")
        if not self.factor >= 1:
            raise UserError(f"rope.factor: found {self.factor}, expected a number >= 1")
        if self.rope_type in ("llama3", "yarn", "longrope") and not (self.original_max_position_embeddings or 0) > 0:
            raise UserError(
                f"rope.original_max_position_embeddings: found {self.original_max_position_embeddings}, "
                f"expected a positive integer with rope_type {self.rope_type!r}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"rope.low_freq_factor, high_freq_factor: found {self.low_freq_factor}, {self.high_freq_factor}, "
                "expected 0 < low < high"
            )
        if not 0 < self.beta_slow <= self.beta_fast:
            raise UserError(
                f"rope.beta_slow, beta_fast: found {self.beta_slow}, {self.beta_fast}, expected 0 < slow <= fast"
            )
        if self.attention_factor is not None and not self.attention_factor > 0:
            raise UserError(f"rope.attention_factor: found {self.attention_factor}, expected a positive number")
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(
                f"rope.partial_rotary_factor: found {self.partial_rotary_factor}, expected a number in (0, 1]"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if not all(f > 0 for f in factors):
                raise UserError(f"rope.{name}: found {factors}, expected positive numbers")
            if (self.rope_type == "longrope") != bool(factors):
                raise UserError(
                    f"rope.{name}: found {len(factors)} factors with rope_type {self.rope_type!r}, expected "
                    "one for each rotated pair with longrope, none otherwise"
                )

    def rotated(self, head_dim: int) -> int:
        """How many features of a head are rotated.

        Raises:
          UserError: an odd number, or longrope's factors are not one for each pair.
        """
        features = int(head_dim * self.partial_rotary_factor)
        if features < 2 or features % 2:
            raise UserError(
                f"rope.partial_rotary_factor: found {self.partial_rotary_factor}, {features} of {head_dim} features, "
                "expected an even number of them"
            )
        for name in ("short_factor", "long_factor"):
            found = len(getattr(self, name))
            if found not in (0, features // 2):
                raise UserError(f"rope.{name}: found {found} factors, expected one a rotated pair, {features // 2}")
        return features

    def for_context(self, tokens: int) -> "RopeConfig":
        """This, with longrope's choice between short and long made once, for contexts of up to `tokens`.

        A server that keeps rotated keys cannot change its mind in the middle of a request.
        """
        if self.rope_type != "longrope":
            return self
        chosen = self.long_factor if tokens > (self.original_max_position_embeddings or 0) else self.short_factor
        return replace(self, short_factor=chosen, long_factor=chosen)


def inverse_frequencies(
    rope: RopeConfig, head_dim: int, *, long: bool = False
) -> tuple[Float[np.ndarray, "half"], float]:
    """Radians per position of each rotated pair of a head, float32, and the factor on cos and sin (1 except yarn and
    longrope).

    Args:
      rope: the settings.
      head_dim: features of a head.
      long: "longrope": for contexts beyond the pretraining one.

    Raises:
      UserError: as `RopeConfig.rotated`.
    """
    head_dim = rope.rotated(head_dim)
    # float32 throughout and in the reference implementations' order: these models were trained with those roundings.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1) / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.rope_type == "linear":
        return frequencies / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope.rope_type == "yarn":
        scale = rope.attention_factor
        return _yarn(frequencies, rope, head_dim), (0.1 * math.log(rope.factor) + 1.0 if scale is None else scale)
    if rope.rope_type == "longrope":
        scale = rope.attention_factor
        if scale is None:
            original = rope.original_max_position_embeddings or 0
            scale = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
        factors = np.array(rope.long_factor if long else rope.short_factor, np.float32)
        return (np.float32(1) / (factors * np.float32(rope.theta) ** exponents)).astype(np.float32), scale
    return frequencies, 1.0


def _llama3(frequencies: Float[np.ndarray, "half"], rope: RopeConfig) -> Float[np.ndarray, "half"]:
    original = float(rope.original_max_position_embeddings or 0)
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = np.where(wavelengths > original / rope.low_freq_factor, frequencies / rope.factor, between)
    return np.where(wavelengths < original / rope.high_freq_factor, frequencies, scaled).astype(np.float32)


def _yarn(frequencies: Float[np.ndarray, "half"], rope: RopeConfig, head_dim: int) -> Float[np.ndarray, "half"]:
    original = float(rope.original_max_position_embeddings or 0)

    def dimension_of(rotations: float) -> float:
        """The (fractional) pair that turns `rotations` times within the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return (frequencies / rope.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)


def rotation(
    positions: Int[Array, "... T"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "... T half"], Float[Array, "... T half"]]:
    """cos and sin of every position's angles, float32.

    With longrope the largest position along the last axis decides between short and long, as in a forward pass over
    whole sequences; see `RopeConfig.for_context` for pieces of them.
    """
    frequencies: Any
    frequencies, scale = inverse_frequencies(rope, head_dim)
    if rope.short_factor != rope.long_factor:
        beyond = jnp.max(positions, axis=-1, keepdims=True) >= (rope.original_max_position_embeddings or 0)
        frequencies = jnp.where(beyond[..., None], inverse_frequencies(rope, head_dim, long=True)[0], frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "... T heads hd"], cos: Float[Array, "... T half"], sin: Float[Array, "... T half"]
) -> Float[Array, "... T heads hd"]:
    """Turns every head by its position's angles: `(x1 cos - x2 sin, x2 cos + x1 sin)` with x1, x2 the head's two
    halves; features beyond the pairs that cos and sin are for stay as they are.

    Computed in float32, returned in `x`'s dtype.
    """
    half = cos.shape[-1]
    x1, x2, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1).astype(x.dtype)
