"""`sample_threshold(scaled, top_k, top_p, min_p)`: every filter of sampling as one exact threshold a row; no sort.

ref.py: sorts        xla.py: bisection on the bits of the logits, skipped where nothing is filtered
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.platforms import implementation_for, pallas_module
from kernels.sample_threshold import ref, xla
from kernels.sample_threshold.threshold import Threshold

__all__ = ["Implementation", "Threshold", "kept", "sample_threshold"]

Implementation = Literal["ref", "xla", "pallas_gpu", "pallas_tpu", "interpret"]
_FORMS = ("ref", "xla", "pallas_gpu", "pallas_tpu", "interpret")


def sample_threshold(
    scaled: Float[Array, "rows V"],
    top_k: Int[Array, " rows"],
    top_p: Float[Array, " rows"],
    min_p: Float[Array, " rows"],
    *,
    implementation: Implementation | None = None,
) -> Threshold:
    """Which tokens of each row survive top-k, then top-p of the mass that top-k left, then min-p.

    `scaled` are float32 logits after temperature, -inf where a token cannot be. In order of falling logit, equal ones
    by token id: top-k keeps the first k; the softmax is taken over those; top-p keeps a token while the mass strictly
    before it is below p; min-p keeps it if its probability is at least m times the largest. At least one token always
    survives, a token of -inf never does. A row's result does not depend on the rows beside it.

    Sums and exponentials are float32: where the mass before a token is within rounding of p, or its probability of the
    min-p bound, the two neighbouring answers are equally right.

    Args:
      top_k: 0, or V and more, keeps all.
      top_p: 1 and more keeps all.
      min_p: 0 keeps all; at most 1.
      implementation: "ref" (the oracle, sorts), "xla", "pallas_gpu", "pallas_tpu", or "interpret" (the Pallas kernel
        in Pallas's interpreter). None picks the fastest that can run here.

    Raises:
      ValueError: shapes or a dtype that do not fit, or an unknown implementation.
      RuntimeError: the implementation asked for cannot run here.
    """
    if scaled.ndim != 2 or scaled.shape[1] == 0 or scaled.dtype != jnp.float32:
        raise ValueError(
            f"sample_threshold: found logits {scaled.dtype}{list(scaled.shape)}, expected float32[rows, V]"
        )
    for name, values in {"top_k": top_k, "top_p": top_p, "min_p": min_p}.items():
        if values.shape != scaled.shape[:1]:
            raise ValueError(f"sample_threshold: found {name} of shape {values.shape}, expected {scaled.shape[:1]}")
    form = implementation_for("sample_threshold", implementation, _FORMS)
    arguments = scaled, top_k.astype(jnp.int32), top_p.astype(jnp.float32), min_p.astype(jnp.float32)
    if form in ("ref", "xla"):
        return (ref if form == "ref" else xla).sample_threshold(*arguments)
    pallas, interpret = pallas_module("kernels.sample_threshold", form)
    return pallas.sample_threshold(*arguments, interpret=interpret)


def kept(scaled: Float[Array, "rows V"], threshold: Threshold) -> Bool[Array, "rows V"]:
    """Which tokens a threshold keeps. Costs nothing where no row cuts through equal logits."""
    return xla.kept(scaled, threshold)
