"""The mixture of experts in a `config.json`."""

from typing import Any

from jaxstack.models.decoder_config import DecoderConfig, MoeConfig
from jaxstack.models.hf_families import Family
from jaxstack.models.hf_fields import Fields
from jaxstack.runtime.errors import UserError


def moe_from_hf(fields: Fields, family: Family, layers: int) -> MoeConfig | None:
    """What a file says of the experts; None for families without.

    Raises:
      UserError: a key that is missing or malformed.
    """
    if family.moe is None:
        return None
    # Newer files of every family count them under the same name.
    count = "num_local_experts" if fields.given("num_local_experts") else "num_experts"
    experts, chosen = fields.integer(count), fields.integer("num_experts_per_tok")
    if family.moe != "qwen3_moe":
        norm = 1.0 if family.moe == "mixtral" else fields.number("weight_norm", optional=True)
        return MoeConfig(
            num_experts=experts,
            experts_per_token=chosen,
            intermediate_size=fields.integer("intermediate_size"),
            weight_norm=norm,
        )
    step = fields.integer("decoder_sparse_step", 1)
    plain = fields.get("mlp_only_layers") or []
    if not isinstance(plain, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in plain):
        raise fields.error("mlp_only_layers", "a list of layer numbers")
    return MoeConfig(
        num_experts=experts,
        experts_per_token=chosen,
        intermediate_size=fields.integer("moe_intermediate_size"),
        weight_norm=1.0 if fields.flag("norm_topk_prob", False) else None,
        dense_layers=tuple(i for i in range(layers) if i in plain or (i + 1) % step),
    )


def moe_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of both generations.

    Raises:
      UserError: the family has no such experts.
    """
    moe = config.moe
    if (moe is None) != (family.moe is None):
        expected = "none" if family.moe is None else "a mixture of experts"
        raise UserError(f"moe: found {moe}, expected {expected}, as {config.architecture} has it")
    if moe is None:
        return {}
    fixed: dict[str, tuple[Any, ...]] = {
        "weight_norm": {"mixtral": (1.0,), "qwen3_moe": (1.0, None)}.get(str(family.moe), (moe.weight_norm,))
    }
    if family.moe != "qwen3_moe":
        fixed |= {"intermediate_size": (config.intermediate_size,), "dense_layers": ((),)}
    for name, allowed in fixed.items():
        if getattr(moe, name) not in allowed:
            raise UserError(
                f"moe.{name}: found {getattr(moe, name)}, expected {' or '.join(map(str, allowed))}: "
                f"{config.architecture} has no other form"
            )
    if family.moe == "dbrx":
        return {}  # they stand in an object of their own
    data = {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token}
    if family.moe == "mixtral":
        return data
    return data | {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.weight_norm is not None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
    }


def dbrx_to_hf(config: DecoderConfig, data: dict[str, Any]) -> dict[str, Any]:
    """DBRX's own names for the usual keys in `data`, and its two nested objects."""
    if config.moe is None or config.head_dim * config.num_heads != config.hidden_size or config.tie_word_embeddings:
        raise UserError("head_dim, tie_word_embeddings: expected hidden_size / num_heads and False, as DBRX has them")
    if config.rms_norm_eps != 1e-5:
        raise UserError(f"rms_norm_eps: found {config.rms_norm_eps}, expected 1e-5: DBRX has no other form")
    shared = (
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "vocab_size",
        "tie_word_embeddings",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "rope_parameters",
        "rope_scaling",
    )
    return {key: data[key] for key in shared} | {
        "d_model": config.hidden_size,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "max_seq_len": config.max_position_embeddings,
        "attn_config": {
            "attn_pdrop": 0.0,
            "clip_qkv": config.qkv_clip,
            "kv_n_heads": config.num_kv_heads,
            "rope_theta": config.rope.theta,
        },
        "ffn_config": {
            "ffn_act_fn": {"name": data["hidden_act"]},
            "ffn_hidden_size": config.moe.intermediate_size,
            "moe_num_experts": config.moe.num_experts,
            "moe_top_k": config.moe.experts_per_token,
            "moe_normalize_expert_weights": config.moe.weight_norm,
        },
    }
