"""How many floating point operations a training token needs, and how many a device can do."""

import jax
import numpy as np
from jaxtyping import Int

from jaxstack.models import DecoderConfig

# Dense bfloat16 operations a second of one device, from the vendors' data sheets, by the beginning of its
# `device_kind`; the longest that fits counts.
_PEAK = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 operations a second of an accelerator; None for a CPU and for devices not known here."""
    fitting = [name for name in _PEAK if device.device_kind.startswith(name)]
    return _PEAK[max(fitting, key=len)] if fitting and device.platform != "cpu" else None


def active_parameters(config: DecoderConfig) -> int:
    """Entries of the matrices that a token is multiplied by: of experts those it goes through; the output matrix, tied
    or not, but no look-up of an embedding.
    """
    width = config.hidden_size
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    total = config.num_layers * width * heads + len(config.dense_layers) * 3 * width * config.intermediate_size
    if config.moe is not None:
        expert = 3 * width * config.moe.intermediate_size
        router = width * config.moe.num_experts
        total += len(config.sparse_layers) * (config.moe.experts_per_token * expert + router)
    return total + width * config.vocab_size


def mean_keys(lengths: Int[np.ndarray, "documents"], window: int | None) -> float:
    """Keys that a token sees on average, itself included, in causal attention within documents of these lengths."""
    tokens = lengths.astype(np.float64)
    inner = tokens if window is None else np.minimum(tokens, window)
    # The first `inner` tokens see 1, 2, ..., inner keys, any others the whole window.
    seen = inner * (inner + 1) / 2 + (tokens - inner) * inner
    return float(seen.sum() / max(1.0, tokens.sum()))


def training_flops_per_token(
    config: DecoderConfig, lengths: Int[np.ndarray, "documents"], *, adapter_parameters: int | None = None
) -> float:
    """Operations of a forward and a backward pass per token, without what rematerialisation repeats.

    Full training: 6 for each active parameter (Kaplan et al. 2020, section 2.1), and 12 for each head's feature and key
    seen. Adapters: the frozen matrices have no gradient of their own, so 4 for their parameters and 6 for the factors'.

    Args:
      lengths: of the documents trained on.
      adapter_parameters: entries of the factors that a token is multiplied by; None for full training.
    """
    features = config.num_heads * config.head_dim
    attention = sum(12 * features * mean_keys(lengths, window) for window in config.layer_windows)
    if adapter_parameters is None:
        return 6 * active_parameters(config) + attention
    return 4 * active_parameters(config) + 6 * adapter_parameters + attention
