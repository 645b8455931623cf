"""What goes row by row: norms, norms and rotation of heads, thresholds of sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import platforms
from kernels import rms_norm as rms_norm_package
from kernels import rms_norm_rope as rms_norm_rope_package
from kernels import sample_threshold as sample_threshold_package
from kernels.rms_norm import rms_norm
from kernels.rms_norm_rope import rms_norm_rope
from kernels.sample_threshold import kept, sample_threshold
from launch.kernel_benchmark.case import Case, Cases, Scale, forms_of, nbytes, normal


def rms_norm_cases(scale: Scale) -> Cases:
    """Rows of Qwen2.5-0.5B's hidden states, and of an 8B model's at full scale."""
    yield _rms_norm(5, 100, timed=False)
    for rows in (32, 512) if scale == "default" else (64, 4096):
        yield _rms_norm(rows, 896 if scale == "default" else 4096)


def _rms_norm(rows, features, timed=True):
    rng = np.random.default_rng(0)
    dtype = jnp.float32 if platforms.platform() == "cpu" else jnp.bfloat16
    x, weight = normal(rng, rows, features, dtype=dtype), normal(rng, features, dtype=dtype)
    call = lambda x, weight, implementation: rms_norm(x, weight, eps=1e-6, implementation=implementation)  # noqa: E731
    forms = forms_of(rms_norm_package, call, [(x, weight)], 2 * nbytes(x) + nbytes(weight))
    reference = functools.partial(call, x, weight, implementation="ref")
    return Case("rms_norm", f"{rows} x {features}", forms, reference, timed)


def rms_norm_rope_cases(scale: Scale) -> Cases:
    """Heads of Qwen3-0.6B, and of Qwen3-8B at full scale."""
    yield _rms_norm_rope(5, 3, 1, timed=False)
    for rows in (32, 512) if scale == "default" else (64, 4096):
        yield _rms_norm_rope(rows, 16 if scale == "default" else 32, 8)


def _rms_norm_rope(rows, heads, kv_heads, head_dim=128, timed=True):
    rng = np.random.default_rng(0)
    dtype = jnp.float32 if platforms.platform() == "cpu" else jnp.bfloat16
    q, k = normal(rng, rows, heads, head_dim, dtype=dtype), normal(rng, rows, kv_heads, head_dim, dtype=dtype)
    angles = rng.uniform(0, 6, (rows, head_dim // 2))
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    weights = [normal(rng, head_dim, dtype=dtype) for _ in range(2)]
    inputs = [(q, k, cos, sin, *weights)]
    call = lambda *arguments, implementation: rms_norm_rope(*arguments, implementation=implementation)  # noqa: E731
    forms = forms_of(rms_norm_rope_package, call, inputs, 2 * nbytes(q, k) + nbytes(cos, sin), interpret=not timed)
    label = f"{heads} + {kv_heads} heads of {head_dim}, {rows} rows"
    return Case("rms_norm_rope", label, forms, functools.partial(call, *inputs[0], implementation="ref"), timed)


# top_k, top_p, min_p
_FILTERS = {"top-p 0.95": (0, 0.95, 0.0), "top-k 1000, top-p 0.9, min-p 0.01": (1000, 0.9, 0.01)}


def sample_threshold_cases(scale: Scale) -> Cases:
    """Rows of Qwen's vocabulary, peaked about as a model's logits are."""
    yield _sample_threshold(3, 1500, "top-k 1000, top-p 0.9, min-p 0.01", timed=False)
    for rows in (1, 32) if scale == "default" else (8, 256):
        for filters in _FILTERS:
            yield _sample_threshold(rows, 151_936, filters)


def _sample_threshold(rows, vocab, filters, timed=True):
    scaled = normal(np.random.default_rng(0), rows, vocab) * 3
    top_k, top_p, min_p = _FILTERS[filters]
    inputs = [
        (
            scaled,
            jnp.full((rows,), top_k, jnp.int32),
            jnp.full((rows,), top_p, jnp.float32),
            jnp.full((rows,), min_p, jnp.float32),
        )
    ]

    def call(*arguments, implementation):
        return sample_threshold(*arguments, implementation=implementation)

    def distance(found, wanted):
        """The probability of all tokens that only one of the two keeps, in the worst row."""
        differ = jnp.where(kept(scaled, found) != kept(scaled, wanted), jax.nn.softmax(scaled), 0.0)
        return float(differ.sum(-1).max())

    return Case(
        "sample_threshold",
        f"{filters}, {rows} x {vocab}",
        forms_of(sample_threshold_package, call, inputs, nbytes(scaled), interpret=not timed),
        functools.partial(call, *inputs[0], implementation="ref"),
        timed,
        distance,
    )
