"""The decoder families: what each architecture's class fixes, and what it assumes of keys that a file leaves out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxstack.models.decoder_config import Activation, Norm


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
      model_type: the key of that name.
      bias: of q, k, v and o; "attention_bias" where the key of that name decides.
      windows: "all": `sliding_window` in every layer; "per_layer": where `layer_types`, or `max_window_layers`, says;
        "pattern": where `layer_types` says, else in all but every `window_pattern`-th layer.
      window_flag: `sliding_window` counts only with `use_sliding_window`.
      mlp_bias: whether the key of that name exists.
      softcaps: whether `query_pre_attn_scalar` and the two softcapping keys exist.
      clip: whether `clip_qkv` exists.
      theta, local_theta: the rotation's base, and that of layers with a window if they have their own.
      partial_rotary: whether only part of a head may be rotated.
      rope_aliases: other names of a rope_type.
      moe: how a mixture of experts is configured and named.
      keys, defaults: as `hf_fields.Fields` takes them.
    """

    model_type: str
    bias: Literal["none", "qkv", "attention_bias"] = "none"
    windows: Literal["none", "all", "per_layer", "pattern"] = "none"
    window_flag: bool = False
    window_pattern: int = 0
    qk_norm: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    norm: Norm = "rms"
    branch_norms: bool = False
    scale_embeddings: bool = False
    softcaps: bool = False
    clip: bool = False
    theta: float = 10_000.0
    local_theta: float | None = None
    partial_rotary: bool = False
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    moe: Literal["mixtral", "qwen3_moe", "dbrx"] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA: dict[str, Any] = {
    "windows": "pattern",
    "activation": "gelu_tanh",
    "norm": "rms_offset",
    "branch_norms": True,
    "scale_embeddings": True,
    "softcaps": True,
    "keys": {"hidden_act": "hidden_activation"},
}
_GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        bias="attention_bias",
        mlp_bias=True,
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        windows="all",
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Qwen2ForCausalLM": Family(model_type="qwen2", bias="qkv", windows="per_layer", window_flag=True, defaults=_QWEN),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        bias="attention_bias",
        windows="per_layer",
        window_flag=True,
        qk_norm=True,
        defaults={**_QWEN, "head_dim": 128},
    ),
    "Gemma2ForCausalLM": Family(
        model_type="gemma2",
        bias="attention_bias",
        window_pattern=2,
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        **_GEMMA,
    ),
    "Gemma3ForCausalLM": Family(
        model_type="gemma3_text",
        bias="attention_bias",
        window_pattern=6,
        qk_norm=True,
        theta=1_000_000.0,
        local_theta=10_000.0,
        defaults={**_GEMMA_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072},
        **_GEMMA,
    ),
    "Phi3ForCausalLM": Family(
        model_type="phi3",
        windows="all",
        partial_rotary=True,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
    ),
    "MixtralForCausalLM": Family(
        model_type="mixtral",
        windows="all",
        theta=1_000_000.0,
        moe="mixtral",
        keys={"num_experts": "num_local_experts"},
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        bias="attention_bias",
        windows="all",
        window_flag=True,
        qk_norm=True,
        moe="qwen3_moe",
        defaults={
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
    ),
    "DbrxForCausalLM": Family(
        model_type="dbrx",
        norm="layer",
        clip=True,
        moe="dbrx",
        keys={
            "hidden_size": "d_model",
            "num_attention_heads": "n_heads",
            "num_hidden_layers": "n_layers",
            "max_position_embeddings": "max_seq_len",
            "num_key_value_heads": "attn_config.kv_n_heads",
            "clip_qkv": "attn_config.clip_qkv",
            "rope_theta": "attn_config.rope_theta",
            "intermediate_size": "ffn_config.ffn_hidden_size",
            "hidden_act": "ffn_config.ffn_act_fn.name",
            "num_experts": "ffn_config.moe_num_experts",
            "num_experts_per_tok": "ffn_config.moe_top_k",
            "weight_norm": "ffn_config.moe_normalize_expert_weights",
        },
        defaults={
            "rms_norm_eps": 1e-5,  # LayerNorm's own; no key says otherwise
            "num_key_value_heads": 1,
            "intermediate_size": 3584,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "weight_norm": 1.0,
        },
    ),
}
"""By the class that `architectures[0]` names."""

TEXT_MODELS: Mapping[str, str] = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Multimodal classes, whose `text_config` and text weights are read as those of the class they stand beside."""

ARCHITECTURES = (*FAMILIES, *TEXT_MODELS)
"""The `architectures[0]` values that are known."""

HIDDEN_ACTS: Mapping[Activation, str] = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
"""What `config.json` calls an activation."""
