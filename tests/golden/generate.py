"""Makes the golden files in this folder from reference implementations. Needs torch and transformers; the tests do not.

    .venv-peers/bin/python tests/golden/generate.py [NAME ...]

With names, only those checkpoints are made, and nothing else.

`decoder/NAME/`: a tiny random checkpoint of each family, saved by transformers itself, and `logits.npz` with two token
sequences and transformers' float32 logits for them.
`encoder/NAME/`: the same of BERT's kind, with a tokenizer; `outputs.npz` has texts, their tokens, the last layer's
outputs and the texts' vectors.
`rope.npz`: transformers' inverse frequencies for published models' settings.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3}

GEMMA = {"sliding_window": 8, "head_dim": 12, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0}

# name: (configuration class, what differs from SIZES, stored dtype)
CHECKPOINTS = {
    "llama2": (transformers.LlamaConfig, {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, torch.float32),
    "llama3": (
        transformers.LlamaConfig,
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "tie_word_embeddings": True, "eos_token_id": [90, 91]},
        torch.bfloat16,
    ),
    "llama_linear": (
        transformers.LlamaConfig,
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
        torch.float16,
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 8}, torch.float32),
    "qwen2": (transformers.Qwen2Config, {**SLIDING, "tie_word_embeddings": True, "eos_token_id": 7}, torch.bfloat16),
    "qwen2_yarn": (transformers.Qwen2Config, {"rope_parameters": {**YARN, "rope_theta": 1000000.0}}, torch.bfloat16),
    "qwen3": (transformers.Qwen3Config, {**SLIDING, "head_dim": 20}, torch.bfloat16),
    "qwen3_tied": (
        transformers.Qwen3Config,
        {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": True, "pad_token_id": 0},
        torch.float32,
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 24,
        },
        torch.bfloat16,
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **GEMMA,
            "num_hidden_layers": 8,
            "hidden_size": 16,
            "intermediate_size": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        torch.bfloat16,
    ),
    "phi3": (
        transformers.Phi3Config,
        {
            "pad_token_id": 0,
            "sliding_window": 20,
            "original_max_position_embeddings": 28,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
            },
        },
        torch.bfloat16,
    ),
    "phi3_partial": (
        transformers.Phi3Config,
        {
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
        torch.bfloat16,
    ),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "intermediate_size": 24, "sliding_window": 20},
        torch.bfloat16,
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "num_hidden_layers": 5,
            "hidden_size": 16,
            "head_dim": 8,
            "intermediate_size": 24,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "mlp_only_layers": [0, 3],
            "norm_topk_prob": True,
        },
        torch.bfloat16,
    ),
    "dbrx": (
        transformers.DbrxConfig,
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"clip_qkv": 1.0, "kv_n_heads": 2, "rope_theta": 500000.0},
            "ffn_config": {
                "ffn_hidden_size": 20,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": 2.0,
            },
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        torch.bfloat16,
    ),
}


def decoder_checkpoints(out: Path, only: list[str]) -> None:
    for seed, (name, (config_class, differences, dtype)) in enumerate(CHECKPOINTS.items()):
        if only and name not in only:
            continue
        torch.manual_seed(seed)
        sizes = {"vocab_size": SIZES["vocab_size"]} if name == "dbrx" else SIZES
        config = config_class(**{**sizes, **differences}, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                # Nothing is left at an initial value (ones, zeros) that would hide a wrong name or place.
                noise = torch.randn_like(parameter) * 0.2
                parameter.copy_(1 + noise if "norm" in key and parameter.ndim == 1 else noise)
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model.to(dtype).save_pretrained(folder)
        # Loaded anew, for what the stored numbers give in float32: `model.to` has rounded the frequencies too.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        model = model.eval()
        generator = np.random.default_rng(seed)
        arrays = {}
        for label, length in {"a": 24, "b": 33}.items():
            tokens = generator.integers(0, config.vocab_size, length)
            with torch.no_grad():
                logits = model(torch.tensor(tokens)[None]).logits[0]
            arrays |= {f"tokens_{label}": tokens.astype(np.int32), f"logits_{label}": logits.numpy()}
        np.savez(folder / "logits.npz", **arrays)


BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
# name: (model class, what differs from BERT, what sentence-transformers says of pooling, if anything)
ENCODERS = {
    "bert": (transformers.BertModel, {}, None),
    "bert_cls": (
        transformers.BertForMaskedLM,
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "type_vocab_size": 3},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    ),
}
TEXTS = [
    "How is the weather in Oslo today?",
    "weather",
    "What is the weather like, and is it going to be as cold as it was on the day before the day before yesterday?",
]


def bert_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Lower-case word pieces: some words, and all letters."""
    words = ["how", "is", "the", "weather", "in", "today", "what", "it", "was", "day", "before", "as", "to", "?", ","]
    letters = [chr(ord("a") + i) for i in range(26)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{letter}" for letter in letters)]
    pipeline = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    pipeline.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    markers = [("[CLS]", pieces.index("[CLS]")), ("[SEP]", pieces.index("[SEP]"))]
    pipeline.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=markers
    )
    # As published folders have them: both are to be overridden.
    pipeline.enable_padding(length=64)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=pipeline, **names, model_max_length=40)


def encoder_checkpoints(out: Path, only: list[str]) -> None:
    tokenizer = bert_tokenizer()
    for seed, (name, (model_class, differences, pooling)) in enumerate(ENCODERS.items()):
        if only and name not in only:
            continue
        torch.manual_seed(100 + seed)
        config = transformers.BertConfig(
            **{"vocab_size": len(tokenizer), **BERT, **differences}, attn_implementation="eager"
        )
        model = model_class(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn_like(parameter) * 0.3
                parameter.copy_(1 + noise if "LayerNorm.weight" in key else noise)
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if pooling is not None:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")
        encoder = getattr(model, "bert", model)
        batch = tokenizer(TEXTS, padding="longest", truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")).last_hidden_state
        there = batch["attention_mask"][..., None].float()
        mean = (hidden * there).sum(1) / there.sum(1)
        vectors = torch.nn.functional.normalize(hidden[:, 0] if pooling else mean, dim=-1)
        np.savez(
            folder / "outputs.npz",
            texts=np.array(TEXTS),
            tokens=batch["input_ids"].numpy().astype(np.int32),
            mask=batch["attention_mask"].numpy().astype(bool),
            hidden=hidden.numpy(),
            vectors=vectors.numpy(),
        )


# name: (head_dim, max_position_embeddings, rope_parameters)
ROPES = {
    "qwen3": (128, 40960, {"rope_type": "default", "rope_theta": 1000000.0}),
    "llama31": (
        128,
        131072,
        {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    ),
    "llama32": (
        64,
        131072,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    ),
    "qwen25_yarn": (
        128,
        131072,
        {**YARN, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
    ),
    "yarn_untruncated": (
        64,
        32768,
        {
            **YARN,
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 150000.0,
            "truncate": False,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
    ),
    "linear": (64, 16384, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
}


def rope_frequencies(path: Path) -> None:
    arrays = {}
    for name, (head_dim, positions, parameters) in ROPES.items():
        config = transformers.LlamaConfig(
            head_dim=head_dim, max_position_embeddings=positions, rope_parameters=dict(parameters)
        )
        rotation = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        arrays[name] = rotation.inv_freq.numpy()
        arrays[f"{name}_scale"] = np.float64(rotation.attention_scaling)
    np.savez(path, **arrays)


if __name__ == "__main__":
    names = sys.argv[1:]
    if unknown := sorted(set(names) - CHECKPOINTS.keys() - ENCODERS.keys()):
        sys.exit(f"found {unknown[0]!r}, expected some of {', '.join([*CHECKPOINTS, *ENCODERS])}")
    decoder_checkpoints(Path(__file__).parent / "decoder", names)
    encoder_checkpoints(Path(__file__).parent / "encoder", names)
    if names:
        sys.exit()
    rope_frequencies(Path(__file__).parent / "rope.npz")
