"""Compares logits with transformers', live, on random tiny checkpoints of every decoder family, in both directions.

    python -m launch.compare_transformers

transformers writes a checkpoint, we load it; we write another, transformers loads it; each time both sides compute the
float32 logits of the same tokens. transformers runs as a subprocess in its own environment (`make peers`).
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from jaxstack.models import Decoder, dense_attention
from jaxstack.models.checkpoint import load_decoder, save_decoder
from jaxstack.runtime.errors import UserError
from launch import job
from launch.peers import find_interpreter

_PEER = flags.DEFINE_string(
    "peer_python", ".venv-peers/bin/python", "Python with torch and transformers (`make peers`)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the checkpoints go and stay; a temporary folder if not given.")
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and tokens.")
_LENGTH = flags.DEFINE_integer("length", 150, "Tokens per sequence.", lower_bound=1)

TOLERANCE = 1e-4

_SIZES = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
_GEMMA = {"sliding_window": 24, "head_dim": 24, "pad_token_id": 0}
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

# name: (transformers' configuration class, what differs from _SIZES, stored dtype)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 6}, "float32"),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, "bfloat16"),
    "llama_linear": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
        "float16",
    ),
    "mistral": ("MistralConfig", {"sliding_window": 24, "head_dim": 24}, "bfloat16"),
    "qwen2": ("Qwen2Config", {**_SLIDING, "tie_word_embeddings": True}, "bfloat16"),
    "qwen2_yarn": ("Qwen2Config", {"rope_parameters": _YARN}, "float32"),
    "qwen3": ("Qwen3Config", {**_SLIDING, "head_dim": 32}, "bfloat16"),
    "qwen3_tied": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True, "attention_bias": True}, "float32"),
    "gemma2": (
        "Gemma2Config",
        {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0, "query_pre_attn_scalar": 20},
        "bfloat16",
    ),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 7, "rope_parameters": _TWO_ROPES}, "float32"),
    "phi3": (
        "Phi3Config",
        {
            "sliding_window": 100,
            "pad_token_id": 0,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [1.0 + 0.5 * i for i in range(8)],
            },
        },
        "bfloat16",
    ),
    "phi3_partial": (
        "Phi3Config",
        {
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
        "float32",
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 6, "sliding_window": 24}, "bfloat16"),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 24,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "num_experts": 10,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 40,
        },
        "float32",
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 96,
            "n_heads": 6,
            "n_layers": 3,
            "max_seq_len": 4096,
            "attn_config": {"clip_qkv": 1.0, "kv_n_heads": 2, "rope_theta": 500000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 4},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        "bfloat16",
    ),
}

# The one class with names of its own for the sizes.
_OWN_SIZES = {"DbrxConfig": {"vocab_size": _SIZES["vocab_size"]}}


def run() -> dict[str, Any]:
    find_interpreter(_PEER.value)
    if _WORKDIR.value is not None:
        return _compare(Path(_WORKDIR.value))
    with tempfile.TemporaryDirectory() as folder:
        return _compare(Path(folder))


def _compare(workdir: Path) -> dict[str, Any]:
    generator = np.random.default_rng(_SEED.value)
    tokens = generator.integers(0, _SIZES["vocab_size"], (2, _LENGTH.value)).astype(np.int32)
    workdir.mkdir(parents=True, exist_ok=True)
    np.save(workdir / "tokens.npy", tokens)

    theirs = {name: workdir / "theirs" / name for name in FAMILIES}
    make = [
        {
            "folder": str(theirs[name]),
            "config_class": config_class,
            "config": {**_OWN_SIZES.get(config_class, _SIZES), **differences},
            "dtype": dtype,
            "seed": _SEED.value + number,
        }
        for number, (name, (config_class, differences, dtype)) in enumerate(FAMILIES.items())
    ]
    version = _peer(workdir, {"make": make, "logits": [str(path) for path in theirs.values()]})

    ours = {name: workdir / "ours" / name for name in FAMILIES}
    expected: dict[str, np.ndarray] = {}
    diffs: dict[str, dict[str, float]] = {name: {} for name in FAMILIES}
    for name, (_, _, dtype) in tqdm(FAMILIES.items(), desc="our side"):
        decoder = load_decoder(theirs[name], progress=False)
        diffs[name]["theirs_read_by_us"] = _difference(_logits(decoder, tokens), theirs[name])
        _randomise(decoder, generator)
        save_decoder(decoder, ours[name], dtype=np.dtype(dtype), tokenizer_from=theirs[name])
        expected[name] = _logits(load_decoder(ours[name], progress=False), tokens)
    _peer(workdir, {"make": [], "logits": [str(path) for path in ours.values()]})
    for name in FAMILIES:
        diffs[name]["ours_read_by_them"] = _difference(expected[name], ours[name])

    worst = max(diff for both in diffs.values() for diff in both.values())
    return {
        "max_abs_diff": worst,
        "tolerance": TOLERANCE,
        "within_tolerance": worst <= TOLERANCE,
        "families": diffs,
        "transformers": version,
        "jax": jax.__version__,
    }


def _peer(workdir: Path, spec: dict[str, Any]) -> str:
    """Runs transformers' side; returns its version."""
    path = workdir / "peer.json"
    path.write_text(json.dumps({**spec, "tokens": str(workdir / "tokens.npy")}))
    script = Path(__file__).parent / "peers" / "transformers_logits.py"
    done = subprocess.run([_PEER.value, str(script), str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{_PEER.value} {script.name}: failed: {last}")
    return done.stdout.strip().splitlines()[-1]


def _logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(decoder)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    step = jax.jit(lambda state: nnx.merge(graphdef, state)(jnp.asarray(tokens), positions, dense_attention())[0])
    return np.asarray(step(state))


def _difference(logits: np.ndarray, folder: Path) -> float:
    return float(np.abs(logits - np.load(folder / "logits.npy")).max())


def _randomise(decoder: Decoder, generator: np.random.Generator) -> None:
    """New weights of our own; nothing stays at a value (ones, zeros) that would hide a wrong name or place."""

    def fresh(path, x):
        return jnp.asarray(0.1 * generator.standard_normal(x.shape, np.float32) + ("norm" in str(path)))

    nnx.update(decoder, jax.tree_util.tree_map_with_path(fresh, nnx.state(decoder, nnx.Param)))


if __name__ == "__main__":
    job.main(run)
