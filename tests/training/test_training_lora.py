"""Adapters: which layers they reach, several at once, merging, and PEFT's folders and numbers."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny_decoder import CONFIG, batch, decoder

from jaxstack.models import LoraParam, dense_attention, lora
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.hf_names import hf_tensors
from jaxstack.models.peft_format import load_adapters, read_peft, save_peft
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import Example
from jaxstack.training.losses import cross_entropy
from jaxstack.training.step import decoder_loss, loss_gradients, split_model

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTER = GOLDEN / "training" / "adapter"
DORA = GOLDEN / "training" / "dora_adapter"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    arrays = {}
    for name in ("gradients", "dora"):
        with np.load(GOLDEN / "training" / f"{name}.npz") as found:
            arrays |= dict(found)
    return arrays


def qwen2():
    return load_decoder(GOLDEN / "decoder" / "qwen2", progress=False)


def golden_batch() -> dict:
    items = [Example(golden()[f"ids_{i}"].astype(np.int32), golden()[f"mask_{i}"].astype(bool)) for i in range(3)]
    return batch(items, [[0, 1], [2]], 32)


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def loss_and_gradients(model, trainable):
    split, params, frozen = split_model(model, trainable)
    run = jax.jit(lambda p: loss_gradients(split, decoder_loss(cross_entropy), p, frozen, golden_batch()))
    parts, grads = run(params)
    return float(parts.num / parts.den), grads


def test_loss_and_every_gradient_equal_transformers():
    model = qwen2()
    loss, grads = loss_and_gradients(model, nnx.Param)
    assert loss == pytest.approx(float(golden()["loss"]), rel=1e-5)
    checked = 0
    for tensor in hf_tensors(model.config):
        ours = tensor.assemble({piece.path: np.asarray(grads[".".join(piece.path)]) for piece in tensor.pieces})
        assert relative(ours, golden()[f"grad/{tensor.name}"]) < 1e-4, tensor.name
        checked += 1
    assert checked == sum(name.startswith("grad/") for name in golden())


@pytest.mark.parametrize(("kind", "folder", "arrays"), [("lora", ADAPTER, 18), ("dora", DORA, 21)])
def test_loss_and_gradients_of_an_adapter_equal_peft(kind, folder, arrays):
    model = qwen2()
    (adapter,) = load_adapters(model, [folder])
    loss, grads = loss_and_gradients(model, LoraParam)
    assert loss == pytest.approx(float(golden()[f"{kind}_loss"]), rel=1e-5)
    checked = 0
    for site in lora.sites(model):
        magnitudes = grads.get(".".join((*site.path, "lora", "magnitude")))
        for layer, module in enumerate(site.modules):
            if module not in adapter.factors:
                assert magnitudes is None or not np.asarray(magnitudes[layer]).any()
                continue
            if magnitudes is not None:
                expected = golden()[f"dora_grad/base_model.model.{module}.lora_magnitude_vector.weight"]
                assert relative(magnitudes[layer, 1], expected) < 1e-4, module
                assert not np.asarray(magnitudes[layer, 0]).any()
                checked += 1
            rank = adapter.config.rank_of(module)
            for name, factor in (("A", "a"), ("B", "b")):
                ours = np.asarray(grads[".".join((*site.path, "lora", factor))][layer, 1])
                used, padding = (ours[:, :rank], ours[:, rank:]) if name == "A" else (ours[:rank], ours[rank:])
                expected = golden()[f"{kind}_grad/base_model.model.{module}.lora_{name}.weight"]
                assert relative(used.T, expected) < 1e-4, (module, name)
                assert not padding.any()
                checked += 1
    assert checked == sum(name.startswith(f"{kind}_grad/") for name in golden()) == arrays


def forward(model, tokens, adapter_ids=None):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, adapter_ids):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)
        return nnx.merge(graphdef, state)(tokens, positions, dense_attention(), adapter_ids=adapter_ids)[0]

    return np.asarray(run(state, jnp.asarray(tokens), adapter_ids))


@pytest.mark.parametrize(("kind", "folder"), [("lora", ADAPTER), ("dora", DORA)])
def test_peft_folder_round_trip_is_bit_identical_and_merging_gives_peft_logits(tmp_path, kind, folder):
    model = qwen2()
    (adapter,) = load_adapters(model, [folder])
    patterns = {"lora": {"v_proj": 2, "layers.1.mlp.down_proj": 5}, "dora": {"o_proj": 2}}
    assert dict(adapter.config.rank_pattern) == patterns[kind]
    assert (adapter.config.use_rslora, adapter.config.use_dora) == (kind == "lora", kind == "dora")
    save_peft(model, tmp_path / "again", adapter.config, dtype=adapter.dtype, settings=adapter.settings)
    ours, theirs = (safetensors.numpy.load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name
    written, read = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "again", folder))
    assert {k: sorted(v) if k == "target_modules" else v for k, v in written.items()} == {
        k: sorted(v) if k == "target_modules" else v for k, v in read.items()
    }
    ids = golden()["ids_0"].astype(np.int32)
    np.testing.assert_allclose(forward(model, ids), golden()[f"{kind}_logits"], atol=1e-4)
    merged = lora.merge(model)
    assert not jax.tree.leaves(nnx.state(merged, LoraParam)) and jax.tree.leaves(nnx.state(model, LoraParam))
    np.testing.assert_allclose(forward(merged, ids), golden()[f"{kind}_logits"], atol=1e-4)


def test_a_fresh_adapter_changes_nothing_and_every_site_is_adapted():
    model = decoder()
    tokens = np.arange(12, dtype=np.int32)[None]
    before = forward(model, tokens)
    matched = lora.attach(model, lora.LoraConfig(r=2), seed=3)
    assert matched == {
        f"layers.{name}": 2
        for name in (
            *(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
        )
    }  # fmt: skip
    graphdef, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))

    @jax.jit
    def logits(b):
        new = {p: v.replace(b[p]) if p in b else v for p, v in flat.items()}
        merged = nnx.merge(graphdef, nnx.from_flat_state(new))
        return merged(jnp.asarray(tokens), jnp.arange(12)[None], dense_attention())[0]

    factors = {p: v.get_value() for p, v in flat.items() if p[-1] == "b"}
    assert len(factors) == 7
    np.testing.assert_allclose(logits(factors), before, atol=1e-5)
    before = np.asarray(logits(factors))
    a = flat[("layers", "mlp", "up_proj", "lora", "a")].get_value()
    assert not a[:, 0].any() and float(jnp.abs(a[:, 1]).max()) <= 1 / np.sqrt(CONFIG.hidden_size)
    # Each B by itself, in each layer: a call path that went round the adapter would leave the logits as they were.
    for path, b in factors.items():
        for layer in range(CONFIG.num_layers):
            moved = logits({**factors, path: b.at[layer, 1].set(1.0)})
            assert np.abs(np.asarray(moved) - before).max() > 1e-4, (path, layer)
            unused = logits({**factors, path: b.at[layer, 0].set(1.0)})
            np.testing.assert_array_equal(unused, before)


def test_a_fresh_dora_changes_nothing_and_its_magnitudes_scale_columns():
    """Closed form: magnitudes of c times the norms make every targeted product c times as large."""
    model = decoder()
    tokens = np.arange(12, dtype=np.int32)[None]
    before = forward(model, tokens)
    config = lora.LoraConfig(r=2, targets=("v_proj", "lm_head"), use_dora=True)
    lora.attach(model, config)
    np.testing.assert_allclose(forward(model, tokens), before, atol=1e-5)
    factors = lora.adapter_factors(model, config)
    doubled = {m: dataclasses.replace(f, magnitude=2 * f.magnitude) for m, f in factors.items() if m == "lm_head"}
    lora.set_adapters(model, [factors | doubled])
    np.testing.assert_allclose(forward(model, tokens), 2 * before, atol=2e-5)
    zeros = jnp.zeros(tokens.shape, jnp.int32)
    np.testing.assert_allclose(forward(model, tokens, zeros), before, atol=1e-5)
    np.testing.assert_allclose(forward(lora.merge(model), tokens), 2 * before, atol=2e-5)


def test_the_heads_adapter_follows_adapter_ids_in_the_loss_too():
    model, plain = decoder(), decoder()
    config = lora.LoraConfig(r=2, targets=("lm_head",))
    lora.attach(model, config)
    (name, factors), *_ = lora.adapter_factors(model, config).items()
    lora.set_adapters(model, [{name: dataclasses.replace(factors, b=np.eye(2, 61, dtype=np.float32))}])
    data = batch([Example(np.arange(9, dtype=np.int32), np.arange(9) > 2)], [[0]], 16)
    split, params, frozen = split_model(model, LoraParam)
    nothing, one = (
        {**data, "adapter_ids": jnp.full(data["token_ids"].shape, adapter, jnp.int32)} for adapter in (0, 1)
    )
    losses = [
        decoder_loss(cross_entropy, **options)
        for options in ({}, {"chunk_tokens": 5}, {"most_targets": 8, "unroll": True})
    ]
    run = jax.jit(lambda batch: [loss(split.merge(params, frozen), batch).num for loss in losses])
    graphdef, state = nnx.split(plain)
    expected = jax.jit(lambda state: losses[0](nnx.merge(graphdef, state), data).num)(state)
    np.testing.assert_allclose(run(nothing), [expected] * 3, rtol=1e-5)
    adapted = np.asarray(run(one))
    np.testing.assert_allclose(adapted, adapted[0], rtol=1e-5)
    assert abs(adapted[0] - expected) > 1e-2


def test_three_adapters_in_one_batch_equal_three_separate_runs(tmp_path):
    rng = np.random.default_rng(0)
    folders = []
    for number, config in enumerate(
        (
            lora.LoraConfig(r=2),
            lora.LoraConfig(r=4, alpha=3.0, targets=("q_proj", "up_proj")),
            lora.LoraConfig(r=3, use_rslora=True, use_dora=True),
        )
    ):
        model = decoder()
        lora.attach(model, config, seed=number)
        factors = {
            m: dataclasses.replace(f, b=rng.normal(size=f.b.shape).astype(np.float32))
            for m, f in lora.adapter_factors(model, config).items()
        }
        if config.use_dora:
            assert all(f.magnitude is not None for f in factors.values())
            factors = {m: dataclasses.replace(f, magnitude=1.5 * f.magnitude) for m, f in factors.items()}
        lora.set_adapters(model, [factors])
        folders.append(tmp_path / str(number))
        save_peft(model, folders[-1], config)
    tokens = rng.integers(0, CONFIG.vocab_size, (4, 10)).astype(np.int32)
    together = decoder()
    load_adapters(together, folders)
    ids = jnp.broadcast_to(jnp.array([[2], [0], [3], [1]]), tokens.shape)
    found = forward(together, tokens, ids)
    for row, number in enumerate((1, None, 2, 0)):
        alone = decoder()
        if number is not None:
            load_adapters(alone, [folders[number]])
        np.testing.assert_allclose(found[row], forward(alone, tokens)[row], atol=1e-4)


MLP = {f"mlp.{name}_proj": 1 for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    "targets,layers",
    [
        (("q_proj",), {"self_attn.q_proj": 2}),
        (("mlp.up_proj", "lm_head"), {"mlp.up_proj": 2, "lm_head": 1}),
        ((r"model\.layers\.1\..*_proj",), {**{f"self_attn.{p}_proj": 1 for p in "qkvo"}, **MLP}),
    ],
)  # fmt: skip
def test_targets(targets, layers):
    model = decoder()
    matched = lora.attach(model, lora.LoraConfig(r=2, targets=targets))
    assert {name.removeprefix("layers."): n for name, n in matched.items()} == layers
    for site in lora.sites(model):
        present = site.linear.lora is not None
        assert present == (".".join(site.path).removeprefix("layers.") in layers)
        if present and site.stacked:
            a = site.linear.lora.a.get_value()
            used = [bool(a[layer, 1].any()) for layer in range(2)]
            assert sum(used) == layers[".".join(site.path[1:])]


BAD_TARGETS = [
    ({"targets": ("query",)}, r"'query' matches no module; the model has lm_head, mlp\.down_proj, mlp\.gate_proj"),
    ({"targets": ("q_proj", "nope")}, "'nope' matches no module"),
    ({"targets": ()}, "expected at least one module name"),
    ({"targets": "q_proj"}, "expected a tuple"),
    ({"targets": ("(",)}, "not a regular expression"),
    ({"r": 0}, "lora.r=0: expected an integer of at least 1"),
    ({"alpha": -1.0}, "lora.alpha=-1.0: expected a positive number"),
    ({"rank_pattern": (("q_proj", 0),)}, r"lora.rank_pattern\[q_proj\]=0"),
]


@pytest.mark.parametrize("fields,message", BAD_TARGETS)
def test_bad_lora_configs(fields, message):
    with pytest.raises(UserError, match=message):
        lora.attach(decoder(), lora.LoraConfig(**fields))


def _edit(key, value):
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        settings = json.loads(path.read_text())
        if value is None:
            del settings[key]
        else:
            settings[key] = value
        path.write_text(json.dumps(settings))

    return change


def _tensors(change):
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return apply


def _dora(magnitude):
    """Makes the folder a DoRA of one module with these magnitudes."""

    def apply(folder: Path) -> None:
        keep = [FIRST, FIRST.replace("lora_A", "lora_B")]
        _edit("use_dora", True)(folder)
        _tensors(lambda t: [t.pop(k) for k in list(t) if k not in keep])(folder)
        _tensors(lambda t: t.update({MAGNITUDE: magnitude.astype(np.float32)}))(folder)

    return apply


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MAGNITUDE = FIRST.replace("lora_A.weight", "lora_magnitude_vector")
BAD_FOLDERS = [
    (_edit("peft_type", "IA3"), r'peft_type is "IA3", expected "LORA"'),
    (_edit("peft_type", None), "no peft_type"),
    (_edit("bias", "all"), r'bias is "all", expected "none"'),
    (_edit("modules_to_save", ["lm_head"]), r'modules_to_save is \["lm_head"\], expected null'),
    (_edit("use_qalora", True), "use_qalora is true, a variant that is not supported"),
    (_edit("use_dora", True), "has no lora_magnitude_vector, though adapter_config.json has use_dora=true"),
    (_tensors(lambda t: t.update({MAGNITUDE: t[FIRST][0]})), "has a lora_magnitude_vector, though .* use_dora=false"),
    (_dora(np.ones((1, 32))), r"lora_magnitude_vector has shape \[1, 32\], expected \[32\]"),
    (_dora(np.full(32, np.inf)), "lora_magnitude_vector holds values that are not finite"),
    (_edit("init_lora_weights", "pissa_niter_16"), "init_lora_weights is 'pissa_niter_16'"),
    (_edit("target_modules", 7), "target_modules is 7"),
    (_edit("r", "four"), "lora.r='four'"),
    (_edit("r", 3), r"lora_A has shape \[\d, \d+\], expected rank 3"),
    (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "not readable as JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "found list, expected a JSON object"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "found no weights; expected adapter_model.safetensors"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10" * 40), "not a safetensors file"),
    (_tensors(lambda t: t.pop(FIRST)), "q_proj has lora_B only"),
    (_tensors(lambda t: t.clear()), "holds no tensors"),
    (_tensors(lambda t: t.update({"strange": t[FIRST]})), "tensor 'strange' is unknown"),
    (_tensors(lambda t: t.update({FIRST: t[FIRST] * np.nan})), "holds values that are not finite"),
    (
        _tensors(lambda t: t.update({k.replace("q_proj", "x_proj"): t.pop(k) for k in list(t) if "q_proj" in k})),
        r"adapts 'model\.layers\.0\.self_attn\.x_proj', which the model has not",
    ),
    (
        _tensors(lambda t: t.update({FIRST: np.ones((4, 9), np.float32)})),
        r"adapts model\.layers\.0\.self_attn\.q_proj from 9 to 32 features, expected 32 to 32",
    ),
]


@pytest.fixture(scope="module")
def base():
    return qwen2()


@pytest.mark.parametrize("number", range(len(BAD_FOLDERS)))
def test_bad_adapter_folders_get_one_line(tmp_path, base, number):
    change, message = BAD_FOLDERS[number]
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTER, folder)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_adapters(base, [folder])
    assert "\n" not in str(error.value)


def test_bfloat16_adapters_keep_their_bits(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTER, folder)
    import ml_dtypes

    _tensors(lambda t: t.update({k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()}))(folder)
    model = qwen2()
    (adapter,) = load_adapters(model, [folder])
    save_peft(model, tmp_path / "again", adapter.config, dtype=adapter.dtype, settings=adapter.settings)
    assert (tmp_path / "again" / "adapter_model.safetensors").stat().st_size < 20_000
    ours, theirs = read_peft(tmp_path / "again"), read_peft(folder)
    assert ours.dtype == theirs.dtype == ml_dtypes.bfloat16
    for module, factors in theirs.factors.items():
        np.testing.assert_array_equal(ours.factors[module].a, factors.a)
        np.testing.assert_array_equal(ours.factors[module].b, factors.b)
