"""The shapes of the models that benchmarks run, with random weights, and what a decode step must read of them."""

import jax
from flax import nnx

from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.rope import RopeConfig

FULL_LAYERS, FULL_VOCABULARY = 24, 151_936


def model_config(layers: int = FULL_LAYERS, vocab_size: int = FULL_VOCABULARY) -> DecoderConfig:
    """The shape of Qwen2.5-0.5B, with fewer layers or tokens if asked."""
    return DecoderConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=vocab_size,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=layers,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        qkv_bias=True,
    )


def scale_of(config: DecoderConfig) -> str:
    """What was cut from the full model, in words."""
    if (config.num_layers, config.vocab_size) == (FULL_LAYERS, FULL_VOCABULARY):
        return "Qwen2.5-0.5B shape, whole"
    return (
        f"Qwen2.5-0.5B shape, all widths, {config.num_layers} of {FULL_LAYERS} layers, "
        f"vocabulary {config.vocab_size} of {FULL_VOCABULARY}"
    )


def llama8b(layers: int = 32) -> DecoderConfig:
    """The shape of Llama 3 8B."""
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=5e5),
        max_position_embeddings=8192,
    )


def weight_bytes(served: Decoder) -> int:
    """What a step reads of a decoder in serving form: all but the embedding, unless that is the output matrix, too."""
    held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(served)))
    return held if served.lm_head is None else held - served.embed.embedding.get_value().nbytes


def token_bytes(model: DecoderConfig, itemsize: int) -> int:
    """The keys and values of one token in all layers."""
    return 2 * model.num_kv_heads * model.head_dim * model.num_layers * itemsize
