"""Model folders: saved, loaded, and damaged in every way we could think of."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
import safetensors.numpy

from jaxstack.models import LoraWeights
from jaxstack.models.checkpoint import load_decoder, save_decoder
from jaxstack.models.hf_names import flat_params, hf_module, hf_tensors
from jaxstack.models.safetensors_file import read_header
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.runtime.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "decoder"


@pytest.fixture
def folder(tmp_path):
    """A copy of a small checkpoint (float32, tied) to be damaged."""
    return Path(shutil.copytree(GOLDEN / "qwen3_tied", tmp_path / "model"))


@pytest.fixture(scope="module")
def decoder():
    return load_decoder(GOLDEN / "qwen3_tied")


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(a, b):
    a, b = flat_params(a), flat_params(b)
    return a.keys() == b.keys() and all((np.asarray(a[path]) == np.asarray(b[path])).all() for path in a)


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        load_decoder(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names():
    assert hf_module(("layers", "mlp", "up_proj"), 3) == "model.layers.3.mlp.up_proj"
    assert hf_module(("lm_head",), None) == "lm_head"


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_the_name_map_is_the_file_of_transformers(name):
    config = load_decoder(GOLDEN / name).config
    stored = read_header(GOLDEN / name / "model.safetensors")
    assert {t.name: t.shape for t in hf_tensors(config)} == {n: t.shape for n, t in stored.items()}


def test_source_dtypes_become_the_chosen_one():
    for name, stored in (("qwen3_tied", "float32"), ("llama3", "bfloat16"), ("llama_linear", "float16")):
        own = load_decoder(GOLDEN / name, param_dtype=None)
        assert {str(x.dtype) for x in flat_params(own).values()} == {stored}
        wide = load_decoder(GOLDEN / name, param_dtype=jnp.float32)
        assert {str(x.dtype) for x in flat_params(wide).values()} == {"float32"}
        assert same(own, wide)  # every narrower number is a float32 number


def test_shards_round_trip_bit_for_bit(decoder, tmp_path):
    save_decoder(decoder, tmp_path / "one")
    save_decoder(decoder, tmp_path / "many", max_shard_bytes=20_000)
    assert contents(tmp_path / "one") == ["config.json", "generation_config.json", "model.safetensors"]
    shards = [name for name in contents(tmp_path / "many") if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    total = sum(x.nbytes for x in flat_params(decoder).values())
    assert index["metadata"]["total_size"] == total
    assert all(
        sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / "many" / s).values()) <= 20_000 for s in shards
    )
    for saved in ("one", "many"):
        assert same(load_decoder(tmp_path / saved), decoder)


@pytest.mark.parametrize("generation", [4, 5])
def test_the_text_model_of_a_multimodal_folder(tmp_path, generation):
    text = load_decoder(GOLDEN / "gemma3")
    folder = Path(shutil.copytree(GOLDEN / "gemma3", tmp_path / "both"))
    config = json.loads((folder / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (folder / "config.json").write_text(json.dumps(outer))
    prefix = "language_model." if generation == 4 else "model.language_model."
    tensors = {
        prefix + (name if generation == 4 else name.removeprefix("model.")): data
        for name, data in tensors_of(folder).items()
    }
    tower = "vision_tower" if generation == 4 else "model.vision_tower"
    rewrite(folder, tensors | {f"{tower}.patches.weight": np.zeros((3, 3), np.float32)})
    assert same(load_decoder(folder), text)
    rewrite(folder, tensors | {f"{prefix}extra.weight": np.zeros(3, np.float32)})
    assert "extra tensor model.extra.weight" in refusal(folder)


def test_tied_weights_are_written_once_and_dtype_is_named(decoder, tmp_path):
    save_decoder(decoder, tmp_path / "half", dtype=jnp.bfloat16)
    stored = read_header(tmp_path / "half" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {t.dtype for t in stored.values()} == {"BF16"}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True


def test_tokenizer_files_and_sampling_defaults_travel(decoder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "notes.md",
    ):
        (source / name).write_text(name)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 77}')
    save_decoder(decoder, tmp_path / "saved", tokenizer_from=source)
    copied = {"tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"}
    assert set(contents(tmp_path / "saved")) == copied | {"config.json", "generation_config.json", "model.safetensors"}
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "tokenizer.json"
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "eos_token_id": 77, "pad_token_id": 0}


def test_saving_over_a_model_replaces_its_weights_and_keeps_the_rest(decoder, folder):
    (folder / "README.md").write_text("about")
    (folder / "extra").mkdir()
    save_decoder(decoder, folder, max_shard_bytes=50_000)
    assert not (folder / "model.safetensors").exists()
    assert {"README.md", "extra", "model.safetensors.index.json"} <= set(contents(folder))
    save_decoder(decoder, folder)
    assert contents(folder) == [
        "README.md",
        "config.json",
        "extra",
        "generation_config.json",
        "logits.npz",
        "model.safetensors",
    ]
    assert contents(folder.parent) == ["model"]  # no temporary folder stays
    assert same(load_decoder(folder), decoder)


def test_a_failed_save_leaves_the_old_model(decoder, folder, monkeypatch):
    before = contents(folder)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxstack.models.checkpoint.write_file", fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        save_decoder(decoder, folder)
    assert contents(folder) == before
    assert contents(folder.parent) == ["model"]


def test_folders_that_are_no_models_are_left_alone(decoder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    (tmp_path / "file").write_text("")
    for name in ("photos", "file"):
        with pytest.raises(UserError, match="found something that is not a model folder"):
            save_decoder(decoder, tmp_path / name)
    with pytest.raises(UserError, match=r"tokenizer_from: .*nowhere: no such folder"):
        save_decoder(decoder, tmp_path / "new", tokenizer_from=tmp_path / "nowhere")
    with pytest.raises(UserError, match="dtype: found"):
        save_decoder(decoder, tmp_path / "new", dtype=jnp.int8)
    assert contents(tmp_path) == ["file", "photos"]


def test_decoders_that_are_not_plain_are_not_saved(tmp_path):
    decoder = load_decoder(GOLDEN / "llama3")
    with pytest.raises(UserError, match="rearranged for serving; save the one it was made from"):
        save_decoder(fuse_for_serving(decoder, pack=False), tmp_path / "x")
    layers, width, _ = decoder.layers.self_attn.q_proj.kernel.get_value().shape
    decoder.layers.self_attn.q_proj.lora = LoraWeights(
        jnp.zeros((layers, 2, width, 1)), jnp.zeros((layers, 2, 1, width)), jnp.ones((layers, 2))
    )
    with pytest.raises(UserError, match="carries LoRA adapters; merge them first, or save them as an adapter folder"):
        save_decoder(decoder, tmp_path / "x")


def test_missing_extra_and_misshapen_tensors(folder):
    tensors = tensors_of(folder)
    name = "model.layers.1.self_attn.k_norm.weight"
    rewrite(folder, {k: v for k, v in tensors.items() if k != name})
    assert f"missing tensor {name}, expected shape (12,)" in refusal(folder)
    rewrite(folder, {k: v for k, v in tensors.items() if "layers.1" not in k})
    assert "missing tensor model.layers.1." in refusal(folder)
    assert " and 14 more, expected shape" in refusal(folder)
    rewrite(folder, tensors | {"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32)})
    assert "extra tensor model.layers.2.mlp.up_proj.weight of shape (48, 32), expected none" in refusal(folder)
    rewrite(folder, tensors | {name: np.zeros(11, np.float32)})
    assert f"misshapen tensor {name}: found (11,), expected (12,)" in refusal(folder)
    rewrite(folder, tensors | {name: np.zeros(12, np.int32)})
    assert f"{name}: found dtype I32, expected one of" in refusal(folder)


def test_harmless_extras_are_ignored(folder, decoder):
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
        "lm_head.weight": np.zeros((97, 32), np.float32),  # tied: some old files hold it all the same
    }
    rewrite(folder, tensors_of(folder) | extras)
    assert same(load_decoder(folder), decoder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(folder, value):
    tensors = tensors_of(folder)
    tensors["model.norm.weight"][3] = value
    rewrite(folder, tensors)
    assert "model.norm.weight: holds NaN or infinite values as float32" in refusal(folder)


def test_weights_that_overflow_the_chosen_dtype(folder):
    tensors = tensors_of(folder)
    tensors["model.norm.weight"][3] = 1e6
    rewrite(folder, tensors)
    assert "model.norm.weight: holds NaN or infinite values as float16" in refusal(folder, param_dtype=jnp.float16)


def test_folders_without_loadable_weights(folder, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "found no weights, expected model.safetensors or model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "found pytorch_model.bin, a pickle, which can run code; expected model.safetensors" in refusal(folder)
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors: no such file" in refusal(folder)


def sharded(folder, weight_map=None):
    """The folder's weights as one shard with an index."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    if weight_map is None:
        names = read_header(folder / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/../../x", "..", "", ".\\..\\x", "a\0b", "missing.safetensors"]
)
def test_an_index_cannot_leave_its_folder(folder, name):
    (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    weight_map = sharded(folder)
    weight_map["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    message = refusal(folder)
    assert ("expected one inside the folder" in message) or ("no such file, named by" in message)


def test_links_may_not_leave_the_folder_except_into_the_hub_cache(folder, tmp_path, decoder):
    weights = (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(weights)
    assert "a link to" in refusal(folder)
    assert "expected a file inside the folder" in refusal(folder)

    hub = tmp_path / "models--org--name"
    (hub / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(GOLDEN / "qwen3_tied", hub / "snapshots" / "abc"))
    (snapshot / "model.safetensors").rename(hub / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert same(load_decoder(snapshot), decoder)


def test_an_index_that_is_wrong(folder):
    weight_map = sharded(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map | {"model.ghost": "model-00001-of-00001.safetensors"}}))
    assert "missing tensor model.ghost, which model.safetensors.index.json places in it" in refusal(folder)
    for bad in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(bad))
        assert "weight_map: expected an object of tensor names to file names" in refusal(folder)
    index.write_text("{")
    assert "not readable as JSON" in refusal(folder)


def test_memory_is_checked_before_anything_is_read(folder, monkeypatch):
    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    monkeypatch.setattr("jaxstack.models.safetensors_file.np.fromfile", lambda *_, **__: pytest.fail("was read"))
    assert "needs 0.00 GB of memory, found 0.00 GB available" in refusal(folder)


def test_a_config_that_promises_more_than_the_file_holds(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**31 - 1}))
    assert "misshapen tensor model.embed_tokens.weight: found (97, 32), expected (2147483647, 32)" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 512, "layer_types": None}))
    assert "missing tensor model.layers.2.input_layernorm.weight" in refusal(folder)


def test_a_good_folder_loads_after_all_this(folder, decoder):
    assert same(load_decoder(folder), decoder)
