"""config.json of both generations, and every way in which it can be wrong."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxstack.models import RopeConfig
from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.decoder_config import MoeConfig
from jaxstack.models.hf_config import config_from_folder, config_from_hf, config_to_hf, stored_dtype
from jaxstack.runtime.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "decoder"

# As published for Llama 3.1 8B, in the keys of transformers 4.
LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_a_published_config_of_the_old_generation():
    config = config_from_hf(LLAMA31)
    assert config == DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500000.0, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192),
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )
    assert stored_dtype(LLAMA31) == "bfloat16"


def to_old_keys(data):
    """The same file as transformers 4 would have written it."""
    data = dict(data)
    rope = dict(data.pop("rope_parameters"))
    if "full_attention" in rope:
        data["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        data["sliding_window_pattern"] = data.pop("_sliding_window_pattern")
        rope = dict(rope["full_attention"])
    if "partial_rotary_factor" in rope:
        data["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if data["model_type"] == "qwen3_moe":
        data["num_experts"] = data.pop("num_local_experts")
    data["rope_theta"] = rope.pop("rope_theta")
    data["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope.pop("rope_type"), **rope}
    data["torch_dtype"] = data.pop("dtype")
    data.pop("layer_types", None)
    return data


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_both_generations_give_the_same_config_and_we_write_both(name):
    new = json.loads((GOLDEN / name / "config.json").read_text())
    old = to_old_keys(new)
    config = config_from_hf(new)
    assert config_from_hf(old) == config
    assert stored_dtype(old) == stored_dtype(new)

    written = config_to_hf(config, dtype=stored_dtype(new))
    assert config_from_hf(json.loads(json.dumps(written))) == config
    without_new = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    old_keys = ("rope_scaling", "rope_theta", "rope_local_base_freq", "torch_dtype", "sliding_window_pattern")
    without_old = {k: v for k, v in written.items() if k not in old_keys}
    assert config_from_hf(without_new) == config_from_hf(without_old) == config
    # transformers' own file, key by key, where both write the key
    unused = {"max_window_layers"} if name in ("qwen2_yarn", "qwen3_tied") else set()
    unused |= {"head_dim"} if new.get("head_dim") is None else set()
    assert_agree(written, {key: value for key, value in new.items() if key not in unused})


def assert_agree(ours, theirs):
    for key in ours.keys() & theirs.keys():
        if isinstance(theirs[key], dict):
            assert_agree(ours[key], theirs[key])
        else:
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({}, (None,) * 4),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (None, 8, 8, 8)),
        ({"use_sliding_window": True, "sliding_window": 8}, (None,) * 4),  # max_window_layers is 28 unless given
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, (None,) * 4),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
        ({"architectures": ["MistralForCausalLM"]}, (4096,) * 4),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (None,) * 4),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 8}, (None,) * 4),
    ],
)
def test_windows(keys, windows):
    config = config_from_hf({**SMALL, **keys})
    assert config.layer_windows == windows
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"head_dim": 128, "num_kv_heads": 2}),
        ({"head_dim": None}, {"head_dim": 8}),
        ({"num_key_value_heads": None}, {"num_kv_heads": 4}),
        ({"architectures": ["Qwen2ForCausalLM"]}, {"head_dim": 8, "qkv_bias": True, "attention_out_bias": False}),
        ({"attention_bias": True}, {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": False}),
        ({"architectures": None, "model_type": "qwen2"}, {"architecture": "Qwen2ForCausalLM"}),
        ({"eos_token_id": None, "pad_token_id": -1}, {"eos_token_ids": (), "pad_token_id": None}),
        ({"architectures": ["LlamaForCausalLM"]}, {"eos_token_ids": (2,), "bos_token_id": 1}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope": RopeConfig(rope_type="linear", factor=2.0)}),
        ({"rope_theta": 5000}, {"rope": RopeConfig(theta=5000.0)}),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
            {"rope": RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)},
        ),
    ],
)
def test_what_absent_keys_mean(keys, expected):
    data = {k: v for k, v in SMALL.items() if k != "head_dim"} | keys
    config = config_from_hf(data)
    assert {name: getattr(config, name) for name in expected} == expected


# As published for Gemma 3 4B: the text model inside a multimodal one, most of its keys left to the class.
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}


def test_a_published_text_config_inside_a_multimodal_one():
    config = config_from_hf(GEMMA3)
    assert config == DecoderConfig(
        architecture="Gemma3ForCausalLM",
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        activation="gelu_tanh",
        norm="rms_offset",
        branch_norms=True,
        rope=RopeConfig(theta=1e6, rope_type="linear", factor=8.0),
        local_rope=RopeConfig(theta=1e4),
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        scale_embeddings=True,
        qk_norm=True,
        query_pre_attn_scalar=256,
        layer_windows=tuple(None if i % 6 == 5 else 1024 for i in range(34)),
        bos_token_id=2,
        eos_token_ids=(1, 106),
        pad_token_id=0,
    )
    assert config.attention_scale == 1 / 16
    assert config_from_hf(config_to_hf(config)) == config


def test_gemma2_alternates_and_caps():
    config = config_from_hf({**SMALL, "architectures": ["Gemma2ForCausalLM"]})
    assert config.layer_windows == (4096, None, 4096, None)
    assert (config.attention_softcap, config.logits_softcap, config.query_pre_attn_scalar) == (50, 30, 256)
    assert (config.tie_word_embeddings, config.qk_norm, config.local_rope) == (True, False, None)
    capless = {**SMALL, "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": None}
    assert config_from_hf(capless).attention_softcap is None


def test_longrope_of_a_published_phi3():
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
    data = {
        **SMALL,
        "architectures": ["Phi3ForCausalLM"],
        "head_dim": None,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", **factors},
        "sliding_window": 262144,
    }
    config = config_from_hf(data)
    rope = config.rope
    assert (rope.rope_type, rope.factor, rope.attention_factor) == ("longrope", 32.0, None)
    assert (rope.original_max_position_embeddings, rope.long_factor) == (4096, (1.5, 2.0, 3.0, 4.0))
    assert config.layer_windows == (262144,) * 4
    written = config_to_hf(config)
    assert written["rope_scaling"] == {"type": "longrope", **factors}  # three keys, as older readers insist
    assert written["original_max_position_embeddings"] == 4096
    assert config_from_hf(written) == config
    odd = dataclasses.replace(config, rope=dataclasses.replace(rope, attention_factor=1.5, factor=7.0))
    assert config_from_hf(config_to_hf(odd)) == odd


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({}, ()),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"mlp_only_layers": [2]}, (2,)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3, 0]}, (0, 2, 3)),
        ({"decoder_sparse_step": 9}, (0, 1, 2, 3)),
    ],
)
def test_which_layers_have_experts(keys, dense):
    sizes = {"num_experts": 6, "num_experts_per_tok": 3}
    config = config_from_hf({**SMALL, "architectures": ["Qwen3MoeForCausalLM"], **sizes, **keys})
    moe = config.moe
    assert (moe.num_experts, moe.experts_per_token, moe.intermediate_size, moe.weight_norm) == (6, 3, 768, None)
    assert moe.dense_layers == config.dense_layers == dense
    assert config.sparse_layers == tuple(i for i in range(4) if i not in dense)
    assert config_from_hf(config_to_hf(config)) == config


def test_segments_are_runs_of_equal_layers():
    config = config_from_hf({**SMALL, "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 7})
    moe = dataclasses.replace(config.moe, dense_layers=(0, 3, 4))
    segments = list(dataclasses.replace(config, moe=moe).segments())
    assert segments == [(0, 1, False, 0), (1, 3, True, 0), (3, 5, False, 1), (5, 7, True, 2)]
    assert list(config.segments()) == [(0, 7, True, 0)]
    assert list(config_from_hf(SMALL).segments()) == [(0, 4, False, 0)]


# As published for DBRX, less what does not concern us.
DBRX = {
    "architectures": ["DbrxForCausalLM"],
    "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
    "d_model": 6144,
    "ffn_config": {"ffn_hidden_size": 10752, "model_type": "", "moe_num_experts": 16, "moe_top_k": 4},
    "max_seq_len": 32768,
    "model_type": "dbrx",
    "n_heads": 48,
    "n_layers": 40,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}


def test_a_published_dbrx():
    config = config_from_hf(DBRX)
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.num_layers) == (6144, 48, 8, 40)
    assert (config.head_dim, config.qkv_clip, config.norm, config.rms_norm_eps) == (128, 8.0, "layer", 1e-5)
    assert config.rope == RopeConfig(theta=500000.0)
    assert config.moe == MoeConfig(num_experts=16, experts_per_token=4, intermediate_size=10752, weight_norm=1.0)
    written = config_to_hf(config)
    assert written["rope_parameters"]["rope_theta"] == written["attn_config"]["rope_theta"] == 500000.0
    assert config_from_hf(written) == config
    with pytest.raises(UserError, match=r"c\.json: attn_config\.kv_n_heads: found 'x', expected an integer"):
        config_from_hf({**DBRX, "attn_config": {"kv_n_heads": "x"}}, source="c.json")
    with pytest.raises(UserError, match=r"ffn_config\.ffn_act_fn\.name: found 'gelu', expected 'silu'"):
        config_from_hf({**DBRX, "ffn_config": {"ffn_act_fn": {"name": "gelu"}}})
    with pytest.raises(UserError, match="rms_norm_eps: found 1e-06, expected 1e-5"):
        config_to_hf(dataclasses.replace(config, rms_norm_eps=1e-6))
    with pytest.raises(UserError, match="tie_word_embeddings: expected"):
        config_to_hf(dataclasses.replace(config, tie_word_embeddings=True))


def test_generation_config_overrides_token_ids(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**SMALL, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 3})
    )
    assert config_from_folder(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5], "pad_token_id": 6}))
    config = config_from_folder(tmp_path)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((4, 5), 2, 6)


BAD = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        "architectures: found 'GPT2LMHeadModel', expected one of LlamaForCausalLM, ",
    ),
    ({"architectures": "LlamaForCausalLM"}, "architectures: found 'LlamaForCausalLM', expected a list"),
    ({"architectures": []}, "architectures: found []"),
    ({"architectures": None}, "architectures: found None"),
    ({"architectures": None, "model_type": "gpt2"}, "architectures: found 'gpt2', expected one of"),
    ({"vocab_size": None}, "vocab_size: found None, expected an integer from 1"),
    ({"hidden_size": "big"}, "hidden_size: found 'big', expected an integer"),
    ({"hidden_size": 32.0}, "hidden_size: found 32.0, expected an integer"),
    ({"hidden_size": True}, "hidden_size: found True"),
    ({"hidden_size": -32}, "hidden_size: found -32"),
    (
        {"intermediate_size": 10**30},
        "intermediate_size: found 1000000000000000000000000000000, expected an integer from 1 to",
    ),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected an integer from 1 to 4096"),
    ({"num_hidden_layers": []}, "num_hidden_layers: found []"),
    ({"num_key_value_heads": 3}, "num_kv_heads: found 3, expected a divisor of num_heads = 4"),
    (
        {"num_attention_heads": 5, "head_dim": None},
        "num_attention_heads: found 5, expected a divisor of hidden_size = 32",
    ),
    ({"head_dim": 15}, "head_dim: found 15, expected an even number"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps: found 'tiny', expected a finite number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps: found -1e-06"),
    ({"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
    (
        {"quantization_config": {"bits": 4}},
        "quantization_config: found {'bits': 4}, expected an unquantised checkpoint",
    ),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: found 'yes', expected true or false"),
    ({"rope_scaling": "double"}, "rope_scaling: found 'double', expected an object"),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        "rope_scaling.rope_type: found 'dynamic', expected one of",
    ),
    ({"rope_parameters": {"rope_type": 3}}, "rope_parameters.rope_type: found 3, expected a string"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor: found nothing, expected a finite number"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor: found nothing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "rope.factor: found 0.5, expected a number >= 1"),
    ({"rope_theta": "1e4"}, "rope_theta: found '1e4', expected a finite number"),
    ({"rope_theta": 0}, "rope.theta: found 0.0"),
    ({"rope_theta": float("inf")}, "rope_theta: found inf"),
    (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor: found 0.5, expected 1.0",
    ),
    ({"layer_types": ["full_attention"]}, "layer_types: found ['full_attention'], expected a list of 4 entries"),
    ({"layer_types": ["linear_attention"] * 4}, "layer_types: found ['linear_attention'"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window: found 0"),
    ({"use_sliding_window": 1}, "use_sliding_window: found 1, expected true or false"),
    ({"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers: found -1"),
    ({"eos_token_id": "</s>"}, "eos_token_id: found '</s>', expected an integer from 0"),
    ({"eos_token_id": [1, None]}, "eos_token_id: found [1, None], expected a token id or a list of token ids"),
    ({"bos_token_id": 1.5}, "bos_token_id: found 1.5"),
    ({"architectures": ["Gemma3ForConditionalGeneration"]}, "text_config: found nothing, expected an object"),
    (
        {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": "x"}},
        "text_config.hidden_size: found 'x', expected an integer",
    ),
    (
        {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "silu"},
        "hidden_activation: found 'silu', expected 'gelu_pytorch_tanh'",
    ),
    (
        {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
        "use_bidirectional_attention: found True, expected false",
    ),
    (
        {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"full_attention": {"rope_type": "odd"}}},
        "rope_parameters.full_attention.rope_type: found 'odd', expected one of",
    ),
    (
        {"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su", "short_factor": [1.0]}},
        "rope_scaling.long_factor: found nothing, expected a list of numbers",
    ),
    (
        {
            "architectures": ["Phi3ForCausalLM"],
            "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]},
        },
        "rope.short_factor: found 1 factors, expected one a rotated pair, 8",
    ),
    ({"architectures": ["MixtralForCausalLM"], "num_local_experts": 0}, "num_local_experts: found 0"),
    (
        {"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9},
        "moe.experts_per_token: found 9, expected at most num_experts = 8",
    ),
    (
        {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": ["0"]},
        "mlp_only_layers: found ['0'], expected a list of layer numbers",
    ),
    ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 0}, "decoder_sparse_step: found 0"),
    ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": None}, "sliding_window: found None, expected"),
    ({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": -1}, "attention_softcap: found -1.0"),
    ({"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": "x"}, "query_pre_attn_scalar: found 'x'"),
    (
        {
            "architectures": ["MistralForCausalLM"],
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        "layer_types: found ['full_attention', 'sliding_attention'",
    ),
]


@pytest.mark.parametrize(("keys", "message"), BAD)
def test_bad_values_get_one_line_with_file_and_field(keys, message):
    with pytest.raises(UserError) as caught:
        config_from_hf({**SMALL, **keys}, source="some/config.json")
    text = str(caught.value)
    assert text.startswith("some/config.json: " + message), text
    assert text.count("some/config.json") == 1
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "found a JSON list, expected an object"),
        ("\ufeff{}", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "not readable as JSON"),
    ],
)
def test_files_that_are_no_json_object(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        config_from_folder(tmp_path)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        config_from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as JSON"):
        config_from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id: found 'x'"):
        config_from_folder(tmp_path)


def test_bad_dtype_names():
    with pytest.raises(UserError, match="torch_dtype: found 'int8', expected one of float32, bfloat16, float16"):
        stored_dtype({"torch_dtype": "int8"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "GPT2LMHeadModel"}, "architecture: found 'GPT2LMHeadModel'"),
        ({"qk_norm": False}, "qk_norm: found False, expected True: Qwen3ForCausalLM has no other form"),
        ({"qkv_bias": True}, "attention_out_bias: found False, expected True"),
        ({"mlp_bias": True}, "mlp_bias: found True, expected False"),
        ({"norm": "rms_offset"}, "norm: found rms_offset, expected rms: Qwen3ForCausalLM has no other form"),
        ({"attention_softcap": 50.0}, "attention_softcap: found 50.0, expected None"),
        ({"local_rope": RopeConfig()}, "local_rope: found .*, expected None"),
        (
            {"moe": MoeConfig(num_experts=2, experts_per_token=1, intermediate_size=8)},
            "moe: found .*, expected none, as Qwen3ForCausalLM has it",
        ),
        ({"layer_windows": (1, 2, None, None)}, "layer_windows: found .* expected one window size"),
        (
            {"architecture": "MistralForCausalLM", "qk_norm": False, "layer_windows": (None, 2, 2, 2)},
            "expected the same window in every layer",
        ),
        (
            {"architecture": "LlamaForCausalLM", "qk_norm": False, "layer_windows": (2, 2, 2, 2)},
            "expected full attention in every layer",
        ),
    ],
)
def test_what_an_architecture_cannot_express_is_not_written(changes, message):
    with pytest.raises(UserError, match=message):
        config_to_hf(dataclasses.replace(config_from_hf(SMALL), **changes))
