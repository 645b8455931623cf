"""A tiny model over bytes, for tests that start programs."""

from pathlib import Path
from typing import Any

from jaxstack.models.checkpoint import save_decoder
from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.training.initialize import fresh_decoder


def byte_model(window: int, **more: Any) -> DecoderConfig:
    return DecoderConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=byte_tokenizer().vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        qkv_bias=True,
        max_position_embeddings=window,
        **more,
    )


def save(folder: Path, config: DecoderConfig) -> None:
    """Random weights and the byte tokenizer, as a Hugging Face folder."""
    save_decoder(fresh_decoder(config), folder)
    byte_tokenizer().save(folder)
